"""How good a probability forecast of a binary label is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from airflow_mlops.exceptions import InvalidInputError

Floats = npt.NDArray[np.float64]
_EPSILON = 1e-15


def check_label(label: npt.ArrayLike) -> npt.NDArray[np.int8]:
    """``label`` as 0 and 1, shape (n,).

    :raises InvalidInputError: another shape or another value, a missing one included
    """
    values = np.asarray(label)
    if values.ndim != 1:
        raise InvalidInputError(f"the label has shape {values.shape}; expected one value a row")
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"the label must be 0 or 1: {error}") from error
    wrong = ~np.isin(numbers, (0.0, 1.0))
    if wrong.any():
        raise InvalidInputError(
            f"{int(wrong.sum())} of {len(values)} labels are neither 0 nor 1 (first: {values[wrong][0]}); rows whose "
            "label is not known yet must be left out"
        )
    return numbers.astype(np.int8)


def check_probability(probability: npt.ArrayLike, rows: int, whose: str) -> Floats:
    """``probability`` as float64, shape (rows,).

    :raises InvalidInputError: another length, a missing value, or one outside [0, 1]
    """
    values = np.asarray(probability, dtype=np.float64)
    if values.shape != (rows,):
        raise InvalidInputError(
            f"the {whose} has predictions of shape {values.shape} for {rows} labels; both must cover the same rows"
        )
    wrong = ~(np.isfinite(values) & (values >= 0) & (values <= 1))
    if wrong.any():
        raise InvalidInputError(
            f"{int(wrong.sum())} of {rows} predictions of the {whose} are not probabilities "
            f"(first: {values[wrong][0]}); expected numbers from 0 to 1, none missing"
        )
    return values


def row_loss(metric: str, label: npt.ArrayLike, probability: npt.ArrayLike, threshold: float = 0.5) -> Floats:
    """The loss of each row, shape (n,): ``"log_loss"`` in nats, ``"brier"``, or for ``"accuracy"`` 1 where the row is
    on the wrong side of ``threshold``.
    """
    hit = np.asarray(label, dtype=np.float64)
    p = np.asarray(probability, dtype=np.float64)
    if metric == "accuracy":
        return ((p >= threshold) != (hit == 1)).astype(np.float64)
    if metric == "brier":
        return (p - hit) ** 2
    return -np.log(np.clip(np.where(hit == 1, p, 1 - p), _EPSILON, None))


def auc(label: npt.ArrayLike, probability: npt.ArrayLike) -> float | None:
    """Area under the ROC curve, ties counted half (Mann-Whitney); None when only one class is present."""
    positive = np.asarray(label) == 1
    n, m = len(positive), int(positive.sum())
    if m in (0, n):
        return None
    ranks = rankdata(np.asarray(probability))
    return float((ranks[positive].sum() - m * (m + 1) / 2) / (m * (n - m)))


def reliability(label: npt.ArrayLike, probability: npt.ArrayLike, bins: int = 10) -> dict[str, Floats]:
    """Mean probability and observed rate in ``bins`` groups of equal size, with each group's share of the rows."""
    order = np.argsort(np.asarray(probability), kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(label, dtype=np.float64)
    return {
        "predicted": np.array([p[group].mean() for group in groups]),
        "observed": np.array([y[group].mean() for group in groups]),
        "share": np.array([len(group) / len(order) for group in groups]),
    }


def score(label: npt.ArrayLike, probability: npt.ArrayLike) -> dict[str, Any]:
    """The quality of ``probability`` as a forecast of ``label``.

    :param label: shape (n,), 0 or 1
    :param probability: shape (n,), from 0 to 1
    :return: ``rows``, ``base_rate``, ``mean_probability``, ``calibration`` (mean probability minus base rate),
        ``calibration_error`` (mean distance over ten groups of equal size), ``auc`` (None when only one class is
        present), ``log_loss`` (nats), ``brier``
    :raises InvalidInputError: no rows, different lengths, a label that is not 0 or 1, a probability that is not one
    """
    y = check_label(label)
    if not len(y):
        raise InvalidInputError("there are no rows to score; check the window and that its labels have arrived")
    p = check_probability(probability, len(y), "model")
    curve = reliability(y, p)
    return {
        "rows": len(y),
        "base_rate": float(y.mean()),
        "mean_probability": float(p.mean()),
        "calibration": float(p.mean() - y.mean()),
        "calibration_error": float((np.abs(curve["predicted"] - curve["observed"]) * curve["share"]).sum()),
        "auc": auc(y, p),
        "log_loss": float(row_loss("log_loss", y, p).mean()),
        "brier": float(row_loss("brier", y, p).mean()),
    }
