"""Encoders the whole way: samples in, INT4 out, judged on samples that nothing saw; alone and with a decoder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from transformers import AutoTokenizer

from stages.calibration.cache import find_cache
from stages.calibration.samples.samples import sample_digest
from stages.commands.quantize_options import QuantizeConfig
from stages.evaluation.judged_samples import samples_of_run
from stages.report.document import read_report
from tests.support.commands import Commands
from tests.support.encoders import (
    add_vision,
    save_image_processor,
    save_images,
    save_sounds,
    save_text_encoder,
    save_vision,
)
from tests.support.tiny_models import VOCABULARY, build_genai_model
from tests.support.written import fused_sites


def result_of(printed: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    return found


def scores_of(printed: str) -> dict[str, dict[str, float]]:
    (evaluation,) = result_of(printed)["result"]["outputs"]  # type: ignore[index]
    return {score["output"]: score for score in evaluation["rows"][-1]["scores"]}


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "base"
    save_vision(folder)
    save_image_processor(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL")
    return save_images(tmp_path_factory.mktemp("images"), 20)


@pytest.mark.slow
def test_images_calibrate_a_vision_encoder(vision: Path, images: Path, tmp_path: Path, commands: Commands) -> None:
    """Statistics are those of the activations that ONNX Runtime gives, and calibration beats rounding on new images."""
    errors = {}
    for algo in ("awq_gptq", "rtn_dq"):
        code, printed = commands.quantize(
            vision, tmp_path / algo, "--samples", images, "--algo", algo, "--cache_dir", tmp_path / "cache",
            "--block_size", 32, "--evaluate", "--json", "--quiet",
        )  # fmt: skip
        assert code == 0, printed
        assert fused_sites(tmp_path / algo) == (6, 6)
        (score,) = scores_of(printed).values()
        errors[algo] = score["relative_error"]
        assert score["vectors"] == 2 * 16
        assert 0.9 < score["worst_cosine"] <= score["cosine"] < 1
    assert errors["awq_gptq"] < 0.9 * errors["rtn_dq"]
    cache = find_cache(tmp_path / "cache")
    assert cache is not None
    assert cache.manifest.key.text == f"images in {images.name} (17 + 1 samples)"
    card = (tmp_path / "awq_gptq" / "README.md").read_text(encoding="utf-8")
    assert "on 2 samples of images in" in card
    report = json.loads((tmp_path / "awq_gptq.weights" / "report" / "report.json").read_text(encoding="utf-8"))
    assert [one["samples"] for one in report["outputs"]] == [2]


def test_statistics_are_those_of_the_rows(vision: Path, tmp_path: Path, commands: Commands) -> None:
    pixels = np.random.default_rng(6).standard_normal((10, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "x.npz", pixel_values=pixels)
    code, printed = commands.calibrate(vision, "--samples", tmp_path / "x.npz", "--cache_dir", tmp_path / "cache")
    assert code == 0, printed
    cache = find_cache(tmp_path / "cache")
    assert cache is not None
    tapped = ir.load(vision / "model.onnx")
    value = next(out for node in tapped.graph for out in node.outputs if out.name == "layers.1/hidden")
    tapped.graph.outputs[:] = [value]
    ir.save(tapped, tmp_path / "tapped.onnx", external_data="tapped.data")
    session = ort.InferenceSession(str(tmp_path / "tapped.onnx"), providers=["CPUExecutionProvider"])
    order = np.random.default_rng(0)
    order.permutation(1)  # of the files
    chosen = order.permutation(10)
    (rows,) = session.run(None, {"pixel_values": pixels[chosen[:8]]})
    expected = torch.from_numpy(rows).reshape(-1, rows.shape[-1]).double()
    stats = cache.read("layers.1/hidden").calibration
    assert stats.num_tokens == 8 * 16
    assert stats.gram is not None
    torch.testing.assert_close(stats.gram.double(), expected.T @ expected / len(expected), rtol=1e-4, atol=1e-5)
    assert len(cache.manifest.samples) == 9


@pytest.mark.slow
def test_a_package_is_quantized_in_one_run(
    tiny_model: Path, tiny_text: Path, images: Path, tmp_path: Path, commands: Commands
) -> None:
    base, output = tmp_path / "base", tmp_path / "int4"
    shutil.copytree(tiny_model, base)
    add_vision(base)
    (base / "README.md").write_text("# of the base\n", encoding="utf-8")
    command = (
        base, output, "--component", "decoder,vision", "--dataset", tiny_text, "--calib_size", 12, "--seq_len", 32,
        "--samples", images, "--block_size", 32, "--algo", "awq_lite",
    )  # fmt: skip
    code, printed = commands.quantize(*command)
    assert code == 0, printed
    assert fused_sites(output) == (10, 10)
    verified = json.loads((tmp_path / "int4.weights.vision" / "verification.json").read_text(encoding="utf-8"))
    assert (verified["fused"], verified["sites"]) == (6, 6)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "base", "base.calibration", "base.vision.calibration", "int4", "int4.weights", "int4.weights.vision",
    }  # fmt: skip
    record = json.loads((output / "genai_quant.json").read_text(encoding="utf-8"))
    assert (record["onnx_file"], [part["onnx_file"] for part in record["parts"]]) == (
        "vision/vision.onnx",
        ["model.onnx"],
    )
    assert record["base"]["name"] == record["parts"][0]["base"]["name"] == "base"
    assert "--component decoder,vision" in (output / "README.md").read_text(encoding="utf-8")
    assert (output / "README.base.md").read_text(encoding="utf-8") == "# of the base\n"
    (tmp_path / "int4.decoder.part").mkdir()
    shutil.rmtree(tmp_path / "int4.weights.vision" / "report")
    code, printed = commands.quantize(*command)
    assert code == 0, printed
    assert "is there already, made with exactly these options" in printed
    assert {path.name for path in tmp_path.iterdir()} == left, "what a run left that was stopped at its end is removed"
    assert (tmp_path / "int4.weights.vision" / "report" / "report.html").is_file()


def test_what_one_component_lacks_is_said_before_the_first_is_calibrated(
    tiny_model: Path, tmp_path: Path, commands: Commands
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    add_vision(base)
    command = (base, tmp_path / "int4", "--component", "decoder,vision", "--dataset", "offline")
    code, printed = commands.quantize(*command)
    assert code == 2
    assert "'pixel_values' holds sound or images" in printed
    assert "pass --samples" in printed
    code, printed = commands.quantize(*command, "--samples", tmp_path / "nothing")
    assert code == 2
    assert "does not exist; pass .npz or .npy files" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.fixture
def text_encoder(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    folder = tmp_path / "base"
    save_text_encoder(folder, VOCABULARY)
    AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["text", pytest.param("arrays", marks=pytest.mark.thorough)])
def test_an_embedding_model_is_calibrated_on_text_or_arrays(
    kind: str, text_encoder: Path, tiny_text: Path, tmp_path: Path, commands: Commands
) -> None:
    if kind == "arrays":
        tokens = np.random.default_rng(7).integers(2, VOCABULARY, (30, 20))
        mask = np.arange(20) < np.random.default_rng(8).integers(5, 20, (30, 1))
        np.savez(tmp_path / "x.npz", input_ids=tokens, attention_mask=mask.astype(np.int64))
    data = ("--dataset", tiny_text) if kind == "text" else ("--samples", tmp_path / "x.npz")
    code, printed = commands.quantize(
        text_encoder, tmp_path / "int4", *data, "--seq_len", 48, "--block_size", 32, "--embedding", 8,
        "--gather_block_size", 32, "--evaluate", "--json", "--quiet",
    )  # fmt: skip
    assert code == 0, printed
    assert fused_sites(tmp_path / "int4") == (5, 5)
    (score,) = scores_of(printed).values()
    assert score["output"] == "last_hidden_state"
    assert 0.9 < score["worst_cosine"] <= score["cosine"] < 1
    code, printed = commands.evaluate(text_encoder, tmp_path / "int4", "--windows", 4, "--seq_len", 48)
    assert code == 0, printed
    assert "last_hidden_state" in printed


def test_evaluate_leaves_out_what_calibrated(vision: Path, images: Path, tmp_path: Path, commands: Commands) -> None:
    base = tmp_path / "base"
    shutil.copytree(vision, base)
    code, printed = commands.quantize(base, tmp_path / "int4", "--samples", images, "--algo", "awq_lite")
    assert code == 0, printed
    kept = ("--results", tmp_path / "r.json", "--report", tmp_path / "report")
    code, printed = commands.evaluate(base, tmp_path / "int4", "--samples", images, *kept)
    assert code == 0, printed
    assert "2 samples of images in" in printed
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["samples"] == 2
    report = read_report(tmp_path / "report")
    assert ([one.samples for one in report.outputs], report.title, report.origin.base) == ([2], "int4", "base")
    assert report.machine
    few = tmp_path / "few"
    few.mkdir()
    order = np.random.default_rng(0).permutation(20)
    for place in order[:3]:  # those that were calibrated on
        shutil.copy(sorted(images.iterdir())[place], few)
    code, printed = commands.evaluate(base, tmp_path / "int4", "--samples", few)
    assert code == 2
    assert "was calibrated on all of them; pass others" in printed


def test_a_run_is_not_judged_on_what_calibrated_its_cache(vision: Path, tmp_path: Path, commands: Commands) -> None:
    """A cache that is there is used, whatever samples a run of these options would take."""
    pixels = np.random.default_rng(6).standard_normal((40, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "x.npz", pixel_values=pixels)
    samples = ("--samples", tmp_path / "x.npz", "--cache_dir", tmp_path / "cache")
    code, printed = commands.calibrate(vision, *samples, "--seed", 1, "--calib_size", 20)
    assert code == 0, printed
    config = QuantizeConfig(
        onnx_path=vision, output_path=tmp_path / "int4", samples=str(tmp_path / "x.npz"), algo="awq_lite"
    )
    everything, unseen = samples_of_run(config), samples_of_run(replace(config, cache_dir=tmp_path / "cache"))
    cache = find_cache(tmp_path / "cache")
    assert everything is not None
    assert unseen is not None
    assert cache is not None
    expected = [digest for digest in map(sample_digest, everything.samples) if digest not in cache.manifest.samples]
    assert [sample_digest(sample) for sample in unseen.samples] == expected
    assert 0 < len(expected) < len(everything.samples)


def test_what_an_encoder_cannot_do_is_refused(text_encoder: Path, commands: Commands) -> None:
    code, printed = commands.evaluate(text_encoder, text_encoder, "--speed")
    assert code == 2
    assert "is an encoder, whose outputs are compared; --generate, --lm_eval_tasks and --speed go with decoders" in (
        " ".join(printed.split())
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--refine",), "--refine, --distill and --algo signround run text"),
        (("--target_bpw", 5, "--sensitivity", "measured"), "--sensitivity measured runs text"),
        (("--component", "vision,speech", "--target_size", "1MB"), "goes with one --component"),
        (("--component", "vision,vision"), "names one twice"),
    ],
)
def test_what_needs_text_or_one_component_is_refused(
    options: tuple[object, ...], words: str, vision: Path, images: Path, tmp_path: Path, commands: Commands
) -> None:
    code, printed = commands.quantize(
        vision, tmp_path / "int4", "--samples", images, "--cache_dir", tmp_path / "cache", *options
    )
    assert code == 2, printed
    assert words in printed
    assert not (tmp_path / "int4").exists()


def test_float16_inputs_that_overflow_are_named(tmp_path: Path, commands: Commands) -> None:
    save_vision(tmp_path / "base", dtype=TensorProto.FLOAT16)
    np.savez(tmp_path / "x.npz", pixel_values=np.full((4, 3, 16, 16), 1e6))
    code, printed = commands.calibrate(tmp_path / "base", "--samples", tmp_path / "x.npz")
    assert code == 2, printed
    assert "holds NaN or infinite values; run a float32 or bfloat16 build" in printed


@pytest.mark.slow
def test_sounds_calibrate_whispers_encoder_through_onnxruntime_genai(tmp_path: Path, commands: Commands) -> None:
    """The package, its processor's description and its graphs are those of onnxruntime-genai's builder."""
    pytest.importorskip("onnxruntime_genai")
    package = save_whisper(tmp_path)
    code, printed = commands.quantize(
        package, tmp_path / "int4", "--component", "encoder", "--samples", save_sounds(tmp_path / "sounds", 6),
        "--block_size", 32, "--evaluate", "--verbose",
    )  # fmt: skip
    assert code == 0, printed
    assert "onnxruntime-genai's" in printed
    assert "hidden_states" in printed
    assert "present_value_cross_1" in printed
    files = {path.name for path in (tmp_path / "int4").iterdir()}
    assert {"encoder.onnx", "decoder.onnx", "audio_processor_config.json"} <= files


@pytest.mark.thorough
@pytest.mark.slow
def test_sounds_calibrate_the_whole_of_whisper_in_one_run(tmp_path: Path, commands: Commands) -> None:
    """The decoder hears the sounds through the encoder."""
    pytest.importorskip("onnxruntime_genai")
    package, sounds = save_whisper(tmp_path), save_sounds(tmp_path / "sounds", 8)
    code, printed = commands.quantize(
        package, tmp_path / "int4", "--component", "encoder,decoder", "--samples", sounds, "--block_size", 32,
        "--evaluate", "--json", "--quiet",
    )  # fmt: skip
    assert code == 0, printed
    encoder, decoder = result_of(printed)["result"]["outputs"]  # type: ignore[index]
    (logits,) = [score for score in decoder["rows"][-1]["scores"] if score["output"] == "logits"]
    assert (encoder["component"], decoder["component"]) == ("encoder", "decoder")
    assert 0.99 < logits["worst_cosine"] < 1
    cache = find_cache(tmp_path / "package.calibration")
    assert cache is not None
    assert cache.manifest.key.text == "sounds in sounds (6 + 1 samples)"
    assert fused_sites(tmp_path / "int4") == (14, 14)
    assert fused_sites(tmp_path / "int4", tmp_path / "int4.weights.decoder") == (16, 16)


def save_whisper(folder: Path) -> Path:
    """Build a random Whisper. Its biases aren't zero: the builder leaves those out, and its Attention needs them."""
    import transformers

    from scripts.architectures.configs import ARCHITECTURES

    config = next(each for each in ARCHITECTURES if each.name == "WhisperForConditionalGeneration").config()
    generator = torch.Generator().manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    source = folder / "whisper"
    model.save_pretrained(source)
    transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(source)
    build_genai_model(source, folder / "package", "fp32", "cpu")
    return folder / "package"
