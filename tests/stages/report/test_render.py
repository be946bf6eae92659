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
from stages.report.document import KeptSite, Report
from stages.report.render import render
from stages.report.values import grade_divergence, grade_perplexity, grade_speed, grade_top1, megabytes, percent
from tests.stages.report import sample
from tests.stages.report.parsed import Element, cells_of, hints, parse, place

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
        assert figure.all("table") or figure.attributes["id"] == "bits", figure.attributes


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
            if "transform" in element.attributes:  # upright, with its middle at (x, y)
                assert top <= y - size / 2 <= y + size / 2 <= top + height, element
                continue
            start = x - size * (0.5 if "middle" in element.classes else 1 if "end" in element.classes else 0)
            assert left <= start <= start + size <= left + width, element
            assert top <= y <= top + height, element
        for mark in picture.all("path"):
            x, y = place(mark) if "transform" in mark.attributes else (0.0, 0.0)
            assert left <= x - 5.5 <= x + 5.5 <= left + width, mark
            assert top <= y - 5.5 <= y + 5.5 <= top + height, mark


def test_losses_are_drawn_for_every_site(page: Element) -> None:
    figure = page.by_id("sites")
    inside = [site for site in sample.quantization().sites if site.layer is not None]
    reports = [site.report for site in inside]
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
    assert len(figure.all("svg")) == 2 + 3  # the legend's two, and a panel for each kind in the layers


def test_errors_are_of_unseen_text_where_all_that_are_drawn_are() -> None:
    known = sample.quantization()
    first, *others = known.sites
    unknown = dict.fromkeys(("loss_rtn", "loss", "held_out_loss_rtn", "held_out_loss"))
    imported = replace(first, report=replace(first.report, **unknown))
    for sites, where in (
        ((imported, *others), "text that the search never saw"),
        ((replace(first, report=replace(first.report, held_out_loss=None)), *others), "the calibration text"),
    ):
        page = parse(render(Report(quantization=replace(known, sites=sites))))
        assert f"relative to the output, on {where}; lower" in page.by_id("sites").whole_text()


def test_tables_of_sites_group_what_is_alike_and_hold_every_number(page: Element) -> None:
    known = sample.quantization().sites
    figure = page.by_id("sites")
    grouped, whole = (cells_of(table) for table in figure.all("table"))
    assert [row[0] for row in whole] == [short_name(site.report.site) for site in known]
    assert whole[0][1:] == [
        "0", "INT4, a scale for every 32 weights", "0.0", "0.1 %", "0.0333 %", "0.11 %", "0.04 %", "1 %", "0.5 %",
        "activation", "0.00", "0.800",
    ]  # fmt: skip
    assert whole[2][10:] == ["-", "-", "0.820"]
    # One row for the four layers of a kind, with ranges; errors on the calibration text are in the other table only.
    assert [row[:3] for row in grouped] == [
        ["4 x attn/qkv_proj", "0-3", "INT4, a scale for every 32 weights"],
        ["4 x attn/o_proj", "0-3", "INT8, a scale for every 128 weights"],
        ["4 x mlp/down_proj", "0-3", "INT8, a scale for every output channel"],
        ["1 x lm_head", "-", "INT4, a scale for every 32 weights"],
    ]
    assert grouped[0][4:6] == ["0.11 to 1.87 %", "0.04 to 0.68 %"]
    assert grouped[0][8:] == ["activation", "0.00 to 0.60", "0.800 to 0.890"]


def test_a_bits_map_has_a_cell_for_every_site_in_its_place(page: Element) -> None:
    quantization = sample.quantization()
    found = hints(page.by_id("bits"))
    sites = [site for site in quantization.sites if site.layer is not None]
    cells = {site.report.site: f"{short_name(site.report.site)}: {site.report.format}" for site in sites}
    assert found.keys() == {*cells.values(), *(f"{short_name(one.site)}: not quantized" for one in quantization.kept)}
    columns: dict[int | None, set[str]] = {}
    rows: dict[str, set[str]] = {}
    colours: dict[str, set[str]] = {}
    for site in sites:
        cell = found[cells[site.report.site]].attributes
        columns.setdefault(site.layer, set()).add(cell["x"])
        rows.setdefault(site.kind, set()).add(cell["y"])
        colours.setdefault(site.report.format, set()).add(cell["class"])
    for places in (columns, rows, colours):
        assert all(len(values) == 1 for values in places.values())
    assert len(set.union(*rows.values())) == len(rows)
    assert len(set.union(*colours.values())) == len(colours)


def test_there_is_no_bits_map_where_the_layers_formats_are_alike() -> None:
    known = sample.quantization()
    sites = tuple(
        replace(site, report=replace(site.report, format="4b32" if site.layer is not None else "8ch"))
        for site in known.sites
    )
    kept = (KeptSite(site="/lm_head/MatMul", layer=None, kind="lm_head", reason="as asked"),)
    page = parse(render(Report(quantization=replace(known, sites=sites, kept=kept))))
    assert [figure.attributes["id"] for figure in page.all("figure")] == ["unmeasured", "sizes", "sites", "checks"]


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
    assert [text.text for text in figure.all("text") if text.classes & {"halo"}] == ["large", "small", "beaten"]
    table, commands = (cells_of(table) for table in figure.all("table"))
    assert [row[:2] for row in table] == [["", "base"], ["*", "small"], ["*", "large"], ["", "beaten"], ["", "failed"]]
    assert table[1][2:8] == ["0.20000 fair", "1.2000", "80 % fair", "13.700 good", "285.7", "28.6 %"]
    assert table[4][-1] == "it failed"
    assert commands[0][1] == "python -m stages.quantize --output_path=small"


