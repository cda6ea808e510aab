"""Evidence that may be looked at after every batch of requests without losing its error rate.

Everything here is an *e-process* (a non-negative process whose mean is at most 1 at every stopping time while the
null holds, so that it exceeds ``1/alpha`` with probability at most ``alpha``, ever) or a *confidence sequence* (an
interval that covers at all times at once). Logarithms of e-values are used throughout.

Sources:

* arms of events, sample ratio: Lindon & Malek, "Anytime-valid inference for multinomial count data" (NeurIPS 2022)
  and Lindon et al., "Rapid regression detection in software deployments through sequential testing" (KDD 2022)
* Ville's inequality and mixtures: Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform, nonparametric, nonasymptotic
  confidence sequences" (Annals of Statistics 2021), proposition 6 for the one-sided normal mixture
* means: Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, "Time-uniform central limit theory and asymptotic confidence
  sequences" (Annals of Statistics 2024)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

WORSE = (1.25, 1.6, 2.0, 3.0, 5.0, 10.0, 30.0)
BETTER = (0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8)
UNBALANCED = (0.5, 0.7, 0.8, 0.9, 1.11, 1.25, 1.43, 2.0)


def log_mean_exp(values: Sequence[float]) -> float:
    """Logarithm of the mean of ``exp(values)``."""
    top = max(values)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(value - top) for value in values) / len(values))


def arm_log_likelihood_ratios(
    logs: Sequence[float], factors: Sequence[float], null: float, exposure: tuple[float, float], events: tuple[int, int]
) -> list[float]:
    """Add one look to the log likelihood ratios of ``ratio = null * factor`` against ``ratio = null``.

    Given that an event happened in a look, it belongs to the canary with probability
    ``ratio * canary / (ratio * canary + stable)``, whatever the rate of events in that look: a shock that both arms
    share cancels, and a changing split needs no correction. The mean over ``factors > 1`` is an e-process for
    ``ratio <= null``, over ``factors < 1`` for ``ratio >= null``, over both sides for ``ratio == null``.

    :param logs: one value per factor, 0 at the start
    :param exposure: requests of (stable, canary) in this look, or their intended shares
    :param events: events of (stable, canary) in this look
    """
    stable, canary = exposure
    if stable <= 0 or canary <= 0 or sum(events) == 0:
        return list(logs)
    result = []
    for value, factor in zip(logs, factors, strict=True):
        ratio = null * factor
        scale = math.log((ratio * canary + stable) / (null * canary + stable))
        result.append(value + events[1] * math.log(factor) - sum(events) * scale)
    return result


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
        values.append(hits + (trials - events) * math.log((1 - rate) / (1 - bound)))
    return log_mean_exp(values)


def log_e_rate_above(events: int, trials: int, bound: float) -> float:
    """Evidence against "each trial has an event with probability ``bound`` or less", from totals alone."""
    values = []
    for factor in WORSE:
        rate = min(factor * bound, (1 + bound) / 2)
        values.append(events * math.log(rate / bound) + (trials - events) * math.log((1 - rate) / (1 - bound)))
    return log_mean_exp(values)


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of one arm's values.

    :param n: values
    :param total: their sum
    :param squares: sum of their squares
    """

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    def minus(self, other: Moments) -> Moments:
        """What was added since ``other``."""
        return Moments(self.n - other.n, self.total - other.total, self.squares - other.squares)

    @property
    def within(self) -> float:
        """Sum of squares around the mean; rounding cannot make it negative."""
        return max(self.squares - self.total * self.total / self.n, 0.0) if self.n else 0.0


@dataclass(frozen=True)
class MeanDifference:
    """Difference of two arms' means, stratified by look, so that a mean that moves in time is not taken for one.

    Each look contributes its own difference with weight ``n_c n_s / (n_c + n_s)``; the variances are those within
    looks.

    :param weighted: sum of weight x difference
    :param weight: sum of weights (the effective number of pairs)
    :param stable_scale: sum of weight^2 / stable's n
    :param canary_scale: sum of weight^2 / canary's n
    :param stable_within: stable's squares within looks
    :param stable_df: their degrees of freedom
    :param canary_within: canary's squares within looks
    :param canary_df: their degrees of freedom
    """

    weighted: float = 0.0
    weight: float = 0.0
    stable_scale: float = 0.0
    canary_scale: float = 0.0
    stable_within: float = 0.0
    stable_df: int = 0
    canary_within: float = 0.0
    canary_df: int = 0

    def add(self, stable: Moments, canary: Moments) -> MeanDifference:
        """The evidence with one more look; a look with an empty arm adds nothing."""
        if stable.n == 0 or canary.n == 0:
            return self
        weight = stable.n * canary.n / (stable.n + canary.n)
        return MeanDifference(
            self.weighted + weight * (canary.total / canary.n - stable.total / stable.n),
            self.weight + weight,
            self.stable_scale + weight * weight / stable.n,
            self.canary_scale + weight * weight / canary.n,
            self.stable_within + stable.within,
            self.stable_df + stable.n - 1,
            self.canary_within + canary.within,
            self.canary_df + canary.n - 1,
        )

    @property
    def estimate(self) -> float:
        """Canary's mean minus stable's."""
        return self.weighted / self.weight

    def usable(self, least: int = 30) -> bool:
        """Whether both arms have ``least`` degrees of freedom and any variance: below, the asymptotics are a guess."""
        return min(self.stable_df, self.canary_df) >= least and self.stable_within > 0 and self.canary_within > 0

    def radius(self, alpha: float, best_at: float = 250.0) -> float:
        """Half-width, valid at all looks at once, of a one-sided bound with error rate ``alpha``.

        :param best_at: effective number of pairs at which the bound is tightest
        """
        variance = (
            self.stable_scale * self.stable_within / self.stable_df
            + self.canary_scale * self.canary_within / self.canary_df
        ) / self.weight
        log_inverse = math.log(1 / alpha)
        prior = best_at / (2 * log_inverse + math.log(1 + 2 * log_inverse))
        total = self.weight + prior
        boundary = math.sqrt(2 * total * math.log(math.sqrt(total / prior) / (2 * alpha) + 1))
        return math.sqrt(variance) * boundary / self.weight

    def to_json(self) -> list[float]:
        """The fields in order."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> MeanDifference:
        """Inverse of :meth:`to_json`."""
        return cls(*value)
