"""The drop-in takes ModelOpt-Windows' command lines: every argument, its default, and what it does here."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import tyro

import scripts.drop_in.run
import stages.calibration.text.documents
import stages.calibration.text.tokenizer
import stages.quantize
from scripts.drop_in.calibration_folder import calibration_folder
from scripts.drop_in.run import past_the_end
from scripts.options import DropInConfig
from stages.model.directory import locate_model
from stages.quantization.weights.store import QuantizedStore, open_store
from stages.records.formats import PerBlock, PerChannel
from stages.records.results import SiteReport
from stages.runtime.feeds import CausalFeeds
from stages.runtime.tap import ActivationTap
from tests.support.commands import Commands
from tests.support.written import cache_times, fused_sites

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--calib_size", 4, "--seq_len", 16, "--block_size", 16)
TOKENS = np.arange(40).reshape(1, 40) * 7 % 300


# --------------------------------------------------------------------------- names, spellings, defaults


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of the reference: its default there and here, and a value that its users pass."""

    name: str
    theirs: object
    ours: object
    given: object
    because: str = ""
    """Why the default differs."""


REQUIRED = "required"
REFERENCE = (
    Argument(name="model_name", theirs=REQUIRED, ours=None, given="a/b", because="the base folder holds a tokenizer"),
    Argument(name="onnx_path", theirs=REQUIRED, ours=REQUIRED, given=Path("m.onnx")),
    Argument(name="output_path", theirs=REQUIRED, ours=REQUIRED, given=Path("o.onnx")),
    Argument(
        name="device", theirs="cpu", ours="auto", given="cpu", because="there it only holds tokens, here it works"
    ),
    Argument(name="algo", theirs="awq_lite", ours="awq_lite", given="awq_clip"),
    Argument(name="dataset", theirs="cnn", ours="cnn", given="pilevel"),
    # Their documentation says 128, their script 32.
    Argument(name="calib_size", theirs=128, ours=128, given=32),
    Argument(name="batch_size", theirs=1, ours=1, given=2),
    Argument(name="use_fp32", theirs=False, ours=False, given=True),
    Argument(name="awqlite_alpha_step", theirs=0.1, ours=0.1, given=0.05),
    Argument(name="awqlite_run_per_subgraph", theirs=False, ours=False, given=True),
    Argument(name="awqlite_disable_fuse_nodes", theirs=False, ours=False, given=True),
    Argument(name="awqclip_alpha_step", theirs=0.05, ours=0.05, given=0.1),
    Argument(name="awqclip_alpha_min", theirs=0.5, ours=0.5, given=0.6),
    Argument(name="awqclip_bsz_col", theirs=1024, ours=1024, given=512),
    Argument(name="block_size", theirs=128, ours=None, given=32, because="128, unless --target runs another best"),
    Argument(name="gather_block_size", theirs=32, ours=None, given=64, because="32, unless --target needs another"),
    Argument(name="gather_quantize_axis", theirs=None, ours=None, given=1),
    Argument(name="use_zero_point", theirs=False, ours=None, given=True, because="as --target likes"),
    Argument(name="no_past_kv_inputs", theirs=False, ours=False, given=True),
    Argument(name="use_buffer_share", theirs=False, ours=False, given=True),
    Argument(name="add_position_ids", theirs=False, ours=False, given=True),
    Argument(name="no_position_ids", theirs=False, ours=False, given=True),
    Argument(name="use_random_calib", theirs=False, ours=False, given=True),
    Argument(name="calibration_eps", theirs="cuda,cpu", ours="cuda,cpu", given="dml,cpu"),
    Argument(name="trust_remote_code", theirs=False, ours=False, given=True),
    Argument(name="enable_mixed_quant", theirs=False, ours=False, given=True),
    Argument(name="layers_8bit", theirs="", ours="", given="layers.0,lm_head"),
    Argument(name="use_column_major", theirs=False, ours=False, given=True),
)
PATHS = ("--onnx_path", "m.onnx", "--output_path", "o.onnx")


def parse(*arguments: str) -> DropInConfig:
    return tyro.cli(DropInConfig, args=list(arguments), use_underscores=True)


