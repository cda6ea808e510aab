"""A rollout's evidence over time as plots: for a page, in its colours, or as one image."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.rollout.words import finite, kind, odds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Name of a colour in a page's style, and its value in an image; no two may be the same.
COLOURS = {
    "stable": "#1f6feb",
    "canary": "#d9660a",
    "good": "#1a7f45",
    "bad": "#c4302b",
    "ink": "#1c1d21",
    "muted": "#62656e",
    "rule": "#e3e4e8",
}
#: E-values below are drawn there: that the evidence has gone away is all they say.
_LEAST, _MOST = 1e-2, 1e6
_WIDTH, _ROW = 11.0, 2.35
_NAME = 60
#: Name of a line to the point where it ends and its colour.
Ends = Mapping[str, tuple[tuple[float, float], str]]


@dataclass(frozen=True)
class Marks:
    """Times at which something changed, in the unit of the axis.

    :param unit: of time since the first look: s, min, h or d
    :param seconds: in one such unit
    :param times: of each look
    :param steps: when the canary's weight changed, and to what, percent
    :param verdict: when the verdict fell and its colour; None when none is on record
    """

    unit: str
    seconds: float
    times: list[float]
    steps: list[tuple[float, float]]
    verdict: tuple[float, str] | None


def looks_of(result: Mapping[str, Any]) -> list[Sequence[Any]]:
    """The looks on record that can be placed in time."""
    looks = (result.get("history") or {}).get("looks") or []
    return [look for look in looks if finite(look[0]) is not None]


def marks_of(looks: Sequence[Sequence[Any]]) -> Marks:
    """The axis of time that all plots of one rollout share."""
    start, span = looks[0][0], looks[-1][0] - looks[0][0]
    units = ((180.0, "s", 1.0), (10800.0, "min", 60.0), (259200.0, "h", 3600.0), (math.inf, "d", 86400.0))
    _, unit, seconds = next(entry for entry in units if span < entry[0])
    times = [(look[0] - start) / seconds for look in looks]
    steps = [(time, look[1]) for time, look in zip(times, looks) if look[2] == "PROMOTE_STEP"]
    ends = {"PROMOTE": "good", "ROLLBACK": "bad", "CONCLUDE": "ink"}
    verdict = (times[-1], ends[looks[-1][2]]) if looks[-1][2] in ends else None
    return Marks(unit, seconds, times, steps, verdict)


def traffic_svg(result: Mapping[str, Any]) -> str:
    """The canary's weight and the arms' requests over time."""
    figure, axes = _figure(1)
    _traffic(axes[0], looks_of(result), marks_of(looks_of(result)))
    return _svg(figure, "traffic", "the canary's weight and the arms' requests over time")


def guardrail_svg(result: Mapping[str, Any], name: str, account: Mapping[str, Any], salt: str) -> str:
    """Both arms' numbers of one guardrail and its evidence over time; empty where there are no numbers.

    :param salt: another one for every plot of a page
    """
    looks = looks_of(result)
    if not any(number is not None for row in _columns(looks, name) for number in row):
        return ""
    figure, axes = _figure(1)
    _guardrail(axes[0], looks, marks_of(looks), name, account)
    return _svg(figure, salt, "both versions and the evidence over time")


def png(result: Mapping[str, Any], title: str) -> bytes:
    """All plots under each other, one row per guardrail."""
    looks, accounts = looks_of(result), dict(result.get("guardrails") or {})
    names = list(dict.fromkeys([*accounts, *(name for look in looks for name in look[3] or {})]))
    figure, axes = _figure(1 + len(names) if looks else 1)
    figure.set_facecolor("white")
    figure.suptitle(_plain(title), x=0.012, ha="left", fontsize=13, fontweight="bold", parse_math=False)
    if not looks:
        for cell in axes[0]:
            cell.axis("off")
        axes[0][0].text(0, 0.9, "No look is on record.", color=COLOURS["muted"], transform=axes[0][0].transAxes)
        return _bytes(figure, "png")
    marks = marks_of(looks)
    _traffic(axes[0], looks, marks)
    for row, name in zip(axes[1:], names):
        _guardrail(row, looks, marks, name, accounts.get(name) or {})
        heading = f"{_plain(name)}: {row[0].get_title(loc='left')}"
        row[0].set_title(heading, loc="left", fontsize=9.5, fontweight="bold", parse_math=False)
    return _bytes(figure, "png")


def _figure(rows: int) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    size = (_WIDTH, _ROW * rows + (0.45 if rows > 1 else 0))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.12 if rows > 1 else 0.04))
    figure.set_facecolor("none")
    axes = figure.subplots(rows, 2, squeeze=False, gridspec_kw={"width_ratios": [2, 3]})
    for cell in axes.flat:
        cell.set_facecolor("none")
        cell.grid(axis="y", color=COLOURS["rule"], linewidth=0.8)
        cell.set_axisbelow(True)
        cell.tick_params(colors=COLOURS["muted"], labelsize=8.5, length=0, pad=5)
        for side, spine in cell.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(COLOURS["rule"])
    return figure, [list(row) for row in axes]


def _traffic(axes: Sequence[Axes], looks: Sequence[Sequence[Any]], marks: Marks) -> None:
    weight, requests = axes
    shares = [math.nan if (share := finite(look[1])) is None else share for look in looks]
    weight.step(marks.times, shares, where="post", color=COLOURS["canary"], linewidth=2)
    most = max((share for share in shares if share > 0), default=100.0)
    weight.set_ylim(-0.03 * most, 1.08 * most)
    weight.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    _title(weight, "canary's share of traffic")
    lines = {
        arm: [finite(look[4][index]) if len(look) > 4 and look[4] else None for look in looks]
        for index, arm in enumerate(("stable", "canary"))
    }
    ends = _arms(requests, marks, lines)
    requests.set_ylim(bottom=0)
    requests.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _label_ends(requests, ends)
    _title(requests, "requests judged so far")
    for cell in axes:
        _time(cell, marks)


def _guardrail(
    axes: Sequence[Axes], looks: Sequence[Sequence[Any]], marks: Marks, name: str, account: Mapping[str, Any]
) -> None:
    stable, canary, one, other = _columns(looks, name)
    percent = kind(account) not in ("mean", "score")
    distance = kind(account) == "drift"
    ends = _arms(axes[0], marks, {"canary": canary} if distance else {"stable": stable, "canary": canary})
    _title(axes[0], "distance from stable" if distance else "both versions")
    if percent:
        top = max([value for value in (*stable, *canary) if value is not None], default=0.0)
        axes[0].set_ylim(0, 1.15 * top or 0.01)
        axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    _label_ends(axes[0], ends)
    if "worse_by_at_most" in account:
        _bounds(axes[1], marks, one, other, account, percent)
    elif "z_ok" in account:
        _scores(axes[1], marks, one, other, account)
    else:
        _odds(axes[1], marks, one, other, account)
    for cell in axes:
        _time(cell, marks)


def _columns(looks: Sequence[Sequence[Any]], name: str) -> list[list[float | None]]:
    """Of every look: stable, canary, and the two numbers of the evidence."""
    rows = [(look[3] or {}).get(name) or [None] * 5 for look in looks]
    return [[finite(row[index]) if index < len(row) else None for row in rows] for index in range(1, 5)]


def _arms(axes: Axes, marks: Marks, lines: Mapping[str, Sequence[float | None]]) -> Ends:
    """A line per arm; returns where they end."""
    for name, values in lines.items():
        # Where the arms are the same, both are seen.
        _line(axes, marks.times, values, COLOURS[name], width=2.8 if name == "stable" else 1.6)
    ends = {name: _last(marks.times, values) for name, values in lines.items()}
    return {name: (end, COLOURS[name]) for name, end in ends.items() if end}


def _odds(
    axes: Axes, marks: Marks, harm: Sequence[float | None], ok: Sequence[float | None], account: Mapping[str, Any]
) -> None:
    needs = [finite(account.get(key)) for key in ("e_harm_needed", "e_ok_needed")]
    known = [value for value in (*harm, *ok) if value is not None]
    top = min(max([10 * (need or 1) for need in needs] + known), _MOST)
    axes.set_yscale("log")
    axes.set_ylim(_LEAST, top * 1.6)
    # Labels of a logarithmic axis are formulas otherwise.
    ticks = [10.0**power for power in range(-2, 7) if 10.0**power <= top * 1.6]
    axes.set_yticks(ticks[:: 2 if len(ticks) > 6 else 1])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: _beyond(value) + (f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    ends = {}
    for name, colour, values, need in zip(("harm", "no harm"), ("bad", "good"), (harm, ok), needs):
        drawn = [None if value is None else min(max(value, _LEAST), top) for value in values]
        _line(axes, marks.times, drawn, COLOURS[colour])
        if end := _last(marks.times, drawn):
            ends[name] = (end, COLOURS[colour])
        if need:
            _limit(axes, marks, need, f"{name} is shown at {odds(need)}", colour)
    _label_ends(axes, ends)
    _title(axes, "evidence, to 1")


def _scores(
    axes: Axes, marks: Marks, harm: Sequence[float | None], ok: Sequence[float | None], account: Mapping[str, Any]
) -> None:
    """The statistics of planned looks, and what the last of them had to reach."""
    ends: dict[str, tuple[tuple[float, float], str]] = {}
    needs = {key: finite(account.get(f"{key}_needed")) or math.inf for key in ("z_harm", "z_ok")}
    # A bound that no statistic reaches means that nothing could be shown at this look.
    bounds = {key: need for key, need in needs.items() if need < 7}
    known = [value for value in (*harm, *ok, *bounds.values()) if value is not None]
    axes.set_ylim(min([*known, 0.0]) - 0.5, max([*known, 1.0]) + 1)
    for name, key, colour, values in (("harm", "z_harm", "bad", harm), ("no harm", "z_ok", "good", ok)):
        drawn = [math.nan if value is None else value for value in values]
        axes.step(marks.times, drawn, where="post", color=COLOURS[colour], linewidth=1.8)
        if end := _last(marks.times, values):
            ends[name] = (end, COLOURS[colour])
        if key in bounds:
            _limit(axes, marks, bounds[key], f"{name} is shown at {bounds[key]:.3g}, at the last planned look", colour)
    _label_ends(axes, ends)
    _title(axes, "standardised difference at planned looks")


def _bounds(
    axes: Axes,
    marks: Marks,
    least: Sequence[float | None],
    most: Sequence[float | None],
    account: Mapping[str, Any],
    percent: bool,
) -> None:
    margin, harm = finite(account.get("margin")), finite(account.get("harm_margin"))
    lower, upper = ([math.nan if value is None else value for value in values] for values in (least, most))
    axes.fill_between(marks.times, lower, upper, color=COLOURS["canary"], alpha=0.22, linewidth=0)
    for values in (least, most):
        _line(axes, marks.times, values, COLOURS["canary"], width=1.3)
    ends = [end for end in (_last(marks.times, least), _last(marks.times, most)) if end]
    # Early bounds are so wide that nothing else could be seen.
    scale = max([abs(end[1]) for end in ends] + [2.2 * (margin or 0), 1e-9])
    known = [value for value in (*lower, *upper) if math.isfinite(value)]
    axes.set_ylim(max(min([*known, -scale / 2]), -1.6 * scale), min(max([*known, scale]), 2 * scale))
    axes.axhline(0, color=COLOURS["muted"], linewidth=0.8)
    # Planned looks decide by other bounds, of which these are not the picture.
    shown = "" if "z_harm" in account else " is shown when all of it is"
    if margin:
        _limit(axes, marks, margin, f"no harm{shown} below", "good", late=True)
    if harm is not None:
        _limit(axes, marks, harm, f"harm{shown} above", "bad", late=True, below=harm == margin)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    names = ("at least", "at most")
    _label_ends(axes, {name: (end, COLOURS["canary"]) for name, end in zip(names, ends)})
    _title(axes, "canary worse by, sure at all looks at once")


def _line(axes: Axes, times: Sequence[float], values: Sequence[float | None], colour: str, width: float = 1.8) -> None:
    known = sum(value is not None for value in values)
    drawn = [math.nan if value is None else value for value in values]
    axes.plot(times, drawn, color=colour, linewidth=width, marker="o" if known < 25 else None, markersize=3)


def _last(times: Sequence[float], values: Sequence[float | None]) -> tuple[float, float] | None:
    return next(((time, value) for time, value in zip(times[::-1], values[::-1]) if value is not None), None)


def _label_ends(axes: Axes, ends: Ends) -> None:
    """A name beside the end of each line; those that would overlap are moved apart. The axes have their limits."""
    axes.get_ylim()
    points = 72 / axes.figure.dpi
    heights = {name: points * axes.transData.transform(end)[1] for name, (end, _) in ends.items()}
    shifts, last = {}, -math.inf
    for name in sorted(heights, key=lambda name: heights[name]):
        place = max(heights[name], last + 11)
        shifts[name], last = place - heights[name], place
    for name, (end, colour) in ends.items():
        axes.annotate(
            name,
            end,
            xytext=(6, shifts[name] - 3),
            textcoords="offset points",
            color=colour,
            fontsize=8.5,
            fontweight="bold",
            annotation_clip=False,
        )


def _limit(
    axes: Axes, marks: Marks, height: float, text: str, colour: str, *, late: bool = False, below: bool = False
) -> None:
    """A dashed line with a note at its start, or ``late`` at its end, above it or ``below``."""
    end = marks.times[-1]
    axes.hlines(height, 0, end, color=COLOURS[colour], linewidth=1, linestyle=(0, (5, 3)))
    axes.annotate(
        text,
        (end if late else 0, height),
        xytext=(-3 if late else 2, -3 if below else 3),
        textcoords="offset points",
        ha="right" if late else "left",
        va="top" if below else "bottom",
        color=COLOURS[colour],
        fontsize=7.5,
    )


def _beyond(value: float) -> str:
    """What is drawn at the edge may lie beyond it."""
    return "≤" if value <= _LEAST else "≥" if value >= _MOST else ""


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9.5, color=COLOURS["ink"])


def _time(axes: Axes, marks: Marks) -> None:
    end = marks.times[-1] or 1.0
    axes.set_xlim(-0.01 * end, 1.12 * end)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} {marks.unit}" if value <= 1.001 * end else "")
    for time, _ in marks.steps:
        axes.axvline(time, color=COLOURS["muted"], linewidth=0.8, linestyle=":")
    if marks.verdict:
        axes.axvline(marks.verdict[0], color=COLOURS[marks.verdict[1]], linewidth=1.4)


def _plain(text: str) -> str:
    """One short line that can be drawn whatever is in it."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))[:_NAME]


def _bytes(figure: Figure, form: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=110, **settings)
    return buffer.getvalue()


def _svg(figure: Figure, salt: str, alternative: str) -> str:
    """The figure as an inline SVG whose colours are the page's variables, so that they follow light and dark."""
    import matplotlib

    # Several of them stand in one page, where equal names of their parts would meet.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        text = _bytes(figure, "svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sid="([^"]+)"', lambda found: found[0] if f"#{found[1]}" in text else "", text)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{alternative}"', text, count=1)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", text)
