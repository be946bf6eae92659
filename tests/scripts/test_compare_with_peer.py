"""Competitors beside our algorithms: what they are asked for, their models, their failures, and one table of all."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import load_file

from scripts.compare_with_peer import compare_with_peer
from scripts.options import PeerConfig
from scripts.peers import environment
from scripts.peers.checkpoints import run_autoround, run_olive
from scripts.peers.checkpoints.runs import AUTOROUND_RUNNER, CHECKPOINT_REQUIREMENTS, OLIVE_RUNNER
from scripts.peers.comparison import read_comparison
from scripts.peers.environment import ensure_environment, pinned_version, python_of
from scripts.peers.llama_cpp.runs import LLAMA_CPP_REQUIREMENTS, LLAMA_CPP_RUNNER
from scripts.peers.peer import Peer
from scripts.peers.run_modelopt import arguments_of, read_feeds
from scripts.peers.runs import (
    MODELOPT_REQUIREMENTS,
    MODELOPT_RUNNER,
    ORT_RUNNER,
    modelopt_requests,
    ort_requests,
    peers_of,
)
from stages.calibration.cache import CacheKey
from stages.errors import UserError
from stages.evaluation.bench.runs import Record
from stages.system.measured_process import run_measured
from tests.support.commands import Commands

FAKE_QUANTIZER = """#!{python}
import json, shutil, sys
from pathlib import Path
request = json.loads(sys.argv[2])
if request["method"] == "awq_clip":
    raise AttributeError("'numpy.ndarray' object has no attribute 'get'")
output = Path(request["output"]).parent
for file in Path(request["base"]).parent.glob("model.onnx*"):
    shutil.copy(file, output)
(output / "calls").write_text("x")
"""


@pytest.fixture
def fake_environment(tmp_path: Path) -> Path:
    """Make what looks like ModelOpt's finished environment, whose quantizer copies the base, or fails at awq_clip."""
    folder = tmp_path / "environment"
    python_of(folder).parent.mkdir(parents=True)
    python_of(folder).write_text(FAKE_QUANTIZER.format(python=sys.executable))
    python_of(folder).chmod(0o755)
    (folder / "installed.txt").write_text(MODELOPT_REQUIREMENTS.read_text())
    return folder


def record_of(output: Path, name: str) -> Record:
    return TypeAdapter(Record).validate_json((output / f"{name}.run.json").read_bytes())


def test_methods_meet_the_block_sizes_and_zero_points_that_they_know() -> None:
    config = PeerConfig(base=Path("base"), output=Path("out"), block_size=(32, 128), use_zero_point=(False, True))
    assert [request.name("ort") for request in ort_requests(config)] == [
        f"ort-{name}"
        for size in (32, 128)
        for name in (f"default-b{size}", f"default-b{size}-zp", f"hqq-b{size}-zp", f"k_quant-b{size}-zp")
    ]
    assert [request.name("modelopt") for request in modelopt_requests(config)] == [
        f"modelopt-{name}-b{size}{zero_point}"
        for size in (32, 128)
        for name, zero_point in [
            ("rtn_dq", ""),
            ("awq_lite", ""),
            ("awq_lite", "-zp"),
            ("awq_clip", ""),
            ("awq_full", ""),
            ("awq_full", "-zp"),
        ]
    ]


@pytest.mark.slow
def test_modelopt_is_asked_for_its_own_sites_and_without_its_crash(tiny_model: Path, tmp_path: Path) -> None:
    config = PeerConfig(
        base=tiny_model,
        output=tmp_path,
        ort=(),
        modelopt=("rtn_dq", "awq_lite"),
        block_size=(32,),
        use_zero_point=(False,),
        modelopt_fast_path=True,
        modelopt_environment=tmp_path / "environment",
    )
    rounding, searching = (peer.run for peer in peers_of(config))
    program, runner, content = searching.command
    assert (program, runner) == (str(python_of(tmp_path / "environment")), str(MODELOPT_RUNNER))
    request = json.loads(content)
    assert Path(request["base"]) == tiny_model / "model.onnx"
    assert Path(request["output"]).parent == searching.model
    assert arguments_of(request) == {
        "calibration_method": "awq_lite",
        "calibration_eps": ["cpu"],
        "use_zero_point": False,
        "block_size": 32,
        "nodes_to_exclude": ["/lm_head/MatMul$"],
        "awqlite_fuse_nodes": False,
        "enable_fast_path_using_high_sysram": True,
    }
    assert set(arguments_of(json.loads(rounding.command[2]))) == set(arguments_of(request)) - {
        "awqlite_fuse_nodes",
        "enable_fast_path_using_high_sysram",
    }


