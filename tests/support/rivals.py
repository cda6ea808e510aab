"""What Kayenta, Argo Rollouts and Flagger decide: their rules, written down again to compare ours with.

Not their code, and without what surrounds it; each rule is what its documentation and its source say it does:

* Kayenta, ``NetflixACAJudge-v1.0``: a metric is High or Low when the 98 % Mann-Whitney interval of the shift between
  the arms clears a quarter of the Hodges-Lehmann estimate and the ratio of the means an allowed one; the score is the
  share of passing metrics, a group without data scores 100, the run fails when half the metrics or more have none.
* Argo Rollouts, ``AnalysisRun``: one fixed condition per measurement; more failures than ``failureLimit`` fail it, more
  errors in a row than ``consecutiveErrorLimit`` end it, and a run without a measurement is Successful.
* Flagger: one fixed range per measurement; failed checks add up and no success takes one back, no data is a failed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from airflow_mlops.rollout import Observation

Series = Sequence[float] | np.ndarray
#: Ten metrics, as ours, and which way is bad.
DIRECTIONS = {
    "errors": "increase",
    "timeouts": "increase",
    "fallbacks": "increase",
    "latency p95": "increase",
    "latency p99": "increase",
    "log_loss": "increase",
    "brier": "increase",
    "value": "decrease",
    "prediction": "either",
    "prediction p90": "either",
}
PASS, HIGH, LOW, NO_DATA = "Pass", "High", "Low", "Nodata"
INCREASE, DECREASE, EITHER = "increase", "decrease", "either"


@dataclass(frozen=True)
class Decision:
    """What a rule came to.

    :param promoted: whether the canary got all traffic; otherwise it was rolled back
    :param after: measurements until then
    """

    promoted: bool
    after: int


def shift(control: Series, experiment: Series, confidence: float = 0.98) -> tuple[float, float, float]:
    """Lower bound, Hodges-Lehmann estimate and upper bound of how far ``experiment`` lies above ``control``."""
    pairs = np.subtract.outer(np.asarray(experiment, float), np.asarray(control, float)).ravel()
    n, m, size = len(experiment), len(control), pairs.size
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    outside = max(math.floor(n * m / 2 - z * math.sqrt(n * m * (n + m + 1) / 12)), 0)
    ranks = [outside, (size - 1) // 2, size // 2, size - 1 - outside]
    low, below, above, high = np.partition(pairs, ranks)[ranks].tolist()
    return low, (below + above) / 2, high


def classify(
    control: Series,
    experiment: Series,
    direction: str = EITHER,
    *,
    tolerance: float = 0.25,
    allowed_ratio: float = 1.0,
    replace_missing: bool = False,
) -> str:
    """Kayenta's label of one metric; NaN is a point without a value.

    :param direction: which way is bad
    :param allowed_ratio: ratio of the means that is still no failure (``effectSize.allowedIncrease``); of its inverse
        when falling
    :param replace_missing: ``nanStrategy: replace``, by which a missing point is a zero
    """
    arms = [np.asarray(values, float) for values in (control, experiment)]
    missing = [np.isnan(values) for values in arms]
    arms = [np.where(gone, 0.0, x) if replace_missing else x[~gone] for x, gone in zip(arms, missing)]
    if any(len(values) == 0 for values in arms):
        return PASS if replace_missing else NO_DATA
    if len(arms[0]) == len(arms[1]) and np.array_equal(arms[0], arms[1]):
        return PASS
    low, estimate, high = shift(arms[0], arms[1])
    bound = tolerance * abs(estimate)
    means = [float(values.mean()) for values in arms]
    ratio = means[1] / means[0] if means[0] else math.inf
    if direction in (INCREASE, EITHER) and low > bound and ratio > allowed_ratio:
        return HIGH
    if direction in (DECREASE, EITHER) and high < -bound and ratio < 1 / allowed_ratio:
        return LOW
    return PASS


def score(labels: Mapping[str, str], groups: Mapping[str, str] | None = None) -> float:
    """Kayenta's score, 0 to 100: the mean over the groups of the share of metrics that pass.

    :param labels: metric to its label
    :param groups: metric to its group; all in one if not given
    """
    members: dict[str, list[str]] = {}
    for name, label in labels.items():
        members.setdefault((groups or {}).get(name, ""), []).append(label)
    scores = []
    for group in members.values():
        known = [label for label in group if label != NO_DATA]
        scores.append(100 * known.count(PASS) / len(known) if known else 100.0)
    return sum(scores) / len(scores)


def kayenta(
    control: Mapping[str, Sequence[float]],
    experiment: Mapping[str, Sequence[float]],
    directions: Mapping[str, str],
    *,
    interval: int = 30,
    passing: float = 95.0,
    marginal: float = 75.0,
    replace_missing: bool = False,
) -> Decision:
    """A canary analysis that looks every ``interval`` points at all of them so far.

    A score up to ``marginal`` ends it, the last one must reach ``passing``.
    """
    length = max((len(values) for values in [*control.values(), *experiment.values()]), default=0)
    ends = [*range(interval, length, interval), length]
    for end in ends:
        labels = {
            name: classify(control[name][:end], experiment[name][:end], direction, replace_missing=replace_missing)
            for name, direction in directions.items()
        }
        without = sum(label == NO_DATA for label in labels.values())
        reached = 0.0 if 2 * without >= len(labels) else score(labels)
        if reached <= marginal or (end == length and reached < passing):
            return Decision(False, end)
    return Decision(True, length)


def argo(
    measurements: Sequence[float | None], least: float = 0.99, failure_limit: int = 3, error_limit: int = 4
) -> Decision:
    """An analysis run with the condition ``result >= least``; ``None``: the query gave nothing (an error)."""
    failed = in_a_row = 0
    for index, value in enumerate(measurements, 1):
        in_a_row = in_a_row + 1 if value is None else 0
        failed += value is not None and not value >= least
        if failed > failure_limit or in_a_row > error_limit:
            return Decision(False, index)
    return Decision(True, len(measurements))


def flagger(measurements: Sequence[float | None], least: float = 0.99, threshold: int = 10) -> Decision:
    """An analysis of that many checks; the ``threshold``-th failed one rolls back."""
    failed = 0
    for index, value in enumerate(measurements, 1):
        failed += value is None or not value >= least
        if failed >= threshold:
            return Decision(False, index)
    return Decision(True, len(measurements))


def readings(observations: Iterable[Observation]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Control's and experiment's values of ``DIRECTIONS`` per interval, as queries over the same counters give them.

    All replicas of an arm together; a counter below its last value started at zero. NaN: no data.
    """
    series: list[list[dict[str, float]]] = [[], []]
    last: list[Mapping[str, Any] | None] = [None, None]
    for number, observation in enumerate(observations):
        down = observation.problem is not None
        for index, arm in enumerate((observation.stable, observation.canary)):
            now = None if down else arm
            if number:
                series[index].append(_values(now or {}, last[index] or {}))
            last[index] = now
    return tuple({name: [row[name] for row in rows] for name in DIRECTIONS} for rows in series)  # type: ignore[return-value]


