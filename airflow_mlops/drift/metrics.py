"""Metrics of a binary classifier as expectations over labels that are independent draws with given probabilities.

Ratios (AUC, precision, recall) are ratios of expectations.
"""

from __future__ import annotations

import numpy as np

from airflow_mlops.drift.calibration import CLIP, logit

METRICS = ("auc", "log_loss", "brier", "accuracy", "precision", "recall")


def expected_metrics(p: np.ndarray, s: np.ndarray, threshold: float) -> dict[str, tuple[float | None, float]]:
    """Each metric's expectation and the variance that the draw of the labels gives it.

    With labels for ``p``, the metrics themselves, without variance.

    :param p: probability of label 1 by row, or the label
    :param s: the model's score by row, in [0, 1]
    :param threshold: scores of at least this are predictions of 1
    :return: name -> (value or None where it is not defined, variance)
    """
    noise = p * (1 - p)
    n = len(p)
    clipped = np.clip(s, CLIP, 1 - CLIP)
    positive = (s >= threshold).astype(float)
    ones, called = float(p.sum()), float(positive.sum())
    hits = float((p * positive).sum())
    found: dict[str, tuple[float | None, float]] = {"auc": _auc(p, s)}
    found["log_loss"] = (
        float(-(p * np.log(clipped) + (1 - p) * np.log1p(-clipped)).mean()),
        float((noise * logit(s) ** 2).sum()) / n**2,
    )
    found["brier"] = (
        float((p * (1 - s) ** 2 + (1 - p) * s**2).mean()),
        float((noise * (1 - 2 * s) ** 2).sum()) / n**2,
    )
    found["accuracy"] = float(np.where(positive == 1, p, 1 - p).mean()), float(noise.sum()) / n**2
    found["precision"] = (hits / called, float((noise * positive).sum()) / called**2) if called else (None, 0.0)
    recall = hits / ones if ones else None
    found["recall"] = (
        (recall, float((noise * (positive - recall) ** 2).sum()) / ones**2) if recall is not None else (None, 0.0)
    )
    return found


def _auc(p: np.ndarray, s: np.ndarray) -> tuple[float | None, float]:
    """The expected number of pairs ordered rightly (a tie counts half) over that of pairs of unlike labels."""
    _, group = np.unique(s, return_inverse=True)
    ones, zeros = np.bincount(group, p), np.bincount(group, 1 - p)
    noise = p * (1 - p)
    # A row makes no pair with itself.
    pairs = float(ones.sum() * zeros.sum() - noise.sum())
    if pairs <= 0:
        return None, 0.0
    below = np.cumsum(zeros) - zeros / 2
    above = ones.sum() - np.cumsum(ones) + ones / 2
    value = float((ones * below).sum() - noise.sum() / 2) / pairs
    slope = ((below - above)[group] - value * (zeros.sum() - ones.sum())) / pairs
    return value, float((noise * slope**2).sum())