@pytest.mark.parametrize("argument", REFERENCE, ids=lambda argument: argument.name)
def test_defaults_are_the_references_or_differ_for_a_reason(argument: Argument) -> None:
    if argument.ours is REQUIRED:
        place = PATHS.index(f"--{argument.name}")
        with pytest.raises(SystemExit):
            parse(*PATHS[:place], *PATHS[place + 2 :])
    else:
        assert getattr(parse(*PATHS), argument.name) == argument.ours
    assert (argument.theirs == argument.ours) == (argument.because == "")


@pytest.mark.parametrize("argument", REFERENCE, ids=lambda argument: argument.name)
def test_every_argument_is_taken_in_each_spelling(argument: Argument) -> None:
    value = str(argument.given)
    for name in (f"--{argument.name}", f"--{argument.name.replace('_', '-')}"):
        for given in ([name],) if argument.given is True else ([f"{name}={value}"], [name, value]):
            assert getattr(parse(*PATHS, *given), argument.name) == argument.given, given


# --------------------------------------------------------------------------- running


@pytest.fixture(autouse=True)
def local_hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> None:
    """Serve the hub's two data sets as local files with the same columns; its models can't be reached."""
    folder = tmp_path_factory.mktemp("hub")
    text = tiny_text.read_text(encoding="utf-8")
    parts = [text[start : start + 2000] for start in range(0, len(text), 2000)]
    files = {
        ("abisee/cnn_dailymail", "3.0.0", "train"): ("cnn.jsonl", "article", {"highlights": "-", "id": "0"}),
        ("mit-han-lab/pile-val-backup", None, "validation"): ("pile.jsonl", "text", {"meta": {"pile_set_name": "x"}}),
    }
    for name, column, others in files.values():
        lines = [json.dumps({column: part} | others) for part in parts]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    original = datasets.load_dataset

    def local(path: str, config: str | None = None, *, split: str, streaming: bool, **others: object) -> object:
        if path == "json":
            return original(path, split=split, streaming=streaming, **others)
        file = folder / files[path, config, split][0]
        return original("json", data_files=str(file), split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(stages.calibration.text.documents, "why_unreachable", lambda *_: None)
    monkeypatch.setattr(
        stages.calibration.text.tokenizer, "why_unreachable", lambda *_: "the hub can't be reached here"
    )


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the tiny model; what is calibrated here lies beside it and serves several tests."""
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("drop-in") / "base"))


@dataclass(frozen=True)
class Made:
    """An output folder, its weights, and what was printed."""

    folder: Path
    printed: str

    @property
    def store(self) -> QuantizedStore:
        return open_store(self.folder.with_name(self.folder.name + ".weights"))

    @property
    def graph(self) -> ir.Graph:
        return ir.load(locate_model(self.folder).onnx_file).graph

    @property
    def reports(self) -> dict[str, SiteReport]:
        return {report.site: report for report in self.store.reports()}

    def nodes(self, op_type: str) -> list[ir.Node]:
        return [node for node in self.graph if node.op_type == op_type]

    def input_scale(self, name: str) -> np.ndarray:
        store = self.store
        index, site = next(
            (index, site)
            for index, group in enumerate(store.recipe.groups)
            for site in group.sites
            if name in site.name
        )
        scale = store.read(index, site).input_scale
        assert scale is not None
        return scale.numpy()


Run = Callable[..., Made]


@pytest.fixture
def run(base: Path, tiny_text: Path, tmp_path: Path, commands: Commands) -> Run:
    """Quantize the tiny model with a little text and the given options; a keyword names the output folder."""

    def quantize(*arguments: object, into: str = "out", onnx_path: Path = base) -> Made:
        output = tmp_path / into
        code, printed = commands.drop_in(
            "--onnx_path", onnx_path / "model.onnx", "--output_path", output / "model.onnx",
            "--dataset", tiny_text, *SMALL, "--verify", "off", *arguments,
        )  # fmt: skip
        assert code == 0, printed
        return Made(output, printed)

    return quantize


@pytest.fixture
def stage_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same, but nothing is searched and exported."""
    monkeypatch.setattr(stages.quantize, "command", lambda _: ())
    return run


def logits(folder: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    directory = locate_model(folder)
    session = ort.InferenceSession(str(directory.onnx_file), options, providers=["CPUExecutionProvider"])
    feeds = CausalFeeds.of(session, directory)
    return np.asarray(session.run(["logits"], feeds(TOKENS))[0], np.float32)


def is_near(folder: Path, base: Path) -> bool:
    # Some percent of weight error a layer; a broken fold or transposed code gives more than 1.
    mine, theirs = logits(folder), logits(base)
    return bool(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs) < 0.4)


def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.drop_in.run, "calibrate", lambda _: pytest.fail("stage one was run"))


