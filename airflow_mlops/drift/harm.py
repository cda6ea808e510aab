"""Whether a binary classifier has come to do worse than when it was accepted, from labels and predictions.

The reference is the model's own losses on the held-out data it was accepted on. Rows of one day share weather and
delays, so everything is judged by clusters (Liang and Zeger, 1986; t with one degree of freedom less than there
are clusters). Three questions, at a total error rate ``alpha`` after Holm (1979):

* ``log_loss``: has the mean log loss risen by more than ``epsilon``? It also rises when the base rate moves to where
  prediction is harder, which no retraining mends;
* ``calibration``: is ``|mean(label - probability)|`` beyond ``calibration_tolerance``?
* ``excess_loss``: has the mean of loss less the entropy of the prediction risen by more than ``excess_epsilon``? A
  calibrated model's excess loss has mean 0 whatever the base rate, so a rise is the model's own.

Clusters are taken as independent; where days hang together, choose longer clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from airflow_mlops.drift.limits import check_ranges, known_fields
from airflow_mlops.exceptions import DataError, InvalidInputError

VERSION = 1
_CLIP = 1e-6


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error by cluster."""

    mean: float
    se: float
    clusters: int


@dataclass(frozen=True)
class LossReference:
    """A model's performance on the data it was accepted on.

    :param log_loss: mean log loss in nats
    :param gap: mean of label less probability
    :param excess_loss: mean of log loss less the entropy of the prediction, in nats
    :param rows: rows with a label and a prediction
    :param base_rate: share of label 1
    """

    log_loss: Estimate
    gap: Estimate
    excess_loss: Estimate
    rows: int
    base_rate: float

    @classmethod
    def of(cls, label: Any, probability: Any, cluster: Any) -> LossReference:
        """Measure a model's losses.

        :param label: 0 or 1 by row; rows with a missing label are left out
        :param probability: predicted probability of 1 by row
        :param cluster: what the rows of one cluster share, for example the date
        :raises DataError: lengths differ, nothing labelled, a missing prediction, fewer than two clusters, or values
            out of range
        """
        labels, probabilities, codes, _ = _rows(label, probability, cluster)
        if not len(labels):
            raise DataError("a loss reference needs labelled rows and there are none")
        if np.isnan(probabilities).any():
            raise DataError(f"{int(np.isnan(probabilities).sum())} of {len(probabilities)} predictions are missing")
        return cls._measure(labels, probabilities, codes)

    @classmethod
    def _measure(cls, labels: np.ndarray, probabilities: np.ndarray, codes: np.ndarray) -> LossReference:
        if codes.max() == 0:
            raise DataError("all rows are in one cluster; a standard error needs at least two, for example days")
        loss, entropy = log_losses(labels, probabilities)
        log_loss, gap, excess = (_clustered(v, codes) for v in (loss, labels - probabilities, loss - entropy))
        return cls(log_loss, gap, excess, len(labels), float(labels.mean()))

    def to_json(self) -> dict[str, Any]:
        """The reference as JSON."""
        return {"loss_reference_version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any) -> LossReference:
        """The inverse of :meth:`to_json`.

        :raises InvalidInputError: not a loss reference, a newer version, or damaged
        """
        if not isinstance(value, dict) or not isinstance(value.get("loss_reference_version"), int):
            raise InvalidInputError("this is not a loss reference; expected JSON written by LossReference.to_json()")
        if value["loss_reference_version"] > VERSION:
            raise InvalidInputError(
                f"the loss reference has version {value['loss_reference_version']}, this airflow-mlops reads up to "
                f"{VERSION}: upgrade airflow-mlops here"
            )
        try:
            log_loss, gap, excess = estimates = [
                Estimate(float(value[key]["mean"]), float(value[key]["se"]), int(value[key]["clusters"]))
                for key in ("log_loss", "gap", "excess_loss")
            ]
            reference = cls(log_loss, gap, excess, int(value["rows"]), float(value["base_rate"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"the loss reference is damaged ({error!r}); measure it again") from error
        numbers = [number for e in estimates for number in (e.mean, e.se)]
        if not all(math.isfinite(number) for number in numbers) or any(e.se < 0 or e.clusters < 2 for e in estimates):
            raise InvalidInputError("the loss reference is damaged (numbers out of range); measure it again")
        return reference


@dataclass(frozen=True)
class HarmPolicy:
    """When a change of performance is harm.

    :param alpha: bound on the chance of calling harm in a window that has none, over all three tests
    :param epsilon: harmless rise of the mean log loss, nats
    :param calibration_tolerance: harmless size of ``|mean(label - probability)|``
    :param excess_epsilon: harmless rise of the excess loss, nats
    :param min_rows: labelled rows needed
    :param min_clusters: clusters needed in the window and in the reference
    :param min_labelled: share of rows whose label must be known, since late labels are not a random sample
    """

    alpha: float = 0.01
    epsilon: float = 0.02
    calibration_tolerance: float = 0.03
    excess_epsilon: float = 0.01
    min_rows: int = 500
    min_clusters: int = 5
    min_labelled: float = 0.8

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HarmPolicy:
        """A policy from a mapping of its fields; :class:`InvalidInputError` for an unknown one or one out of range."""
        policy = cls(**known_fields(cls, "harm policy", value))
        policy.check()
        return policy

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON."""
        return asdict(self)

    def check(self) -> None:
        """Raise :class:`InvalidInputError` when a value is out of range."""
        check_ranges(self, "harm policy", _RANGES)


_RANGES = {
    "alpha": (1e-12, 0.5),
    "epsilon": (0.0, math.inf),
    "calibration_tolerance": (0.0, 1.0),
    "excess_epsilon": (0.0, math.inf),
    "min_rows": (2, math.inf),
    "min_clusters": (2, math.inf),
    "min_labelled": (0.0, 1.0),
}


@dataclass(frozen=True)
class HarmTest:
    """One of the three questions.

    :param name: ``log_loss``, ``calibration`` or ``excess_loss``
    :param reference: the estimate on the reference
    :param current: the estimate on the window
    :param change: what is tested: the rise over the reference, or the size of the gap for ``calibration``
    :param tolerance: what ``change`` must exceed
    :param se: standard error of ``change``
    :param p_value: of no harm
    :param threshold: what Holm asks of the p-value
    :param harmful: whether it was met
    """

    name: str
    reference: float
    current: float
    change: float
    tolerance: float
    se: float
    p_value: float
    threshold: float
    harmful: bool


@dataclass(frozen=True)
class HarmReport:
    """The verdict on performance.

    :param verdict: ``harm``, ``stable`` or ``not_enough_data``
    :param reasons: why, in words
    :param tests: the three tests; empty without enough data
    :param rows: rows judged
    :param clusters: clusters judged
    :param policy: the policy used
    """

    verdict: str
    reasons: tuple[str, ...]
    tests: tuple[HarmTest, ...]
    rows: int
    clusters: int
    policy: HarmPolicy

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, without NaN."""
        return {
            **asdict(self),
            "reasons": list(self.reasons),
            "tests": [asdict(test) for test in self.tests],
            "policy": self.policy.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HarmReport:
        """The inverse of :meth:`to_json`."""
        return cls(
            value["verdict"],
            tuple(value["reasons"]),
            tuple(HarmTest(**test) for test in value["tests"]),
            value["rows"],
            value["clusters"],
            HarmPolicy.from_json(value["policy"]),
        )


def assess_harm(
    reference: LossReference, label: Any, probability: Any, cluster: Any, policy: HarmPolicy | None = None
) -> HarmReport:
    """Whether the model does worse on these rows than on its reference.

    :param reference: the model's losses when it was accepted
    :param label: 0 or 1 by row, missing where not known yet
    :param probability: the model's predicted probability of 1 by row
    :param cluster: what the rows of one cluster share, for example the date
    :param policy: what counts as harm
    :raises DataError: lengths differ, or values out of range
    """
    policy = policy or HarmPolicy()
    policy.check()
    labels, probabilities, codes, rows = _rows(label, probability, cluster)
    clusters = int(codes.max()) + 1 if len(codes) else 0
    lacking = _lacking(reference, labels, probabilities, rows, clusters, policy)
    if lacking:
        return HarmReport("not_enough_data", tuple(lacking), (), len(labels), clusters, policy)
    current = LossReference._measure(labels, probabilities, codes)
    drafts = [
        _rise("log_loss", reference.log_loss, current.log_loss, policy.epsilon),
        _gap(reference.gap, current.gap, policy.calibration_tolerance),
        _rise("excess_loss", reference.excess_loss, current.excess_loss, policy.excess_epsilon),
    ]
    tests = _holm(drafts, policy.alpha)
    reasons = tuple(
        f"{test.name}: {test.change:+.4f} (tolerance {test.tolerance:g}, se {test.se:.4f}), p {test.p_value:.2g}"
        for test in tests
        if test.harmful
    )
    verdict = "harm" if reasons else "stable"
    return HarmReport(verdict, reasons or ("no test found harm",), tuple(tests), len(labels), clusters, policy)


def log_losses(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The log loss of each forecast, and its expectation were the forecast right (the entropy), in nats.

    :param label: 0 or 1 by row, NaN where not known (the loss is NaN then)
    :param probability: predicted probability of 1 by row; clipped to [1e-6, 1 - 1e-6], so that no loss exceeds 13.9
    """
    p = np.clip(probability, _CLIP, 1 - _CLIP)
    loss = -np.where(label == 1, np.log(p), np.log1p(-p))
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    return np.where(np.isnan(label), np.nan, loss), entropy


def as_floats(values: Any) -> np.ndarray:
    """``values`` as float64, NaN for what is missing or no number."""
    return pd.to_numeric(pd.Series(values), errors="coerce").to_numpy(float, na_value=np.nan)


def check_forecasts(labels: np.ndarray, probabilities: np.ndarray) -> None:
    """:raises DataError: a known label is neither 0 nor 1, or a known probability lies outside [0, 1]"""
    if not np.isin(labels[~np.isnan(labels)], (0.0, 1.0)).all():
        raise DataError("labels must be 0 or 1")
    given = probabilities[~np.isnan(probabilities)]
    if len(given) and (given.min() < 0 or given.max() > 1):
        raise DataError(f"probabilities must lie in [0, 1]; they go from {given.min():g} to {given.max():g}")


def _rows(label: Any, probability: Any, cluster: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Labels, probabilities and cluster codes of the labelled rows, and the number of all rows."""
    labels, probabilities = as_floats(label), as_floats(probability)
    clusters = pd.Series(cluster)
    if not len(labels) == len(probabilities) == len(clusters):
        raise DataError(
            f"label, probability and cluster have {len(labels)}, {len(probabilities)} and {len(clusters)} rows; "
            "they must be of equal length"
        )
    check_forecasts(labels, probabilities)
    known = ~np.isnan(labels)
    if clusters.isna().any():
        raise DataError(f"{int(clusters.isna().sum())} rows have no cluster; give every row one, for example its date")
    codes = pd.factorize(clusters[known], sort=True)[0]
    return labels[known], probabilities[known], codes, len(labels)


def _lacking(
    reference: LossReference,
    labels: np.ndarray,
    probabilities: np.ndarray,
    rows: int,
    clusters: int,
    policy: HarmPolicy,
) -> list[str]:
    lacking = []
    missing = int(np.isnan(probabilities).sum())
    if missing:
        lacking.append(f"{missing} of {len(labels)} labelled rows have no prediction")
    if rows and len(labels) < policy.min_labelled * rows:
        lacking.append(f"{len(labels)} of {rows} rows have a label, at least {policy.min_labelled:.0%} needed")
    if len(labels) < policy.min_rows:
        lacking.append(f"{len(labels)} labelled rows, at least {policy.min_rows} needed")
    if clusters < policy.min_clusters:
        lacking.append(f"{clusters} clusters, at least {policy.min_clusters} needed")
    if reference.log_loss.clusters < policy.min_clusters:
        lacking.append(
            f"{reference.log_loss.clusters} clusters in the reference, at least {policy.min_clusters} needed"
        )
    return lacking


def _clustered(values: np.ndarray, codes: np.ndarray) -> Estimate:
    """The mean of ``values`` and its standard error when values of one cluster hang together."""
    mean = float(values.mean())
    sums = np.bincount(codes, values - mean)
    count = len(sums)
    return Estimate(mean, float(np.sqrt(count / (count - 1) * np.sum(sums**2)) / len(values)), count)


def _rise(name: str, reference: Estimate, current: Estimate, tolerance: float) -> HarmTest:
    """Welch's one-sided test that the mean has risen by more than ``tolerance``."""
    change = current.mean - reference.mean
    variances = reference.se**2, current.se**2
    se = math.sqrt(sum(variances))
    spread = sum(variance**2 / (e.clusters - 1) for variance, e in zip(variances, (reference, current)))
    freedom = sum(variances) ** 2 / spread if spread > 0 else current.clusters - 1
    p_value = _upper_tail(change - tolerance, se, freedom)
    return HarmTest(name, reference.mean, current.mean, change, tolerance, se, p_value, 0.0, False)


def _gap(reference: Estimate, current: Estimate, tolerance: float) -> HarmTest:
    """The test that the mean lies outside ``[-tolerance, tolerance]``; exact at both ends."""
    size, freedom = abs(current.mean), current.clusters - 1
    p_value = _upper_tail(size - tolerance, current.se, freedom) + _upper_tail(size + tolerance, current.se, freedom)
    return HarmTest(
        "calibration", reference.mean, current.mean, size, tolerance, current.se, min(p_value, 1.0), 0.0, False
    )


def _upper_tail(distance: float, se: float, freedom: float) -> float:
    if se == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / se, freedom))


def _holm(drafts: list[HarmTest], alpha: float) -> list[HarmTest]:
    """Holm's step-down: each threshold in turn, and none is met after the first that is not."""
    decided: dict[str, HarmTest] = {}
    still = True
    for place, draft in enumerate(sorted(drafts, key=lambda test: test.p_value)):
        threshold = alpha / (len(drafts) - place)
        still = still and draft.p_value <= threshold
        decided[draft.name] = HarmTest(**{**asdict(draft), "threshold": threshold, "harmful": still})
    return [decided[draft.name] for draft in drafts]
