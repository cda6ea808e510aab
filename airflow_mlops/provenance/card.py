"""A model card, as Markdown and as a page: what a version is for, what it was made of, and how it did.

After Mitchell et al. 2019, Model Cards for Model Reporting. What a run cannot know comes from ``documentation``, a
mapping with any of: ``description``, ``purpose``, ``approach`` (``supervised``, ...), ``family``, ``architecture``,
``domain``, ``supplier``, ``license`` (SPDX), ``autonomy``, ``standards``, ``users``, ``intended_use``, ``application``,
``limitations``, ``ethics`` (texts, or ``{"name", "mitigation"}``), ``safety``, ``explainability``, ``preprocessing``,
``decision_threshold``, ``personal_data``, ``links`` (``vcs``, ``website``, ``documentation``, ``distribution``) and
``energy`` (``cpu_watts``, ``gpu_watts``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from airflow_mlops.page import document
from airflow_mlops.provenance.modelcard import as_list, energy_of
from airflow_mlops.provenance.record import ModelRecord

_STYLE = """
.facts td:first-child{color:var(--muted);width:230px;white-space:nowrap}
td{white-space:normal;overflow-wrap:anywhere;vertical-align:top}td.n{white-space:nowrap}
code{font-size:13px;overflow-wrap:anywhere}h2{margin-top:32px}details{margin:8px 0}summary{cursor:pointer}
"""


@dataclass(frozen=True)
class _Table:
    """Rows under a head; without a head, facts: a name and what is so."""

    rows: Sequence[Sequence[Any]]
    head: Sequence[str] = ()


@dataclass(frozen=True)
class _Section:
    title: str
    blocks: Sequence[str | list[str] | _Table]


def markdown(record: ModelRecord) -> str:
    """The card as Markdown."""
    parts = [f"# {record.model}, version {record.version}"]
    for section in _sections(record):
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, str):
                parts.append(block)
            elif isinstance(block, list):
                parts.append("\n".join(f"- {item}" for item in block))
            else:
                parts.append(_markdown_table(block))
    return "\n\n".join(parts) + "\n"


def html(record: ModelRecord) -> str:
    """The card as one page that loads nothing from anywhere else."""
    parts = [f"<h1>{escape(record.model)}, version {escape(record.version)}</h1>", _tiles(record)]
    for section in _sections(record):
        parts.append(f"<h2>{escape(section.title)}</h2>")
        for block in section.blocks:
            if isinstance(block, str):
                parts.append(f"<p>{escape(block)}</p>")
            elif isinstance(block, list):
                parts.append(f"<ul>{''.join(f'<li>{escape(str(item))}</li>' for item in block)}</ul>")
            else:
                parts.append(_html_table(block))
    return document(f"{record.model} {record.version}: model card", "".join(parts), _STYLE)


def _sections(record: ModelRecord) -> list[_Section]:
    found = [
        _Section("Model", _model(record)),
        _Section("Use", _use(record)),
        _Section("Data", _data(record)),
        _Section("Training", _training(record)),
        _Section("Evaluation", _evaluation(record)),
        _Section("Decisions", _decisions(record)),
        _Section("Considerations", _considerations(record)),
        _Section("Origin", _origin(record)),
        _Section(
            "Not known", [record.unknown] if record.unknown else ["Every question that a record asks is answered."]
        ),
    ]
    return [section for section in found if section.blocks]


def _model(record: ModelRecord) -> list[Any]:
    told = record.documentation
    facts = {
        "Purpose": told.get("purpose"),
        "Architecture": told.get("architecture") or record.get("training.trainer"),
        "Supplier": told.get("supplier"),
        "License": told.get("license"),
        "Domain": told.get("domain"),
        "Registered": record.get("when.registered"),
        "Links": ", ".join(f"{kind} {url}" for kind, url in sorted((told.get("links") or {}).items())),
    }
    return [*as_list(told.get("description")), *_facts(facts)]


def _use(record: ModelRecord) -> list[Any]:
    told = record.documentation
    facts = {
        "Application": told.get("application"),
        "Users": ", ".join(as_list(told.get("users"))),
        "Autonomy": told.get("autonomy"),
        "Decision threshold": told.get("decision_threshold"),
    }
    return [*([as_list(told.get("intended_use"))] if told.get("intended_use") else []), *_facts(facts)]


def _data(record: ModelRecord) -> list[Any]:
    data, raw = record.get("data.training_set") or {}, record.get("data.snapshot") or {}
    window, features = data.get("window") or {}, data.get("features") or []
    facts = {
        "Training set": data.get("uri"),
        "SHA-256": data.get("sha256"),
        "Rows": data.get("rows"),
        "Window": f"{window['start']} to {window['end']}" if window.get("start") else None,
        "Label": data.get("label"),
        "Features": f"{len(features)}: {', '.join(features)}" if features else None,
        "Feature service": record.get("data.feature_service"),
        "Raw data (DVC)": raw.get("uri"),
        "MD5": raw.get("md5"),
        "Files, bytes": f"{raw['nfiles']}, {raw['size']:,}" if raw.get("nfiles") else None,
        "Profile": record.get("data.profile.uri"),
        "Profile's digest": record.get("data.profile.digest"),
        "Preprocessing": record.documentation.get("preprocessing"),
        "Personal data": record.documentation.get("personal_data"),
    }
    rows = [
        [view["view"], view["source"], view["matched"], view["leaks"], view["late_rows"]]
        for view in record.get("data.views") or ()
    ]
    head = ("feature view", "source", "rows matched", "leaks", "late rows")
    return [*_facts(facts), *([_Table(rows, head)] if rows else [])]


def _training(record: ModelRecord) -> list[Any]:
    cost, cluster, around = record.cost, record.cluster, record.environment
    energy = energy_of(record)
    watts = record.documentation.get("energy") or {}
    resources = ", ".join(f"{name} {amount:g}" for name, amount in (cluster.get("resources") or {}).items())
    facts = {
        "Loop": record.get("code.entry"),
        "Trainer": record.get("training.trainer"),
        "Seeds": ", ".join(f"{name} = {value}" for name, value in (record.seeds or {}).items()) or "none in the config",
        "Parameters": json.dumps(_short(record.parameters), sort_keys=True) if record.parameters else None,
        "Python": around.get("python"),
        "Image": around.get("image_digest"),
        "Libraries": f"{len(around['lock']['packages'])}, {around['lock']['sha256']}" if around.get("lock") else None,
        "Cluster": cluster.get("name"),
        "Ray": f"{cluster['ray_version']}, {cluster.get('nodes')} nodes: {resources}"
        if cluster.get("ray_version")
        else None,
        "Workers": cluster.get("num_workers"),
        "CPU hours": cost.get("cpu_hours"),
        "GPU hours": cost.get("gpu_hours"),
        "Cost of the GPUs": cost.get("gpu_cost"),
        "Attempts": cost.get("attempts"),
        "Energy": None
        if energy is None
        else f"{energy:.3g} kWh, estimated at {watts.get('cpu_watts')} W a busy core, {watts.get('gpu_watts')} W a GPU",
    }
    facts |= {
        f"Metric {name}": value for name, value in (record.metrics or {}).items() if isinstance(value, int | float)
    }
    return _facts(facts)


def _evaluation(record: ModelRecord) -> list[Any]:
    gate = record.gate or {}
    if not gate:
        return ["No gate has judged this version."]
    metrics = gate.get("metrics") or {}
    challenger, champion = metrics.get("challenger") or {}, metrics.get("champion") or {}
    rows = [
        [name, value, champion.get(name)]
        for name, value in challenger.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    checks = [
        [check["name"], check["value"], check["limit"], "yes" if check["passed"] else "NO"]
        for check in gate.get("checks") or ()
    ]
    slices = [
        [f"{one.get('column')} = {one.get('value')}", one.get("rows"), one.get("gain"), one.get("p_adjusted")]
        for one in gate.get("slices") or ()
    ]
    against = f"version {gate['champion_version']}" if gate.get("champion_version") else "no champion"
    told = (
        f"{'Passed' if gate.get('passed') else 'Did not pass'} against {against}, on {gate.get('rows')} rows held out."
    )
    return [
        told,
        *([_Table(rows, ("metric", "this version", "champion then"))] if rows else []),
        *([_Table(checks, ("required", "found", "limit", "holds"))] if checks else []),
        *([_Table(slices, ("slice", "rows", "gain", "p that it is worse"))] if slices else []),
    ]


def _decisions(record: ModelRecord) -> list[Any]:
    canary, promotion = record.canary or {}, record.promotion or {}
    facts = {
        "Gate": None if record.gate is None else "passed" if record.gate.get("passed") else "not passed",
        "Canary": canary.get("verdict"),
        "Because": "; ".join(canary.get("reasons") or ()),
        "Requests": ", ".join(f"{arm} {count}" for arm, count in (canary.get("requests") or {}).items()),
        "Alias": f"{promotion['alias']}, before: {promotion.get('previous') or 'none'}"
        if promotion.get("alias")
        else None,
        "Approvals": "nobody was asked"
        if record.approvals is not None and not record.approvals
        else "; ".join(f"{_answer(said)} by {said.get('by')} ({said.get('about')})" for said in record.approvals or ()),
        "Audit log": ", ".join(f"{one.get('kind')}: entry {one['number']}" for one in record.audit),
    }
    return _facts(facts)


def _answer(said: Mapping[str, Any]) -> str:
    if not said.get("approved"):
        return "rejected"
    return "approved against the verdict" if said.get("overrode") else "approved"


def _considerations(record: ModelRecord) -> list[Any]:
    told = record.documentation
    ethics = [
        one if isinstance(one, str) else f"{one['name']}: {one['mitigation']}" for one in as_list(told.get("ethics"))
    ]
    facts = {
        "Safety": told.get("safety"),
        "Explainability": told.get("explainability"),
        "Standards": told.get("standards"),
    }
    limits = as_list(told.get("limitations"))
    return [
        *(["Limitations:", limits] if limits else []),
        *(["Ethics:", ethics] if ethics else []),
        *_facts(facts),
    ]


def _origin(record: ModelRecord) -> list[Any]:
    who, code = record.who, record.code
    state = " with changes" if code.get("dirty") else ""
    facts = {
        "Who": who.get("user"),
        "Dag run": f"{who.get('dag_id')}, {who.get('run_id')}" if who.get("run_id") else None,
        "Started": record.get("when.started"),
        "Git revision": f"{code['revision']}{state}" if code.get("revision") else None,
        "Changed files": ", ".join(code.get("changed") or ()),
        "Repository": code.get("repository"),
        "Loop's source": code.get("entry_sha256"),
        "Dag bundle": " ".join(str(who[name]) for name in ("bundle", "bundle_version") if who.get(name)),
        "Run key": record.run_key,
        "Digest of the files": record.get("integrity.digest"),
        "Signed by": record.get("integrity.signed_by") or ("nobody" if record.get("integrity.digest") else None),
        "Signature": record.get("integrity.signature_uri"),
    }
    files = [[file["path"], file["sha256"], file["size"]] for file in record.artifacts or ()]
    return [*_facts(facts), *([_Table(files, ("file of the model", "SHA-256", "bytes"))] if files else [])]


def _short(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters without long lists, which have a place of their own."""
    return {
        name: f"{len(value)} names" if isinstance(value, list) and len(value) > 8 else value
        for name, value in (parameters or {}).items()
    }


