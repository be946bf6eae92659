"""The page needs no other file, runs nothing foreign, and its drawings hold the report's numbers in their places."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tomllib
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stages.records.sites import short_name
from stages.report.document import Report
from stages.report.render import render
from stages.report.view import megabytes, percent
from tests.stages.report import sample
from tests.stages.report.parsed import Element, hints, parse, place, rows_of

REPORT = sample.whole_report()
ROOT = Path(__file__).parents[3]
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
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page() -> Element:
    return parse(render(REPORT))


def test_nothing_is_loaded_and_nothing_foreign_runs(page: Element) -> None:
    elements = page.everything()
    assert not {element.tag for element in elements} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    for element in elements:
        for name, value in element.attributes.items():
            assert name not in ("src", "srcset", "style", "action", "data"), (element.tag, name)
            assert not name.startswith("on"), (element.tag, name)
            assert name != "href" or value.startswith("#"), value
    (style,), (script,) = page.all("style"), page.all("script")
    assert "url(" not in style.text
    assert "@import" not in style.text
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\b|WebSocket|eval\(", script.text)
    (policy,) = [element for element in elements if element.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none'")


def test_names_and_texts_are_shown_as_they_are(page: Element) -> None:
    for name in ("h1", "th", "td"):
        assert any(sample.NASTY in element.whole_text() for element in page.all(name)), name
    assert len(page.all("script")) == 1


def test_every_drawing_is_xml_and_says_what_it_is(page: Element) -> None:
    drawings = re.findall(r"<svg .*?</svg>", render(REPORT), re.DOTALL)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    pictures = [svg for svg in page.all("svg") if svg.attributes.get("role") == "img"]
    assert len(pictures) + len([svg for svg in page.all("svg") if "aria-hidden" in svg.attributes]) == len(drawings)
    assert all(picture.attributes["aria-label"] for picture in pictures)
    for figure in page.all("figure"):
        assert figure.all("details")[0].all("table"), figure.attributes


def test_every_class_of_a_drawing_has_a_style(page: Element) -> None:
    (style,) = page.all("style")
    defined = set(re.findall(r"\.([a-z][\w-]*)", style.text))
    used = {name for svg in page.all("svg") for element in svg.everything() for name in element.classes}
    assert used - defined <= {"disc", "diamond", "square"}


def test_nothing_is_cut_off_at_the_edges_of_a_drawing(page: Element) -> None:
    for picture in page.all("svg"):
        left, top, width, height = map(float, picture.attributes["viewbox"].split())
        for element in [*picture.all("text"), *picture.all("rect")]:
            x, y = float(element.attributes["x"]), float(element.attributes["y"])
            size = float(element.attributes.get("width", 6.6 * len(element.text)))
            start = x - size * (0.5 if "middle" in element.classes else 1 if "end" in element.classes else 0)
            assert left <= start <= start + size <= left + width, element
            assert top <= y <= top + height, element
        for mark in picture.all("path"):
            x, y = place(mark) if "transform" in mark.attributes else (0.0, 0.0)
            assert left <= x - 5.5 <= x + 5.5 <= left + width, mark
            assert top <= y - 5.5 <= y + 5.5 <= top + height, mark


def test_losses_are_drawn_for_every_site(page: Element) -> None:
    figure = page.by_id("sites")
    reports = [site.report for site in sample.quantization().sites]
    series = ("rounded to nearest", "as chosen")
    errors = {
        (short_name(report.site), words): error
        for report in reports
        for words, error in zip(series, (report.held_out_loss_rtn, report.held_out_loss), strict=True)
    }
    found = hints(figure)
    expected = {f"{name}, {words}: {percent(error)}": error for (name, words), error in errors.items()}
    assert found.keys() == expected.keys()
    # One scale for all panels: more error stands higher.
    ordered = sorted(found, key=lambda hint: expected[hint] or 0.0)
    assert all(place(found[lower])[1] >= place(found[upper])[1] for lower, upper in pairwise(ordered))
    assert [row[0] for row in rows_of(figure)] == [short_name(report.site) for report in reports]
    first, third = rows_of(figure)[0], rows_of(figure)[2]
    assert first[1:] == [
        "4b32", "0.1 %", "0.0333 %", "0.11 %", "0.04 %", "1 %", "0.5 %", "activation", "0.00", "0.8000",
    ]  # fmt: skip
    assert third[8:] == ["-", "-", "0.8200"]


def test_a_bits_map_has_a_cell_for_every_site_in_its_place(page: Element) -> None:
    quantization = sample.quantization()
    found = hints(page.by_id("bits"))
    cells = {site.report.site: f"{short_name(site.report.site)}: {site.report.format}" for site in quantization.sites}
    assert found.keys() == {*cells.values(), *(f"{short_name(one.site)}: not quantized" for one in quantization.kept)}
    columns: dict[int | None, set[str]] = {}
    rows: dict[str, set[str]] = {}
    colours: dict[str, set[str]] = {}
    for site in quantization.sites:
        cell = found[cells[site.report.site]].attributes
        columns.setdefault(site.layer, set()).add(cell["x"])
        rows.setdefault(site.kind, set()).add(cell["y"])
        colours.setdefault(site.report.format, set()).add(cell["class"])
    for places in (columns, rows, colours):
        assert all(len(values) == 1 for values in places.values())
    assert len(set.union(*rows.values())) == len(rows)
    assert len(set.union(*colours.values())) == len(colours)


def test_there_is_no_bits_map_where_all_formats_are_alike() -> None:
    known = sample.quantization()
    sites = tuple(replace(site, report=replace(site.report, format="4b32")) for site in known.sites)
    page = parse(render(Report(quantization=replace(known, sites=sites))))
    assert [figure.attributes["id"] for figure in page.all("figure")] == ["sizes", "sites"]


def test_bars_are_as_long_as_their_bytes(page: Element) -> None:
    found = hints(page.by_id("sizes"))
    sizes = {
        f"{model}, {part.name}: {megabytes(size)} MB": size
        for part in sample.quantization().sizes
        for model, size in (("base", part.before), ("quantized", part.after))
    }
    assert found.keys() == sizes.keys()
    scales = [float(found[hint].attributes["width"]) / size for hint, size in sizes.items() if size > 10**7]
    assert max(scales) == pytest.approx(min(scales), rel=1e-3)
    for model in ("base", "quantized"):
        bars = [bar.attributes for hint, bar in found.items() if hint.startswith(model)]
        for left, right in pairwise(bars):
            assert float(right["x"]) == pytest.approx(float(left["x"]) + float(left["width"]), abs=0.02)


def test_positions_are_drawn_for_every_model_but_the_base(page: Element) -> None:
    expected = {}
    for row in sample.evaluation().rows[1:]:
        for part in row.positions:
            where = f"{row.name}, positions {part.first}-{part.last}"
            expected[f"{where}, mean: {part.mean_divergence:.4g}"] = part.mean_divergence
            expected[f"{where}, 99th percentile: {part.divergence_99:.4g}"] = part.divergence_99
    for index in range(2):
        found = hints(page.by_id(f"positions-{index}"))
        assert found.keys() == expected.keys()
        ordered = sorted(found, key=expected.__getitem__)
        assert all(place(found[lower])[1] >= place(found[upper])[1] for lower, upper in pairwise(ordered))


def test_the_pareto_front_is_drawn_through_the_models_that_nothing_beats(page: Element) -> None:
    figure = page.by_id("front-0")
    small, large, beaten = "small: 285.7 MB, 0.2", "large: 297.0 MB, 0.1", "beaten: 297.0 MB, 0.3"
    found = hints(figure)
    assert found.keys() == {small, large, beaten}
    assert found[small].classes == found[large].classes != found[beaten].classes
    (line,) = figure.all("polyline")
    through = [tuple(map(float, point.split(","))) for point in line.attributes["points"].split()]
    assert through == [place(found[small]), place(found[large])]
    assert through[0][0] < through[1][0] == place(found[beaten])[0]
    assert [row[:2] for row in rows_of(figure)] == [["*", "small"], ["*", "large"], ["", "beaten"], ["", "failed"]]
    assert rows_of(figure)[3][2] == "it failed"


def test_tables_hold_the_figures(page: Element) -> None:
    (accuracy,) = page.by_id("accuracy-0").all("tbody")
    cells = [[cell.whole_text() for cell in row.all("td")] for row in accuracy.all("tr")]
    assert cells[1] == ["int4", "13.600", "0.10000", "0.6000", "90 %", "900.0", "90 %"]
    worst = page.by_id("worst-0").whole_text()
    assert "some text⏎before" in worst
    assert "“ a” 50.0 → 25.0 %" in worst
    speed = page.by_id("speed").whole_text()
    assert "1 thread, on a machine" in speed
    assert "20.0 (18.5 to 21.2)" in speed
    assert "3.00x" in speed
    assert "0.7500 ± 0.1250" in page.by_id("tasks").whole_text()
    assert "12 of 13" in page.by_id("checks").whole_text()
    for element in page.all("td"):
        if re.fullmatch(r"[\d,.]+( %)?", element.whole_text()) and "number" not in element.classes:
            raise AssertionError(f"{element.whole_text()} isn't aligned as a number")


def test_what_is_not_there_is_not_shown() -> None:
    empty = parse(render(Report()))
    assert empty.all("section") == []
    rounded = sample.quantization()
    sites = tuple(
        replace(
            site,
            report=replace(
                site.report,
                loss_rtn=None,
                loss=None,
                held_out_loss_rtn=None,
                held_out_loss=None,
                alpha=None,
                scale_family="identity",
                mean_clip_ratio=None,
                block_loss_start=None,
                block_loss=None,
            ),
        )
        for site in rounded.sites
    )
    page = parse(render(Report(quantization=replace(rounded, sites=sites, sizes=(), verified=None))))
    assert [figure.attributes["id"] for figure in page.all("figure")] == ["bits", "sites"]
    # A column that would be empty is left out.
    assert {len(row) for row in rows_of(page.by_id("sites"))} == {2}
    assert page.by_id("sites").all("svg") == []


def test_many_layers_and_experts_and_losses_of_zero_are_drawn() -> None:
    site = sample.quantized_site(0, "mlp/experts.0/down_proj", 0)
    sites = tuple(
        replace(
            site,
            layer=layer,
            kind=f"mlp/experts.{expert}/down_proj",
            report=replace(
                site.report,
                site=f"/model/layers.{layer}/mlp/experts.{expert}/down_proj/MatMul",
                held_out_loss=0.0 if layer == 3 else 0.001,
            ),
        )
        for layer in range(96)
        for expert in range(4)
    )
    page = parse(render(Report(quantization=replace(sample.quantization(), sites=sites))))
    figure = page.by_id("sites")
    assert len(figure.all("svg")) == 2 + 1  # the legend's two, and one panel for all experts
    heights = {hint.endswith(": 0 %"): place(mark)[1] for hint, mark in hints(figure).items() if "chosen" in hint}
    assert heights[True] == max(place(mark)[1] for mark in hints(figure).values()) > heights[False]


def test_a_page_depends_only_on_its_report() -> None:
    assert render(REPORT) == render(sample.whole_report())


def test_files_of_the_page_are_part_of_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = package["tool"]["setuptools"]["package-data"]["*"]
    there = [
        file for file in (ROOT / "stages" / "report" / "page").iterdir() if file.is_file() and file.suffix != ".py"
    ]
    assert there
    assert all(any(file.match(pattern) for pattern in patterns) for file in there)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(sample.whole_report()), encoding="utf-8")
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
    # After the row's filter byte; the first pixel has no neighbours that a filter could have taken off.
    red, green, blue = zlib.decompress(packed)[1:4]
    return red, green, blue


@in_browser
def test_the_script_makes_headings_buttons(page_file: Path, tmp_path: Path) -> None:
    seen = browse(page_file, tmp_path, "--dump-dom")
    assert '<th scope="col" class="number"><button type="button">perplexity</button></th>' in seen
    assert "alert(" not in seen.replace("&lt;script&gt;alert(", "")


@in_browser
@pytest.mark.parametrize(("scheme", "background"), [("1", (255, 255, 255)), ("0", (0x14, 0x17, 0x1A))])
def test_colours_follow_the_system(
    page_file: Path, tmp_path: Path, scheme: str, background: tuple[int, int, int]
) -> None:
    picture = tmp_path / "page.png"
    options = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=800,600", f"--screenshot={picture}")
    browse(page_file, tmp_path / "profile", *options)
    assert first_pixel(picture) == background
