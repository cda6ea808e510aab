"""What a rollout decided and on which evidence, as one page or one image."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from airflow_mlops.page import document
from airflow_mlops.rollout import plots, words
from airflow_mlops.rollout.spec import RolloutSpec
from airflow_mlops.rollout.terms import HARM, NO_DATA, OK

_STYLE = """
:root{--stable:var(--champion);--canary:var(--challenger)}
.card{margin:14px 0}.card h3{display:flex;gap:10px;align-items:baseline}.card p{margin-bottom:4px}
.card{overflow-x:auto}.card svg{margin-top:8px;min-width:760px}
h1 .chip{font-size:17px;vertical-align:4px;margin-left:6px}
h1,h3,li,td,p{overflow-wrap:anywhere}.wrap{white-space:normal;min-width:22ch}
"""
_VERDICTS = {
    "PROMOTE": ("promoted", "good"),
    "ROLLBACK": ("rolled back", "bad"),
    "CONCLUDE": ("test concluded", ""),
}
_DECISIONS = {
    "PROMOTE_STEP": "to the next step",
    "PROMOTE": "promoted",
    "ROLLBACK": "rolled back",
    "CONCLUDE": "test concluded",
}
_TONES = {OK: "good", HARM: "bad"}


def render_html(result: Mapping[str, Any], spec: RolloutSpec | None = None) -> str:
    """The page: verdict, reasons, steps, guardrails with their numbers, evidence over time.

    :param result: of :func:`airflow_mlops.rollout.controller.run_rollout`
    :param spec: what was rolled out, for the rules that it was judged by
    :return: HTML with nothing loaded from anywhere else
    """
    result = _complete(result, spec)
    word, tone = _verdict(result)
    body = [
        f'<h1>{escape(_subject(result))} <span class="chip {tone}">{escape(word)}</span></h1>',
        f"<p>{escape(lead(result))}</p>",
        _list(result["reasons"]),
        _tiles(result),
        _effects(result),
        "<h2>Guardrails</h2>",
        _guardrails(result),
        "<h2>Steps</h2>",
        _steps(result),
        "<h2>Evidence over time</h2>",
        _evidence(result),
        _rules(spec),
    ]
    return document(f"{_subject(result)}: {word}", "".join(body), _STYLE)


def render_png(result: Mapping[str, Any], spec: RolloutSpec | None = None) -> bytes:
    """The plots of :func:`render_html` as one PNG image."""
    result = _complete(result, spec)
    return plots.png(result, f"{_subject(result)}: {_verdict(result)[0]}")


def lead(result: Mapping[str, Any]) -> str:
    """What the verdict means for the traffic, in one or two sentences."""
    version, previous = f"Version {result['version']}", result.get("previous")
    stays = f"version {previous} serves all traffic" if previous else "the canary gets no traffic"
    verdict = result["verdict"]
    if verdict == "PROMOTE" and not result.get("compared", True):
        return f"{version} serves all traffic. It was not compared with any other version."
    if verdict == "PROMOTE":
        return f"{version} serves all traffic: every guardrail has shown that it is not worse than {_stable(previous)}."
    if verdict == "CONCLUDE":
        return f"The test of {version.lower()} against {_stable(previous)} has run its time; {stays} again."
    harmful = [name for name, account in _accounts(result).items() if account.get("status") == HARM]
    if harmful:
        return f"{version} was shown to be worse than {_stable(previous)} in {_and(harmful)}; {stays}."
    return f"{version} was rolled back; {stays}."


def _complete(result: Mapping[str, Any], spec: RolloutSpec | None) -> dict[str, Any]:
    """The result with all its fields, and with the guardrails' rules beside their numbers."""
    rules = {guardrail.name: guardrail.to_json() for guardrail in spec.guardrails} if spec else {}
    names = [*rules, *(name for name in result.get("guardrails") or {} if name not in rules)]
    accounts = {name: _with_rules(rules.get(name), _accounts(result).get(name)) for name in names}
    empty = {"verdict": "HOLD", "model": "model", "version": "?", "steps": [], "reasons": [], "requests": {}}
    known = {key: value for key, value in result.items() if value is not None}
    return {**empty, **known, "guardrails": accounts}


def _with_rules(rules: Mapping[str, Any] | None, account: Mapping[str, Any] | None) -> dict[str, Any]:
    known = {**(rules or {}), **(account or {"status": NO_DATA})}
    margin = words.finite(known.get("margin"))
    if rules and rules["relative"] and margin is not None:
        if "margin" in (account or {}):
            # The account has its margin in the metric's own unit.
            known["harm_margin"] = margin * rules["harm_margin"] / rules["margin"]
        else:
            del known["harm_margin"]
    return known


