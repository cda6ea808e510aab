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
        harm, ok = (f"{odds(account[key])} of {odds(account[f'{key}_needed'])}" for key in ("e_harm", "e_ok"))
        return f"harm {harm} to 1, no harm {ok} to 1"
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


def effect(name: str, account: Mapping[str, Any]) -> str:
    """How large the difference is, with its confidence sequence where there is one."""
    said = sentence(name, account)
    ratio = account.get("ratio")
    if isinstance(ratio, list | tuple) and len(ratio) == 2 and None not in map(finite, ratio):
        low, high = ratio
        return f"{said} The canary has {_within(number(low), number(high))} times as many{_sure(low, high, 1.0)}."
    if "worse_by_at_most" not in account or NONE in (level(account, account.get(arm)) for arm in ("stable", "canary")):
        return said
    low, high = difference_interval(account)
    return (
        f"{said} The difference, canary less stable, is {_within(level(account, low), level(account, high))}"
        f"{_sure(low, high, 0.0)}."
    )


def difference_interval(account: Mapping[str, Any]) -> tuple[float, float]:
    """Confidence sequence of canary's mean less stable's."""
    least, most = float(account["worse_by_at_least"]), float(account["worse_by_at_most"])
    if account.get("kind") == "score":
        # What is judged is the size of the difference, whose bounds lie around it.
        estimate = float(account["difference"])
        return estimate - (abs(estimate) - least), estimate + (abs(estimate) - least)
    return (-most, -least) if account.get("higher_is_better") else (least, most)


def _within(low: str, high: str) -> str:
    return f"between {low} and {high}"


def _sure(low: float, high: float, null: float) -> str:
    if low <= null <= high:
        return ", which includes no difference at all"
    return ", so that the canary has more" if low > null else ", so that the canary has less"
