"""Charts as inline SVG: lines and bars over a linear or a logarithmic axis. Colours are the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 44
SERIES = 6
"""Colours that the page has."""
COLORS = ("#2f6fb3", "#d97a22", "#3b8f5a", "#a3478f", "#7a6a2c", "#4f5d75")
CSS = """
svg{font-family:system-ui,"DejaVu Sans",sans-serif}.head{font-size:14px;font-weight:600;fill:#23211f}
.grid{stroke:#e6e1da}.tick,.value{fill:#6d6862;font-size:11px}.value{font-size:10px}
.line{fill:none;stroke:var(--c);stroke-width:1.8}.limit{fill:none;stroke:var(--c);stroke-dasharray:5 4}
.dot,.bar{fill:var(--c)}""" + "".join(f".c{i}{{--c:{color}}}" for i, color in enumerate(COLORS))
"""Of charts without a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """values: one an x; None or 0 on a logarithmic axis leaves a gap, or stands at the bottom. limit: a dashed line."""

    name: str
    values: Sequence[float | None]
    color: int = 0
    limit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """From `low` to `high`. log: in powers of ten."""

    low: float
    high: float
    log: bool

    def at(self, value: float) -> float:
        """Pixels from the top."""
        a, b, v = (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        share = (min(max(v, a), b) - a) / (b - a)
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        """Where the grid stands."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**e for e in range(first, last + 1, max(1, (last - first) // 6))]
        return [self.low + (self.high - self.low) * i / 4 for i in range(5)]

    def label(self, value: float) -> str:
        """Of a tick."""
        return f"1e{round(math.log10(value))}" if self.log else f"{value:.4g}"


def log_axis(values: Sequence[float | None]) -> Axis:
    """Whole powers of ten around what is above 0."""
    found = [v for v in values if v is not None and v > 0 and math.isfinite(v)] or [1e-9, 1.0]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    return Axis(low=10.0**low, high=10.0 ** max(high, low + 1), log=True)


def lines(series: Sequence[Series], labels: Sequence[str], axis: Axis, title: str, dots: bool = False) -> str:
    """A line for each series over the same x. labels: of each x; as many are written as fit."""
    step = (WIDTH - LEFT - RIGHT) / max(1, len(labels) - 1)
    marks = [_frame(axis), _names(labels, step, LEFT)]
    for s in series:
        points: list[list[str]] = [[]]
        for i, v in enumerate(s.values):
            if v is None or not math.isfinite(v):
                points.append([])
            else:
                points[-1].append(f"{LEFT + i * step:.1f},{axis.at(v if v > 0 or not axis.log else axis.low):.1f}")
        style = f'class="{"limit" if s.limit else "line"} c{s.color % SERIES}"'
        marks += [f'<polyline {style} points="{" ".join(p)}"/>' for p in points if p]
        if dots and not s.limit:
            marks += [_dot(point, s, i) for i, point in enumerate(p for part in points for p in part)]
    return _svg("".join(marks), title)


def _dot(point: str, s: Series, i: int) -> str:
    x, y = point.split(",")
    return f'<circle class="dot c{s.color % SERIES}" cx="{x}" cy="{y}" r="2.4"/>'


def bars(series: Sequence[Series], labels: Sequence[str], axis: Axis, title: str, form: str = ".1e") -> str:
    """Bars side by side, a group an x, each with its value. form: of the values."""
    group = (WIDTH - LEFT - RIGHT) / max(1, len(labels))
    width = min(64.0, group * 0.8 / max(1, len(series)))
    marks = [_frame(axis), _names(labels, group, LEFT + group / 2)]
    base = HEIGHT - BOTTOM
    for j, s in enumerate(series):
        for i, v in enumerate(s.values):
            if v is None or not math.isfinite(v):
                continue
            x = LEFT + i * group + (group - width * len(series)) / 2 + j * width
            y = axis.at(v if v > 0 or not axis.log else axis.low)
            marks.append(
                f'<rect class="bar c{s.color % SERIES}" x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" '
                f'height="{max(1.0, base - y):.1f}" rx="2"><title>{escape(s.name)}: {v:{form}}</title></rect>'
            )
            if width >= 34:
                at = f'x="{x + width / 2:.1f}" y="{y - 4:.1f}"'
                marks.append(f'<text class="value" {at} text-anchor="middle">{v:{form}}</text>')
    return _svg("".join(marks), title)


def legend(series: Sequence[Series]) -> str:
    """What the colours mean, as HTML."""
    items = [
        f'<span class="key"><i class="{kind} c{s.color % SERIES}"></i>{escape(s.name)}</span>'
        for s, kind in ((s, "dash" if s.limit else "swatch") for s in series)
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def stacked(charts: Sequence[tuple[str, str, Sequence[Series]]]) -> str:
    """Charts (title, SVG, its series) below each other as one SVG that needs no page."""
    parts, y = [], 10
    for title, svg, series in charts:
        at = LEFT
        parts.append(f'<text class="head" x="{LEFT}" y="{y + 14}">{escape(title)}</text>')
        for s in series:
            key = f'<rect class="bar c{s.color % SERIES}" x="{at}" y="{y + 26}" width="12" height="12" rx="3"/>'
            parts.append(f'{key}<text class="tick" x="{at + 18}" y="{y + 36}">{escape(s.name)}</text>')
            at += 40 + 7 * len(s.name)
        parts.append(svg.replace("<svg ", f'<svg x="0" y="{y + 44}" width="{WIDTH}" height="{HEIGHT}" ', 1))
        y += HEIGHT + 54
    frame = f'viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" xmlns="http://www.w3.org/2000/svg"'
    return f"<svg {frame}><style>{CSS}</style>{''.join(parts)}</svg>\n"


def _svg(inner: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{inner}</svg>'
    )


def _frame(axis: Axis) -> str:
    """Horizontal lines and their labels."""
    out = []
    for tick in axis.ticks():
        y = axis.at(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{axis.label(tick)}</text>')
    return "".join(out)


def _names(labels: Sequence[str], step: float, start: float) -> str:
    """Labels below the axis, as many as fit."""
    longest = max((len(x) for x in labels), default=1)
    every = max(1, math.ceil((longest * 7 + 10) / max(step, 1e-9)))
    return "".join(
        f'<text class="tick" x="{start + i * step:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
        f"{escape(x)}</text>"
        for i, x in enumerate(labels)
        if i % every == 0
    )
