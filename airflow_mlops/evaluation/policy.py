"""What a challenger has to show before it may replace the champion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow_mlops.exceptions import InvalidInputError

METRICS = ("log_loss", "brier", "auc")
RULES = ("improvement", "non_inferiority")
FLOORS = ("auc",)
CEILINGS = ("log_loss", "brier")
COUNTS = ("min_rows", "min_clusters", "slice_min_rows")


@dataclass(frozen=True)
class GatePolicy:
    """The rule of a gate. Every limit must hold; the comparison errs in at most ``alpha`` of the cases.

    The *gain* is the challenger's advantage in ``metric`` over all rows: lower log loss or Brier score, higher AUC.

    :param metric: ``"log_loss"``, ``"brier"`` or ``"auc"``
    :param rule: ``"improvement"``: the gain must be shown to exceed ``margin``; a challenger whose true gain is at
        most ``margin`` passes with probability at most ``alpha``. ``"non_inferiority"``: the gain must be shown to
        exceed ``-margin``; a challenger truly worse by ``margin`` or more passes with probability at most ``alpha``
    :param margin: in units of the metric, not negative; positive for non-inferiority
    :param alpha: one-sided error rate of the comparison, and of all slices together
    :param floors: least value of a metric of the challenger, ``{"auc": 0.6}``; the only rule for a first model,
        together with ``ceilings`` and the calibration
    :param ceilings: greatest value, ``{"log_loss": 0.6, "brier": 0.2}``
    :param max_calibration_error: greatest distance of the mean probability from the base rate; None for no limit
    :param max_latency_ms: greatest 95th percentile of a single-row prediction, milliseconds; None for no limit
    :param slice_tolerance: greatest loss a slice may suffer against the champion (log loss, or Brier score when
        that is the metric); a slice shown to be worse than that fails the challenger (Holm over all slices)
    :param slice_min_rows: a slice with fewer rows is reported and not tested
    :param min_rows: with fewer rows nothing passes
    :param min_clusters: with fewer clusters (days) nothing passes
    :param min_labelled: with a smaller share of labelled rows nothing passes, since late labels are not a random sample
    """

    metric: str = "log_loss"
    rule: str = "improvement"
    margin: float = 0.0
    alpha: float = 0.05
    floors: Mapping[str, float] = field(default_factory=lambda: {"auc": 0.5})
    ceilings: Mapping[str, float] = field(default_factory=dict)
    max_calibration_error: float | None = None
    max_latency_ms: float | None = None
    slice_tolerance: float = 0.02
    slice_min_rows: int = 200
    min_rows: int = 500
    min_clusters: int = 5
    min_labelled: float = 0.8

    def validate(self) -> GatePolicy:
        """This policy.

        :raises InvalidInputError: a field has a value no rule can be made of
        """
        allowed: tuple[str, ...]
        for name, allowed in (("metric", METRICS), ("rule", RULES)):
            if getattr(self, name) not in allowed:
                raise InvalidInputError(f"the gate's {name} is {getattr(self, name)!r}; expected one of {allowed}")
        for name, allowed in (("floors", FLOORS), ("ceilings", CEILINGS)):
            if unknown := set(getattr(self, name)) - set(allowed):
                raise InvalidInputError(f"the gate's {name} name {sorted(unknown)}; expected some of {allowed}")
        if not 0 < self.alpha < 0.5:
            raise InvalidInputError(f"the gate's alpha is {self.alpha}; expected an error rate between 0 and 0.5")
        limits = [self.max_calibration_error, self.max_latency_ms, *self.floors.values(), *self.ceilings.values()]
        for value in [self.margin, self.slice_tolerance, *limits]:
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InvalidInputError(f"the gate's limits must be finite and not negative; got {value}")
        if self.rule == "non_inferiority" and self.margin == 0:
            raise InvalidInputError("non-inferiority needs a positive margin: how much worse is still acceptable?")
        if not 0 <= self.min_labelled <= 1:
            raise InvalidInputError(f"the gate's min_labelled is {self.min_labelled}; expected a share from 0 to 1")
        if self.min_clusters < 2 or self.min_rows < 2 or self.slice_min_rows < 2:
            raise InvalidInputError("the gate's min_rows, min_clusters and slice_min_rows must be at least 2")
        return self

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON types."""
        return {**dataclasses.asdict(self), "floors": dict(self.floors), "ceilings": dict(self.ceilings)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GatePolicy:
        """A policy from a mapping of its fields; numbers may be strings, as templates render them.

        :raises InvalidInputError: an unknown field, or a value that is not a number where one is expected
        """
        known = {entry.name for entry in dataclasses.fields(cls)}
        if unknown := set(value) - known:
            raise InvalidInputError(f"a gate policy has no {sorted(unknown)}; it has {sorted(known)}")
        fields: dict[str, Any] = {}
        try:
            for name, given in value.items():
                if name in ("metric", "rule"):
                    fields[name] = str(given)
                elif name in ("floors", "ceilings"):
                    fields[name] = {str(key): float(limit) for key, limit in given.items()}
                elif given in (None, "", "None"):
                    fields[name] = None
                else:
                    fields[name] = int(given) if name in COUNTS else float(given)
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"the gate policy's {name} is {given!r}: {error}") from error
        if empty := [name for name, given in fields.items() if given is None and not name.startswith("max_")]:
            raise InvalidInputError(f"the gate policy's {empty} are empty; give numbers or leave them out")
        return cls(**fields).validate()