def _values(now: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, float]:
    values = dict.fromkeys(DIRECTIONS, math.nan)
    names = [name for name in now if name in last]
    if not names:
        return values

    def grown(kind: str, name: str) -> np.ndarray | None:
        try:
            new, old = (np.array([_numbers(side[replica][kind][name]) for replica in names]) for side in (now, last))
        except KeyError:
            return None
        return np.where(new < old, new, new - old).sum(axis=0)

    requests = float(grown("counts", "requests")[0])  # type: ignore[index]
    for name in ("errors", "timeouts", "fallbacks"):
        count = grown("counts", name)
        if count is not None and requests:
            values[name] = count[0] / requests
    for name in ("log_loss", "brier", "value", "prediction"):
        sums = grown("moments", name)
        if sums is not None and sums[0]:
            values[name] = sums[1] / sums[0]
    for metric, name, quantile in (
        ("latency p95", "latency", 0.95),
        ("latency p99", "latency", 0.99),
        ("prediction p90", "prediction", 0.9),
    ):
        counts = grown("histograms", name)
        if counts is not None and counts.sum():
            values[metric] = _quantile(now[names[0]]["histograms"][name]["edges"], counts, quantile)
    return values


def _numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        value = value["counts"]
    return [float(number) for number in value] if isinstance(value, list) else [float(value)]


def _quantile(edges: Sequence[float], counts: np.ndarray, quantile: float) -> float:
    """Straight line within the bucket, the last edge for what is above all."""
    below = np.concatenate([[0.0], counts.cumsum()])
    return float(np.interp(quantile * below[-1], below, [0.0, *edges, edges[-1]]))
