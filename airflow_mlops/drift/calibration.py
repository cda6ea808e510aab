"""From a classifier's scores to probabilities, and how far they are from right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

METHODS = ("none", "platt", "isotonic")
#: Scores are held this far from 0 and 1 where a logarithm is taken.
CLIP = 1e-6
_MAX_KNOTS = 200
_ROWS_PER_KNOT = 20
_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """From scores to probabilities.

    :param method: ``none`` (scores are probabilities), ``platt`` (logistic regression on the score's logit; Platt,
        1999) or ``isotonic`` (monotone; Zadrozny and Elkan, 2002)
    :param coefficients: intercept and slope of ``platt``, else empty
    :param scores: of the knots of ``isotonic``, increasing, at most 200, else empty
    :param probabilities: at the knots; linear between them, constant beyond
    """

    method: str
    coefficients: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    probabilities: tuple[float, ...] = ()

    @classmethod
    def fit(cls, method: str, scores: np.ndarray, labels: np.ndarray) -> Calibration:
        """Fit on scores in [0, 1] and labels 0 or 1."""
        if method == "platt":
            return cls(method, coefficients=_platt(logit(scores), labels))
        if method == "isotonic":
            return cls(method, (), *_isotonic(scores, labels))
        return cls("none")

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """The probabilities of label 1."""
        if self.method == "platt":
            intercept, slope = self.coefficients
            return 1 / (1 + np.exp(-(intercept + slope * logit(scores))))
        if self.method == "isotonic":
            return np.interp(scores, self.scores, self.probabilities)
        return scores

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """From a mapping of its fields; :class:`KeyError`, :class:`TypeError` or :class:`ValueError` when damaged."""
        if value["method"] not in METHODS:
            raise ValueError(f"method is {value['method']!r}")
        numbers = {name: tuple(float(x) for x in value[name]) for name in ("coefficients", "scores", "probabilities")}
        calibration = cls(value["method"], **numbers)
        x, y = np.array(calibration.scores), np.array(calibration.probabilities)
        expected = (2, 0) if calibration.method == "platt" else (0, len(x))
        if (len(calibration.coefficients), len(x)) != expected or len(x) != len(y) or len(x) > _MAX_KNOTS:
            raise ValueError("the numbers do not fit the method")
        has_knots = calibration.method == "isotonic"
        if not np.isfinite([*calibration.coefficients, *x, *y]).all() or has_knots != bool(len(x)):
            raise ValueError("a number is missing or not finite")
        if len(x) and ((np.diff(x) <= 0).any() or (np.diff(y) < 0).any() or y[0] < 0 or y[-1] > 1):
            raise ValueError("the calibration is not monotone or leaves [0, 1]")
        return calibration


def miscalibration(p: np.ndarray, y: np.ndarray) -> float:
    """Mean of ``|mean(label) - mean(probability)|`` over ten bins of equally many rows, less what sampling gives."""
    total = 0.0
    for rows in np.array_split(np.argsort(p, kind="stable"), _BINS):
        sampling = math.sqrt(2 / math.pi * float((p[rows] * (1 - p[rows])).sum()))
        total += abs(float((y[rows] - p[rows]).sum())) - sampling
    return max(0.0, total / len(p))


def logit(scores: np.ndarray) -> np.ndarray:
    """The logit of scores, those near 0 and 1 held off."""
    clipped = np.clip(scores, CLIP, 1 - CLIP)
    return np.log(clipped) - np.log1p(-clipped)


def _platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Intercept and slope of a logistic regression by Newton's method, with a faint pull to no calibration."""
    design = np.column_stack([np.ones(len(logits)), logits])
    prior = np.array([0.0, 1.0])
    beta = prior.copy()
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ beta))
        gradient = design.T @ (labels - p) - (beta - prior)
        step = np.linalg.solve((design * (p * (1 - p))[:, None]).T @ design + np.eye(2), gradient)
        beta = beta + step * min(1.0, 2.0 / float(np.abs(step).max() or 1.0))
        if np.abs(step).max() < 1e-10:
            break
    return float(beta[0]), float(beta[1])


def _isotonic(scores: np.ndarray, labels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots of a monotone regression on bins of equally many rows; rows of one score share a bin."""
    order = np.argsort(scores, kind="stable")
    x, y = scores[order], labels[order]
    count = int(np.clip(len(x) // _ROWS_PER_KNOT, 1, _MAX_KNOTS))
    first = np.searchsorted(x, x, side="left")
    _, bins = np.unique(first * count // len(x), return_inverse=True)
    rows = np.bincount(bins).astype(float)
    heights = optimize.isotonic_regression(np.bincount(bins, y) / rows, weights=rows).x
    return tuple((np.bincount(bins, x) / rows).tolist()), tuple(np.clip(heights, 0.0, 1.0).tolist())
