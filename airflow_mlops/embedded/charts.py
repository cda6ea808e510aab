"""Inline SVG plots for the demo's page; colours are the page's CSS variables, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 640, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 74, 16, 34


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span ``low`` to ``high``, about ``count`` of them."""
    span = max(high - low, 1e-9)
    raw = span / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _x(index: int, count: int) -> float:
    inner = _WIDTH - _LEFT - _RIGHT
    return _LEFT + inner * (index + 0.5) / max(count, 1)


def _frame(title: str, labels: Sequence[str], marks: Sequence[float], digits: int) -> tuple[list[str], float, float]:
    low, high = marks[0], marks[-1]
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for mark in marks:
        y = _y(mark, low, high)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" class="tick" text-anchor="end">{mark:.{digits}f}</text>')
    for index, label in enumerate(labels):
        x = _x(index, len(labels))
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 12}" class="tick" text-anchor="middle">{escape(label)}</text>')
    return parts, low, high


def _y(value: float, low: float, high: float) -> float:
    inner = _HEIGHT - _TOP - _BOTTOM
    return _TOP + inner * (1 - (value - low) / max(high - low, 1e-9))


def lines(
    title: str, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], *, promoted: Sequence[int] = ()
) -> str:
    """One line per entry of ``series``, named at its end.

    :param labels: along the x axis
    :param series: values by name; None leaves a gap. The colour is the CSS variable ``--{name}``
    :param promoted: indexes after which the champion changed: a dashed line towards the next month
    """
    values = [value for line in series.values() for value in line if value is not None]
    if not values:
        return '<p class="muted">Nothing is on record yet.</p>'
    margin = max((max(values) - min(values)) * 0.12, 0.002)
    marks = ticks(min(values) - margin, max(values) + margin)
    digits = 3 if marks[1] - marks[0] < 0.01 else 2
    parts, low, high = _frame(title, labels, marks, digits)
    for index in promoted:
        x = _x(index, len(labels)) + (_WIDTH - _LEFT - _RIGHT) / len(labels) / 2
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" class="promoted"/>')
    ends: list[tuple[float, float, str]] = []
    for name, line in reversed(list(series.items())):
        points = [
            (_x(index, len(labels)), _y(value, low, high), labels[index], value)
            for index, value in enumerate(line)
            if value is not None
        ]
        if not points:
            continue
        path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y, _, _) in enumerate(points))
        parts.append(f'<path d="{path}" fill="none" stroke="var(--{name})" stroke-width="2.5"/>')
        for x, y, label, value in points:
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="var(--{name})" class="dot">'
                f"<title>{escape(label)}: {escape(name)} {value:.4f}</title></circle>"
            )
        ends.append((points[-1][1], points[-1][0], name))
    last = -math.inf
    for y, x, name in sorted(ends):
        # Names that would overlap are moved apart.
        last = max(y, last + 15)
        parts.append(
            f'<text x="{x + 11:.1f}" y="{last + 4:.1f}" class="name" fill="var(--{name})">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def bars(title: str, labels: Sequence[str], values: Sequence[float | None], *, colour: str, digits: int = 2) -> str:
    """One bar per label, its value above it.

    :param colour: name of a CSS variable, without the dashes
    :param digits: of the values, after the point
    """
    known = [value for value in values if value is not None]
    if not known:
        return '<p class="muted">Nothing is on record yet.</p>'
    parts, low, high = _frame(title, labels, ticks(0, max(known) * 1.1), digits)
    width = min(42.0, (_WIDTH - _LEFT - _RIGHT) / len(labels) * 0.6)
    for index, value in enumerate(values):
        if value is None:
            continue
        x, y = _x(index, len(labels)), _y(value, low, high)
        parts.append(
            f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_HEIGHT - _BOTTOM - y:.1f}" '
            f'rx="3" fill="var(--{colour})"><title>{escape(labels[index])}: {value:.4f}</title></rect>'
            f'<text x="{x:.1f}" y="{y - 6:.1f}" class="value" text-anchor="middle">{value:.{digits}f}</text>'
        )
    return "".join([*parts, "</svg>"])