def _accounts(result: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return result.get("guardrails") or {}


def _subject(result: Mapping[str, Any]) -> str:
    return f"{result['model']}, version {result['version']}"


def _stable(previous: Any) -> str:
    return f"version {previous}" if previous else "what served before"


def _verdict(result: Mapping[str, Any]) -> tuple[str, str]:
    return _VERDICTS.get(result["verdict"], (str(result["verdict"]).lower(), "warn"))


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _list(texts: Iterable[Any]) -> str:
    items = "".join(f"<li>{escape(str(text))}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def _table(heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; each head has the class of its column."""
    head = "".join(f'<th class="{kind}">{escape(text)}</th>' for text, kind in heads)
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for cell, (_, kind) in zip(row, heads)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _chip(status: Any) -> str:
    text = words.STATUS.get(status, str(status))
    return f'<span class="chip {_TONES.get(status, "")}">{escape(text)}</span>'


def _tiles(result: Mapping[str, Any]) -> str:
    looks = plots.looks_of(result)
    weights = [step.get("weight") for step in result["steps"]] + [
        look[1] for look in looks if result["verdict"] != "PROMOTE" or look[2] != "PROMOTE"
    ]
    most = max((weight for weight in map(words.finite, weights) if weight is not None), default=None)
    requests = result["requests"]
    tiles = [
        (words.count(requests.get("canary")), "requests to the canary"),
        (words.count(requests.get("stable")), "requests to stable, judged beside it"),
        ("-" if most is None else f"{most:g} %", "largest share of traffic"),
        (words.duration(result.get("seconds")), f"from start to verdict, {words.count(result.get('looks'))} looks"),
    ]
    cells = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{text}</span></div>' for value, text in tiles)
    return f'<div class="tiles">{cells}</div>'


def _effects(result: Mapping[str, Any]) -> str:
    if result["verdict"] != "CONCLUDE":
        return ""
    sentences = _list(
        words.effect(name, account, (result.get("report") or {}).get(name) or {})
        for name, account in _accounts(result).items()
    )
    note = (
        "The intervals hold at all looks at once: that the test ended when it did does not make them wrong more often."
    )
    return f'<h2>Effects</h2>{sentences}<p class="muted">{note}</p>'


def _guardrails(result: Mapping[str, Any]) -> str:
    if not _accounts(result):
        return '<p class="muted">No guardrail was judged.</p>'
    heads = [
        ("guardrail", "wrap"),
        ("status", ""),
        ("stable", "n"),
        ("canary", "n"),
        ("measured", ""),
        ("evidence", "wrap"),
    ]
    heads += [("events or values, stable", "n"), ("canary", "n")]
    rows = []
    for name, account in _accounts(result).items():
        seen = account.get("events") or account.get("values") or [None, None]
        cells = [words.of_arm(account, arm) for arm in ("stable", "canary")]
        cells += [words.measured(account), words.evidence(account), *map(words.count, seen)]
        rows.append([escape(name), _chip(account.get("status")), *map(escape, cells)])
    return _table(heads, rows)


def _steps(result: Mapping[str, Any]) -> str:
    if not result["steps"]:
        return '<p class="muted">No step was finished.</p>'
    heads = [("canary's share of traffic", ""), ("lasted", "n"), ("looks", "n"), ("requests to stable", "n")]
    heads += [("to the canary", "n"), ("ended", "")]
    rows = []
    for step in result["steps"]:
        weight, requests = words.finite(step.get("weight")), step.get("requests") or [None, None]
        decision = step.get("decision") or "-"
        share = "0 %, copies of requests" if weight == 0 else "-" if weight is None else f"{weight:g} %"
        cells = [share, words.duration(step.get("seconds")), words.count(step.get("looks"))]
        cells += [*map(words.count, requests), _DECISIONS.get(decision, str(decision))]
        rows.append([escape(cell) for cell in cells])
    return _table(heads, rows)


def _evidence(result: Mapping[str, Any]) -> str:
    looks = plots.looks_of(result)
    if not looks:
        return '<p class="muted">No look is on record.</p>'
    began = dt.datetime.fromtimestamp(looks[0][0], dt.timezone.utc)
    note = (
        f"From {began:%Y-%m-%d %H:%M} UTC. A dotted line marks a new weight of the canary, a solid one the verdict. "
        "Evidence of 20 to 1 for a claim: if the claim were false, that much would be seen, at whichever look, "
        "in 1 of 20 rollouts at most."
    )
    cards = [f'<div class="card"><h3>Traffic</h3>{plots.traffic_svg(result)}</div>']
    for index, (name, account) in enumerate(_accounts(result).items()):
        plot = plots.guardrail_svg(result, name, account, f"guardrail {index}")
        said = [words.sentence(name, account), _rule(account), *words.remarks(account)]
        text = "".join(f"<p>{escape(text)}</p>" for text in said if text)
        cards.append(f'<div class="card"><h3>{escape(name)} {_chip(account.get("status"))}</h3>{text}{plot}</div>')
    return f'<p class="muted">{note}</p>' + "".join(cards)


def _rule(account: Mapping[str, Any]) -> str:
    """What is harm and what is not, where the guardrail's rules are known."""
    margin, harm = words.finite(account.get("margin")), words.finite(account.get("harm_margin"))
    if margin is None or harm is None:
        return ""
    if "e_harm" in account or words.kind(account) in ("rate", "latency"):
        tolerance = words.finite(account.get("tolerance")) or 0.0
        return (
            f"Harm is a share above {1 + harm:g} times stable's, no harm one below {1 + margin:g} times"
            f"{f'; up to {words.share(tolerance)} is no harm in any case' if tolerance else ''}."
        )
    limit, most = words.level(account, margin), words.level(account, harm)
    if account.get("kind") in ("score", "drift"):
        return f"Harm is a difference of more than {most}, no harm one of less than {limit}."
    worse = "lower" if account.get("higher_is_better") else "higher"
    return f"Worse is {worse}; harm is more than {most}, no harm less than {limit}."


def _rules(spec: RolloutSpec | None) -> str:
    if spec is None:
        return ""
    policy = spec.policy
    return (
        "<h2>Rules</h2><p>A version that is not worse is rolled back with a probability of at most "
        f"{100 * policy.alpha:g} %, over all guardrails and looks; one that is worse than a guardrail's margin is "
        f"promoted with at most {100 * policy.beta:g} %. Without a verdict after "
        f"{words.duration(policy.deadline_seconds)} the version is rolled back.</p>"
    )
