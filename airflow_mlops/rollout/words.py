"""Numbers of a rollout with their units, and what a guardrail's account says, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from airflow_mlops.rollout.terms import HARM, NO_DATA, OK, OPEN

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
    """``rate``, ``latency``, ``mean``, ``score`` or ``drift``, also of an account that does not say so itself."""
    if account.get("kind"):
        return str(account["kind"])
    if "slower_than_seconds" in account:
        return "latency"
    return "rate" if "events" in account else "mean"


def level(account: Mapping[str, Any], value: Any) -> str:
    """One arm's number, with its unit."""
    return number(value) if kind(account) in ("mean", "score") else share(value)


def of_arm(account: Mapping[str, Any], arm: str) -> str:
    """The number of one arm, with its unit; a distance between the arms is the canary's."""
    return NONE if (kind(account), arm) == ("drift", "stable") else level(account, account.get(arm))


def measured(account: Mapping[str, Any]) -> str:
    """What the numbers of the arms are."""
    if kind(account) == "latency" and "slower_than_seconds" in account:
        return f"slower than {duration(account['slower_than_seconds'])}"
    return {"rate": "of requests", "latency": "slow requests", "drift": "total variation"}.get(kind(account), "mean")


def evidence(account: Mapping[str, Any]) -> str:
    """How far the evidence is, in one short line."""
    if "e_ok" in account:
        harm, ok = (f"{odds(account[key])} of {odds(account.get(f'{key}_needed'))}" for key in ("e_harm", "e_ok"))
        return f"harm {harm} to 1, no harm {ok} to 1"
    planned = [
        f"{name} z {number(account[key])} of {number(account.get(f'{key}_needed'))}"
        for name, key in (("harm", "z_harm"), ("no harm", "z_ok"))
        if key in account
    ]
    parts = [f"planned look {account.get('planned_look')}: {', '.join(planned)}"] if planned else []
    if "worse_by_at_most" in account and "z_ok" not in account:
        least, most = level(account, account.get("worse_by_at_least")), level(account, account["worse_by_at_most"])
        parts.append(f"worse by {least} to {most}, to be below {level(account, account.get('margin'))}")
    return "; ".join(parts) or NONE


def sentence(name: str, account: Mapping[str, Any]) -> str:
    """The numbers of both arms, as one says them."""
    stable, canary, what = of_arm(account, "stable"), of_arm(account, "canary"), kind(account)
    if canary == NONE or (stable == NONE and what != "drift"):
        return f"There are no numbers of both arms for {name}."
    if what == "latency":
        return f"Of the canary's requests {canary} were {measured(account)}, of stable's {stable}."
    if what == "drift":
        return f"Predictions of the canary are distributed differently from stable's by {canary} (total variation)."
    if what == "rate":
        return f"The canary had {name} in {canary} of its requests, stable in {stable}."
    return f"The canary has a mean {name} of {canary}, stable of {stable}."


def remarks(account: Mapping[str, Any]) -> list[str]:
    """What else is to be known of the numbers."""
    found = [str(account["remark"])] if account.get("remark") else []
    if account.get("status") == OK and not _reached(account):
        found.append(
            "No harm was shown at an earlier look or by a share that is acceptable in any case, and still holds."
        )
    if spread := finite(account.get("replica_spread")):
        found.append(
            f"Replicas of one version differ by about {share(spread)}; a difference between the arms is held "
            "against that."
        )
    if account.get("culprit") is not None:
        found.append(f"Only the canary's replica {account['culprit']} is worse; the others are as good as stable.")
    return found


def _reached(account: Mapping[str, Any]) -> bool:
    """Whether the numbers of this look alone show no harm."""
    if "e_ok" in account:
        pair = account["e_ok"], account.get("e_ok_needed")
    elif "z_ok" in account:
        pair = account["z_ok"], account.get("z_ok_needed")
    else:
        pair = account.get("margin"), account.get("worse_by_at_most")
    shown, needed = map(finite, pair)
    return shown is not None and needed is not None and shown >= needed


def effect(name: str, account: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How large the difference is, with its confidence sequence.

    :param account: of the last look
    :param found: ``effect`` (what is estimated), ``estimate``, ``interval`` and ``confidence``, of a verdict's report
    """
    said = sentence(name, account)
    low, high = map(finite, found.get("interval") or (None, None))
    if low is None or high is None:
        return f"{said} How large the difference is cannot be said."
    ratio = "ratio" in str(found.get("effect"))
    estimate, least, most = (number(v) if ratio else level(account, v) for v in (found.get("estimate"), low, high))
    null = 1.0 if ratio else 0.0
    # Distances are never below 0, so an interval that begins there says nothing of a difference.
    clear = "a difference is shown" if low > null or high < null else "no difference is shown"
    confidence = finite(found.get("confidence"))
    sure = f", sure to {100 * confidence:.4g} %" if confidence else ""
    what = str(found.get("effect") or "difference").capitalize()
    return f"{said} {what}, canary against stable: {estimate}, between {least} and {most}{sure}; {clear}."
