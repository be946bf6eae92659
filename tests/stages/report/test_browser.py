"""The page in a real browser, where there is one: its script runs, its policy refuses nothing, it is dark or light."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from stages.report.render import render
from tests.stages.report import documents

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(documents.whole_document()), encoding="utf-8")
    return file


def browse(page: Path, profile: Path, *options: str) -> str:
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # What the page's policy refuses, and errors of its script, are messages of the console.
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def first_pixel(picture: Path) -> tuple[int, int, int]:
    """Red, green and blue of the upper left corner of a PNG of 8 bits a colour."""
    content, place, packed = picture.read_bytes(), 8, b""
    while place < len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        packed += content[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += length + 12
    # Behind the row's filter byte; the first pixel has no neighbours that a filter could have taken off.
    red, green, blue = zlib.decompress(packed)[1:4]
    return red, green, blue


def test_the_script_makes_headings_buttons(page: Path, tmp_path: Path) -> None:
    seen = browse(page, tmp_path, "--dump-dom")
    assert '<th scope="col" class="number"><button type="button">perplexity</button></th>' in seen
    assert "alert(" not in seen.replace("&lt;script&gt;alert(", "")


@pytest.mark.parametrize(("scheme", "background"), [("1", (255, 255, 255)), ("0", (0x14, 0x17, 0x1A))])
def test_colours_follow_the_system(page: Path, tmp_path: Path, scheme: str, background: tuple[int, int, int]) -> None:
    picture = tmp_path / "page.png"
    options = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=800,600", f"--screenshot={picture}")
    browse(page, tmp_path / "profile", *options)
    assert first_pixel(picture) == background