# --------------------------------------------------------------------------- the documentation's command lines

STORE = r"E:\model_store\genai\llama3-8b-fp16-dml-genai"
EXAMPLE_LITE = r"""
python quantize.py --model_name=meta-llama/Meta-Llama-3-8B \
                          --onnx_path="E:\model_store\genai\llama3-8b-fp16-dml-genai\opset_21\model.onnx" \
                          --output_path="E:\model_store\genai\llama3-8b-fp16-dml-genai\opset_21\cnn_32_lite_0.1_16\model.onnx" \
                          --calib_size=32 --algo=awq_lite --dataset=cnn
"""  # noqa: E501
MODELS = r"E:\models"
EXAMPLE_MIXED = r"""
python quantize.py --model_name=meta-llama/Meta-Llama-3.2-1B \
                   --onnx_path="E:\models\llama3.2-1b-fp16\model.onnx" \
                   --output_path="E:\models\llama3.2-1b-int4-int8-mixed\model.onnx" \
                   --algo=awq_lite \
                   --calib_size=32 \
                   --enable_mixed_quant
"""
EXAMPLE_LAYERS = r"""
python quantize.py --model_name=meta-llama/Meta-Llama-3.2-1B \
                   --onnx_path="E:\models\llama3.2-1b-fp16\model.onnx" \
                   --output_path="E:\models\llama3.2-1b-int4-int8-custom\model.onnx" \
                   --algo=awq_lite \
                   --calib_size=32 \
                   --layers_8bit="layers.0,layers.1,layers.15,layers.16"
"""


def here(example: str, theirs: str, folder: Path) -> list[str]:
    """Return the arguments of a documented command line, with its model store moved to ``folder``."""
    words = shlex.split(example.replace("\\\n", " "))[2:]
    return [word.replace(theirs, str(folder)).replace("\\", "/") if theirs in word else word for word in words]


