"""Drawings of what each site lost and what was chosen for it, one panel for each kind of site."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stages.page.document import QuantizedSite
from stages.page.svg import Axis, Drawing, Hint, Shape, drawing, linear_axis, log_axis
from stages.page.view import Figure, LegendEntry, number, percent, table
from stages.records import SiteReport
from stages.site_names import short_name

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 30, 34
_LARGEST_MARK, _SMALLEST_MARK = 4.0, 1.5
_OUTSIDE = "outside the layers"
_SCALES: dict[str, tuple[str, Shape, str]] = {
    "activation": ("a^r: from activations", "disc", "c1"),
    "duo": ("duo: from activations and weights", "diamond", "c2"),
    "identity": ("none", "ring", "c0"),
}
"""Family of an input scale: its words, shape and colour."""


def loss_figure(sites: Sequence[QuantizedSite]) -> Figure | None:
    """Output error of every site as rounding would give it and as chosen; None where nothing was measured."""
    pairs = {site.report.site: losses for site in sites if (losses := _losses(site.report)) is not None}
    measured = [site for site in sites if site.report.site in pairs]
    if not measured:
        return None
    y = log_axis([value for pair in pairs.values() for value in pair], _HEIGHT - _BOTTOM, _TOP)
    drawings = []
    for panel in _panels("losses", measured, y, percent):
        for site in panel.sites:
            panel.draw_fall(site, ("rounded", "chosen"), pairs[site.report.site])
        drawings.append(panel.drawing.markup())
    return Figure(
        name="losses",
        heading="Error of each site's output",
        text=f"Mean squared error relative to the output, {_which(measured)}. Each line falls from what rounding to "
        "nearest would give to what was chosen; the scale is logarithmic and the same in all panels.",
        drawings=tuple(drawings),
        legend=_fall_legend("rounded to nearest", "as chosen"),
        table=table(
            ("site", "format", "rounded", "chosen", "rounded, unseen text", "chosen, unseen text"),
            [_loss_row(site.report) for site in measured],
            texts=2,
        ),
        small=True,
    )


def _losses(report: SiteReport) -> tuple[float, float] | None:
    """Rounded and chosen, on held-out text where there is some."""
    for rounded, chosen in ((report.held_out_loss_rtn, report.held_out_loss), (report.loss_rtn, report.loss)):
        if rounded is not None and chosen is not None:
            return rounded, chosen
    return None


def _which(sites: Sequence[QuantizedSite]) -> str:
    held_out = all(site.report.held_out_loss is not None for site in sites)
    return "on text that the search didn't see" if held_out else "on the calibration text"


def _loss_row(report: SiteReport) -> tuple[str, ...]:
    losses = (report.loss_rtn, report.loss, report.held_out_loss_rtn, report.held_out_loss)
    return (short_name(report.site), report.format, *map(percent, losses))


def scale_figure(sites: Sequence[QuantizedSite]) -> Figure | None:
    """Family and exponent of each input scale; None where none was searched."""
    searched = [site for site in sites if site.report.loss is not None]
    if not any(site.report.alpha is not None for site in searched):
        return None
    y = Axis(low=0, high=1, start=_HEIGHT - _BOTTOM, end=_TOP)
    drawings = []
    for panel in _panels("scales", searched, y, _plain):
        for site in panel.sites:
            words, shape, css = _SCALES[site.report.scale_family]
            name, alpha = short_name(site.report.site), site.report.alpha
            text = f"{name}: {words}" + ("" if alpha is None else f", exponent {alpha:.2g}")
            value: float | str = "none" if alpha is None else alpha
            hint = Hint(text=text, name=name, series=site.report.scale_family, value=value)
            panel.drawing.mark(panel.place(site), y(alpha or 0), panel.size, shape, css, hint)
        drawings.append(panel.drawing.markup())
    return Figure(
        name="scales",
        heading="Input scales (AWQ)",
        text="The exponent that was chosen for each site's input scale, from 0 (all channels alike) to 1, and what the "
        "scale is made from.",
        drawings=tuple(drawings),
        legend=tuple(LegendEntry(text=text, shape=shape, css=css) for text, shape, css in _SCALES.values()),
        table=table(
            ("site", "scale", "exponent"),
            [
                (short_name(site.report.site), site.report.scale_family, number(site.report.alpha, ".2f"))
                for site in searched
            ],
            texts=2,
        ),
        small=True,
    )


def clip_figure(sites: Sequence[QuantizedSite]) -> Figure | None:
    """Mean share of its range that each site keeps; None where no range was searched."""
    ratios = {
        site.report.site: site.report.mean_clip_ratio for site in sites if site.report.mean_clip_ratio is not None
    }
    clipped = [site for site in sites if site.report.site in ratios]
    if not clipped:
        return None
    y = linear_axis([*ratios.values(), 1.0], _HEIGHT - _BOTTOM, _TOP)
    drawings = []
    for panel in _panels("clips", clipped, y, _plain):
        panel.drawing.line(_LEFT, y(1), _WIDTH - _RIGHT, y(1), "axis")
        for site in panel.sites:
            name, ratio = short_name(site.report.site), ratios[site.report.site]
            hint = Hint(text=f"{name}: {ratio:.3f}", name=name, series="clip", value=ratio)
            panel.drawing.mark(panel.place(site), y(ratio), panel.size, "square", "c3", hint)
        drawings.append(panel.drawing.markup())
    return Figure(
        name="clips",
        heading="Ranges (clipping)",
        text="How much of its largest weight a block's range keeps, mean over the site's blocks: 1, the darker line, "
        "clips nothing; above it a range reaches beyond.",
        drawings=tuple(drawings),
        legend=(LegendEntry(text="mean clip ratio", shape="square", css="c3"),),
        table=table(
            ("site", "mean clip ratio"),
            [(short_name(site.report.site), f"{ratios[site.report.site]:.4f}") for site in clipped],
        ),
        small=True,
    )


def block_figure(sites: Sequence[QuantizedSite]) -> Figure | None:
    """Error of each decoder block's output before and after tuning; None where no block was tuned."""
    tuned = {
        site.layer: (site, (site.report.block_loss_start, site.report.block_loss))
        for site in sites
        if site.layer is not None and site.report.block_loss_start is not None and site.report.block_loss is not None
    }
    pairs = {layer: (start or 0.0, kept or 0.0) for layer, (_, (start, kept)) in tuned.items()}
    if not pairs:
        return None
    y = log_axis([value for pair in pairs.values() for value in pair], _HEIGHT - _BOTTOM, _TOP)
    places = {site.report.site: float(layer) for layer, (site, _) in tuned.items()}
    panel = _panel("blocks-0", "decoder blocks", [site for site, _ in tuned.values()], places, y, percent)
    for layer, (site, _) in tuned.items():
        panel.draw_fall(site, ("before", "tuned"), pairs[layer], f"layers.{layer}")
    return Figure(
        name="blocks",
        heading="Error of each decoder block's output",
        text="Mean squared error on held-out text relative to each token's squared length, before and after the blocks "
        "were gone through one by one.",
        drawings=(panel.drawing.markup(),),
        legend=_fall_legend("before", "tuned"),
        table=table(
            ("layer", "before", "tuned"),
            [(str(layer), percent(start), percent(kept)) for layer, (start, kept) in pairs.items()],
            texts=0,
        ),
        small=True,
    )


