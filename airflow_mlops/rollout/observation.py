"""What a route reports about its two arms, and whether it can be believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from airflow_mlops.rollout.evidence import Moments

MOMENTS = ("latency", "prediction", "log_loss", "brier")
BUCKET_EDGES = tuple(round(0.001 * 1.25**i, 6) for i in range(44))
"""Upper edges of the latency histogram in seconds, 1 ms to 14.7 s; one more bucket holds what is slower."""


@dataclass(frozen=True)
class Observation:
    """One reading of a route, counters cumulative since its router started.

    :param time: the route's clock, seconds; equal to the last reading's means stale
    :param boot: changes when the counters start anew
    :param epoch: changes when weights or versions change
    :param weight: share of traffic really sent to the canary, percent
    :param stable: counters of the stable version: ``requests``, ``errors``, ``buckets`` and, for each of
        ``latency``, ``prediction``, ``log_loss``, ``brier``, ``[n, sum, sum of squares]``
    :param canary: the same of the canary
    :param routed: requests routed to (stable, canary) in this epoch
    :param problem: why nothing could be read; the other fields are then ignored
    """

    time: float
    boot: str = ""
    epoch: int = 0
    weight: float = 0.0
    stable: Mapping[str, Any] | None = None
    canary: Mapping[str, Any] | None = None
    routed: tuple[int, int] = (0, 0)
    problem: str | None = None


def counters_problem(counters: Mapping[str, Any] | None) -> str | None:
    """What is wrong with one arm's counters, or ``None``."""
    if not counters:
        return "has no counters"
    try:
        counts = [counters["requests"], counters["errors"], *counters["buckets"]]
        moments = [value for name in MOMENTS for value in counters[name]]
        counts += [counters[name][0] for name in MOMENTS]
        if len(counters["buckets"]) != len(BUCKET_EDGES) + 1 or any(len(counters[name]) != 3 for name in MOMENTS):
            return "has counters of another shape"
        if not all(math.isfinite(value) for value in [*counts, *moments]):
            return "reports numbers that are not finite"
        if min(counts) < 0 or counters["errors"] > counters["requests"]:
            return "reports impossible counts"
    except (KeyError, TypeError, ValueError) as error:
        return f"has unreadable counters ({type(error).__name__}: {error})"
    return None


def difference(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any] | None:
    """Counters since ``old``; ``None`` when a count went backwards, that is, started anew."""
    result: dict[str, Any] = {name: new[name] - old[name] for name in ("requests", "errors")}
    result["buckets"] = [a - b for a, b in zip(new["buckets"], old["buckets"], strict=True)]
    for name in MOMENTS:
        result[name] = Moments(*new[name]).minus(Moments(*old[name]))
    counts = [result["requests"], result["errors"], *result["buckets"], *(result[name].n for name in MOMENTS)]
    return None if min(counts) < 0 else result
