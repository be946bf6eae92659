"""Every architecture of the support matrix goes the whole way: build, calibrate, quantize, export, run, generate.

Tiny random models with each family's own configuration; what released weights lose is scripts.evaluate's to say. With
SUPPORT_MATRIX_OUT=FILE each family adds the line that scripts.support_matrix makes its table from.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime_genai as og
import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console
from transformers import AutoModelForCausalLM

from export.fold import FoldOutcome
from export.rewrite import rewrite
from scripts.support_matrix import FamilyResult
from stages.base_graph import load_graph
from stages.calibrate import calibrate
from stages.config import CalibrateConfig, QuantizeConfig
from stages.model_directory import ModelDirectory, locate_model
from stages.quantize import quantize
from stages.quantized_store import QuantizedStore, open_store
from stages.records import QuantizedWeight, WeightLayout
from stages.session import CausalFeeds, SessionSettings, open_session
from tests.families import FAMILIES, Family, build_in_process, save_random_model

# Longer than the sliding windows of 16.
TOKENS = np.arange(40).reshape(1, 40) * 7 % 300
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Finished:
    """One family's model on the whole way."""

    family: Family
    source: Path
    base: ModelDirectory
    output: ModelDirectory
    store: QuantizedStore
    folds: tuple[FoldOutcome, ...]


def go_the_whole_way(family: Family, folder: Path, text: Path, tokenizer: Path, *build: str) -> Finished:
    """Build (fp32 for the CPU where ``build`` names nothing else), calibrate, quantize, export and verify."""
    save_random_model(family.config(), folder / "hf", tokenizer)
    build_in_process(folder / "hf", folder / "base", *build)
    console = Console(quiet=True)
    calibrate(
        CalibrateConfig(onnx_path=folder / "base", dataset=str(text), calib_size=12, seq_len=64, batch_size=4), console
    )
    quantize(
        QuantizeConfig(onnx_path=folder / "base", output_path=folder / "int4", block_size=BLOCK_SIZE, accuracy_level=1),
        console,
    )
    base, store = locate_model(folder / "base"), open_store(folder / "int4.weights")
    folds = rewrite(load_graph(base), store).folds
    return Finished(family, folder / "hf", base, locate_model(folder / "int4"), store, folds)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def finished(request, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path, tiny_text: Path) -> Finished:
    """Each family in turn, as the command lines treat it by default."""
    return go_the_whole_way(request.param, tmp_path_factory.mktemp("family"), tiny_text, tiny_tokenizer)


def test_the_base_model_computes_what_transformers_does(finished: Finished) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished.source, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(TOKENS)).logits.numpy()
    # Two layers of float32 sums in another order; a rotation, cap or window that is off gives more than 1e-2.
    assert _difference(_logits(finished.base), expected) < 1e-5


def test_every_site_runs_fused(finished: Finished) -> None:
    report = json.loads((finished.store.folder / "verification.json").read_text())
    assert report["unfused"] == []
    assert report["fused"] == report["sites"] == finished.family.sites
    assert finished.store.recipe.kept == (("/lm_head/MatMul", "--exclude lm_head"),)


def test_input_scales_go_where_they_cost_least(finished: Finished) -> None:
    found: dict[str, set[str]] = {}
    for outcome in finished.folds:
        found.setdefault(_kind(outcome), set()).add(outcome.how)
    # The search may find that no scale is best, in one of the layers.
    assert {kind: hows - {"none"} for kind, hows in found.items()} == {
        kind: {how} for kind, how in finished.family.folds.items()
    }
    for outcome in finished.folds:
        assert (outcome.how == "mul") == bool(outcome.reason)
        assert finished.family.reason in outcome.reason or outcome.how != "mul"


def test_folding_and_packing_change_nothing(finished: Finished) -> None:
    """The base graph with the dequantized weights in it knows no fold: norms, gains and other layers are untouched."""
    # Each fold rounds twice in float32.
    assert _difference(_logits(finished.output), _logits_with_stored_weights(finished)) < 1e-5


def test_logits_stay_near_the_bases(finished: Finished) -> None:
    # INT4 rounding of random weights costs some percent a layer; codes in a wrong place give 1 and more.
    assert _difference(_logits(finished.output), _logits(finished.base)) < 0.4


