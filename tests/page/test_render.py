"""The page: whole, alone, safe, and its drawings hold the report's numbers where they belong."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stages.page.document import Document
from stages.page.render import render
from stages.site_names import short_name
from tests.page import documents
from tests.page.parsed import Element, height, marks, parse, rows_of

DOCUMENT = documents.whole_document()
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def page() -> Element:
    return parse(render(DOCUMENT))


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
        assert any(documents.NASTY in element.whole_text() for element in page.all(name)), name
    assert len(page.all("script")) == 1


def test_every_drawing_is_xml_and_says_what_it_is(page: Element) -> None:
    drawings = re.findall(r"<svg .*?</svg>", render(DOCUMENT), re.DOTALL)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    pictures = [svg for svg in page.all("svg") if svg.attributes.get("role") == "img"]
    assert len(pictures) + len([svg for svg in page.all("svg") if "aria-hidden" in svg.attributes]) == len(drawings)
    for picture in pictures:
        title, description = picture.attributes["aria-labelledby"].split()
        assert page.by_id(title).text
        assert page.by_id(description).text
    for figure in page.all("figure"):
        assert figure.all("details")[0].all("table"), figure.attributes


def test_every_class_of_a_drawing_has_a_colour(page: Element) -> None:
    (style,) = page.all("style")
    defined = set(re.findall(r"\.([a-z][\w-]*)", style.text))
    used = {name for svg in page.all("svg") for element in svg.everything() for name in element.classes}
    plain = {"on-s1", "on-s2", "on-s3", "on-s4", "on-s6", "on-s8", "on-b4c", "on-b8a", "on-b8b", "on-b8c"}
    assert used - defined <= plain, used - defined - plain


def test_losses_are_drawn_for_every_site(page: Element) -> None:
    figure = page.by_id("losses")
    reports = [site.report for site in documents.quantization().sites]
    expected = {(short_name(report.site), "rounded", str(report.held_out_loss_rtn)) for report in reports}
    expected |= {(short_name(report.site), "chosen", str(report.held_out_loss)) for report in reports}
    found = marks(figure)
    assert {(name, series, value) for name, series, value, _ in found} == expected
    assert len(found) == len(expected)
    # One scale for all panels: more error stands higher.
    ordered = sorted(found, key=lambda mark: float(mark[2]))
    assert all(height(lower[3]) >= height(upper[3]) for lower, upper in pairwise(ordered))
    assert [row[0] for row in rows_of(figure)] == [short_name(report.site) for report in reports]
    assert rows_of(figure)[0][2:] == ["0.1 %", "0.0333 %", "0.11 %", "0.04 %"]


def test_choices_are_drawn_for_every_site(page: Element) -> None:
    reports = [site.report for site in documents.quantization().sites]
    scales = marks(page.by_id("scales"))
    assert {(name, series, value) for name, series, value, _ in scales} == {
        (short_name(report.site), report.scale_family, "none" if report.alpha is None else str(report.alpha))
        for report in reports
    }
    shapes = {series: element.tag for _, series, _, element in scales}
    assert shapes["activation"] != shapes["duo"]
    clips = marks(page.by_id("clips"))
    assert {(name, value) for name, _, value, _ in clips} == {
        (short_name(report.site), str(report.mean_clip_ratio)) for report in reports
    }
    ordered = sorted(clips, key=lambda mark: float(mark[2]))
    assert all(height(lower[3]) > height(upper[3]) for lower, upper in pairwise(ordered))


def test_blocks_are_drawn_once_a_layer(page: Element) -> None:
    found = {(name, series): float(value) for name, series, value, _ in marks(page.by_id("blocks"))}
    assert found == {
        (f"layers.{layer}", series): start * (1 + layer)
        for layer in range(4)
        for series, start in (("before", 0.01), ("tuned", 0.005))
    }


def test_the_bits_map_has_a_cell_for_every_site_in_its_place(page: Element) -> None:
    quantization = documents.quantization()
    found = marks(page.by_id("bits"))
    expected = {(short_name(site.report.site), site.report.format) for site in quantization.sites}
    expected |= {(short_name(one.site), "as it was") for one in quantization.kept}
    assert {(name, value) for name, _, value, _ in found} == expected
    columns: dict[int | None, set[float]] = {}
    rows: dict[str, set[float]] = {}
    cells = {name: element for name, _, _, element in found}
    for site in quantization.sites:
        cell = cells[short_name(site.report.site)]
        columns.setdefault(site.layer, set()).add(float(cell.attributes["x"]))
        rows.setdefault(site.kind, set()).add(float(cell.attributes["y"]))
    assert all(len(places) == 1 for places in (*columns.values(), *rows.values()))
    assert len(set.union(*rows.values())) == len(rows)
    colours = {value: element.classes for _, _, value, element in found}
    assert len({frozenset(classes) for classes in colours.values()}) == len(colours)


def test_bars_are_as_long_as_their_bytes(page: Element) -> None:
    sizes = documents.quantization().sizes
    found = marks(page.by_id("sizes"))
    assert {(series, name): int(value) for name, series, value, _ in found} == {
        (model, part.name): size for part in sizes for model, size in (("base", part.before), ("quantized", part.after))
    }
    scales = [float(bar.attributes["width"]) / int(value) for _, _, value, bar in found if int(value) > 10**7]
    assert max(scales) == pytest.approx(min(scales), rel=1e-3)
    for model in ("base", "quantized"):
        bars = [bar for _, series, _, bar in found if series == model]
        for left, right in pairwise(bars):
            end = float(left.attributes["x"]) + float(left.attributes["width"])
            assert float(right.attributes["x"]) == pytest.approx(end, abs=0.02)


def test_positions_are_drawn_for_every_model_but_the_base(page: Element) -> None:
    for index in range(2):
        found = marks(page.by_id(f"positions-{index}"))
        expected = set()
        for row in documents.evaluation().rows[1:]:
            for part in row.positions:
                where = f"{row.name}, positions {part.first}-{part.last}"
                expected |= {(where, "mean", str(part.mean_divergence))}
                expected |= {(where, "99th percentile", str(part.divergence_99))}
        assert {(name, series, value) for name, series, value, _ in found} == expected
        ordered = sorted(found, key=lambda mark: float(mark[2]))
        assert all(height(lower[3]) >= height(upper[3]) for lower, upper in pairwise(ordered))


def test_the_front_is_drawn_through_the_models_that_nothing_beats(page: Element) -> None:
    figure = page.by_id("front-0")
    found = {name: (series, float(value), element) for name, series, value, element in marks(figure)}
    assert {name: found[name][:2] for name in found} == {
        "small": ("front", 0.2),
        "large": ("front", 0.1),
        "beaten": ("beaten", 0.3),
    }
    (line,) = figure.all("polyline")
    first, second = (tuple(map(float, point.split(","))) for point in line.attributes["points"].split())
    assert first[0] < second[0]
    assert first[1] == pytest.approx(height(found["small"][2]), abs=0.02)
    assert second[1] == pytest.approx(height(found["large"][2]), abs=0.02)
    assert rows_of(figure)[3][1:3] == ["failed", "it failed"]
    assert [row[0] for row in rows_of(figure)] == ["*", "*", "", ""]


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
    empty = parse(render(Document()))
    assert empty.all("section") == []
    rounded = documents.quantization()
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
                block_loss=None,
            ),
        )
        for site in rounded.sites
    )
    page = parse(render(Document(quantization=replace(rounded, sites=sites, sizes=(), verified=None))))
    assert [figure.attributes["id"] for figure in page.all("figure")] == ["bits"]


def test_many_layers_and_experts_and_losses_of_zero_are_drawn() -> None:
    site = documents.quantized_site(0, "mlp/experts.0/down_proj", 0)
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
    page = parse(render(Document(quantization=replace(documents.quantization(), sites=sites))))
    assert len(page.by_id("losses").all("svg")) == 2 + 1  # the legend's two, and one panel for all experts
    assert len(marks(page.by_id("bits"))) == len(sites) + 1
    lowest = max(height(mark) for _, _, _, mark in marks(page.by_id("losses")))
    assert {height(mark) for name, _, value, mark in marks(page.by_id("losses")) if float(value) == 0} == {lowest}


def test_a_page_depends_on_its_report_alone() -> None:
    assert render(DOCUMENT) == render(documents.whole_document())


def test_files_of_the_page_are_part_of_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = package["tool"]["setuptools"]["package-data"]["*"]
    there = [file for file in (ROOT / "stages" / "page").iterdir() if file.is_file() and file.suffix != ".py"]
    assert there
    assert all(any(file.match(pattern) for pattern in patterns) for file in there)
