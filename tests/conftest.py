"""Share fixtures between rooms: English text, a tokenizer trained on it, tiny models and a calibration of one.

torch, transformers and the stages are imported by the fixtures that need them, so that collecting a few files is quick.
"""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.support.commands import Commands
from tests.support.tiny_models import build_genai_model, save_tiny_llama, train_tokenizer
from tests.support.type_checks import check_types_cheaply

check_types_cheaply()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have the most slow tests, so that no worker is left with a long one in the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Spare the garbage collector half a million objects that were imported and stay."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a .txt file with about 100,000 characters of English."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n\n\n".join(topics[name] for name in sorted(topics))[:100_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    """Return a folder with a byte-level BPE tokenizer of 300 tokens that begins each text with <s>; </s> is its EOS."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(tiny_text.read_text(encoding="utf-8")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Return the Hugging Face folder of a random two-layer Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    save_tiny_llama(folder, tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> Path:
    """Return the tiny Llama as an fp32 ORT-GenAI folder for the CPU: packed qkv, GroupQueryAttention rotates."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_genai_model(tiny_hf, folder, "fp32", "cpu")
    return folder


@pytest.fixture(scope="session")
def tiny_model_dml(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> Path:
    """Return the tiny Llama as an fp16 ORT-GenAI folder for DirectML: separate q/k/v, position_ids as an input."""
    folder = tmp_path_factory.mktemp("models") / "tiny-dml"
    build_genai_model(tiny_hf, folder, "fp16", "dml")
    return folder


@pytest.fixture(scope="session")
def tiny_model_bf16(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> Path:
    """Return the tiny Llama as a bf16 ORT-GenAI folder for CUDA: bfloat16 key/value caches, float32 logits."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bf16"
    build_genai_model(tiny_hf, folder, "bf16", "cuda")
    return folder


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_text: Path) -> Path:
    """Calibrate the tiny model: 18 windows of 32 tokens to search with, 2 held out."""
    from stages.calibration.run import calibrate
    from stages.commands.calibrate_options import CalibrateConfig

    folder = tmp_path_factory.mktemp("caches") / "tiny"
    config = CalibrateConfig(
        onnx_path=tiny_model, dataset=str(tiny_text), calib_size=20, seq_len=32, batch_size=4, cache_dir=folder
    )
    calibrate(config)
    return folder


@pytest.fixture(scope="session")
def unseen_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a .txt file that the tiny model was not calibrated on."""
    path = tmp_path_factory.mktemp("text") / "unseen.txt"
    path.write_text(" ".join(f"Line {n} holds {n * n % 89} apples." for n in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Return the command lines, to run inside the test process."""
    return Commands(capsys, monkeypatch)