def test_the_runtime_generates_the_greedy_continuation(finished: Finished) -> None:
    prompt = [int(token) for token in TOKENS[0, :20]]
    sequence = _generate(finished.output, prompt, 28)
    assert sequence[:20] == prompt
    assert len(sequence) == 28
    # The first token follows from the same logits that plain ONNX Runtime gives; </s> was forbidden.
    logits = _logits(finished.output, TOKENS[:, :20])[0, -1]
    logits[1] = -np.inf
    assert sequence[20] == int(logits.argmax())


@pytest.mark.parametrize(
    ("name", "execution_provider", "o_proj"),
    [
        # Norms written out in small nodes and in float32, with a Cast before each MatMul.
        ("gemma-2", "trt-rtx", "value"),
        # MultiHeadAttention in place of GroupQueryAttention.
        ("llama-3.1", "cpu", "mul"),
    ],
)
def test_half_precision_graphs_of_other_shapes(
    name: str, execution_provider: str, o_proj: str, tmp_path: Path, tiny_text: Path, tiny_tokenizer: Path
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    finished = go_the_whole_way(family, tmp_path, tiny_text, tiny_tokenizer, "fp16", execution_provider)
    expected = dict(family.folds) | {"o_proj": o_proj}
    expected["q_proj"] = expected["qkv_proj"]
    for outcome in finished.folds:
        assert outcome.how in ("none", expected[_kind(outcome)]), outcome
    # Activations of two layers are rounded to half precision, 5e-4 each time, at other places.
    assert _difference(_logits(finished.output), _logits_with_stored_weights(finished)) < 5e-3
    assert _difference(_logits(finished.output), _logits(finished.base)) < 0.4


def test_the_support_matrix_gets_its_line(finished: Finished, tmp_path: Path) -> None:
    wanted = os.environ.get("SUPPORT_MATRIX_OUT")
    path = Path(wanted) if wanted else tmp_path / "results.jsonl"
    adapter = TypeAdapter(FamilyResult)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(adapter.dump_json(_result(finished)).decode() + "\n")
    last = adapter.validate_json(path.read_text(encoding="utf-8").splitlines()[-1])
    assert last.fused == last.sites == finished.family.sites


# --------------------------------------------------------------------------- measuring


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _kind(outcome: FoldOutcome) -> str:
    """The first reader's own name: /model/layers.0/attn/o_proj/MatMul -> o_proj."""
    return outcome.sites[0].split("/")[-2]


def _logits(directory: ModelDirectory, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return _run(directory.onnx_file, directory, tokens)


def _run(model: Path | bytes, directory: ModelDirectory, tokens: np.ndarray) -> np.ndarray:
    session = open_session(model, SessionSettings(external_data_folder=directory.folder, accuracy_level=1))
    feeds = CausalFeeds(session, directory.kv_heads, directory.head_size, directory.windowed_caches)
    logits: np.ndarray = session.run(["logits"], feeds(tokens))[0]
    return logits


def _logits_with_stored_weights(finished: Finished) -> np.ndarray:
    model = load_graph(finished.base)
    for index, group in enumerate(finished.store.recipe.groups):
        for site in group.sites:
            assert site.layout is WeightLayout.K_BY_N
            weight = _dequantized(finished.store.read(index, site)).T
            model.graph.initializers[site.weight].const_value = ir.tensor(weight.astype(site.dtype))
    return _run(ir.to_proto(model).SerializeToString(), finished.base, TOKENS)


def _dequantized(weight: QuantizedWeight) -> np.ndarray:
    """[N, K] float32: (code - zero point) * block scale / input scale, from what was stored."""
    codes, scales = weight.codes.double().numpy(), weight.scales.double().numpy()
    assert weight.zero_points is None
    matrix = codes * np.repeat(scales, BLOCK_SIZE, axis=1)
    if weight.input_scale is not None:
        matrix /= weight.input_scale.double().numpy()
    return matrix.astype(np.float32)


def _generate(directory: ModelDirectory, prompt: list[int], length: int) -> list[int]:
    model = og.Model(str(directory.folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def _result(finished: Finished) -> FamilyResult:
    report = json.loads((finished.store.folder / "verification.json").read_text())
    family, ours = finished.family, _logits(finished.output)
    return FamilyResult(
        name=family.name,
        models=family.models,
        architecture=type(family.config()).__name__.removesuffix("Config"),
        peculiar=family.peculiar,
        sites=report["sites"],
        fused=report["fused"],
        folds=dict(Counter(outcome.how for outcome in finished.folds)),
        reasons=tuple(sorted({outcome.reason for outcome in finished.folds if outcome.reason})),
        against_own_weights=_difference(ours, _logits_with_stored_weights(finished)),
        against_base=_difference(ours, _logits(finished.base)),
    )
