import re
from dataclasses import replace
from pathlib import Path

import pytest

from stages.errors import OptionError
from stages.quantization.plan.plan_file import PlannedSite, plan_text, read_plan, spec_of, write_plan
from stages.records.formats import PerBlock, PerChannel, QuantSpec
from tests.stages.quantization.search.problems import site

SITES = [site(name, 8, 32) for name in ("/model/layers.0/attn/q_proj/MatMul", 'odd "name" \\ #', "/lm_head/MatMul")]
PLANNED = {
    SITES[0].name: PlannedSite(format="4b32", loss=1.25e-05, why="others: 8b128 1e-07"),
    SITES[1].name: PlannedSite(format="8ch", loss=3.0),
    SITES[2].name: PlannedSite(format="keep", why='"quoted"'),
}


def _write(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    write_plan(path, text)
    return path


def _edited(folder: Path, old: str, new: str) -> Path:
    text = plan_text(PLANNED)
    assert old in text
    return _write(folder, text.replace(old, new))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = _write(tmp_path, plan_text(PLANNED, ["a note"]))
    assert read_plan(path, SITES) == PLANNED
    assert path.read_text(encoding="utf-8").startswith("# a note\n")


def test_every_site_has_one_line_that_names_its_format() -> None:
    lines = [line for line in plan_text(PLANNED).splitlines() if "format = " in line]
    assert len(lines) == len(SITES)
    assert lines[0].startswith('"/model/layers.0/attn/q_proj/MatMul" = { format = "4b32", loss = 1.25e-05')


def test_an_edited_format_is_obeyed_and_loss_and_why_may_go(tmp_path: Path) -> None:
    path = _edited(tmp_path, ' format = "4b32", loss = 1.25e-05, why = "others: 8b128 1e-07" ', ' format = "8b64" ')
    assert read_plan(path, SITES)[SITES[0].name] == PlannedSite(format="8b64")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"4b32"', '"4b33"', r"plan\.toml, line 5: the format of '/model/layers\.0/attn/q_proj/MatMul' is '4b33'"),
        ('"4b32"', '"int4"', r"line 5: the format .* is 'int4'.*4b32, 4b32z, 8b128, 8ch, keep"),
        ('"4b32"', '"4b512"', r"line 5: the format .* is '4b512'.*16 to 256"),
        ('"4b32"', '"keepz"', r"line 5: the format .* is 'keepz'"),
        ('"4b32"', '"4ch"', r"line 5: the format .* is '4ch'"),
        ("loss = 3.0", 'loss = "much"', r"line 6: the loss of .* is 'much'"),
        ("loss = 3.0", "los = 3.0", r"line 6: the los of .* is 3.0"),
        ('format = "keep", ', "", r"line 7: the format of '/lm_head/MatMul' is 'missing'"),
        ('"4b32"', "4b32", r"is not valid TOML: .*line 5"),
        ("layers.0", "layers.9", r"line 5: the model has no site '/model/layers\.9.*nearest name is '/model/layers\.0"),
        ("[sites]", "[layers]", r"must hold one table, \[sites\]"),
    ],
)
def test_a_line_that_can_not_be_used_is_named_with_its_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = _edited(tmp_path, old, new)
    with pytest.raises(OptionError, match=message) as caught:
        read_plan(path, SITES)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_site_that_is_left_out_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path, plan_text({SITES[1].name: PLANNED[SITES[1].name]}))
    with pytest.raises(OptionError, match=r"says nothing about '/model/layers\.0.* and 1 more; add a line"):
        read_plan(path, SITES)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=re.escape(f"--plan {tmp_path / 'none.toml'} can't be read")):
        read_plan(tmp_path / "none.toml", SITES)


@pytest.mark.parametrize(
    ("label", "bits", "granularity"),
    [("4b32", 4, PerBlock(block_size=32)), ("8b128", 8, PerBlock(block_size=128)), ("8ch", 8, PerChannel())],
)
def test_a_format_means_the_spec_that_tables_call_so(label: str, bits: int, granularity: PerBlock | PerChannel) -> None:
    symmetric = QuantSpec(bits=bits, symmetric=True, granularity=granularity, scale_dtype="float32")
    with_zero_points = replace(symmetric, symmetric=False)
    for spec in (symmetric, with_zero_points):
        planned = PlannedSite(format=spec.label)
        assert spec_of(planned, SITES[0], zero_point=None) == spec
        assert spec_of(planned, SITES[0], zero_point=True) == with_zero_points
        assert spec_of(planned, SITES[0], zero_point=False) == symmetric
    assert (symmetric.label, with_zero_points.label) == (label, f"{label}z")


def test_a_site_that_stays_has_no_spec() -> None:
    assert spec_of(PlannedSite(format="keep"), SITES[0], zero_point=True) is None