@pytest.mark.slow
def test_the_documented_command_line_with_an_output_inside_the_base_folder(
    tiny_model_dml: Path, tmp_path: Path, commands: Commands
) -> None:
    base = Path(shutil.copytree(tiny_model_dml, tmp_path / "opset_21"))
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    code, printed = commands.drop_in(*here(EXAMPLE_LITE, STORE, tmp_path), "--seq_len", 32)
    assert code == 0, printed
    output = base / "cnn_32_lite_0.1_16"
    assert fused_sites(output) == (14, 14)
    assert f"{base}, in place of meta-llama/Meta-Llama-3-8B: the hub can't be reached here" in printed
    assert "cnn_dailymail train" in printed
    assert re.search(rf"python -m stages.evaluate {re.escape(str(base))}\S* {re.escape(str(output))}", printed), printed
    assert is_near(output, base)
    assert {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()} == before
    assert {path.name for path in base.iterdir() if path.is_dir()} == {output.name, f"{output.name}.weights"}
    # A second output there takes neither the first nor its weights with it.
    assert commands.drop_in(*here(EXAMPLE_LITE.replace("0.1_16", "b"), STORE, tmp_path), "--algo=rtn_dq")[0] == 0
    assert {path.name for path in (base / "cnn_32_lite_b").iterdir()} == {path.name for path in output.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "output", "eight_bit", "line"),
    [
        pytest.param(
            EXAMPLE_MIXED,
            "llama3.2-1b-int4-int8-mixed",
            {"layers.0/attn/qkv", "layers.0/mlp/down"},
            "",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            EXAMPLE_LAYERS,
            "llama3.2-1b-int4-int8-custom",
            {"layers.0/", "layers.1/"},
            "layers.15, layers.16 left out",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_the_documented_mixed_command_lines(
    example: str, output: str, eight_bit: set[str], line: str, tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "llama3.2-1b-fp16"))
    code, printed = commands.drop_in(*here(example, MODELS, tmp_path))
    assert code == 0, printed
    assert line in printed
    assert fused_sites(tmp_path / output) == (10, 10)
    reports = Made(tmp_path / output, printed).reports
    for name, report in reports.items():
        assert report.format.startswith("8" if any(part in name for part in eight_bit) else "4"), name
    assert is_near(tmp_path / output, base)
    assert len(generated(tmp_path / output)) == 24


def generated(folder: Path) -> list[int]:
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=24, min_length=24, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([0, 5, 9], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


@pytest.mark.slow
def test_the_file_runs_by_its_path_and_as_a_module(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    script = [sys.executable, str(ROOT / "scripts" / "quantize.py"), "--onnx_path=base/model.onnx"]
    arguments = ["--output_path=new/folders/int4.onnx", "--algo=rtn_dq", "--block_size=16", "--verify=off"]
    done = subprocess.run([*script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert is_near(tmp_path / "new" / "folders" / "int4.onnx", base)
    monkeypatch.setattr(sys, "argv", ["quantize", "--onnx_path", str(tmp_path / "none"), "--output_path", "o"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("scripts.quantize", run_name="__main__", alter_sys=True)
    assert "does not exist" in capsys.readouterr().err


# --------------------------------------------------------------------------- the kept calibration


@pytest.mark.thorough
@pytest.mark.slow
def test_another_algorithm_skips_stage_one_and_says_so(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--seed", 5, into="first")
    caches = {path: path.stat().st_mtime_ns for path in base.parent.glob("base.*.calibration/*")}
    assert caches
    no_calibration(monkeypatch)
    made = run("--seed", 5, "--algo", "awq_clip", "--use_zero_point", "--batch_size", 3, into="second")
    assert {path: path.stat().st_mtime_ns for path in base.parent.glob("base.*.calibration/*")} == caches
    assert "stage one is skipped" in made.printed
    assert "MB: tiny.txt, 3 + 1 windows of 16 tokens) is there from an earlier call" in made.printed
    assert any(str(path.parent) in made.printed for path in caches)


@pytest.mark.thorough
@pytest.mark.slow
def test_other_settings_calibrate_into_a_folder_of_their_own_and_the_first_stays_usable(
    tiny_model: Path, tmp_path: Path, run: Run
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    for number, change in enumerate(((), ("--calib_size", 5), ("--use_random_calib",)), 1):
        run(*change, into=f"out{number}", onnx_path=base)
        assert len(list(tmp_path.glob("base.*.calibration"))) == number
    times = cache_times(tmp_path)
    run("--algo", "awq_clip", into="again", onnx_path=base)
    assert cache_times(tmp_path) == times


def test_a_calibration_folder_is_named_after_all_that_the_statistics_depend_on_and_nothing_else(
    tiny_model: Path, tiny_hf: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    text = tmp_path / "other.txt"
    text.write_text("one text")

    def folder(**changes: object) -> Path:
        return calibration_folder(replace(parse("--onnx_path", str(base), "--output_path", "o"), **changes))

    first = folder()
    assert first.parent == tmp_path
    assert first == folder(algo="awq_clip", batch_size=4, device="cpu", overwrite=True, output_path=Path("p"))
    changes = (
        {"calib_size": 5}, {"seq_len": 8}, {"seed": 1}, {"dataset": "pilevel"}, {"use_random_calib": True},
        {"model_name": str(tiny_hf)}, {"model_name": "someone/else"}, {"dataset": str(text)},
    )  # fmt: skip
    others = {folder(**change) for change in changes}
    # The same path with another text, another tokenizer in the same folder.
    text.write_text("another text")
    others.add(folder(dataset=str(text)))
    (base / "tokenizer_config.json").write_text("{}")
    others.add(folder())
    assert len(others | {first}) == len(changes) + 3


@pytest.mark.thorough
@pytest.mark.slow
def test_a_changed_model_and_a_cache_of_another_version_are_calibrated_again(
    tiny_model: Path, tmp_path: Path, run: Run
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    run(into="first", onnx_path=base)
    (manifest,) = tmp_path.glob("base.*.calibration/manifest.json")
    manifest.write_text('{"format": 0}')
    damaged = cache_times(tmp_path)
    run(into="second", onnx_path=base)
    times = cache_times(tmp_path)
    assert times[manifest] != damaged[manifest]
    run(into="third", onnx_path=base)
    assert cache_times(tmp_path) == times
    data = base / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    run(into="fourth", onnx_path=base)
    assert cache_times(tmp_path) != times


@pytest.mark.slow
def test_a_base_model_that_may_only_be_read_is_calibrated_beside_the_output(
    tiny_model: Path, tmp_path: Path, stage_one: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "read only"
    base = Path(shutil.copytree(tiny_model, shelf / "base"))
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shelf and may(path, mode))
    stage_one(into="first", onnx_path=base)
    assert [path.name for path in shelf.iterdir()] == ["base"]
    (cache,) = tmp_path.glob("*.calibration")
    assert cache.name.startswith("first.")


@pytest.mark.slow
def test_a_named_cache_folder_keeps_the_rules_of_the_stages(
    run: Run, base: Path, tiny_text: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    calibrate = ["--onnx_path", base, "--dataset", tiny_text, "--calib_size", 4, "--seq_len", 16, "--cache_dir", cache]
    assert commands.calibrate(*calibrate)[0] == 0
    times = cache_times(cache)
    assert times
    run("--cache_dir", cache, into="same")
    assert cache_times(cache) == times
    code, printed = commands.drop_in(*calibrate, "--output_path", tmp_path / "other", "--seed", 1)
    assert (code, "holds another calibration" in printed) == (2, True), printed
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_weights_of_an_output_that_is_gone_do_not_stand_in_the_way(run: Run) -> None:
    made = run("--algo", "rtn_dq")
    shutil.rmtree(made.folder)
    assert run("--algo", "awq_lite").store.recipe.summary.startswith("awq_lite")


@pytest.mark.slow
def test_named_weights_of_another_run_are_refused(run: Run, base: Path, tmp_path: Path, commands: Commands) -> None:
    run("--algo", "rtn_dq", "--weights_path", tmp_path / "w")
    arguments = ["--onnx_path", base, "--output_path", tmp_path / "b", "--algo", "rtn", "--weights_path"]
    code, printed = commands.drop_in(*arguments, tmp_path / "w")
    assert (code, "weights of another run" in printed) == (2, True), printed


# --------------------------------------------------------------------------- what is wrong is said before stage one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers_8bit", "down_prj"], "'down_prj' matches no site; the nearest names are"),
        (["--layers_8bit", "layers.7"], "'layers.7' matches no site"),
        (["--block_size", 48], "--block_size 48 is not a power of two"),
        (["--calib_size", 1], "--calib_size must be at least 2"),
        (["--device", "cuda:77"], "--device cuda:77 can't be used here"),
        (["--algo", "rtn", "--use_column_major"], "use --algo rtn_dq in place of rtn"),
    ],
)
def test_what_cannot_be_is_said_before_stage_one(
    arguments: list[object], words: str, base: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_calibration(monkeypatch)
    code, printed = commands.drop_in("--onnx_path", base, "--output_path", tmp_path / "out", *arguments)
    assert (code, words in printed, "Traceback" in printed) == (2, True, False), printed


@pytest.mark.slow
def test_an_existing_output_is_refused_before_stage_one(
    run: Run, base: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run("--algo", "rtn_dq")
    before = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    no_calibration(monkeypatch)
    arguments = ["--onnx_path", base, "--output_path", made.folder / "model.onnx", "--seed", 77]
    code, printed = commands.drop_in(*arguments)
    words = "already exists, made with other options or from another base"
    assert (code, words in printed) == (2, True), printed
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == before


# --------------------------------------------------------------------------- one test for each option


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        "awq_lite",
        pytest.param("awq_clip", marks=pytest.mark.thorough),
        pytest.param("awq_full", marks=pytest.mark.thorough),
        "rtn",
        "rtn_dq",
    ],
)
def test_algo(algorithm: str, run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_no_data = algorithm in ("rtn", "rtn_dq")
    if needs_no_data:
        no_calibration(monkeypatch)
    made = run("--algo", algorithm, "--verify", "full")
    assert ("stage one is left out" in made.printed) == needs_no_data
    assert fused_sites(made.folder) == (10, 10)
    assert (len(made.nodes("QuantizeLinear")), len(made.nodes("DequantizeLinear"))) == (10 * (algorithm == "rtn"), 10)
    assert is_near(made.folder, base)


@pytest.mark.slow
def test_calib_size_and_batch_size(stage_one: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = ActivationTap.run

    def counted(self: ActivationTap, tokens: np.ndarray, *boundary: dict[str, np.ndarray]) -> object:
        if boundary:  # the pass that weighs tokens reads what enters the first layer without one
            seen.append(len(tokens))
        return original(self, tokens, *boundary)

    monkeypatch.setattr(ActivationTap, "run", counted)
    stage_one("--calib_size", 11, "--batch_size", 4, into="a")
    # One window is held out; ten are calibrated on, the last two in a batch of their own.
    assert seen == [1, 4, 4, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "title"),
    [
        ("cnn", "cnn_dailymail train"),
        ("cnn_dailymail", "cnn_dailymail train"),
        ("pilevel", "pile-val-backup validation"),
        ("mit-han-lab/pile-val-backup", "pile-val-backup validation"),
    ],
)
def test_dataset(dataset: str, title: str, stage_one: Run) -> None:
    assert title in stage_one("--dataset", dataset).printed


@pytest.mark.slow
def test_model_name_of_a_folder_is_taken_and_one_without_a_tokenizer_refused(
    stage_one: Run, base: Path, tiny_hf: Path, tmp_path: Path, commands: Commands
) -> None:
    assert str(tiny_hf) in stage_one("--model_name", tiny_hf).printed
    code, printed = commands.drop_in(
        "--onnx_path", base, "--output_path", tmp_path / "o", "--model_name", tmp_path, "--dataset", "offline", *SMALL
    )
    assert (code, f"No tokenizer can be loaded from {tmp_path}" in printed) == (2, True), printed


@pytest.mark.slow
def test_trust_remote_code(
    stage_one: Run, base: Path, tiny_tokenizer: Path, tmp_path: Path, commands: Commands
) -> None:
    folder = Path(shutil.copytree(tiny_tokenizer, tmp_path / "own code"))
    (folder / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast): pass\n"
    )
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    path.write_text(json.dumps(content))
    arguments = ["--onnx_path", base, "--output_path", tmp_path / "o", "--dataset", "offline", *SMALL]
    code, printed = commands.drop_in(*arguments, "--model_name", folder)
    assert (code, "trust_remote_code" in printed) == (2, True), printed
    assert str(folder) in stage_one("--model_name", folder, "--trust_remote_code").printed


@pytest.mark.slow
def test_use_random_calib(stage_one: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("read a data set"))
    assert "random tokens" in stage_one("--use_random_calib", "--dataset", "cnn").printed


@pytest.mark.slow
@pytest.mark.parametrize("written", ["dml,cpu", "[dml,cpu]", "dml, cpu"])
def test_calibration_eps(written: str, stage_one: Run) -> None:
    if "DmlExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has DirectML")
    printed = stage_one("--calibration_eps", written, "--seed", len(written)).printed
    assert "dml: this onnxruntime package was built without it" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "of_gqa", "of_dml"),
    [
        (
            "--add_position_ids",
            "the graph has no input position_ids",
            "the graph has the input position_ids, which gets 0, 1, 2, ...",
        ),
        ("--no_position_ids", "the graph has no input position_ids", "the graph has the input position_ids"),
        ("--use_fp32", "past key/values are FLOAT,", "past key/values are FLOAT16,"),
        ("--no_past_kv_inputs", "has 4 past key/value inputs, which start empty", "has 4 past key/value inputs"),
        ("--use_buffer_share", "start empty, with or without a shared buffer", "with or without a shared buffer"),
    ],
)
def test_what_the_graph_decides_is_said(
    option: str, of_gqa: str, of_dml: str, stage_one: Run, tiny_model_dml: Path, tmp_path: Path
) -> None:
    for name, answer, model in (("gqa", of_gqa, {}), ("dml", of_dml, {"onnx_path": tiny_model_dml})):
        printed = stage_one(option, "--algo", "rtn_dq", into=name, **model).printed
        (line,) = (line for line in printed.splitlines() if line.startswith(option))
        assert line.startswith(f"{option} changes nothing: ")
        assert answer in line


def test_a_shared_buffer_holds_nothing_before_the_first_token(base: Path) -> None:
    """Feed what --use_buffer_share does there, a past of full length and all zeros: the numbers stay the same."""
    directory = locate_model(base)
    session = ort.InferenceSession(str(directory.onnx_file), providers=["CPUExecutionProvider"])
    feeds = CausalFeeds.of(session, directory)(TOKENS)
    shared = {
        name: np.zeros((1, 2, 128, 16), value.dtype) if "past" in name else value for name, value in feeds.items()
    }
    np.testing.assert_array_equal(session.run(["logits"], feeds)[0], session.run(["logits"], shared)[0])


@pytest.mark.slow
def test_device(run: Run) -> None:
    assert run("--device", "cpu").reports


def test_the_output_has_the_formats_of_the_replaced_tool_to_the_byte(
    base: Path, tmp_path: Path, commands: Commands
) -> None:
    def made(name: str, *arguments: object) -> Made:
        places = ("--onnx_path", base, "--output_path", tmp_path / name, "--verify", "off", "--algo", "rtn_dq")
        code, printed = commands.drop_in(*places, *arguments)
        assert code == 0, printed
        return Made(tmp_path / name, printed)

    formats = (
        "--block_size",
        128,
        "--no_use_zero_point",
        "--scale_range",
        "full",
        "--target",
        "cpu",
        "--scale_type",
        "base",
        "--rotary_tables",
        "stored",
    )
    mine, spelled_out = made("a"), made("b", *formats, "--lm_head", "none", "--embedding", "none")
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (mine.folder / name).read_bytes() == (spelled_out.folder / name).read_bytes()
    assert {report.format for report in mine.reports.values()} == {"4b128"}


@pytest.mark.slow
def test_use_zero_point(run: Run) -> None:
    for arguments, inputs in (((), 2), (("--use_zero_point",), 3)):
        made = run("--algo", "rtn_dq", *arguments, into=f"out{inputs}")
        assert {len([value for value in node.inputs if value]) for node in made.nodes("DequantizeLinear")} == {inputs}


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32, 64])
def test_block_size(size: int, run: Run) -> None:
    made = run("--algo", "rtn_dq", "--block_size", size)
    assert {node.attributes.get_int("block_size", 0) for node in made.nodes("DequantizeLinear")} == {size}


@pytest.mark.slow
def test_awqlite_alpha_step(run: Run) -> None:
    fine = {report.alpha for report in run(into="fine").reports.values()} - {None}
    coarse = {report.alpha for report in run("--awqlite_alpha_step", 0.5, into="coarse").reports.values()} - {None}
    assert coarse <= {0.0, 0.5, 1.0}
    assert not fine <= {0.0, 0.5, 1.0}


@pytest.mark.slow
def test_awqlite_disable_fuse_nodes_and_run_per_subgraph(run: Run) -> None:
    folded = run(into="folded")
    own = run("--awqlite_disable_fuse_nodes", into="own")
    shared = run("--awqlite_disable_fuse_nodes", "--awqlite_run_per_subgraph", into="shared")
    alike = []
    for layer in (0, 1):
        gate, up = f"layers.{layer}/mlp/gate_proj", f"layers.{layer}/mlp/up_proj"
        np.testing.assert_array_equal(shared.input_scale(gate), shared.input_scale(up))
        alike.append(np.array_equal(own.input_scale(gate), own.input_scale(up)))
    assert not all(alike)  # one layer's own best scales may be the same
    # A Mul for each scale that is not folded; gate and up of the two layers share theirs where it was asked for.
    added = [len(made.nodes("Mul")) - len(folded.nodes("Mul")) for made in (own, shared)]
    assert added[0] - added[1] == alike.count(False)
    assert added[1] > 0


@pytest.mark.slow
def test_awqclip_alpha_min_and_step(run: Run) -> None:
    def ratios(made: Made) -> dict[str, float]:
        known = {name: report.mean_clip_ratio for name, report in made.reports.items()}
        return {name: ratio for name, ratio in known.items() if ratio is not None}

    default, narrow, halves = (
        ratios(run("--algo", "awq_clip", *options, into=into))
        for into, options in (
            ("default", ()),
            ("narrow", ("--awqclip_alpha_min", 0.95)),
            ("halves", ("--awqclip_alpha_step", 0.5)),
        )
    )
    # Refits move a block's range on from the ratio that won, so the bounds hold only for the search's start.
    assert min(default.values()) < min(narrow.values()) < 1
    both = halves.keys() & default.keys()
    assert both
    assert all(halves[name] != default[name] for name in both)


@pytest.mark.thorough
@pytest.mark.slow
def test_awqclip_bsz_col_changes_memory_and_nothing_else(run: Run) -> None:
    whole, sliced = (run("--algo", "awq_clip", "--awqclip_bsz_col", size, into=f"o{size}") for size in (1024, 8))
    for name in ("model.onnx", "model.onnx.data"):
        assert (whole.folder / name).read_bytes() == (sliced.folder / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("option", [["--enable_mixed_quant"], ["--layers_8bit", "layers.0/attn/qkv_proj,down_proj"]])
def test_enable_mixed_quant_and_layers_8bit(option: list[str], run: Run) -> None:
    formats = {name: report.format for name, report in run("--algo", "rtn_dq", *option).reports.items()}
    eight = {name for name, text in formats.items() if text.startswith("8")}
    rule = {"/model/layers.0/attn/qkv_proj/MatMul", "/model/layers.0/mlp/down_proj/MatMul"}
    assert eight == (rule if option[0] == "--enable_mixed_quant" else rule | {"/model/layers.1/mlp/down_proj/MatMul"})
    specs = {type(spec.granularity) for spec in specs_of(run("--algo", "rtn_dq", *option, into="b"))}
    assert specs == {PerBlock, PerChannel}


def specs_of(made: Made) -> list:
    store = made.store
    return [store.read(index, site).spec for index, group in enumerate(store.recipe.groups) for site in group.sites]


def test_layer_numbers_past_the_end_are_left_out_but_not_all_of_them() -> None:
    names = [f"/model/layers.{layer}/mlp/down_proj/MatMul" for layer in range(16)]
    assert past_the_end("layers.0, layers.15,layers.16", names) == ("layers.0,layers.15", ("layers.16",), 15)
    for patterns in ("", "layers.15,down_proj", "layers.16,layers.17", "layers.16/mlp/down_proj"):
        assert past_the_end(patterns, names)[0] == patterns
    slashed = [name.replace("layers.", "layers/") for name in names]
    assert past_the_end("layers/15,layers/16", slashed) == ("layers/15", ("layers/16",), 15)
    assert past_the_end("layers.3,lm_head", ["lm_head"])[0] == "layers.3,lm_head"


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_gather_quantize_axis_and_block_size(axis: int, run: Run, base: Path) -> None:
    made = run("--algo", "rtn_dq", "--gather_quantize_axis", axis, "--gather_block_size", 64)
    dequantizers = [*made.nodes("GatherBlockQuantized"), *made.nodes("DequantizeLinear")]
    tables = [node for node in dequantizers if "embed" in (node.inputs[0].name or "")]
    assert [node.attributes.get_int("block_size", 0) for node in tables] == [64]
    assert is_near(made.folder, base)


@pytest.mark.slow
def test_use_column_major(run: Run, base: Path) -> None:
    made = run("--algo", "awq_lite", "--use_column_major")
    transposed = [node for node in made.nodes("Transpose") if node.inputs[0].producer().op_type == "DequantizeLinear"]
    assert len(transposed) == 10
    assert is_near(made.folder, base)
