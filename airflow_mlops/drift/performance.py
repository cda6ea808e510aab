"""How well a binary classifier does before any label has come: confidence-based performance estimation (CBPE).

A calibrated probability says how often a forecast is right, so the confusion matrix, and with it every metric, has an
expectation given the scores alone (the idea: NannyML's documentation of CBPE; Garg et al., "Leveraging unlabeled data
to predict out-of-distribution performance", ICLR 2022, on when it fails). All metrics here are expectations over
labels that are independent draws with the calibrated probabilities; ratios (AUC, precision, recall) are ratios of
expectations.

**Assumptions.** (1) The scores, after the calibration fitted on the reference, are right wherever the window lies:
features may move (covariate shift), what they mean may not. **Concept drift is invisible here**, and so is a base
rate that moves for reasons that the model does not see; only labels show them (:mod:`~airflow_mlops.drift.harm`,
:mod:`~airflow_mlops.drift.sequential`). (2) The window's scores lie where the reference's do. What can be checked is
checked and said in the reasons: calibration on the reference, its stability from chunk to chunk, scores outside the
reference's range.

**Interval.** For the metric that the window's labels will show, from two sources: the labels' own sampling (closed
form: a metric's derivative by each probability, times that label's variance), and how far estimates of chunks of the
reference missed what their labels showed, with a calibration fitted on the other chunks, beyond the labels' sampling.
The second does not shrink in windows larger than a chunk and grows in smaller ones; Student's t, one degree of freedom
less than there are chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from airflow_mlops.drift.calibration import METHODS, Calibration, miscalibration
from airflow_mlops.drift.harm import as_floats, check_forecasts
from airflow_mlops.drift.metrics import METRICS, expected_metrics
from airflow_mlops.exceptions import DataError, InvalidInputError

__all__ = [
    "METHODS",
    "METRICS",
    "CalibratedEstimate",
    "Calibration",
    "MetricEstimate",
    "PerformanceEstimate",
    "expected_metrics",
]

VERSION = 1
_MIN_CHUNK = 50
_MIN_CHUNKS = 3
_OUTSIDE = 0.01


@dataclass(frozen=True)
class MetricEstimate:
    """One metric.

    :param value: its expectation; None where it is not defined, for example precision where nothing is predicted 1
    :param low: lower end of the interval for what the labels will show; None where not known
    :param high: upper end
    :param reference: what the labels of the reference showed
    """

    value: float | None
    low: float | None
    high: float | None
    reference: float | None


@dataclass(frozen=True)
class PerformanceEstimate:
    """What performance to expect on a window.

    :param verdict: ``estimated`` or ``not_enough_data``
    :param metrics: by name, see :data:`METRICS`; empty without enough data
    :param rows: rows with a score
    :param base_rate: expected share of label 1; None without enough data
    :param confidence: of the intervals
    :param reasons: why there is no estimate, and what makes it doubtful
    """

    verdict: str
    metrics: Mapping[str, MetricEstimate]
    rows: int
    base_rate: float | None
    confidence: float
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The estimate as JSON, without NaN."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PerformanceEstimate:
        """The inverse of :meth:`to_json`."""
        metrics = {name: MetricEstimate(**metric) for name, metric in value["metrics"].items()}
        return cls(**{**value, "metrics": metrics, "reasons": tuple(value["reasons"])})


@dataclass(frozen=True)
class CalibratedEstimate:
    """An estimator of performance from scores alone, fitted on labelled reference data; small enough to be stored
    beside the model.

    :param calibration: from scores to probabilities
    :param threshold: scores of at least this are predictions of 1
    :param rows: rows of the reference
    :param chunks: chunks it was cut into
    :param reference: what its labels showed, by metric; a metric that is not defined is missing
    :param spread: standard deviation between chunks of estimate less truth, beyond the labels' sampling, by metric
    :param raw_error: mean absolute miscalibration of the scores on the reference, beyond sampling
    :param error: the same of calibrated scores, within chunks that the calibration has not seen
    :param tolerance: miscalibration that is no cause for a warning
    :param lowest: lowest score of the reference
    :param highest: highest score of the reference
    """

    calibration: Calibration
    threshold: float
    rows: int
    chunks: int
    reference: Mapping[str, float]
    spread: Mapping[str, float]
    raw_error: float
    error: float
    tolerance: float
    lowest: float
    highest: float

    @classmethod
    def fit(
        cls,
        scores: Any,
        labels: Any,
        *,
        threshold: float = 0.5,
        n_chunks: int = 10,
        method: str = "auto",
        tolerance: float = 0.02,
    ) -> CalibratedEstimate:
        """Fit on a reference that the model was not trained on, for example the held-out data it was accepted on.

        :param scores: the model's probability of 1 by row, in the order of time, so that chunks are stretches of time
        :param labels: 0 or 1 by row; rows with a missing label are left out
        :param threshold: scores of at least this are predictions of 1
        :param n_chunks: contiguous parts of equal size, to see how estimates miss
        :param method: one of :data:`METHODS`, or ``auto``: the simplest whose Brier score on chunks it has not seen is
            not bettered by more than a standard error
        :param tolerance: miscalibration that is no cause for a warning
        :raises DataError: lengths differ, values out of range, a missing score, too few rows, or a chunk with only
            one label
        :raises InvalidInputError: a parameter is out of range
        """
        if method not in ("auto", *METHODS):
            raise InvalidInputError(f"method is {method!r}; expected auto, {', '.join(METHODS)}")
        if not 0 <= threshold <= 1 or not 0 <= tolerance <= 1:
            raise InvalidInputError(f"threshold is {threshold!r}, tolerance {tolerance!r}; expected 0 to 1")
        if isinstance(n_chunks, bool) or not isinstance(n_chunks, int) or n_chunks < _MIN_CHUNKS:
            raise InvalidInputError(f"n_chunks is {n_chunks!r}; expected a whole number of at least {_MIN_CHUNKS}")
        s, y = _reference_rows(scores, labels, n_chunks)
        parts = np.array_split(np.arange(len(s)), n_chunks)
        for number, part in enumerate(parts, 1):
            if (ones := int(y[part].sum())) in (0, len(part)):
                raise DataError(
                    f"chunk {number} of {n_chunks} of the reference has {ones} of {len(part)} labels 1; each chunk "
                    "needs both labels: use fewer chunks or a longer reference"
                )
        tried = METHODS if method == "auto" else (method,)
        unseen = {name: _unseen(name, s, y, parts) for name in tried}
        best = _simplest(unseen, y, parts)
        reference = {name: value for name, (value, _) in expected_metrics(y, s, threshold).items() if value is not None}
        return cls(
            calibration=Calibration.fit(best, s, y),
            threshold=float(threshold),
            rows=len(s),
            chunks=n_chunks,
            reference=reference,
            spread=_spread(unseen[best], s, y, parts, threshold),
            raw_error=miscalibration(s, y),
            error=float(np.mean([miscalibration(unseen[best][part], y[part]) for part in parts])),
            tolerance=float(tolerance),
            lowest=float(s.min()),
            highest=float(s.max()),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the reference shows against the assumption that scores are calibrated, in words."""
        found = []
        if self.raw_error > self.tolerance:
            then = "taken as they are" if self.calibration.method == "none" else f"{self.calibration.method} calibrated"
            found.append(
                f"the scores are not calibrated: off by {self.raw_error:.3f} on the reference; they are {then}"
            )
        if self.error > self.tolerance:
            found.append(
                f"the calibration does not hold over time: off by {self.error:.3f} within parts of the reference that "
                "it was not fitted on; estimates can be off by as much"
            )
        return tuple(found)

    def estimate(
        self, scores: Any, *, confidence: float = 0.95, min_rows: int = 500, min_scored: float = 0.95
    ) -> PerformanceEstimate:
        """The performance to expect on a window.

        :param scores: the model's probability of 1 by row
        :param confidence: that each interval covers what the labels will show, if the assumptions hold
        :param min_rows: rows with a score that are needed
        :param min_scored: share of rows that need one
        :raises DataError: scores out of range
        :raises InvalidInputError: confidence out of range
        """
        if not 0 < confidence < 1:
            raise InvalidInputError(f"confidence is {confidence!r}; expected a number between 0 and 1")
        every = as_floats(scores)
        check_forecasts(np.empty(0), every)
        s = every[~np.isnan(every)]
        lacking = []
        if len(s) < min_rows:
            lacking.append(f"{len(s)} rows with a score, at least {min_rows} needed")
        if len(every) and len(s) < min_scored * len(every):
            lacking.append(f"{len(every) - len(s)} of {len(every)} rows have no score, {min_scored:.0%} need one")
        if lacking or not len(s):
            return PerformanceEstimate("not_enough_data", {}, len(s), None, confidence, tuple(lacking or ["no rows"]))
        p = self.calibration(s)
        width = float(stats.t.isf((1 - confidence) / 2, self.chunks - 1))
        smaller = max(1.0, self.rows / self.chunks / len(s))
        metrics = {
            name: self._metric(name, value, variance, width, smaller)
            for name, (value, variance) in expected_metrics(p, s, self.threshold).items()
        }
        return PerformanceEstimate(
            "estimated", metrics, len(s), float(p.mean()), confidence, (*self.warnings, *self._doubts(s, len(every)))
        )

    def _metric(self, name: str, value: float | None, variance: float, width: float, smaller: float) -> MetricEstimate:
        low = high = None
        if value is not None and name in self.spread:
            half = width * math.sqrt(variance + self.spread[name] ** 2 * smaller)
            low, high = max(0.0, value - half), value + half if name == "log_loss" else min(1.0, value + half)
        return MetricEstimate(value, low, high, self.reference.get(name))

    def _doubts(self, s: np.ndarray, rows: int) -> list[str]:
        doubts = []
        if len(s) < rows:
            doubts.append(f"{rows - len(s)} of {rows} rows have no score and were left out")
        outside = float(np.mean((s < self.lowest) | (s > self.highest)))
        if outside > _OUTSIDE:
            doubts.append(
                f"{outside:.1%} of the scores lie outside the reference's {self.lowest:.3g} to {self.highest:.3g}, "
                "where the calibration is a guess"
            )
        return doubts

    def to_json(self) -> dict[str, Any]:
        """The estimator as JSON, a few kilobytes."""
        calibration = {
            name: value if name == "method" else list(value) for name, value in asdict(self.calibration).items()
        }
        return {"performance_version": VERSION, **asdict(self), "calibration": calibration}

    @classmethod
    def from_json(cls, value: Any) -> CalibratedEstimate:
        """The inverse of :meth:`to_json`.

        :raises InvalidInputError: not such an estimator, a newer version, or damaged
        """
        if not isinstance(value, dict) or not isinstance(value.get("performance_version"), int):
            raise InvalidInputError(
                "this is no estimator of performance; expected JSON written by CalibratedEstimate.to_json()"
            )
        if value["performance_version"] > VERSION:
            raise InvalidInputError(
                f"the estimator of performance has version {value['performance_version']}, this airflow-mlops reads up "
                f"to {VERSION}: upgrade airflow-mlops here"
            )
        try:
            return cls(
                calibration=Calibration.from_json(value["calibration"]),
                rows=_number(value["rows"], 1, kind=int),
                chunks=_number(value["chunks"], _MIN_CHUNKS, kind=int),
                reference={name: _number(value["reference"][name]) for name in METRICS if name in value["reference"]},
                spread={name: _number(value["spread"][name]) for name in METRICS if name in value["spread"]},
                **{
                    name: _number(value[name], high=1.0)
                    for name in ("threshold", "raw_error", "error", "tolerance", "lowest", "highest")
                },
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(
                f"the estimator of performance is damaged ({error!r}); fit it again on the reference"
            ) from error


def _reference_rows(scores: Any, labels: Any, n_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    s, y = as_floats(scores), as_floats(labels)
    if len(s) != len(y):
        raise DataError(f"scores and labels have {len(s)} and {len(y)} rows; they must be of equal length")
    check_forecasts(y, s)
    known = ~np.isnan(y)
    s, y = s[known], y[known]
    if np.isnan(s).any():
        raise DataError(
            f"{int(np.isnan(s).sum())} of {len(s)} labelled rows have no score; score them or leave them out"
        )
    if len(s) < n_chunks * _MIN_CHUNK:
        raise DataError(
            f"the reference has {len(s)} labelled rows, {n_chunks} chunks need at least {n_chunks * _MIN_CHUNK}: "
            "use fewer chunks or a longer reference"
        )
    return s, y


def _unseen(method: str, s: np.ndarray, y: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The probabilities of each chunk by a calibration fitted on all others."""
    p = np.empty(len(s))
    for part in parts:
        others = np.ones(len(s), bool)
        others[part] = False
        p[part] = Calibration.fit(method, s[others], y[others])(s[part])
    return p


def _simplest(unseen: Mapping[str, np.ndarray], y: np.ndarray, parts: Sequence[np.ndarray]) -> str:
    names = list(unseen)
    best = names[0]
    for name in names[1:]:
        gains = (y - unseen[best]) ** 2 - (y - unseen[name]) ** 2
        by_chunk = np.array([gains[part].mean() for part in parts])
        if by_chunk.mean() > by_chunk.std(ddof=1) / math.sqrt(len(parts)):
            best = name
    return best


def _spread(
    p: np.ndarray, s: np.ndarray, y: np.ndarray, parts: Sequence[np.ndarray], threshold: float
) -> dict[str, float]:
    misses: dict[str, list[float]] = {name: [] for name in METRICS}
    noises: dict[str, list[float]] = {name: [] for name in METRICS}
    for part in parts:
        estimates = expected_metrics(p[part], s[part], threshold)
        truths = expected_metrics(y[part], s[part], threshold)
        for name, (estimate, variance) in estimates.items():
            truth = truths[name][0]
            if estimate is not None and truth is not None:
                misses[name].append(estimate - truth)
                noises[name].append(variance)
    return {
        name: math.sqrt(max(0.0, float(np.mean(np.square(misses[name])) - np.mean(noises[name]))))
        for name in METRICS
        if len(misses[name]) >= _MIN_CHUNKS
    }


def _number(value: Any, low: float = 0.0, high: float = math.inf, kind: Any = (int, float)) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or math.isinf(value):
        raise ValueError(f"{value!r} is not a number from {low:g} to {high:g}")
    return value
