"""Check that a folder opens in onnxruntime-genai, with what is asked for in place of its own configuration."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from stages.errors import UserError
from stages.runtime.genai import cannot_run, import_genai, load_genai, open_genai, require_genai

PROMPT = [0, 5, 9]


def test_generation_past_the_end_token_has_its_full_length(tiny_model: Path) -> None:
    session = open_genai(tiny_model, "--speed", threads=1)
    assert len(list(session.generate(PROMPT, 17, past_the_end=True))) == 17


def test_a_text_without_template_begins_as_the_tokenizer_begins_it(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    session = open_genai(copy, "MODEL", threads=1)
    assert not session.has_template
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    expected = tokenizer.encode("a city").ids
    assert session.prompt_tokens("a city") == expected
    word, number = next((word, number) for word, number in tokenizer.get_vocab().items() if number not in expected)
    tokenizer.post_processor = TemplateProcessing(single=f"{word} $A", special_tokens=[(word, number)])
    tokenizer.save(str(copy / "tokenizer.json"))
    session = open_genai(copy, "MODEL", threads=1)
    assert session.prompt_tokens("a city") == [number, *expected[1:]]
    assert session.prompt_tokens("") == []


def greedy(model: object, limit: int) -> list[int]:
    """Return the most likely tokens before the model's end token."""
    runtime = import_genai("--generate")
    settings = runtime.GeneratorParams(model)
    settings.set_search_options(max_length=len(PROMPT) + limit, do_sample=False)
    generator = runtime.Generator(model, settings)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(PROMPT) :]]


def test_an_end_token_and_a_file_replace_those_of_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    runtime = import_genai("--generate")
    longer = greedy(load_genai(runtime, tiny_model), 8)
    end = next(token for token in longer if token != longer[0])
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "model.onnx").rename(copy / "decoder.onnx")
    changed = load_genai(runtime, copy, threads=1, filename="decoder.onnx", end_token=end, provider="cpu")
    assert greedy(changed, 8) == longer[: longer.index(end)]


def test_the_runtime_takes_all_cores_unless_threads_are_given_or_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    overlays: list[dict[str, Any]] = []

    class Config:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def overlay(self, text: str) -> None:
            overlays.append(json.loads(text))

    runtime = ModuleType("onnxruntime_genai")
    monkeypatch.setattr(runtime, "Config", Config, raising=False)
    monkeypatch.setattr(runtime, "Model", lambda config: config, raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 12 if logical else 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    load_genai(runtime, Path("model"))
    load_genai(runtime, Path("model"), threads=2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    load_genai(runtime, Path("model"))
    found = [overlay["model"]["decoder"]["session_options"]["intra_op_num_threads"] for overlay in overlays]
    assert found == [6, 2, 3]


def test_the_provider_replaces_that_of_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    runtime = import_genai("--generate")
    with pytest.raises(RuntimeError, match="nowhere"):
        load_genai(runtime, tiny_model, provider="nowhere")
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"nowhere": {}}]
    (copy / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="nowhere"):
        load_genai(runtime, copy)
    assert greedy(load_genai(runtime, copy, provider="cpu"), 4)


def test_a_runtime_that_is_missing_is_one_sentence(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(UserError, match=r"--speed: onnxruntime-genai can't be imported .*; install it with 'pip "):
        require_genai([tiny_model], "--speed")


def test_a_folder_without_configuration_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    (copy / "genai_config.json").unlink()
    with pytest.raises(UserError, match=r"--generate .*copy has no genai_config\.json"):
        require_genai([tiny_model, copy], "--generate")


def test_renamed_logits_are_answered_with_the_setting_that_names_them(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    config = (copy / "genai_config.json").read_text(encoding="utf-8")
    (copy / "genai_config.json").write_text(config.replace('"logits": "logits"', '"logits": "lost"'), encoding="utf-8")
    runtime = import_genai("--generate")
    with pytest.raises(RuntimeError) as caught:
        greedy(load_genai(runtime, copy), 1)
    message = str(cannot_run(copy, "--generate", caught.value))
    assert "lost" in message
    assert "write the graph's own name into model.decoder.outputs of its genai_config.json" in message


@pytest.mark.parametrize(
    ("error", "reason"), [(RuntimeError(), "RuntimeError"), (RuntimeError("no\nkernel"), "no kernel")]
)
def test_the_runtimes_reason_is_told_in_one_line(error: RuntimeError, reason: str) -> None:
    assert f"model can't be run by onnxruntime-genai here ({reason});" in str(
        cannot_run(Path("model"), "--speed", error)
    )


def test_opening_a_model_imports_nothing_heavy() -> None:
    """The speed test measures the memory of a process that imports this module."""
    code = "import sys, stages.runtime.genai; print({'torch', 'numpy', 'onnx_ir'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
