"""The gate's verdict as one page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np

from airflow_mlops.evaluation.metrics import Floats, reliability
from airflow_mlops.evaluation.verdict import GateVerdict

COLOURS = {"challenger": "#0b6e99", "champion": "#b3541e"}
STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:60em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.3em .7em;border-bottom:1px solid #ddd}td.n{text-align:right}
.yes{color:#1a7f37}.no{color:#b42318}img{max-width:100%}"""
MAX_BARS = 20


def render(
    verdict: GateVerdict, label: Any, challenger: Floats, champion: Floats | None = None, title: str = "Gate report"
) -> str:
    """The page: verdict, checks, metrics, gains and plots (calibration, ROC, slices).

    :param verdict: of :func:`airflow_mlops.evaluation.evaluate`
    :param label: shape (n,), 0 or 1, the rows the verdict is about
    :param challenger: shape (n,), its probabilities
    :param champion: shape (n,), or None
    :param title: heading of the page
    :return: HTML with the plots inline
    """
    arms = {"challenger": challenger} | ({} if champion is None else {"champion": champion})
    word, style = ("passed", "yes") if verdict.passed else ("failed", "no")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}: <span class={style}>{word}</span></h1>",
        f"<p>{verdict.rows:,} rows in {verdict.clusters:,} clusters"
        f"{', no champion yet' if verdict.first_model else ''}.</p>",
        "<ul>" + "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons) + "</ul>",
        "<h2>Checks</h2>",
        _table(
            ["check", "found", "required", "holds"],
            [[check.name, check.value, check.limit, "yes" if check.passed else "no"] for check in verdict.checks],
        ),
        "<h2>Metrics</h2>",
        _table(["metric", *arms], _metric_rows(verdict, list(arms))),
    ]
    if verdict.differences:
        rows = [
            [gain["metric"], gain["method"], _number(gain["estimate"]), " to ".join(map(_number, gain["interval"]))]
            for gain in verdict.differences
        ]
        confidence = f"{verdict.differences[0]['confidence']:.0%} interval"
        parts += ["<h2>Gain of the challenger</h2>", _table(["metric", "method", "gain", confidence], rows)]
    if verdict.latency:
        rows = [[name, _number(value)] for name, value in verdict.latency.items()]
        parts += ["<h2>Latency of one prediction</h2>", _table(["", "found"], rows)]
    if len(np.unique(np.asarray(label))) == 2:
        parts += ["<h2>Plots</h2>", _curves(label, arms)]
    if any(row["tested"] for row in verdict.slices):
        parts += ["<h2>Slices</h2>", _slice_bars(verdict)]
    return "\n".join(parts)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _metric_rows(verdict: GateVerdict, arms: list[str]) -> list[list[str]]:
    names = list(verdict.metrics["challenger"] or ())
    return [[name, *(_number((verdict.metrics[arm] or {}).get(name)) for arm in arms)] for name in names]


def _inline(figure: Any, alternative: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'


def _curves(label: Any, arms: dict[str, Floats]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    calibration, roc = figure.subplots(1, 2)
    for name, probability in arms.items():
        curve = reliability(label, probability)
        calibration.plot(curve["predicted"], curve["observed"], "o-", color=COLOURS[name], label=name)
        order = np.argsort(-probability, kind="stable")
        # Tied scores are one point of the curve.
        last = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)
        hits = np.asarray(label)[order] == 1
        share = [np.append(0.0, np.cumsum(kind)[last] / kind.sum()) for kind in (~hits, hits)]
        roc.plot(*share, color=COLOURS[name], label=name)
    for axes, x, y, heading in (
        (calibration, "predicted probability", "observed rate", "Calibration, ten groups"),
        (roc, "false positive rate", "true positive rate", "ROC"),
    ):
        axes.axline((0, 0), slope=1, color="#999", linewidth=1, linestyle="--")
        axes.set(xlabel=x, ylabel=y, title=heading)
        axes.legend(frameon=False)
    return _inline(figure, "calibration and ROC curves")


def _slice_bars(verdict: GateVerdict) -> str:
    from matplotlib.figure import Figure

    rows = [row for row in verdict.slices if row["tested"]][:MAX_BARS]
    figure = Figure(figsize=(10, 0.8 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    gains = np.array([row["gain"] for row in rows])
    errors = np.abs(np.array([row["interval"] for row in rows]).T - gains)
    colours = ["#1a7f37" if gain >= 0 else "#b42318" for gain in gains]
    axes.barh([f"{row['column']}={row['value']} ({row['rows']})" for row in rows], gains, xerr=errors, color=colours)
    axes.axvline(-float(verdict.policy["slice_tolerance"]), color="#b42318", linewidth=1, linestyle="--")
    axes.invert_yaxis()
    axes.set(xlabel=f"gain in {rows[0]['metric']}; dashed: tolerance", title="Worst slices first")
    return _inline(figure, "gain by slice")
