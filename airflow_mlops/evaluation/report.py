"""The gate's verdict as one page that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from airflow_mlops.evaluation.metrics import Floats, reliability
from airflow_mlops.evaluation.verdict import GateVerdict
from airflow_mlops.page import document

COLOURS = {"challenger": "#d9660a", "champion": "#1f6feb"}
GOOD, BAD, GREY = "#1a7f45", "#c4302b", "#9aa0ab"
MAX_BARS = 20
_STYLE = """
h1 .chip{font-size:17px;vertical-align:4px;margin-left:6px}.wrap{white-space:normal;min-width:24ch}
.card{margin:14px 0}img{max-width:100%;display:block;margin:0 auto;background:#fff;border-radius:6px}
td{vertical-align:top}
"""
_NAMES = {
    "rows": "rows",
    "base_rate": "observed rate",
    "mean_probability": "mean probability",
    "calibration": "mean probability - observed rate",
    "calibration_error": "expected calibration error",
    "auc": "AUC",
    "log_loss": "log loss",
    "brier": "Brier score",
    "p50_ms": "p50 [ms]",
    "p95_ms": "p95 [ms]",
    "p99_ms": "p99 [ms]",
    "calls": "calls",
    "load_seconds": "time to load [s]",
    "memory_mib": "memory of the process [MiB]",
}
Cell = Any


def render(
    verdict: GateVerdict, label: Any, challenger: Floats, champion: Floats | None = None, title: str = "Gate report"
) -> str:
    """The page: verdict, checks, metrics, gains, what the policy asked for besides, and plots.

    :param verdict: of :func:`airflow_mlops.evaluation.evaluate`
    :param label: shape (n,), 0 or 1, the rows the verdict is about
    :param challenger: shape (n,), its probabilities
    :param champion: shape (n,), or None
    :param title: heading of the page
    :return: HTML with the plots inline
    """
    word, tone = ("passed", "good") if verdict.passed else ("failed", "bad")
    parts = [
        f'<h1>{escape(title)} <span class="chip {tone}">{word}</span></h1>',
        "<ul>" + "".join(f"<li>{escape(reason)}</li>" for reason in verdict.reasons) + "</ul>",
        _tiles(verdict),
        "<h2>Checks</h2>",
        _checks(verdict),
        "<h2>Metrics</h2>",
        _metrics(verdict.metrics),
        _gains(verdict),
        _curves_card(label, challenger, champion),
        _calibration(verdict),
        _slices(verdict),
        _fairness(verdict),
        _missing(verdict),
        _cases(verdict),
        _latency(verdict),
    ]
    return document(f"{title}: {word}", "".join(parts), _STYLE)


def render_png(label: Any, challenger: Floats, champion: Floats | None = None) -> bytes | None:
    """Calibration and ROC curves of the arms; None where only one class is present."""
    if len(np.unique(np.asarray(label))) != 2:
        return None
    return _png(_curves(label, {"challenger": challenger} | ({} if champion is None else {"champion": champion})))


def _tiles(verdict: GateVerdict) -> str:
    failed = sum(not check.passed for check in verdict.checks)
    tiles = [
        (f"{len(verdict.checks) - failed} of {len(verdict.checks)}", "checks hold"),
        (f"{verdict.rows:,}", f"rows in {verdict.clusters:,} clusters"),
    ]
    if verdict.first_model:
        tiles.append(("first model", "no champion to compare with"))
    elif verdict.differences:
        gain = verdict.differences[0]
        interval = " to ".join(_signed(bound) for bound in gain["interval"])
        tiles.append((_signed(gain["estimate"]), f"gain in {_name(gain['metric'])} ({interval})"))
    if verdict.unlabelled:
        tiles.append((f"{verdict.unlabelled:,}", "rows without a label yet"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
        + "</div>"
    )


def _checks(verdict: GateVerdict) -> str:
    rows = [[_holds(check.passed), check.name, check.value, check.limit] for check in verdict.checks]
    # What stops a challenger comes first; else the order of the policy.
    order = sorted(range(len(rows)), key=lambda i: verdict.checks[i].passed)
    return _table(["holds", "check", "found", "required"], [rows[i] for i in order])


def _metrics(metrics: Mapping[str, Any]) -> str:
    arms = [arm for arm in COLOURS if metrics.get(arm)]
    names = list(metrics[arms[0]]) if arms else []
    return _table(["metric", *arms], [[_name(name), *(metrics[arm].get(name) for arm in arms)] for name in names])


def _gains(verdict: GateVerdict) -> str:
    if not verdict.differences:
        return ""
    confidence = f"{verdict.differences[0]['confidence']:.0%} interval"
    rows = [
        [_name(g["metric"]), g["method"], _signed(g["estimate"]), " to ".join(map(_signed, g["interval"]))]
        for g in verdict.differences
    ]
    note = "Positive when the challenger is better. The first decides, the others are evidence beside it."
    table = _table(["metric", "method", "gain", confidence], rows)
    return f'<h2>Gain of the challenger</h2><p class="muted">{note}</p>{table}'


def _curves_card(label: Any, challenger: Floats, champion: Floats | None) -> str:
    png = render_png(label, challenger, champion)
    return "" if png is None else f"<h2>Curves</h2>{_image(png, 'calibration and ROC curves')}"


def _calibration(verdict: GateVerdict) -> str:
    found = verdict.calibration
    if not found or found.get("slope") is None:
        return ""
    rows = [
        ["intercept (0 when right on average)", found["intercept"], _interval(found["intercept_interval"])],
        ["slope (1 when right, below 1 overconfident)", found["slope"], _interval(found["slope_interval"])],
        [
            "Spiegelhalter's z (rows taken as independent)",
            found["spiegelhalter_z"],
            f"p={found['spiegelhalter_p']:.3g}",
        ],
    ]
    return "<h2>Calibration</h2>" + _table(["log odds of the label on those predicted", "found", "interval"], rows)


def _slices(verdict: GateVerdict) -> str:
    tested = [row for row in verdict.slices if row["tested"]]
    if not verdict.slices:
        return ""
    small = [row for row in verdict.slices if not row["tested"]]
    note = f"{len(tested)} of {len(verdict.slices)} slices are large enough to be tested."
    if small:
        shown = ", ".join(f"{row['column']}={row['value']} ({row['rows']})" for row in small[:10])
        note += f" Not tested: {shown}{' and more' if len(small) > 10 else ''}."
    plot = _image(_png(_slice_bars(tested[:MAX_BARS], verdict)), "gain by slice") if tested else ""
    return f'<h2>Slices</h2><p class="muted">{escape(note)}</p>{plot}'


def _fairness(verdict: GateVerdict) -> str:
    parts = []
    for column in dict.fromkeys(entry["column"] for entry in verdict.fairness):
        entries = [entry for entry in verdict.fairness if entry["column"] == column]
        rows = [
            [
                entry["metric"].replace("_", " "),
                entry["problem"] or entry["estimate"],
                _interval(entry["interval"]),
                f"{'at least' if entry['at_least'] else 'at most'} {entry['limit']:g}",
            ]
            for entry in entries
        ]
        groups = [
            [g["group"], f"{g['rows']:,}"]
            + [_share(g[k]) for k in ("positive_rate", "selection_rate", "true_positive_rate", "false_positive_rate")]
            for g in entries[0]["groups"]
        ]
        header = ["group", "rows", "positive", "predicted positive", "true positive rate", "false positive rate"]
        parts.append(
            f"<h2>Fairness by {escape(column)}</h2>"
            + _table(["metric", "found", "interval", "required"], rows)
            + f"<p></p>{_table(header, groups)}"
        )
    return "".join(parts)


def _missing(verdict: GateVerdict) -> str:
    if not verdict.missing:
        return ""
    metric = _name(str(verdict.policy.get("metric", "")))
    rows = [[row["what"], "refuses: " + row["refused"] if row["refused"] else row["loss"]] for row in verdict.missing]
    return "<h2>Missing features</h2>" + _table(["without", f"lost in {metric}"], rows)


def _cases(verdict: GateVerdict) -> str:
    if not verdict.cases:
        return ""
    rows = [[_holds(case["passed"]), case["name"], case["found"], case["expected"]] for case in verdict.cases]
    rows.sort(key=lambda row: row[0] == _holds(True))
    return "<h2>Cases</h2>" + _table(["holds", "case", "found", "expected"], rows)


def _latency(verdict: GateVerdict) -> str:
    arms = {"challenger": verdict.latency, "champion": verdict.champion_latency}
    known = {arm: found for arm, found in arms.items() if found}
    if not known:
        return ""
    names = list(dict.fromkeys(name for found in known.values() for name in found))
    rows = [[_name(name), *(found.get(name) for found in known.values())] for name in names]
    return "<h2>One prediction, in a fresh process</h2>" + _table(["", *known], rows)


def _name(metric: str) -> str:
    return _NAMES.get(metric, metric)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if not bounds else " to ".join(f"{bound:.4g}" for bound in bounds)


class _Mark(str):
    """HTML that is ready."""


def _holds(passed: bool) -> _Mark:
    return _Mark('<b class="good">yes</b>' if passed else '<b class="bad">NO</b>')


def _cell(value: Cell) -> str:
    if isinstance(value, _Mark):
        return f"<td>{value}</td>"
    if value is None:
        return '<td class="n">-</td>'
    if isinstance(value, bool | str):
        return (
            f'<td class="wrap">{escape(str(value))}</td>' if len(str(value)) > 40 else f"<td>{escape(str(value))}</td>"
        )
    return f'<td class="n">{value:,}</td>' if isinstance(value, int) else f'<td class="n">{value:.5g}</td>'


def _table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    head = "".join(f"<th{' class=n' if right else ''}>{escape(cell)}</th>" for cell, right in zip(header, numeric))
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _image(png: bytes, alternative: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<div class="card"><img alt="{escape(alternative)}" src="data:image/png;base64,{data}"></div>'


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _curves(label: Any, arms: Mapping[str, Floats]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    calibration, roc = figure.subplots(1, 2)
    greatest = 0.0
    for name, probability in arms.items():
        curve = reliability(label, probability)
        greatest = max(greatest, float(curve["predicted"].max()), float(curve["observed"].max()))
        calibration.plot(curve["predicted"], curve["observed"], "o-", color=COLOURS[name], label=name)
        order = np.argsort(-probability, kind="stable")
        # Tied scores are one point of the curve.
        last = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)
        hits = np.asarray(label)[order] == 1
        share = [np.append(0.0, np.cumsum(kind)[last] / kind.sum()) for kind in (~hits, hits)]
        roc.plot(*share, color=COLOURS[name], label=name)
    for axes, x, y, heading in (
        (calibration, "predicted probability", "observed rate", "Calibration, ten groups of equal size"),
        (roc, "false positive rate", "true positive rate", "ROC"),
    ):
        axes.axline((0, 0), slope=1, color=GREY, linewidth=1, linestyle="--")
        axes.set(xlabel=x, ylabel=y, title=heading)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    calibration.set(xlim=(0, 1.05 * greatest), ylim=(0, 1.05 * greatest))
    return figure


def _slice_bars(rows: Sequence[Mapping[str, Any]], verdict: GateVerdict) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.3 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['column']}={row['value']} ({row['rows']:,} rows)" for row in rows]
    tolerance = -float(verdict.policy["slice_tolerance"])
    for i, row in enumerate(rows):
        shown_worse = row["p_adjusted"] < verdict.policy["alpha"]
        colour = BAD if shown_worse else GOOD if row["gain"] >= 0 else GREY
        axes.plot(row["interval"], [i, i], color=colour, linewidth=2)
        axes.plot(row["gain"], i, "o", color=colour)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.axvline(tolerance, color=BAD, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=f"gain in {_name(rows[0]['metric'])} with interval; dashed: tolerated", title="Worst slices first")
    return figure