def _fall_legend(before: str, after: str) -> tuple[LegendEntry, LegendEntry]:
    return LegendEntry(text=before, shape="ring", css="c0"), LegendEntry(text=after, shape="disc", css="c1")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    """One drawing with its axes, and the sites that belong into it."""

    drawing: Drawing
    sites: Sequence[QuantizedSite]
    places: Mapping[str, float]
    """By site."""
    x: Axis
    y: Axis
    size: float
    """Of a mark, so that neighbours don't touch."""

    def place(self, site: QuantizedSite) -> float:
        return self.x(self.places[site.report.site])

    def draw_fall(
        self, site: QuantizedSite, series: tuple[str, str], pair: tuple[float, float], name: str | None = None
    ) -> None:
        """A line from the first value, a ring, to the second one, a disc."""
        name = name or short_name(site.report.site)
        # A loss of 0 has no place on a logarithmic axis; it stands at its foot.
        start, end = (self.y(max(value, self.y.low)) for value in pair)
        hints = [
            Hint(text=f"{name}: {word} {percent(value)}", name=name, series=word, value=value)
            for word, value in zip(series, pair, strict=True)
        ]
        at = self.place(site)
        self.drawing.line(at, start, at, end, "stem")
        self.drawing.mark(at, start, self.size, "ring", "c0", hints[0])
        self.drawing.mark(at, end, self.size, "disc", "c1", hints[1])


def _panels(name: str, sites: Sequence[QuantizedSite], y: Axis, words: Callable[[float], str]) -> Iterable[_Panel]:
    """One panel a kind, those outside the layers in the last one."""
    kinds: dict[str, list[QuantizedSite]] = defaultdict(list)
    outside = [site for site in sites if site.layer is None]
    for site in sites:
        if site.layer is not None:
            # Experts are many; they share a panel.
            kinds[re.sub(r"\d+", "*", site.kind)].append(site)
    for index, (kind, members) in enumerate(kinds.items()):
        places = {site.report.site: float(site.layer or 0) for site in members}
        yield _panel(f"{name}-{index}", kind, members, places, y, words)
    if outside:
        places = {site.report.site: float(place) for place, site in enumerate(outside)}
        heading = outside[0].kind if len(outside) == 1 else _OUTSIDE
        yield _panel(f"{name}-{len(kinds)}", heading, outside, places, y, words, axis="")


def _panel(
    name: str,
    heading: str,
    sites: Sequence[QuantizedSite],
    places: Mapping[str, float],
    y: Axis,
    words: Callable[[float], str],
    axis: str = "layer",
) -> _Panel:
    panel = drawing(name, heading, f"{len(sites)} sites; the table below has the numbers.", _WIDTH, _HEIGHT)
    panel.text(_LEFT, 16, heading, "panel-title")
    for value in y.ticks():
        panel.line(_LEFT, y(value), _WIDTH - _RIGHT, y(value), "grid")
        panel.text(_LEFT - 6, y(value) + 4, words(value), "tick", "end")
    first, last = min(places.values()), max(places.values())
    x = Axis(low=first - 0.5, high=last + 0.5, start=_LEFT, end=_WIDTH - _RIGHT)
    panel.line(_LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, "axis")
    if axis:
        for value in x.ticks():
            if value == int(value) and first <= value <= last:
                panel.text(x(value), _HEIGHT - _BOTTOM + 16, f"{value:.0f}", "tick", "middle")
        panel.text(_WIDTH - _RIGHT, _HEIGHT - 4, axis, "tick", "end")
    step = (x.end - x.start) / (x.high - x.low)
    size = min(_LARGEST_MARK, max(_SMALLEST_MARK, 0.42 * step))
    return _Panel(drawing=panel, sites=sites, places=places, x=x, y=y, size=size)


def _plain(value: float) -> str:
    return f"{value:g}"