def _facts(facts: Mapping[str, Any]) -> list[_Table]:
    rows = [[name, value] for name, value in facts.items() if value not in (None, "")]
    return [_Table(rows)] if rows else []


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _tiles(record: ModelRecord) -> str:
    verdict = {True: "passed", False: "not passed"}.get(record.get("gate.passed"), "–")
    revision = record.get("code.revision")
    tiles = [
        (verdict, "gate"),
        (str(record.get("canary.verdict") or "–").lower(), "canary"),
        (_text(record.get("data.training_set.rows")), "rows it learned from"),
        (f"{revision[:8]}{' +' if record.get('code.dirty') else ''}" if revision else "–", "git revision"),
        (str(len(record.unknown)), "questions without an answer"),
    ]
    cells = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
    return f'<div class="tiles">{cells}</div>'


def _html_table(table: _Table) -> str:
    numbers = [all(value is None or isinstance(value, int | float) for value in column) for column in zip(*table.rows)]

    def kind(place: int) -> str:
        return ' class="n"' if table.head and place and numbers[place] else ""

    def line(tag: str, row: Sequence[Any]) -> str:
        cells = (f"<{tag}{kind(place)}>{escape(_text(value))}</{tag}>" for place, value in enumerate(row))
        return f"<tr>{''.join(cells)}</tr>"

    rows = "".join(line("td", row) for row in table.rows)
    head = line("th", table.head) if table.head else ""
    look = "" if table.head else ' class="facts"'
    return f'<div class="scroll" style="margin:8px 0"><table{look}>{head}{rows}</table></div>'


def _markdown_table(table: _Table) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_cell(_text(value)) for value in cells) + " |"

    head = table.head or ("", "")
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, table.rows)])


def _cell(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
