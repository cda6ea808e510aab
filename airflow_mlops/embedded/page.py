"""The demo's one self-contained page: what the loop decided each month, on which evidence, and what it brought."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from airflow_mlops import storage
from airflow_mlops.embedded import charts, summary
from airflow_mlops.embedded.summary import MonthSummary
from airflow_mlops.page import document

_STYLE = """
:root{--frozen:var(--challenger);--rate:#7c8aa5}@media (prefers-color-scheme:dark){:root{--rate:#8390a8}}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:16px}
.grid{stroke:var(--rule)}.tick,.value{fill:var(--muted);font-size:12px}
.name{font-size:13px;font-weight:600}.dot{stroke:var(--card);stroke-width:1.5}
.promoted{stroke:var(--good);stroke-dasharray:4 4;stroke-width:1.5}
details{background:var(--card);border:1px solid var(--rule);border-radius:10px;margin:10px 0}
summary{cursor:pointer;padding:12px 18px;font-weight:600}summary .chip{margin-left:8px}
details>div{padding:2px 18px 16px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:20px}
.acts td,.acts th{padding:6px 4px;text-align:center}.acts td:first-child{text-align:left}
.facts{width:auto}
.facts td,.facts th{padding:3px 10px 3px 0;white-space:normal;
border:0;vertical-align:top;overflow-wrap:anywhere}
.facts td:first-child{color:var(--muted);white-space:nowrap}
"""
_TONES = {
    "harm": "bad", "drift": "warn", "stable": "good", "passed": "good", "lost": "bad",
    "promote": "good", "rollback": "bad", "not_enough_data": "warn",
}  # fmt: skip
_HIDDEN = (
    "uri",
    "html",
    "path",
    "reasons",
    "columns",
    "verdict",
    "steps",
    "guardrails",
    "requests",
    "run_dir",
    "table",
    "audit",
)
_MOST_FACTS = 14


def write(path: Path, months: Sequence[MonthSummary]) -> Path:
    """Write the page about ``months`` to ``path`` and return it."""
    storage.write_bytes(str(path), render(months).encode())
    return path


def render(months: Sequence[MonthSummary]) -> str:
    """The page as HTML, with nothing loaded from anywhere else."""
    body = "".join(
        [
            "<h1>A model kept trained, month after month</h1>",
            "<p>Each month an Airflow Dag scored the model that was serving (the champion), measured whether it does "
            "harm, and only then trained a challenger, which had to win at the gate and in a canary rollout before "
            "it served. Beside it: the first model, frozen in March and never touched again. The task: predict two "
            "hours before departure whether a flight from New York arrives more than 15 minutes late.</p>",
            _tiles(months),
            "<h2>What retraining brought</h2>",
            _plots(months),
            "<h2>Drift, and the loss that came with it</h2>",
            _drift_and_loss(months),
            "<h2>Month by month</h2>",
            _table(months),
            "<h2>Why: the evidence of every decision</h2>",
            *[_details(months, index) for index in range(len(months))],
        ]
    )
    return document("Continuous training: the demo", body, _STYLE)


def _number(value: Any, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:+.{digits}f}".replace("-", "−")


def _chip(text: str) -> str:
    if text == "-":
        return "–"
    return f'<span class="chip {_TONES.get(text, "")}">{escape(text.replace("_", " "))}</span>'


def _label(month: str) -> str:
    return dt.date.fromisoformat(f"{month}-01").strftime("%b")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _tiles(months: Sequence[MonthSummary]) -> str:
    # The months in which the two are different models.
    compared = [month for month in months if month.gain is not None and _differs(month)]
    better = [month for month in compared if (month.gain or 0) > 0]
    gain = _mean([month.gain for month in compared if month.gain is not None])
    auc = _mean(
        [m.champion.auc - m.frozen.auc for m in compared
         if m.champion and m.frozen and m.champion.auc is not None and m.frozen.auc is not None]
    )  # fmt: skip
    cpu = sum(month.cpu_seconds or 0 for month in months)
    tiles = [
        (f"{len(better)} of {len(compared)}", "months in which the champion beats the frozen model, once it differs"),
        (
            _signed(None if gain is None else -gain),
            "mean change of log loss against the frozen model (lower is better)",
        ),
        (_signed(auc), "mean change of AUC (higher is better)"),
        (
            f"{sum(m.retrained for m in months)} / {sum(m.promoted for m in months)}",
            "trainings / promotions, the first model included",
        ),
        (f"{cpu:.0f} s", "CPU time of all trainings"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{b}</b><span>{s}</span></div>' for b, s in tiles)
        + "</div>"
    )


def _differs(month: MonthSummary) -> bool:
    return not (month.champion and month.frozen and month.champion.version == month.frozen.version)


def _plots(months: Sequence[MonthSummary]) -> str:
    labels = [_label(month.month) for month in months]
    promoted = [index for index, month in enumerate(months) if month.promoted and index + 1 < len(months)]

    def series(name: str) -> dict[str, list[float | None]]:
        return {
            "champion": [getattr(month.champion, name, None) for month in months],
            "frozen": [getattr(month.frozen, name, None) for month in months],
        }

    note = '<p class="muted">Dashed green lines: a new champion took over after the month to the left.</p>'
    plots = [
        (
            "Log loss on the month, lower is better",
            charts.lines("log loss", labels, series("log_loss"), promoted=promoted),
        ),
        ("AUC on the month, higher is better", charts.lines("AUC", labels, series("auc"), promoted=promoted)),
        (
            "Share of flights that arrived late",
            charts.bars("late rate", labels, [month.base_rate for month in months], colour="rate"),
        ),
    ]
    cards = [f'<div class="card"><h3>{title}</h3>{plot}</div>' for title, plot in plots]
    cards.append(f'<div class="card"><h3>When the loop acted</h3>{_actions(months)}</div>')
    return f'{note}<div class="plots">{"".join(cards)}</div>'


def _drift_and_loss(months: Sequence[MonthSummary]) -> str:
    """What the sensor said of each month's data, beside what it did to the model that was never retrained."""
    labels = [_label(month.month) for month in months]
    frozen = [month.frozen.log_loss if month.frozen else None for month in months]
    first = next((loss for loss in frozen if loss is not None), None)
    drifted = [float(_drifted(month)) if month.champion else None for month in months]
    counted = charts.bars("drifted columns", labels, drifted, colour="rate", digits=0)
    loss = charts.lines("log loss of the frozen model", labels, {"frozen": frozen})
    rows = []
    for month, value in zip(months, frozen):
        if month.champion is None:
            continue
        change = None if value is None or first is None else value - first
        tests = ((month.ledger.get("drift") or {}).get("harm") or {}).get("tests") or {}
        own = (tests.get("log_loss") or {}).get("change")
        cells = [
            (month.month, ""), (_chip(month.verdict), ""), (str(_drifted(month)), "n"), (_number(value), "n"),
            (_signed(change), "n"), (_signed(own), "n"), (_expected_auc(month), "n"),
            (_number(month.champion.auc, 3), "n"), (escape(", ".join(month.columns)) or "–", ""),
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f'<td class="{kind}">{text}</td>' for text, kind in cells) + "</tr>")
    heads = [("month", ""), ("verdict", ""), ("drifted columns", "n"), ("log loss frozen", "n")]
    heads += [("against its first month", "n"), ("log loss champion against its reference", "n")]
    heads += [("AUC champion, expected before labels came", "n"), ("AUC champion, seen", "n"), ("which", "")]
    head = "".join(f'<th class="{kind}">{text}</th>' for text, kind in heads)
    return (
        f"<p>{escape(_telling(months))} Columns that move with the calendar, such as the weather, are not counted.</p>"
        f'<div class="plots"><div class="card"><h3>Drifted columns, against the champion\'s training data</h3>{counted}'
        f'</div><div class="card"><h3>Log loss of the frozen model, lower is better</h3>{loss}</div></div>'
        f'<div class="scroll" style="margin-top:16px"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def _expected_auc(month: MonthSummary) -> str:
    """What the scores alone let expect, with its interval."""
    estimate = (month.ledger.get("drift") or {}).get("estimate") or {}
    auc = (estimate.get("metrics") or {}).get("auc")
    if not auc:
        return "–"
    return f"{_number(auc['value'], 3)} ({_number(auc['low'], 3)} to {_number(auc['high'], 3)})"


def _drifted(month: MonthSummary) -> int:
    """How many columns drifted; the list of them ends at fifteen."""
    return int((month.ledger.get("drift") or {}).get("drifted", len(month.columns)))


def _telling(months: Sequence[MonthSummary]) -> str:
    """Whether months with more drifted columns were months of more loss for the frozen model, in words."""
    known = [
        (_drifted(month), month.frozen.log_loss)
        for month in months
        if month.champion and month.frozen and month.frozen.log_loss is not None
    ]
    if len(known) < 4 or len({count for count, _ in known}) < 2:
        return "Too few months to say whether drift of the columns tells of a loss."
    pairs = [
        (first, second) for place, first in enumerate(known) for second in known[place + 1 :] if first[0] != second[0]
    ]
    agree = sum((first[0] < second[0]) == (first[1] < second[1]) for first, second in pairs)
    tells = "goes with loss" if agree >= 0.75 * len(pairs) else "does not tell of loss"
    return (
        f"Of any two months, the one with more drifted columns was the one with more loss in {agree} of {len(pairs)} "
        f"cases: drift of the columns alone {tells} here."
    )


def _actions(months: Sequence[MonthSummary]) -> str:
    def row(name: str, cells: list[str]) -> str:
        return f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"

    dot = '<span class="good" title="yes">●</span>'
    triangle = {"harm": '<span class="bad" title="harm">▲</span>', "drift": '<span class="warn" title="drift">▲</span>'}
    head = "<tr><th></th>" + "".join(f"<th>{_label(month.month)}</th>" for month in months) + "</tr>"
    rows = [
        row("harm or drift", [triangle.get(month.verdict, "·") for month in months]),
        row("retrained", [dot if month.retrained else "·" for month in months]),
        row("won at the gate", [dot if month.gate == "passed" else "·" for month in months]),
        row("won the canary", [dot if month.canary == "promote" else "·" for month in months]),
        row("new champion", [dot if month.promoted else "·" for month in months]),
    ]  # fmt: skip
    return f'<div style="overflow-x:auto"><table class="acts">{head}{"".join(rows)}</table></div>'


def _table(months: Sequence[MonthSummary]) -> str:
    heads = [
        ("month", ""),
        ("drift", ""),
        ("retrained", ""),
        ("log loss champion", "n"),
        ("frozen", "n"),
        ("gain", "n"),
    ]
    heads += [("AUC champion", "n"), ("frozen", "n"), ("late rate", "n"), ("gate", ""), ("canary", "")]
    heads += [("CPU / GPU s", "n"), ("champion after", "")]
    rows = []
    for m in months:
        tone = "" if not m.gain else ("good" if m.gain > 0 else "bad")
        cells = [
            (m.month, ""), (_chip(m.verdict), ""), ("yes" if m.retrained else "no", ""),
            (_number(m.champion and m.champion.log_loss), "n"), (_number(m.frozen and m.frozen.log_loss), "n"),
            (f'<span class="{tone}">{_signed(m.gain)}</span>', "n"),
            (_number(m.champion and m.champion.auc), "n"), (_number(m.frozen and m.frozen.auc), "n"),
            (_number(m.base_rate, 3), "n"), (_chip(m.gate), ""), (_chip(m.canary), ""),
            (f"{_number(m.cpu_seconds, 1)} / {_number(m.gpu_seconds, 1)}" if m.retrained else "–", "n"),
            (f"v{escape(m.champion_after)}" if m.champion_after else "–", ""),
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f'<td class="{kind}">{text}</td>' for text, kind in cells) + "</tr>")
    head = "".join(f'<th class="{kind}">{text}</th>' for text, kind in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _details(months: Sequence[MonthSummary], index: int) -> str:
    month = months[index]
    worse = month.gain is not None and month.gain <= 0
    chips = _chip(month.verdict) + (_chip(month.gate) if month.gate != "-" else "")
    chips += _chip(month.canary) if month.canary != "-" else ""
    sections = [
        _section("Drift against the champion's training data", month.ledger.get("drift"), month.columns),
        _section("Gate: challenger against champion", month.ledger.get("gate")),
        _canary(month.ledger.get("canary")),
    ]
    return (
        f"<details{' open' if worse else ''}><summary>{month.month}{chips}</summary><div>"
        f"<p>{escape(summary.explain(months, index))} {escape(_decision(month))}</p>"
        f'<div class="pair">{"".join(sections)}</div>{_papers(month)}</div></details>'
    )


def _papers(month: MonthSummary) -> str:
    """A link to the model card of the version that the month has made."""
    papers = month.ledger.get("papers") or {}
    if not papers.get("card_uri"):
        return ""
    uri = str(papers["card_uri"])
    link = f"file://{uri}" if uri.startswith("/") else uri
    return f'<p><a href="{escape(link)}">Model card of version {escape(str(papers["version"]))}</a></p>'


def _decision(month: MonthSummary) -> str:
    if not month.retrained:
        return "Nothing was trained: without harm or relevant drift the champion stays."
    if month.gate == "lost":
        return "A challenger was trained and lost at the gate; what serves did not change."
    if month.canary == "rollback":
        return "A challenger passed the gate and was rolled back in the canary; what serves did not change."
    if month.promoted:
        return f"A challenger was trained and became the champion: version {month.champion_after}."
    return "A challenger was trained; the champion did not change."


def facts(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Numbers and short texts of a nested record as name and text; lists of records and URIs are left out."""
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        if any(hidden in key for hidden in _HIDDEN) or item is None:
            continue
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(item, Mapping):
            found += facts(item, f"{name}: ")
        elif isinstance(item, bool):
            found.append((name, "yes" if item else "no"))
        elif isinstance(item, float):
            found.append((name, f"{item:.5g}"))
        elif isinstance(item, (int, str)) and len(str(item)) <= 80:
            found.append((name, str(item)))
    return found


def _rows(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in pairs)


def _reasons(record: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{escape(str(reason))}</li>" for reason in record.get("reasons") or ())
    return f"<ul>{items}</ul>" if items else ""


def _section(title: str, record: Mapping[str, Any] | None, columns: Sequence[str] = ()) -> str:
    if not record:
        return ""
    drifted = f"<p>Drifted most: {escape(', '.join(columns[:8]))}.</p>" if columns else ""
    table = f'<table class="facts">{_rows(facts(record)[:_MOST_FACTS])}</table>'
    return f"<div><h3>{title}</h3>{_reasons(record)}{drifted}{table}</div>"


def _canary(record: Mapping[str, Any] | None) -> str:
    if not record:
        return ""
    requests = record.get("requests") or {}
    pairs = [(f"requests to {arm}", f"{count:,}") for arm, count in requests.items() if isinstance(count, int)]
    for step in record.get("steps") or ():
        if isinstance(step, Mapping):
            rest = ", ".join(f"{name} {text}" for name, text in facts(step)[:4])
            pairs.append(("step", rest))
    guardrails = record.get("guardrails") or {}
    named = (
        guardrails.items() if isinstance(guardrails, Mapping) else [(g.get("name", "guardrail"), g) for g in guardrails]
    )
    for name, guardrail in named:
        if isinstance(guardrail, Mapping):
            pairs.append((str(name), ", ".join(f"{key} {text}" for key, text in facts(guardrail)[:5])))
        else:
            pairs.append((str(name), str(guardrail)))
    table = f'<table class="facts">{_rows(pairs)}</table>'
    return f"<div><h3>Canary: both versions under live traffic</h3>{_reasons(record)}{table}</div>"
