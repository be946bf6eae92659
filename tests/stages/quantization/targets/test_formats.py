from dataclasses import replace

from stages.quantization.targets.formats import ModelFacts, facts_of
from stages.records.formats import EmbeddingTable
from stages.records.sites import ActivationGroup
from tests.stages.quantization.search.problems import site

TABLE = EmbeddingTable(
    weight="table", gathers=("looked up",), vocabulary=300, hidden=40, transposed=False, dtype="float16"
)


def _group(*sites: object) -> ActivationGroup:
    return ActivationGroup(activation="x", in_features=32, sites=sites, absorber=None)


def test_facts_are_those_of_all_sites_and_embeddings() -> None:
    one, wide = site("one", 8, 32), site("wide", 8, 96)
    groups = (_group(one, replace(one, name="two", dtype="float16")), _group(wide))
    assert facts_of(groups, (TABLE, replace(TABLE, hidden=64))) == ModelFacts(
        dtypes=frozenset({"float32", "float16"}),
        in_features=frozenset({32, 96}),
        has_gemm=False,
        has_lm_head=False,
        embedding_widths=frozenset({40, 64}),
        embedding_bytes=2 * 300 * (40 + 64),
    )
    assert facts_of((_group(one, replace(one, op_type="Gemm")),), ()).has_gemm
    assert facts_of((_group(one, replace(one, name="/lm_head/MatMul")),), ()).has_lm_head
    assert facts_of((_group(replace(one, feeds_logits=True)),), ()).has_lm_head
