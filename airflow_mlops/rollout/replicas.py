"""How much replicas of one version differ by themselves: what a difference between the arms has to be held against.

A slow or failing replica is no bad model. Between two arms of ``m_c`` and ``m_s`` replicas, whose own effects on the
logarithm of a rate (or on a mean) have standard deviation ``tau``, a difference of standard deviation
``tau * sqrt(1/m_c + 1/m_s)`` is there however many requests are counted. ``tau`` shows in the arms themselves:
given how many events an arm had in a look, they fall on its replicas in proportion to their requests, whatever shock
the look brought; what they deviate beyond that is theirs.

Sources: DerSimonian & Laird, "Meta-analysis in clinical trials" (Controlled Clinical Trials 1986) for Q and its
expectation; Wilson & Hilferty (PNAS 1931) for the quantile of chi-squared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

SPREADS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.1)
FEW = 4
"""Degrees of freedom below which replicas tell little of what they differ by."""
MAX_REPLICAS = 60
"""Replicas tracked per arm; what comes after counts for the arm, not for its dispersion."""


@dataclass(frozen=True)
class Dispersion:
    """Deviation of the replicas of both arms from what their arm did.

    :param q: per arm with at least two replicas, sum of squared deviations over their sampling variance
    :param df: its degrees of freedom, per such arm
    :param information: how much Q grows with the square of the spread, per such arm
    :param uneven: ``1/m_c + 1/m_s``, with ``m`` the effective number of replicas
    """

    q: tuple[float, ...] = ()
    df: tuple[int, ...] = ()
    information: tuple[float, ...] = ()
    uneven: float = 2.0

    @property
    def known(self) -> bool:
        """Whether any arm has replicas to compare."""
        return bool(self.df)

    def variance_bound(self, confidence: float = 0.9) -> float:
        """Upper confidence bound on the variance ``tau^2``."""
        if not self.known:
            return 0.0
        df, q, information = sum(self.df), sum(self.q), sum(self.information)
        quantile = chi_squared_quantile(1 - confidence, df)
        return max(0.0, (q * df / quantile - df) / information)

    def of_difference(self, least_spread: float) -> tuple[float, float]:
        """Variance of the arms' difference that is their replicas' own, to hold harm and no inferiority against.

        A few replicas tell little of their spread. Then harm is held against more of it: what cannot be told ends at
        the deadline, while a bad replica that is taken for a bad model ends the rollout at once.
        """
        careful = 0.97 if sum(self.df) < FEW else 0.9
        least = least_spread * least_spread
        harm, fine = (max(self.variance_bound(confidence), least) for confidence in (careful, 0.9))
        return harm * self.uneven, fine * self.uneven

    @property
    def variance(self) -> float:
        """Estimate of ``tau^2`` (moments)."""
        return max(0.0, (sum(self.q) - sum(self.df)) / sum(self.information)) if self.known else 0.0


def chi_squared_quantile(probability: float, df: int) -> float:
    """Wilson and Hilferty's approximation, below the truth for small ``df`` and small probabilities."""
    part = 2 / (9 * df)
    return max(df * (1 - part + NormalDist().inv_cdf(probability) * math.sqrt(part)) ** 3, 1e-3)


def dispersion_of(arms: Sequence[Sequence[tuple[float, float]]], least: float) -> Dispersion:
    """Dispersion of what replicas did around what was expected of them.

    :param arms: (stable, canary), each a list of (deviation, precision) per replica: the deviation from the arm in
        units of the effect, and the inverse of its sampling variance
    :param least: replicas of a lower precision are left out, their numbers say nothing
    """
    q, df, information, uneven = [], [], [], 0.0
    for arm in arms:
        total = sum(precision for _, precision in arm)
        squares = sum(precision * precision for _, precision in arm)
        uneven += squares / (total * total) if total > 0 else 1.0
        seen = [(deviation, precision) for deviation, precision in arm if precision >= least]
        if len(seen) < 2:
            continue
        total = sum(precision for _, precision in seen)
        q.append(sum(precision * deviation * deviation for deviation, precision in seen))
        df.append(len(seen) - 1)
        information.append(total - sum(precision * precision for _, precision in seen) / total)
    return Dispersion(tuple(q), tuple(df), tuple(information), uneven)


class ReplicaTallies:
    """Two numbers per replica and arm, by the replica's index.

    :param state: :meth:`state` of an earlier one
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.arms: list[list[list[float]]] = [[list(r) for r in arm] for arm in (state or {}).get("arms", [[], []])]

    def state(self) -> dict[str, Any]:
        """Small JSON."""
        return {"arms": self.arms}

    def add(self, arm: int, replica: int, first: float, second: float) -> None:
        """Add to a replica's two numbers, which are kept to 6 digits."""
        if replica >= MAX_REPLICAS:
            return
        rows = self.arms[arm]
        while len(rows) <= replica:
            rows.append([0, 0])
        row = rows[replica]
        row[0], row[1] = float(f"{row[0] + first:.6g}"), float(f"{row[1] + second:.6g}")