def test_tables_hold_the_figures(page: Element) -> None:
    (accuracy,) = page.by_id("kl").all("table")
    assert cells_of(accuracy)[1] == [
        "news.txt", "int4", "0.10000 fair", "90 % good", "13.600 excellent", "0.6000", "900.0", "90 %",
    ]  # fmt: skip
    assert [row[:2] for row in cells_of(accuracy)] == [
        [text, name] for text in ("news.txt", "offline") for name in ("base", "int4", "int8")
    ]
    worst = page.by_id("worst-0").whole_text()
    assert "some text⏎before" in worst
    assert "“ a” 50.0 → 25.0 %" in worst
    speed = page.by_id("speed").whole_text()
    assert "1 thread, on a machine" in speed
    assert "20.0 (18.5 to 21.2)" in speed
    assert "3.00x excellent" in speed
    assert "0.7500 ± 0.1250" in page.by_id("tasks").whole_text()
    assert "12 of 13" in page.by_id("checks").whole_text()
    for element in page.all("td"):
        if re.fullmatch(r"[\d,]+( %|\.\d+)", element.whole_text()) and "number" not in element.classes:
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
    assert [figure.attributes["id"] for figure in page.all("figure")] == ["unmeasured", "bits", "sites", "checks"]
    # A column that would be empty is left out.
    assert {len(row) for table in page.by_id("sites").all("table") for row in cells_of(table)} == {4}
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


def test_the_head_says_how_it_was_made_and_the_first_numbers_are_the_accuracys(page: Element) -> None:
    (head,) = page.all("header")
    facts = {div.all("dt")[0].text: div.all("dd")[0].text for div in head.all("div")}
    assert facts == {
        "base": "smollm, 1,800.1 MB, fingerprint aaaaaaaaaaaa",
        "formats": "5 MatMuls as INT4, a scale for every 32 weights; 4 MatMuls as INT8, a scale for every 128 weights; "
        "4 MatMuls as INT8, a scale for every output channel; embedding embed as INT4, by rows; "
        "1 MatMul as in the base",
        "algorithm": f"awq_full {sample.NASTY}",
        "calibration text": "a text: 29 windows",
        "made": "2026-11-29 13:08 UTC, genai-quant 1.2, a machine",
        "command": "genai-quant quantize --onnx_path smollm",
    }
    one = replace(sample.evaluation(), rows=sample.evaluation().rows[:2])
    tiles = parse(render(replace(REPORT, evaluations=(one,)))).all("li")
    assert [[part.whole_text() for part in tile.all("span")] for tile in tiles[:2]] == [
        ["KL divergence on news.txt", "0.1000 nats", "perplexity 13.50 → 13.60, same top-1 90 %", "fair"],
        ["size", "560.1 MB", "base 1,800.1 MB, 3.21x smaller"],
    ]
    assert page.all("section")[0].attributes["id"] == "accuracy"
    # What earlier versions didn't record is left out, and the base is taken from the evaluations.
    known = parse(render(Report(evaluations=(one,)))).all("dd")
    assert [fact.text for fact in known] == ["base, 1,000.0 MB, fingerprint ffffffffffff"]


@pytest.mark.parametrize(
    ("change", "grades"),
    [
        (0.009, ["excellent"] * 3),
        (0.049, ["good", "good", "excellent"]),
        (0.099, ["fair", "fair", "good"]),
        (0.199, ["fair", "fair", "fair"]),
        (0.26, ["poor"] * 3),
    ],
)
def test_numbers_are_graded_on_the_scale_that_the_page_states(change: float, grades: list[str]) -> None:
    base = sample.model_row("base", 0.0).accuracy
    model = replace(base, mean_divergence=change, perplexity=base.perplexity * (1 + change), top1_agreement=1 - change)
    found = [grade_divergence(model), grade_perplexity(model, base), grade_top1(model)]
    assert [grade.value for grade in found] == grades


def test_the_page_states_its_scale(page: Element) -> None:
    (scale,) = page.by_id("scale").all("table")
    assert cells_of(scale)[1] == [" good", "0.05 or less", "90 % or more", "5 % or less", "1.1x or more"]
    assert [row[0].strip() for row in cells_of(scale)] == ["excellent", "good", "fair", "poor"]


@pytest.mark.parametrize(("ratio", "word"), [(1.5, "excellent"), (1.2, "good"), (1.0, "fair"), (0.9, "poor")])
def test_a_model_slower_than_its_base_is_poor(ratio: float, word: str) -> None:
    assert grade_speed(ratio).value == word


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
