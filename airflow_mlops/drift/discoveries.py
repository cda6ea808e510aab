"""Which of many p-values are discoveries, at a bounded false discovery rate.

Two controls, both valid whatever the dependence between the hypotheses, both with weights whose mean is 1 (Blanchard
and Roquain, 2008):

``by``
    Benjamini and Yekutieli (2001).
``e-bh``
    e-BH (Wang and Ramdas, 2022) on e-values made of the p-values by the admissible calibrator
    ``(1 - p + p ln p) / (p (ln p)^2)`` (Vovk and Wang, 2021). Of these p-values alone: a running maximum of an
    e-process over windows is no e-value, and nothing is carried over from earlier windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def adjust(p_values: Sequence[float], weights: Sequence[float] | None = None, control: str = "by") -> list[float]:
    """Adjusted p-values, in the order given: those at most q are the discoveries at false discovery rate q.

    :param p_values: one for each hypothesis; any dependence between them
    :param weights: above 0, their mean at most 1; all 1 when not given
    :param control: ``by`` or ``e-bh``
    """
    p = np.asarray(p_values, float)
    count = len(p)
    if not count:
        return []
    with np.errstate(divide="ignore"):
        inverse = 1 / p if control == "by" else _e_values(p)
        score = 1 / (inverse * (np.ones(count) if weights is None else np.asarray(weights, float)))
    order = np.argsort(score, kind="stable")
    harmonic = np.sum(1.0 / np.arange(1, count + 1)) if control == "by" else 1.0
    scaled = score[order] * count * harmonic / np.arange(1, count + 1)
    result = np.empty(count)
    result[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return result.tolist()


def _e_values(p: np.ndarray) -> np.ndarray:
    """e-values of p-values: the mixture of all ``k p^(k - 1)``, 0 < k < 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(p)
        values = (1 - p + p * logs) / (p * logs**2)
    # Near 1 the numerator cancels; its series is 1/2 + (1 - p) / 6 there.
    values = np.where(p > 1 - 1e-4, 0.5 + (1 - p) / 6, values)
    return np.where(p <= 0, np.inf, values)
