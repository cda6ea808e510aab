"""A mean in the canary against stable's: a loss, a gain, a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from airflow_mlops.rollout.difference import MeanDifference, radius
from airflow_mlops.rollout.groupseq import PlannedTest
from airflow_mlops.rollout.guardrail import Guardrail
from airflow_mlops.rollout.terms import NO_DATA, OPEN, Part, Terms, settle

BEST_AT = 250.0


class MeanEvidence:
    """Evidence on a ``mean`` or ``score`` guardrail.

    :param guardrail: of kind ``mean`` or ``score``
    :param state: :meth:`state` of an earlier one
    """

    per_request = False

    def __init__(self, guardrail: Guardrail, state: Mapping[str, Any] | None = None) -> None:
        self.guardrail = guardrail
        state = state or {}
        self.difference = MeanDifference(state.get("difference"))
        self.planned = PlannedTest(state.get("planned"))
        self.settled: str = state.get("settled", OPEN)

    def state(self) -> dict[str, Any]:
        """Small JSON from which the evidence continues."""
        return {"difference": self.difference.state(), "planned": self.planned.state(), "settled": self.settled}

    def calibrate(self, stable: Sequence[Mapping[str, Any]]) -> None:
        """Nothing to fix."""

    def reading(self, counters: Mapping[str, Any]) -> list[float] | None:
        """Cumulative (n, sum, sum of squares) of one replica, to 10 digits."""
        moments = (counters.get("moments") or {}).get(self.guardrail.metric)
        return None if moments is None else [moments[0], *(float(f"{value:.10g}") for value in moments[1:])]

    def add(self, stable: Sequence[Part], canary: Sequence[Part]) -> None:
        """Take in one look of both arms."""
        self.difference.add(stable, canary)

    def add_bake(self, canary: Sequence[Part]) -> None:
        """At 100 % there is no mean to compare with."""

    def baked_badly(self, alpha: float) -> bool:
        """Never: a mean that moved in time would be taken for one that got worse."""
        return False

    def _unit(self) -> float:
        return abs(self.difference.stable_mean) if self.guardrail.relative else 1.0

    def _worse(self) -> float:
        estimate = self.difference.estimate
        if self.guardrail.kind == "score":
            return abs(estimate)
        return -estimate if self.guardrail.higher_is_better else estimate

    def _extra(self, terms: Terms) -> tuple[float, float]:
        """Variance of the difference that the replicas make by themselves, for harm and for no inferiority."""
        return self.difference.dispersion().of_difference(terms.replica_sd * self.difference.stable_mean)

    def account(self, terms: Terms) -> dict[str, Any]:
        """Status and numbers at this look."""
        difference, guardrail = self.difference, self.guardrail
        if not difference.usable():
            return {"status": NO_DATA, "stable": None, "canary": None, "values": [n for n, _ in difference.totals]}
        unit, worse, extra = self._unit(), self._worse(), self._extra(terms)
        harm_at, margin = guardrail.harm_margin * unit, guardrail.margin * unit
        variances = [
            difference.pair_variance(1 + m if guardrail.relative else 1.0)
            for m in (guardrail.harm_margin, guardrail.margin)
        ]
        alpha = terms.alpha / 2 if guardrail.kind == "score" else terms.alpha
        least = worse - radius(variances[0], difference.weight, extra[0], -math.log(alpha), BEST_AT)
        most = worse + radius(variances[1], difference.weight, extra[1], -math.log(terms.beta), BEST_AT)
        numbers = {
            "stable": round(difference.totals[0][1] / difference.totals[0][0], 6),
            "canary": round(difference.totals[1][1] / difference.totals[1][0], 6),
            "values": [n for n, _ in difference.totals],
            "difference": round(difference.estimate, 6),
            "worse_by_at_least": round(least, 6),
            "worse_by_at_most": round(most, 6),
            "margin": round(margin, 6),
        }
        if terms.plan is None:
            harm, fine, lost = least > harm_at, most < margin, worse >= margin
        else:
            sds = [math.sqrt(variance / difference.weight + own) for variance, own in zip(variances, extra)]
            split = Terms(alpha, terms.beta)
            statistics = [((worse - harm_at) / sds[0], sds[0] ** -2), ((margin - worse) / sds[1], sds[1] ** -2)]
            harm, fine, planned = self.planned.look(terms.plan, statistics, split)
            lost = planned.pop("lost")
            numbers |= planned
        culprit = difference.culprit() if worse > harm_at and (harm or self._harm_of_values(harm_at, alpha)) else None
        if culprit is not None:
            numbers["culprit"] = culprit
        self.settled = settle(self.settled, harm and culprit is None, fine, lost)
        return {"status": self.settled, **numbers}

    def _harm_of_values(self, harm_at: float, alpha: float) -> bool:
        """Whether it would be harm if replicas did not differ: only then is a single one to blame for it."""
        difference = self.difference
        return self._worse() - harm_at > radius(
            difference.pair_variance(), difference.weight, 0.0, -math.log(alpha), BEST_AT
        )

    def report(self, terms: Terms) -> dict[str, Any]:
        """The effect with its confidence sequence: canary's mean minus stable's."""
        difference = self.difference
        if not difference.usable():
            return {"effect": "difference of means", "estimate": None, "interval": None}
        half = radius(
            difference.pair_variance(), difference.weight, max(self._extra(terms)), -math.log(terms.beta / 2), BEST_AT
        )
        estimate = difference.estimate
        return {
            "effect": "difference of means",
            "estimate": round(estimate, 6),
            "interval": [round(estimate - half, 6), round(estimate + half, 6)],
            "confidence": 1 - terms.beta,
        }
