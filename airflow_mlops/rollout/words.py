"""Numbers of a rollout with their units, and what a guardrail's account says, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from airflow_mlops.rollout.guards import HARM, NO_DATA, OK, OPEN

NONE = "-"
#: What a status of a guardrail means.
STATUS = {
    OK: "shown to be no worse",
    HARM: "shown to be worse",
    OPEN: "neither shown",
    NO_DATA: "not enough data of both arms",
}


def finite(value: Any) -> float | None:
    """``value`` as a number, or None for anything that is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any) -> str:
    """Four significant digits."""
    known = finite(value)
    return NONE if known is None else f"{known:.4g}"


def count(value: Any) -> str:
    """A whole number, its thousands apart."""
    known = finite(value)
    return NONE if known is None else f"{known:,.0f}"


def share(value: Any) -> str:
    """A share of 0 to 1 in percent."""
    known = finite(value)
    if known is None:
        return NONE
    return "<0.001 %" if 0 < known < 1e-5 else f"{100 * known:.3g} %"


def duration(value: Any) -> str:
    """Seconds, in the unit that fits."""
    known = finite(value)
    if known is None:
        return NONE
    for limit, unit, factor in ((1, "ms", 0.001), (120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if abs(known) < limit:
            return f"{known / factor:.3g} {unit}"
    return f"{known / 86400:.3g} d"


def odds(value: Any) -> str:
    """An e-value: how much there is against a claim, to one."""
    known = finite(value)
    if known is None:
        return NONE
    if known < 0.01:
        return "<0.01"
    if known >= 1e6:
        return ">1,000,000"
    return f"{known:,.0f}" if known >= 10 else f"{known:.2g}"


def kind(account: Mapping[str, Any]) -> str:
    """``rate``, ``latency``, ``drift`` or ``mean``, also of an account that does not say so itself."""
    if account.get("kind"):
        return "mean" if account["kind"] == "score" else str(account["kind"])
    if "slower_than_seconds" in account:
        return "latency"
    return "rate" if "events" in account else "mean"


def level(account: Mapping[str, Any], value: Any) -> str:
    """One arm's number, with its unit."""
    return number(value) if kind(account) == "mean" else share(value)


def measured(account: Mapping[str, Any]) -> str:
    """What the numbers of the arms are."""
    if kind(account) == "latency" and "slower_than_seconds" in account:
        return f"slower than {duration(account['slower_than_seconds'])}"
    return {"rate": "of requests", "latency": "slow requests", "drift": "of predictions"}.get(kind(account), "mean")


def evidence(account: Mapping[str, Any]) -> str:
    """How far the evidence is, in one short line."""
    if "e_ok" in account:
        harm, ok = (f"{odds(account[key])} of {odds(account.get(f'{key}_needed'))}" for key in ("e_harm", "e_ok"))
        return f"harm {harm} to 1, no harm {ok} to 1"
    if "z_ok" in account:
        harm, ok = (f"{number(account[key])} of {number(account.get(f'{key}_needed'))}" for key in ("z_harm", "z_ok"))
        return f"planned look {account.get('planned_look')}: harm z {harm}, no harm z {ok}"
    if "worse_by_at_most" in account:
        least, most = level(account, account["worse_by_at_least"]), level(account, account["worse_by_at_most"])
        return f"worse by {least} to {most}, to be below {level(account, account.get('margin'))}"
    return NONE


def sentence(name: str, account: Mapping[str, Any]) -> str:
    """The numbers of both arms, as one says them."""
    stable, canary = (level(account, account.get(arm)) for arm in ("stable", "canary"))
    if NONE in (stable, canary):
        return f"There are no numbers of both arms for {name}."
    what = kind(account)
    if what == "latency":
        return f"Of the canary's requests {canary} were {measured(account)}, of stable's {stable}."
    if what == "rate":
        return f"The canary had {name} in {canary} of its requests, stable in {stable}."
    return f"The canary has a mean {name} of {canary}, stable of {stable}."


def remarks(account: Mapping[str, Any]) -> list[str]:
    """What else is to be known of the numbers."""
    found = [str(account["remark"])] if account.get("remark") else []
    if spread := finite(account.get("replica_spread")):
        found.append(
            f"Replicas of one version differ by about {share(spread)}; a difference between the arms is held "
            "against that."
        )
    if account.get("culprit") is not None:
        found.append(f"One replica of the canary, number {account['culprit']} from 0, makes the difference alone.")
    return found


def effect(name: str, account: Mapping[str, Any]) -> str:
    """How large the difference is, with its confidence sequence where there is one.

    :param account: with ``effect`` (what is estimated), ``estimate``, ``interval`` and ``confidence``, as an A/B test's
        last look has them
    """
    said = sentence(name, account)
    low, high = account.get("interval") or (None, None)
    if finite(low) is None or finite(high) is None:
        return f"{said} How large the difference is cannot be said."
    ratio = "ratio" in str(account.get("effect"))
    write = number if ratio else (lambda value: level(account, value))
    null = 1.0 if ratio else 0.0
    telling = "no difference is among them" if low <= null <= high else "no difference is not among them"
    confidence = finite(account.get("confidence"))
    sure = f", with {100 * confidence:g} % confidence at all looks at once" if confidence else ""
    estimate = f" {write(account['estimate'])}" if finite(account.get("estimate")) is not None else ""
    return (
        f"{said} {str(account.get('effect') or 'difference').capitalize()}, canary against stable:{estimate}, between "
        f"{write(low)} and {write(high)}{sure}; {telling}."
    )
