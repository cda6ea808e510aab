"""Evidence that may be looked at after every batch of requests without losing its error rate.

Everything here is an *e-process* (a non-negative process whose mean is at most 1 at every stopping time while the
null holds, so that it exceeds ``1/alpha`` with probability at most ``alpha``, ever) or a *confidence sequence* (an
interval that covers at all times at once). Logarithms of e-values are used throughout.

Sources:

* arms of events, sample ratio: Lindon & Malek, "Anytime-valid inference for multinomial count data" (NeurIPS 2022)
  and Lindon et al., "Rapid regression detection in software deployments through sequential testing" (KDD 2022)
* Ville's inequality and mixtures: Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform, nonparametric, nonasymptotic
  confidence sequences" (Annals of Statistics 2021)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

UNBALANCED = (0.5, 0.7, 0.8, 0.9, 1.11, 1.25, 1.43, 2.0)
WORSE = (1.25, 1.6, 2.0, 3.0, 5.0, 10.0, 30.0)
MOST = 1e12
"""E-values are told up to here: databases turn a larger float into an integer that not every reader takes."""


def log_mean_exp(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Logarithm of the mean of ``exp(values)``, weighted when there are ``weights`` (that sum to 1)."""
    top = max(values)
    if top == -math.inf:
        return top
    if weights is None:
        return top + math.log(sum(math.exp(value - top) for value in values) / len(values))
    return top + math.log(sum(weight * math.exp(value - top) for value, weight in zip(values, weights, strict=True)))


def bounded(log_e: float) -> float:
    """An e-value that is a number of moderate size in JSON."""
    return round(math.exp(max(min(log_e, math.log(MOST)), -math.log(MOST))), 6)


def sample_ratio_logs(logs: Sequence[float], share: float, routed: tuple[int, int]) -> list[float]:
    """Add one look to the log likelihood ratios of "the odds of the canary are ``factor`` times what was asked for".

    Their mean over :data:`UNBALANCED` is an e-process for "requests follow the weight".

    :param logs: one value per factor, 0 at the start
    :param share: the weight, 0 to 1
    :param routed: requests of (stable, canary) in this look
    """
    total, canary = sum(routed), routed[1]
    return [
        round(value + canary * math.log(factor) - total * math.log(1 + share * (factor - 1)), 6)
        for value, factor in zip(logs, UNBALANCED, strict=True)
    ]


def log_e_rate_below(events: int, trials: int, bound: float) -> float:
    """Evidence against "each trial has an event with probability ``bound`` or more", from totals alone.

    No event in ``n`` trials is evidence too: with ``bound`` 0.01, 20 to 1 after about 400.
    """
    values = []
    for factor in (0.0, 0.0, 0.1, 0.3, 0.5, 0.7):
        rate = factor * bound
        if rate == 0.0 and events:
            values.append(-math.inf)
            continue
        hits = events * math.log(factor) if events else 0.0
        values.append(hits + max(trials - events, 0) * math.log((1 - rate) / (1 - bound)))
    return log_mean_exp(values)


def log_e_rate_above(events: int, trials: int, bound: float) -> float:
    """Evidence against "each trial has an event with probability ``bound`` or less", from totals alone."""
    values = []
    for factor in WORSE:
        rate = min(factor * bound, (1 + bound) / 2)
        misses = max(trials - events, 0)
        values.append(events * math.log(rate / bound) + misses * math.log((1 - rate) / (1 - bound)))
    return log_mean_exp(values)
