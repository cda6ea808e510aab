"""Group-sequential tests, for when the sample is known: a few planned looks, and more power than always-valid evidence.

The error rate is spent over the planned looks, nearly nothing at first and most of it at the end (O'Brien-Fleming
type). What is spent by when follows the canary's requests, what the looks have in common follows the information.

Sources: Lan & DeMets, "Discrete sequential boundaries for clinical trials" (Biometrika 1983) and "Group sequential
procedures: calendar versus information time" (Statistics in Medicine 1989); Armitage, McPherson & Rowe, "Repeated
significance tests on accumulating data" (JRSS A 1969) for the recursion.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from airflow_mlops.rollout.terms import Terms

NORMAL = NormalDist()
NEVER = 8.0
POINTS = np.linspace(-NEVER, NEVER, 801)


@dataclass(frozen=True)
class Plan:
    """Where a rollout is in its plan.

    :param fraction: of the planned requests that the canary has had
    :param looks: planned looks
    """

    fraction: float
    looks: int


def spent(fraction: float, alpha: float) -> float:
    """Error rate spent when ``fraction`` of the sample is there: ``2 - 2 Phi(z_{alpha/2} / sqrt(fraction))``."""
    if fraction >= 1:
        return alpha
    if fraction <= 0:
        return 0.0
    return 2 - 2 * NORMAL.cdf(NORMAL.inv_cdf(1 - alpha / 2) / math.sqrt(fraction))


@functools.lru_cache(maxsize=4096)
def boundaries(information: tuple[float, ...], fractions: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    """Upper boundaries of the standardised statistic at each look.

    :param information: rising, of the same length as ``fractions``
    """
    step = float(POINTS[1] - POINTS[0])
    result: list[float] = []
    density, before, used = None, 0.0, 0.0
    for now, fraction in zip(information, fractions, strict=True):
        if density is None:
            density = np.exp(-(POINTS**2) / 2) / math.sqrt(2 * math.pi)
        else:
            # z_now = sqrt(before / now) z_before + an independent part with the rest of the variance.
            rest = math.sqrt(1 - before / now)
            kernel = np.exp(-(((POINTS[:, None] - math.sqrt(before / now) * POINTS[None, :]) / rest) ** 2) / 2)
            density = kernel @ density * step / (rest * math.sqrt(2 * math.pi))
        tail = np.cumsum(density[::-1])[::-1] * step
        budget = max(spent(fraction, alpha) - used, 0.0)
        reached = np.flatnonzero(tail <= budget)
        # The next point of the grid outwards: at most the budget is spent.
        bound = float(POINTS[reached[0]]) if budget > 1e-9 and len(reached) else NEVER
        used += float(tail[reached[0]]) if bound < NEVER else 0.0
        density = np.where(bound <= POINTS, 0.0, density)
        result.append(bound)
        before = now
    return tuple(result)


class PlannedTest:
    """The planned looks that one guardrail has had, and what they showed.

    :param state: :meth:`state` of an earlier one
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self.fractions: list[float] = list(state.get("fractions", []))
        self.information: list[list[float]] = [list(each) for each in state.get("information", [[], []])]
        self.shown: list[bool] = list(state.get("shown", [False, False]))
        self.last: dict[str, Any] = dict(state.get("last", {}))

    def state(self) -> dict[str, Any]:
        """Small JSON."""
        return {name: getattr(self, name) for name in ("fractions", "information", "shown", "last")}

    def look(
        self, plan: Plan, statistics: Sequence[tuple[float, float]], terms: Terms
    ) -> tuple[bool, bool, dict[str, Any]]:
        """Look if a planned look is due.

        :param statistics: (standardised, information) of harm and of no inferiority
        :return: whether harm, and no inferiority, has been shown; the numbers of the latest look
        """
        fraction = min(plan.fraction, 1.0)
        due = int(fraction * plan.looks + 1e-9) > int((self.fractions or [0.0])[-1] * plan.looks + 1e-9)
        if due and all(now > 0 for _, now in statistics):
            self.fractions.append(round(fraction, 6))
            numbers: dict[str, Any] = {"planned_look": len(self.fractions), "sample": round(fraction, 4)}
            for index, (name, error) in enumerate((("harm", terms.alpha), ("ok", terms.beta))):
                z, information = statistics[index]
                # What replicas are thought to differ by may have grown since: a look costs all the same.
                least = self.information[index][-1] * 1.001 if self.information[index] else 0.0
                self.information[index].append(float(f"{max(information, least):.7g}"))
                bound = boundaries(tuple(self.information[index]), tuple(self.fractions), error)[-1]
                self.shown[index] = self.shown[index] or z >= bound
                numbers |= {f"z_{name}": round(z, 3), f"z_{name}_needed": round(bound, 3)}
            self.last = numbers
        return self.shown[0], self.shown[1], {**self.last, "lost": False}


class ScoreTest:
    """Score statistics of the ratio of two arms' rates, given each look's events (Mantel & Haenszel 1959).

    :param state: :meth:`state` of an earlier one
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self.sums = [list(each) for each in state.get("sums", [[0.0, 0.0], [0.0, 0.0]])]
        self.test = PlannedTest(state.get("test"))

    def state(self) -> dict[str, Any]:
        """Small JSON."""
        return {"sums": self.sums, "test": self.test.state()}

    def add(self, trials: tuple[float, float], events: tuple[float, float], nulls: tuple[float, float]) -> None:
        """Add one look of (stable, canary)."""
        total = sum(events)
        for row, null in zip(self.sums, nulls):
            chance = null * trials[1] / (null * trials[1] + trials[0])
            row[0] = round(row[0] + events[1] - total * chance, 6)
            row[1] = round(row[1] + total * chance * (1 - chance), 6)

    def look(self, plan: Plan, variances: tuple[float, float], terms: Terms) -> tuple[bool, bool, dict[str, Any]]:
        """See :meth:`PlannedTest.look`.

        :param variances: of the difference that replicas make by themselves, on the logarithm of the ratio
        """
        statistics = []
        for (score, information), sign, variance in zip(self.sums, (1, -1), variances):
            # Replicas' own effects add information^2 * variance to the score's variance.
            sd = math.sqrt(information + information * information * variance)
            statistics.append((sign * score / sd if sd else 0.0, information / (1 + information * variance)))
        return self.test.look(plan, statistics, terms)
