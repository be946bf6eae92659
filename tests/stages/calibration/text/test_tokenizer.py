"""A tokenizer is found where it is, in good time, and each reason why it can't be is named."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import transformers

from stages.calibration.text.tokenizer import find_tokenizer, first_tokens, hub_reason, why_unreachable
from stages.errors import UserError

ANSWERS = {
    "gated": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}),
    "private": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "broken": (404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}),
}


class Hub(BaseHTTPRequestHandler):
    """Answers every question about ``someone/NAME`` with what ANSWERS says of NAME."""

    def _answer(self) -> None:
        status, headers = next(answer for name, answer in ANSWERS.items() if name in self.path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve the hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield
    server.shutdown()
    server.server_close()


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point at a place where nobody listens."""
    point_at("http://127.0.0.1:9", monkeypatch)


def test_a_folder_is_read_without_asking_the_hub(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: pytest.fail("asked the hub"))
    found = find_tokenizer(str(tiny_tokenizer), None, trust_remote_code=False)
    assert (len(found.tokenizer), found.source, found.title) == (300, str(tiny_tokenizer), str(tiny_tokenizer))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("someone/gated", r"terms must be accepted on the Hugging Face hub; do that, then log in with 'hf auth login'"),
        ("someone/private", "has no such model, or it is private; if so, log in with 'hf auth login'"),
    ],
)
def test_a_model_that_the_hub_keeps_is_named_with_the_fix(
    name: str, reason: str, hub: None, tiny_tokenizer: Path
) -> None:
    assert why_unreachable(name, "model") is None
    with pytest.raises(UserError, match=rf"^No tokenizer can be loaded from {name} \([^)]*{reason}\); pass a folder"):
        find_tokenizer(name, None, trust_remote_code=False)
    found = find_tokenizer(name, str(tiny_tokenizer), trust_remote_code=False)
    assert found.source == str(tiny_tokenizer)
    assert found.title.startswith(f"{tiny_tokenizer}, in place of {name}: ")


def test_without_a_network_the_model_folders_tokenizer_stands_in_at_once(no_hub: None, tiny_tokenizer: Path) -> None:
    started = time.perf_counter()
    found = find_tokenizer("someone/model", str(tiny_tokenizer), trust_remote_code=False)
    # The libraries alone repeat their questions for more than twenty seconds.
    assert time.perf_counter() - started < 10
    assert f"{tiny_tokenizer}, in place of someone/model: the Hugging Face hub can't be reached" in found.title
    with pytest.raises(UserError, match="the Hugging Face hub can't be reached"):
        find_tokenizer("someone/model", None, trust_remote_code=False)


def test_without_a_network_a_copy_that_is_kept_is_taken(
    no_hub: None, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transformers.AutoTokenizer.from_pretrained

    def kept(path: str, *, local_files_only: bool, **others: object) -> object:
        assert local_files_only
        return original(tiny_tokenizer, **others)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", kept)
    found = find_tokenizer("someone/model", str(tmp_path), trust_remote_code=False)
    assert found.title == "someone/model"


def test_a_folder_without_a_tokenizer_is_not_replaced_by_another(tiny_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No tokenizer can be loaded from .*--model_name"):
        find_tokenizer(str(tmp_path), str(tiny_tokenizer), trust_remote_code=False)


def test_a_path_that_leads_nowhere_is_not_replaced_either(tiny_tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"\(there is no such folder, and it is not a hub name\); pass a folder"):
        find_tokenizer(r"E:\models\llama", str(tiny_tokenizer), trust_remote_code=False)


def test_two_places_without_a_tokenizer_are_one_message(no_hub: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No tokenizer can be loaded from someone/model \(the Hugging Face hub"):
        find_tokenizer("someone/model", str(tmp_path), trust_remote_code=False)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>", "sentencepiece, which reads its tokenizer.model, isn't installed"),
        ("spiece.model", b"\n\x0e\n\x05<unk>", "(pip install sentencepiece), or pass a folder"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken, which reads its tokenizer.model, isn't installed"),
        ("notes.txt", b"", "(it holds none); pass a folder that has one"),
    ],
)
def test_a_tokenizer_that_no_installed_library_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, words: str
) -> None:
    monkeypatch.setattr("stages.calibration.text.tokenizer.find_spec", lambda _: None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        find_tokenizer(str(tmp_path), None, trust_remote_code=False)


def test_of_a_long_text_only_its_beginning_is_tokenized(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizer)
    text = " ".join(f"word{number}" for number in range(9000))
    whole, seen, ask = tokenizer(text)["input_ids"], list[int](), type(tokenizer).__call__

    def counting(self: object, part: str, **options: object) -> object:
        seen.append(len(part))
        return ask(self, part, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    assert first_tokens(tokenizer, text, 100) == whole[:100]
    assert sum(seen) < 2000 < len(text)
    assert first_tokens(tokenizer, text, len(whole) + 1) == whole
    # So many tokens need more characters than are tried first.
    spaced = (" " * 40).join(text.split())
    assert first_tokens(tokenizer, spaced, 3000) == ask(tokenizer, spaced)["input_ids"][:3000]


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"])
def test_a_cache_that_can_t_be_written_is_named_with_the_variable_that_moves_it(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable == "HF_DATASETS_CACHE":
        monkeypatch.setenv(variable, "/nowhere/cache")
    else:
        monkeypatch.setattr(huggingface_hub.constants, variable, "/nowhere/cache")
    error = OSError("can't load")
    error.__cause__ = PermissionError(13, "Permission denied", "/nowhere")
    said = hub_reason(error)
    assert said == f"/nowhere can't be written, Permission denied; set {variable} to a folder that can be"
    assert "set " not in hub_reason(PermissionError(13, "Permission denied", "/elsewhere"))
