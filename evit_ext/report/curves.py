"""Curves as SVG, drawn by hand: no library, no script, and colours that the page's style chooses."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

from evit_ext.report.records import Points

_WIDTH, _HEIGHT = 480.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 12.0, 34.0
# So many points can be told apart; of more, each is the mean of several.
_MOST_POINTS = 300


def chart(title: str, lines: Mapping[str, Points], horizontal: str, unit: str = "") -> str:
    """Return a figure with a curve for each name, whose class in the style is line0, line1, ….

    Args:
        title: shown above, for people and screen readers.
        lines: points by the name of the line; those without a point are left out.
        horizontal: what the horizontal axis counts.
        unit: of the vertical axis, such as "%".
    """
    there = {name: _thinned(points) for name, points in lines.items() if points}
    if not there:
        return ""
    every = [point for points in there.values() for point in points]
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    ticks = _ticks(min(y for _, y in every), max(y for _, y in every))
    low_y, high_y = ticks[0], ticks[-1]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = (point[0] - low_x) / ((high_x - low_x) or 1.0)
        y = (point[1] - low_y) / ((high_y - low_y) or 1.0)
        return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        _, y = place((low_x, tick))
        parts.append(
            f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in _ticks(low_x, high_x, whole=True):
        if low_x <= tick <= high_x:
            x, _ = place((tick, low_y))
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 16:g}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:g}" y="{_HEIGHT - 2:g}" text-anchor="middle">'
        f"{html.escape(horizontal)}</text>"
    )
    keys = []
    for number, (name, points) in enumerate(there.items()):
        places = [place(point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line{number}" points="{path}"/>')
        if len(points) <= 60:
            for (x, y), point in zip(places, points, strict=True):
                said = f"{name}: {point[1]:.4g}{unit} at {horizontal} {point[0]:.4g}"
                dot = f'<circle class="dot{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
                parts.append(f"{dot}<title>{html.escape(said)}</title></circle>")
        last = f"{points[-1][1]:.4g}{unit}"
        keys.append(f'<span class="key{number}">{html.escape(name)} <b>{html.escape(last)}</b></span>')
    drawing = "".join(parts)
    return (
        f'<figure class="chart"><figcaption><h3>{html.escape(title)}</h3>{" ".join(keys)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{html.escape(title)}">'
        f"{drawing}</svg>"
        "</figure>"
    )


def _thinned(points: Points) -> Points:
    every = math.ceil(len(points) / _MOST_POINTS)
    groups = [points[start : start + every] for start in range(0, len(points), every)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return some round numbers, at least two, from `low` or less to `high` or more."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 4 >= span * 0.999)
    if whole:
        step = max(1.0, round(step))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(number * step, 12) for number in range(first, last + 1)]
