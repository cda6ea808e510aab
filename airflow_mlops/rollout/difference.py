"""The difference of two arms' means over looks and replicas, with bounds that hold at all looks at once.

Sources: Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, "Time-uniform central limit theory and asymptotic confidence
sequences" (Annals of Statistics 2024); Howard, Ramdas, McAuliffe & Sekhon, "Time-uniform, nonparametric,
nonasymptotic confidence sequences" (Annals of Statistics 2021), proposition 6, for the one-sided normal mixture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from airflow_mlops.rollout.replicas import Dispersion, ReplicaTallies, dispersion_of
from airflow_mlops.rollout.terms import Part

LEAST_VALUES = 5
LEAST_DEGREES = 30


def radius(variance: float, pairs: float, extra: float, log_inverse: float, best_at: float) -> float:
    """Half-width of a one-sided bound that holds at all looks at once with error rate ``exp(-log_inverse)``.

    :param variance: of one pair's difference
    :param pairs: effective number of pairs
    :param extra: variance of the difference that more pairs do not lessen, the replicas' own; a normal difference of
        that variance makes the estimate as good as one from fewer pairs
    :param best_at: number of pairs at which the bound is tightest
    """
    pairs = variance / (variance / pairs + extra)
    prior = best_at / (2 * log_inverse + math.log(1 + 2 * log_inverse))
    total = pairs + prior
    # log(sqrt(total / prior) / (2 alpha) + 1), which does not overflow for the smallest alphas
    inner = 0.5 * math.log(total / prior) - math.log(2) + log_inverse
    boundary = math.sqrt(2 * total * (inner + math.log1p(math.exp(-inner)) if inner < 600 else inner))
    return math.sqrt(variance) * boundary / pairs


class MeanDifference:
    """Difference of two arms' means, stratified by look, so that a mean that moves in time is not taken for one.

    Each look contributes its own difference with weight ``n_c n_s / (n_c + n_s)``; the variances are those within
    looks. Looks with few values wait for the next. How the replicas of an arm deviate from it is kept beside.

    :param state: :meth:`state` of an earlier one
    """

    NAMES = ("weighted", "weight", "level", "stable_scale", "canary_scale", "within", "degrees", "totals")

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self.weighted: float = state.get("weighted", 0.0)
        self.weight: float = state.get("weight", 0.0)
        self.level: float = state.get("level", 0.0)
        self.stable_scale: float = state.get("stable_scale", 0.0)
        self.canary_scale: float = state.get("canary_scale", 0.0)
        self.within: list[float] = list(state.get("within", [0.0, 0.0]))
        self.degrees: list[int] = list(state.get("degrees", [0, 0]))
        self.totals = [list(arm) for arm in state.get("totals", [[0, 0.0], [0, 0.0]])]
        self.replicas = ReplicaTallies(state.get("replicas"))
        self.waiting = [[Part(r, list(v)) for r, v in arm] for arm in state.get("waiting", [[], []])]

    def state(self) -> dict[str, Any]:
        """Small JSON from which the difference continues."""
        waiting = [[[part.replica, list(part.values)] for part in arm] for arm in self.waiting]
        return {
            **{name: getattr(self, name) for name in self.NAMES},
            "replicas": self.replicas.state(),
            "waiting": waiting,
        }

    def add(self, stable: Sequence[Part], canary: Sequence[Part]) -> None:
        """Add one look; values are (n, sum, sum of squares) of each replica."""
        arms = [_merged(waiting, new) for waiting, new in zip(self.waiting, (stable, canary))]
        if any(sum(part.values[0] for part in arm) < LEAST_VALUES for arm in arms):
            self.waiting = arms
            return
        self.waiting = [[], []]
        n = [sum(part.values[0] for part in arm) for arm in arms]
        total = [sum(part.values[1] for part in arm) for arm in arms]
        mean = [t / m for t, m in zip(total, n)]
        weight = n[0] * n[1] / (n[0] + n[1])
        self.weighted += weight * (mean[1] - mean[0])
        self.weight += weight
        self.level += weight * mean[0]
        self.stable_scale += weight * weight / n[0]
        self.canary_scale += weight * weight / n[1]
        for index, arm in enumerate(arms):
            squares = sum(part.values[2] for part in arm)
            # Rounding cannot make a sum of squares negative.
            self.within[index] += max(squares - total[index] * mean[index], 0.0)
            self.degrees[index] += int(n[index]) - 1
            self.totals[index] = [self.totals[index][0] + n[index], self.totals[index][1] + total[index]]
            if len(arm) > 1 or self.replicas.arms[index]:
                part_of = weight / n[index]
                for part in arm:
                    own = part.values[0]
                    self.replicas.add(
                        index, part.replica, part_of * (part.values[1] - own * mean[index]), part_of * own
                    )

    @property
    def estimate(self) -> float:
        """Canary's mean minus stable's."""
        return self.weighted / self.weight

    @property
    def stable_mean(self) -> float:
        """Stable's mean, weighted as the difference is."""
        return self.level / self.weight

    def usable(self) -> bool:
        """Whether both arms have degrees of freedom and any variance: below, the asymptotics are a guess."""
        return min(self.degrees) >= LEAST_DEGREES and min(self.within) > 0

    def pair_variance(self, stable_factor: float = 1.0) -> float:
        """Variance of the difference, times the effective number of pairs.

        :param stable_factor: what stable's mean is multiplied by before it is subtracted
        """
        stable = self.stable_scale * self.within[0] / self.degrees[0] * stable_factor**2
        return (stable + self.canary_scale * self.within[1] / self.degrees[1]) / self.weight

    def dispersion(self) -> Dispersion:
        """How the replicas deviate from their arms, in the metric's unit."""
        arms = []
        for index, scale in enumerate((self.stable_scale, self.canary_scale)):
            noise = self.within[index] / self.degrees[index] * scale if self.degrees[index] else 0.0
            rows = self.replicas.arms[index]
            arms.append([(d / w, w * self.weight / noise) if w and noise else (0.0, 0.0) for d, w in rows])
        return dispersion_of(arms, least=1e-12)

    def culprit(self) -> int | None:
        """The canary's replica without which the others are nearer to stable than to their arm."""
        rows = self.replicas.arms[1]
        active = [i for i, (_, weight) in enumerate(rows) if weight > 0]
        if len(active) < 3:
            return None
        sign = 1.0 if self.estimate > 0 else -1.0
        worst = max(active, key=lambda i: sign * rows[i][0] / math.sqrt(rows[i][1]))
        rest = self.weight - rows[worst][1]
        if rest <= 0:
            return None
        others = self.estimate - rows[worst][0] / rest
        return worst if sign * others < abs(self.estimate) / 2 else None


def _merged(waiting: Sequence[Part], new: Sequence[Part]) -> list[Part]:
    if not waiting:
        return list(new)
    sums = {part.replica: part.values for part in waiting}
    for part in new:
        old = sums.get(part.replica)
        sums[part.replica] = [a + b for a, b in zip(old, part.values)] if old else part.values
    return [Part(replica, values) for replica, values in sums.items()]
