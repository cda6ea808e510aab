"""Bets that a mean loss lies above a level: the capital behind :class:`airflow_mlops.drift.sequential.LossTest`.

Two bettors share a capital of 1 and stake part of it on the mean loss of every cluster. Were no cluster's expected loss
above the level, the capital would be a nonnegative supermartingale, so the chance that it *ever* reaches ``1 / alpha``
is at most ``alpha`` (Ville, 1939). Betting: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting" (JRSS B, 2023). One bettor learns mean and variance from the losses, the other always expects the same rise.

The bound is exact when the mean of a cluster cannot be foreseen from those before it. Where it can (bad weather lasts),
three things keep the error near its bound: stakes follow only clusters at least :data:`LAG` back, half the capital is
staked on one rise fixed beforehand, and gains are discounted by the autocorrelation ``r`` of neighbouring clusters,
``capital ** ((1 - r) / (1 + r))``, the ratio of a mean's naive variance to its true one. ``r`` is learned, from
``correlation`` downwards and never above it, since a real rise looks like autocorrelation too; by Jensen's inequality a
discount never breaks the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

#: Levels at which the loss is tested, as multiples of the limit (both measured from the floor).
LEVELS = np.arange(14, 39) / 20
#: The place of the limit itself among them.
AT_LIMIT = 6
#: Clusters that a stake does not know yet.
LAG = 7
_STAKE = 0.9
_DECAY = 0.5 ** (1 / 20)
_PRIOR_CLUSTERS = 20.0


@dataclass(frozen=True)
class Capital:
    """What the bettors own, and what they know; every field may have leading axes, one entry for each of many tests.

    :param mean: of the losses seen, recent ones weighing more, as of :data:`LAG` clusters ago
    :param variance: likewise
    :param recent: the newest losses, not in ``mean`` yet, oldest first, shape ``(..., up to 6)``
    :param centre: mean of the losses up to now, from which the autocorrelation is measured
    :param previous: the newest of those deviations
    :param products: sum of products of neighbouring deviations from it
    :param squares: sum of their squares
    :param logs: log capital by bettor and level, shape ``(..., 2, levels)``
    :param best: highest log of the bettors' mean capital so far by level, shape ``(..., levels)``
    """

    mean: np.ndarray
    variance: np.ndarray
    recent: np.ndarray
    centre: np.ndarray
    previous: np.ndarray
    products: np.ndarray
    squares: np.ndarray
    logs: np.ndarray
    best: np.ndarray

    @classmethod
    def start(cls, mean: float, variance: float, correlation: float, shape: tuple[int, ...] = ()) -> Capital:
        """Capital 1 of bettors who expect losses of this mean, variance and autocorrelation."""
        full = np.full
        return cls(
            mean=full(shape, mean),
            variance=full(shape, variance),
            recent=np.zeros((*shape, 0)),
            centre=full(shape, mean),
            previous=np.zeros(shape),
            products=full(shape, correlation * _PRIOR_CLUSTERS * variance),
            squares=full(shape, _PRIOR_CLUSTERS * variance),
            logs=np.zeros((*shape, 2, len(LEVELS))),
            best=np.zeros((*shape, len(LEVELS))),
        )

    @property
    def correlation(self) -> np.ndarray:
        """Autocorrelation of neighbouring clusters, not below 0."""
        return np.maximum(self.products / self.squares, 0.0)

    def bet(
        self, loss: Any, levels: np.ndarray, floor: float, fixed_rise: float, variance: float, correlation: float
    ) -> Capital:
        """The capital after a cluster of mean ``loss``; stakes are set before it is looked at.

        :param loss: not below ``floor``, shape of the leading axes
        :param levels: the losses bet against, above ``floor``
        :param fixed_rise: the rise over each level that the second bettor always expects
        :param variance: that the second bettor always expects
        :param correlation: largest autocorrelation that gains are discounted by
        """
        loss = np.asarray(loss, float)
        learned = self.mean[..., None] - levels
        edge = np.stack([learned, np.broadcast_to(fixed_rise, learned.shape)], axis=-2)
        spread = np.stack([self.variance, np.broadcast_to(variance, self.variance.shape)], axis=-1)[..., None]
        # Kelly's share for small gains; never so much that one cluster at the floor could ruin.
        stake = np.clip(edge / (spread + edge**2), 0.0, _STAKE / (levels - floor))
        together = np.minimum(self.correlation, correlation)
        discount = (1 - together) / (1 + together)
        gains = np.log1p(stake * (loss[..., None] - levels)[..., None, :])
        logs = self.logs + discount[..., None, None] * gains
        best = np.maximum(self.best, np.logaddexp(logs[..., 0, :], logs[..., 1, :]) - math.log(2))
        deviation = loss - self.centre
        learned_state = self._learn(np.concatenate([self.recent, loss[..., None]], axis=-1))
        return replace(
            self,
            **learned_state,
            centre=self.centre + (1 - _DECAY) * deviation,
            previous=deviation,
            products=self.products + deviation * self.previous,
            squares=self.squares + deviation**2,
            logs=logs,
            best=best,
        )

    def _learn(self, recent: np.ndarray) -> dict[str, np.ndarray]:
        if recent.shape[-1] < LAG:
            return {"recent": recent}
        deviation = recent[..., 0] - self.mean
        return {
            "recent": recent[..., 1:],
            "mean": self.mean + (1 - _DECAY) * deviation,
            "variance": _DECAY * (self.variance + (1 - _DECAY) * deviation**2),
        }

    def to_json(self) -> dict[str, Any]:
        """The capital of one test as lists and numbers."""
        return {name: np.asarray(getattr(self, name)).tolist() for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Capital:
        """The inverse of :meth:`to_json`; :class:`ValueError` for wrong shapes or numbers."""
        capital = cls(**{name: np.asarray(value[name], float) for name in cls.__dataclass_fields__})
        shapes = {name: getattr(capital, name).shape for name in cls.__dataclass_fields__}
        scalars = [shape for name, shape in shapes.items() if name not in ("recent", "logs", "best")]
        if any(scalars) or shapes["logs"] != (2, len(LEVELS)) or shapes["best"] != (len(LEVELS),):
            raise ValueError(f"shapes {shapes}")
        if len(shapes["recent"]) != 1 or shapes["recent"][0] >= LAG:
            raise ValueError(f"{shapes['recent']} recent losses")
        if not all(np.isfinite(getattr(capital, name)).all() for name in shapes):
            raise ValueError("a number is not finite")
        if capital.variance <= 0 or capital.squares <= 0 or capital.best.min() < 0:
            raise ValueError("a number is out of range")
        return capital
