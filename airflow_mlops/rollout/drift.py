"""The distance between the distributions of the two arms' predictions, while both serve.

The distance is total variation: the largest difference, over all sets of buckets, of the share that falls in the set.

* Harm: at every look the set with the largest difference *so far* is taken, and its difference in this look is one
  value of a mean that no set can lift above the distance. A bound below that mean bounds the distance. (A witness
  that is chosen before it is used: Shekhar & Ramdas, "Nonparametric two-sample testing by betting", IEEE Transactions
  on Information Theory 2023.)
* No inferiority: the difference of every set at once, each a bounded mean (Hoeffding), so that the largest one seen
  plus a common half-width bounds the distance from above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from airflow_mlops.rollout.cuts import cut, group_edges, total_histogram
from airflow_mlops.rollout.difference import MeanDifference, radius
from airflow_mlops.rollout.groupseq import PlannedTest
from airflow_mlops.rollout.guardrail import Guardrail
from airflow_mlops.rollout.terms import NO_DATA, OPEN, Part, Terms, settle

BEST_AT = 500.0
HOEFFDING = 0.25
"""Variance of a share, at most."""


class DriftEvidence:
    """Evidence on a ``drift`` guardrail; its at most ten groups of buckets are fixed from what stable had served.

    :param guardrail: of kind ``drift``
    :param state: :meth:`state` of an earlier one
    """

    per_request = False

    def __init__(self, guardrail: Guardrail, state: Mapping[str, Any] | None = None) -> None:
        self.guardrail = guardrail
        state = state or {}
        self.edges: list[float] | None = state.get("edges")
        self.witness = MeanDifference(state.get("witness"))
        self.differences: list[float] = list(state.get("differences", []))
        self.weight: float = state.get("weight", 0.0)
        self.planned = PlannedTest(state.get("planned"))
        self.settled: str = state.get("settled", OPEN)

    def state(self) -> dict[str, Any]:
        """Small JSON from which the evidence continues."""
        names = ("edges", "differences", "weight", "settled")
        return {
            **{name: getattr(self, name) for name in names},
            "witness": self.witness.state(),
            "planned": self.planned.state(),
        }

    def calibrate(self, stable: Sequence[Mapping[str, Any]]) -> None:
        """Fix the groups, once stable has predicted enough."""
        if self.edges is None:
            histogram = total_histogram(stable, self.guardrail.metric)
            if histogram:
                self.edges = group_edges(*histogram)

    def reading(self, counters: Mapping[str, Any]) -> list[float] | None:
        """Cumulative counts of one replica by group."""
        return None if self.edges is None else cut(counters, self.guardrail.metric, self.edges)

    def add(self, stable: Sequence[Part], canary: Sequence[Part]) -> None:
        """Take in one look of both arms."""
        if any(self.differences):
            chosen = [index for index, value in enumerate(self.differences) if value > 0]
            self.witness.add(*([_share_in(part, chosen) for part in arm] for arm in (stable, canary)))
        sums = [[sum(group) for group in zip(*(part.values for part in arm))] for arm in (stable, canary)]
        n = [sum(groups) for groups in sums]
        if 0 in n:
            return
        weight = n[0] * n[1] / (n[0] + n[1])
        old = self.differences or [0.0] * len(sums[0])
        self.differences = [
            round(value + weight * (c / n[1] - s / n[0]), 6) for value, s, c in zip(old, sums[0], sums[1])
        ]
        self.weight = round(self.weight + weight, 6)

    def add_bake(self, canary: Sequence[Part]) -> None:
        """At 100 % there is no distribution to compare with."""

    def baked_badly(self, alpha: float) -> bool:
        """Never: predictions that moved in time would be taken for the canary's."""
        return False

    def distance(self) -> float:
        """Total variation between what both arms have predicted."""
        return sum(abs(value) for value in self.differences) / (2 * self.weight)

    def _extra(self, terms: Terms) -> tuple[float, float]:
        """Variance of the difference that the replicas make by themselves, for harm and for no inferiority."""
        return self.witness.dispersion().of_difference(terms.replica_sd * math.sqrt(HOEFFDING))

    def _above(self, log_inverse: float, extra: float) -> float:
        """Half-width above the distance, for all sets of groups at once."""
        sets = (len(self.differences) - 1) * math.log(2)
        return radius(HOEFFDING, self.weight, extra, log_inverse + sets, BEST_AT)

    def account(self, terms: Terms) -> dict[str, Any]:
        """Status and numbers at this look."""
        witness, guardrail = self.witness, self.guardrail
        if not witness.usable():
            return {"status": NO_DATA, "stable": None, "canary": None, "values": [n for n, _ in witness.totals]}
        extra, seen = self._extra(terms), self.distance()
        most = seen + self._above(-math.log(terms.beta), extra[1])
        half = radius(witness.pair_variance(), witness.weight, extra[0], -math.log(terms.alpha), BEST_AT)
        least = witness.estimate - half
        numbers = {
            "stable": 0.0,
            "canary": round(seen, 6),
            "values": [n for n, _ in witness.totals],
            "difference": round(witness.estimate, 6),
            "worse_by_at_least": round(least, 6),
            "worse_by_at_most": round(most, 6),
            "margin": guardrail.margin,
        }
        harm, fine = least > guardrail.harm_margin, most < guardrail.margin
        if terms.plan is not None:
            sd = math.sqrt(witness.pair_variance() / witness.weight + extra[0])
            # Of all sets at once there is no planned test: that side keeps its always-valid bound.
            statistics = [((witness.estimate - guardrail.harm_margin) / sd, sd**-2), (0.0, sd**-2)]
            harm, _, planned = self.planned.look(terms.plan, statistics, terms)
            numbers |= {name: value for name, value in planned.items() if "ok" not in name and name != "lost"}
        culprit = witness.culprit() if harm else None
        if culprit is not None:
            numbers["culprit"] = culprit
        self.settled = settle(self.settled, harm and culprit is None, fine, seen >= guardrail.margin)
        return {"status": self.settled, **numbers}

    def report(self, terms: Terms) -> dict[str, Any]:
        """The distance with its confidence sequence."""
        witness = self.witness
        if not witness.usable():
            return {"effect": "total variation", "estimate": None, "interval": None}
        extra, half = self._extra(terms), -math.log(terms.beta / 2)
        least = witness.estimate - radius(witness.pair_variance(), witness.weight, extra[0], half, BEST_AT)
        return {
            "effect": "total variation",
            "estimate": round(self.distance(), 6),
            "interval": [round(max(least, 0.0), 6), round(min(self.distance() + self._above(half, extra[1]), 1.0), 6)],
            "confidence": 1 - terms.beta,
        }


def _share_in(part: Part, chosen: Sequence[int]) -> Part:
    """Moments of "the prediction is in the chosen groups"."""
    hits = sum(part.values[index] for index in chosen)
    return Part(part.replica, [sum(part.values), hits, hits])
