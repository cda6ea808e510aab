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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

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


def shift(
    control: Sequence[float], experiment: Sequence[float], confidence: float = 0.98
) -> tuple[float, float, float]:
    """Lower bound, Hodges-Lehmann estimate and upper bound of how far ``experiment`` lies above ``control``."""
    pairs = np.sort(np.subtract.outer(np.asarray(experiment, float), np.asarray(control, float)).ravel())
    n, m = len(experiment), len(control)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    outside = max(math.floor(n * m / 2 - z * math.sqrt(n * m * (n + m + 1) / 12)), 0)
    return float(pairs[outside]), float(np.median(pairs)), float(pairs[-1 - outside])


def classify(
    control: Sequence[float],
    experiment: Sequence[float],
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
    if len(arms[0]) == len(arms[1]) and np.array_equal(*arms):
        return PASS
    low, estimate, high = shift(*arms)
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
