"""Whether predicted probabilities can be taken at their word."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from airflow_mlops.evaluation.metrics import Floats
from airflow_mlops.evaluation.paired import cluster_codes

_EDGE = 1e-6
STEPS = 50


def recalibration(
    label: npt.ArrayLike, probability: Floats, clusters: npt.ArrayLike | None = None, alpha: float = 0.05
) -> dict[str, Any]:
    """The logistic regression of the label on the predicted log odds, and Spiegelhalter's test.

    A forecast to be taken at its word has intercept 0 and slope 1 (Cox, Biometrika 1958); a slope below 1 is
    overconfident. Intervals are from the cluster-robust covariance (CR1) with t on clusters - 1 degrees.
    Spiegelhalter's z (Statistics in Medicine 1986) takes rows for independent; with dependent rows it says too much.

    :param label: shape (n,), 0 or 1, both present
    :param probability: shape (n,); clipped to 1e-6 from 0 and 1
    :param alpha: on either side of the intervals
    :return: ``intercept``, ``slope``, ``intercept_interval``, ``slope_interval``, ``spiegelhalter_z``,
        ``spiegelhalter_p`` (two-sided); the first four None where the regression has no finite answer
    """
    y = np.asarray(label, dtype=np.float64)
    p = np.clip(np.asarray(probability, dtype=np.float64), _EDGE, 1 - _EDGE)
    found: dict[str, Any] = {
        "intercept": None,
        "slope": None,
        "intercept_interval": None,
        "slope_interval": None,
        **_spiegelhalter(y, p),
    }
    design = np.column_stack([np.ones(len(y)), np.log(p / (1 - p))])
    fitted = _fit(design, y)
    if fitted is None:
        return found
    beta, inverse = fitted
    codes, count = cluster_codes(clusters, len(y))
    residual = y - 1 / (1 + np.exp(-design @ beta))
    sums = np.column_stack([np.bincount(codes, residual * column, count) for column in design.T])
    errors = np.sqrt(np.diag(inverse @ (sums.T @ sums) @ inverse) * count / max(count - 1, 1))
    half = stats.t.ppf(1 - alpha, max(count - 1, 1)) * errors
    for i, name in enumerate(("intercept", "slope")):
        found[name] = float(beta[i])
        found[f"{name}_interval"] = [float(beta[i] - half[i]), float(beta[i] + half[i])]
    return found


def _fit(design: Floats, y: Floats) -> tuple[Floats, Floats] | None:
    """Newton's method from a perfect calibration; coefficients and inverse information, None when it finds no end."""
    beta = np.array([0.0, 1.0])
    for _ in range(STEPS):
        mean = 1 / (1 + np.exp(-np.clip(design @ beta, -500, 500)))
        information = (design * (mean * (1 - mean))[:, None]).T @ design
        try:
            step = np.linalg.solve(information, design.T @ (y - mean))
        except np.linalg.LinAlgError:
            return None
        if not np.isfinite(step).all() or np.abs(beta + step).max() > 1e3:
            return None
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            return beta, np.linalg.inv(information)
    return None


def _spiegelhalter(y: Floats, p: Floats) -> dict[str, float | None]:
    variance = float(((1 - 2 * p) ** 2 * p * (1 - p)).sum())
    if variance == 0:
        return {"spiegelhalter_z": None, "spiegelhalter_p": None}
    z = float(((y - p) * (1 - 2 * p)).sum()) / variance**0.5
    return {"spiegelhalter_z": z, "spiegelhalter_p": float(2 * stats.norm.sf(abs(z)))}