def test_modelopt_reads_the_windows_of_the_present_calibration(
    tiny_model: Path, tiny_cache: Path, fake_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PeerConfig(
        base=tiny_model, output=tmp_path, cache_dir=tiny_cache, ort=(), modelopt=("awq_lite",), modelopt_windows=2,
        block_size=(32,), use_zero_point=(False,), modelopt_environment=fake_environment,
    )  # fmt: skip
    (peer,) = peers_of(config)
    assert peer.run.before is not None
    written = []
    for digest in ("one", "one", "other"):
        monkeypatch.setattr(CacheKey, "digest", lambda _, digest=digest: digest)
        peer.run.before()
        written.append((tmp_path / "modelopt-feeds-2.safetensors").stat().st_mtime_ns)
    assert written[0] == written[1] != written[2]


@pytest.mark.slow
@pytest.mark.thorough
def test_ort_and_a_broken_competitor_stand_in_one_table(
    commands: Commands, tiny_model: Path, tiny_cache: Path, unseen_text: Path, fake_environment: Path, tmp_path: Path
) -> None:
    """ONNX Runtime's quantizer for real; ModelOpt's place is taken by a fake that copies the base, or fails."""
    output = tmp_path / "proof"
    arguments = ["--base", tiny_model, "--cache_dir", tiny_cache, "--output", output, "--text", unseen_text]
    arguments += ["--windows", 2, "--seq_len", 32, "--algo", "rtn_dq", "--block_size", 16, "--use_zero_point", False]
    arguments += ["--modelopt", "awq_lite", "awq_clip", "--modelopt_windows", 3]
    arguments += ["--modelopt_environment", fake_environment]
    code, printed = commands.compare(*arguments)
    # A competitor that fails is a finding, not an error.
    assert code == 0, printed
    divergences = {}
    for name in ("rtn_dq-b16-nozp", "ort-default-b16", "ort-hqq-b16-zp", "ort-k_quant-b16-zp", "modelopt-awq_lite-b16"):
        record = record_of(output, name)
        assert record.failure is None, record.failure
        (accuracy,) = record.accuracy.values()
        divergences[name] = accuracy.mean_divergence
        assert (output / name / "genai_config.json").is_file()
        assert (output / name / "tokenizer.json").is_file()
    assert divergences.pop("modelopt-awq_lite-b16") == 0
    assert min(divergences.values()) > 0
    assert record_of(output, "modelopt-awq_clip-b16").failure == "'numpy.ndarray' object has no attribute 'get'"
    assert "'numpy.ndarray' object has no attribute 'get'" in printed
    kept = {node.name for node in onnx.load(output / "ort-default-b16" / "model.onnx").graph.node}
    assert not kept & {"/lm_head/MatMul", "/model/layers.0/mlp/down_proj/MatMul"}
    feeds = read_feeds(output / "modelopt-feeds-3.safetensors")
    tokens = load_file(tiny_cache / "tokens.safetensors")["calibration"]
    assert np.array_equal([feed["input_ids"][0] for feed in feeds], tokens[:3])
    assert all(feed["past_key_values.0.key"].shape == (1, 2, 0, 16) for feed in feeds)

    calls = output / "modelopt-awq_lite-b16" / "calls"
    calls.unlink()
    code, again = commands.compare(*arguments)
    assert code == 0, again
    assert not calls.exists()


def test_competitors_that_start_from_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    config = PeerConfig(
        base=tiny_model,
        output=tmp_path,
        ort=(),
        modelopt=(),
        block_size=(32,),
        use_zero_point=(False, True),
        builder_source="smollm2",
    )
    runs = {peer.run.name: peer.run.command for peer in peers_of(config)}
    assert list(runs) == [
        "builder-int4",
        "builder-int4_mixed",
        "builder-k_quant",
        "builder-k_quant_mixed",
        "olive-gptq-b32",
        "autoround-light-b32",
        "olive-gptq-b32-zp",
        "autoround-light-b32-zp",
        "llama_cpp-q4_k_m",
    ]
    assert "--extra_options" not in runs["builder-int4"]
    mixed = "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8"
    assert runs["builder-int4_mixed"][-2:] == ("--extra_options", mixed)
    assert runs["builder-k_quant"][-1] == "algo_config=k_quant"
    olive = run_olive.options_of(json.loads(runs["olive-gptq-b32-zp"][2]))
    assert (olive["group_size"], olive["sym"]) == (32, False)
    assert run_autoround.arguments_of(json.loads(runs["autoround-light-b32"][2]), samples=29, tokens=512) == {
        "scheme": "W4A16",
        "group_size": 32,
        "sym": True,
        "nsamples": 29,
        "seqlen": 512,
        "device_map": "cpu",
        "iters": 50,
        "lr": 5e-3,
    }


def builder_of(tiny_model: Path, output: Path) -> Peer:
    (peer,) = peers_of(
        PeerConfig(
            base=tiny_model,
            output=output,
            ort=(),
            modelopt=(),
            block_size=(16,),
            use_zero_point=(False,),
            builder_source="some/name",
            builder=("int4",),
            olive=(),
            autoround=(),
            llama_cpp=(),
        )
    )
    return peer


def test_a_rounded_build_of_the_same_checkpoint_is_accepted(
    tiny_model: Path, tiny_model_dml: Path, tmp_path: Path
) -> None:
    peer = builder_of(tiny_model, tmp_path)
    peer.run.model.symlink_to(tiny_model_dml)
    peer.run.after()


def test_the_builder_must_be_given_the_weights_of_the_base(tiny_model: Path, tmp_path: Path) -> None:
    peer = builder_of(tiny_model, tmp_path)
    peer.run.model.mkdir()
    model = ir.load(tiny_model / "model.onnx")
    norm = model.graph.initializers["model.layers.1.input_layernorm.weight"]
    assert norm.const_value is not None
    norm.const_value = ir.tensor(norm.const_value.numpy() * 1.1, name=norm.name)
    ir.save(model, peer.run.model / "model.onnx")
    shutil.copy(tiny_model / "model.onnx.data", peer.run.model)
    with pytest.raises(UserError, match=r"other weights than --base \(model\.layers\.1\.input_layernorm\.weight"):
        peer.run.after()


@pytest.mark.slow
@pytest.mark.thorough
def test_the_builders_int4_and_everyones_speed(
    tiny_model: Path, tiny_hf: Path, tiny_cache: Path, unseen_text: Path, tmp_path: Path
) -> None:
    config = PeerConfig(
        base=tiny_model,
        cache_dir=tiny_cache,
        output=tmp_path / "proof",
        text=(str(unseen_text),),
        windows=2,
        seq_len=32,
        algo=("rtn_dq",),
        block_size=(16,),
        use_zero_point=(False,),
        ort=(),
        modelopt=(),
        builder_source=str(tiny_hf),
        builder=("int4",),
        olive=(),
        autoround=(),
        llama_cpp=("q4_k_m",),
        speed=True,
        speed_rounds=1,
    )
    for _ in compare_with_peer(config):
        pass
    found = read_comparison(config.output)
    ours, default, other = found.texts[0].models
    assert [(model.name, model.failure) for model in (ours, default)] == [
        ("rtn_dq-b16-nozp", None),
        ("builder-int4", None),
    ]
    assert "tokenizer" in str(other.failure)  # there is no GGUF
    assert default.accuracy is not None
    assert 0 < default.accuracy.mean_divergence < 1
    assert found.speed is not None
    assert [(model.model, model.accuracy_level) for model in found.speed.models] == [
        ("tiny", "none (nothing is quantized)"),
        ("rtn_dq-b16-nozp", "4 (ONNX Runtime's default on the CPU)"),
        ("builder-int4", "4 (by its MatMulNBits nodes)"),
    ]
    assert all(model.decode.median > 0 for model in found.speed.models)


@pytest.mark.slow
@pytest.mark.thorough
def test_a_competitor_that_can_not_be_installed_says_so(tmp_path: Path) -> None:
    requirements = tmp_path / "pins.txt"
    requirements.write_text("/no/such/folder/package.whl\n")
    with pytest.raises(UserError, match=r"pins\.txt can't be installed \(package\.whl is not a valid wheel filename"):
        ensure_environment(tmp_path / "environment", requirements)
    assert not (tmp_path / "environment" / "installed.txt").exists()
    assert "package.whl" in (tmp_path / "environment.log").read_text()


def test_an_environment_is_made_once_for_the_same_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[tuple[str, ...]] = []

    def run_without_pip(command: tuple[str, ...], log: Path) -> None:
        """Real environments, but empty ones: pip takes seconds to come into each."""
        if "venv" in command:
            run_measured((*command, "--without-pip"), log)
        else:
            installed.append(command)

    monkeypatch.setattr(environment, "run_measured", run_without_pip)
    requirements = tmp_path / "pins.txt"
    requirements.write_text("# nothing\n")
    folder = tmp_path / "environment"
    ensure_environment(folder, requirements)
    made = python_of(folder).lstat().st_mtime_ns
    (folder / "mark").write_text("")
    ensure_environment(folder, requirements)
    assert (folder / "mark").exists()
    assert python_of(folder).lstat().st_mtime_ns == made
    assert installed == [(str(python_of(folder)), "-m", "pip", "install", "-r", str(requirements))]
    requirements.write_text("# something else\n")
    ensure_environment(folder, requirements)
    assert not (folder / "mark").exists()
    assert len(installed) == 2


@pytest.mark.parametrize(
    "runner",
    [ORT_RUNNER, MODELOPT_RUNNER, OLIVE_RUNNER, AUTOROUND_RUNNER, LLAMA_CPP_RUNNER],
    ids=lambda file: file.stem,
)
def test_a_runner_imports_nothing_of_ours(runner: Path) -> None:
    assert not re.findall(r"(?:import|from) (?:stages|export|scripts)\b", runner.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "pins", [MODELOPT_REQUIREMENTS, CHECKPOINT_REQUIREMENTS, LLAMA_CPP_REQUIREMENTS], ids=lambda file: file.stem
)
def test_the_pins_are_exact(pins: Path) -> None:
    lines = [line for line in pins.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert all(line.count("==") == 1 for line in lines)


def test_the_version_in_a_note_is_the_pinned_one() -> None:
    assert pinned_version(MODELOPT_REQUIREMENTS, "nvidia-modelopt") == "0.47.0"
