"""What a challenger has to show before it may replace the champion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from airflow_mlops.evaluation.rules import fairness_rules
from airflow_mlops.exceptions import InvalidInputError

METRICS = ("log_loss", "brier", "auc", "accuracy")
#: Metrics that are means over rows, less is better.
LOSSES = ("log_loss", "brier")
#: Tests by metric, the default first; a function of the user's has those of "function".
METHODS = {
    "log_loss": ("t", "permutation", "bootstrap"),
    "brier": ("t", "permutation", "bootstrap"),
    "auc": ("delong", "bootstrap"),
    "accuracy": ("mcnemar", "permutation"),
    "function": ("permutation", "bootstrap"),
}
RULES = ("improvement", "non_inferiority")
FLOORS = ("auc", "accuracy")
CEILINGS = ("log_loss", "brier")
COUNTS = ("min_rows", "min_clusters", "slice_min_rows", "replicates")
TEXTS = ("metric", "rule", "method")
OPTIONAL = ("method", "fairness", "calibration_slope")


def is_function(metric: str) -> bool:
    """Whether ``metric`` names a function, ``package.module:function``."""
    return ":" in metric


@dataclass(frozen=True)
class GatePolicy:
    """The rule of a gate. Every limit must hold; the comparison errs in at most ``alpha`` of the cases.

    The *gain* is the challenger's advantage in ``metric`` over all rows: lower log loss or Brier score, higher AUC or
    accuracy.

    :param metric: ``"log_loss"``, ``"brier"``, ``"auc"``, ``"accuracy"``, or ``"package.module:function"``, which is
        called with ``(label, probability)`` and returns a number
    :param rule: ``"improvement"``: the gain must be shown to exceed ``margin``; a challenger whose true gain is at
        most ``margin`` passes with probability at most ``alpha``. ``"non_inferiority"``: the gain must be shown to
        exceed ``-margin``; a challenger truly worse by ``margin`` or more passes with probability at most ``alpha``
    :param margin: in units of the metric, not negative; positive for non-inferiority
    :param method: the test, see :data:`METHODS` and ``docs/gate.md``; None for the metric's own: cluster-robust t for
        losses, DeLong for AUC, McNemar for accuracy, for a function the paired permutation, or with a margin the
        bootstrap
    :param threshold: probability from which a row counts as predicted positive, for accuracy and fairness
    :param greater_is_better: of a function given as metric
    :param replicates: resamples or permutations, where the method makes some
    :param alpha: one-sided error rate of the comparison, and of all slices together
    :param floors: least value of a metric of the challenger, ``{"auc": 0.6}``, also accuracy or a function; for a
        first model all limits of this policy count, only the comparison does not
    :param ceilings: greatest value, ``{"log_loss": 0.6, "brier": 0.2}``, or a function
    :param max_calibration_error: greatest distance of the mean probability from the base rate; None for no limit
    :param max_expected_calibration_error: greatest mean distance of predicted from observed rate over ten groups of
        equal size; None for no limit
    :param calibration_slope: least and greatest slope of the label's log odds on the predicted ones, 1 when neither
        over- nor underconfident; None for no limit
    :param fairness: a mapping of the fields of :class:`airflow_mlops.evaluation.rules.FairnessRule`, or a list of
        such; None for no rule
    :param max_missing_loss: greatest loss in ``metric`` when any one feature is missing in all rows, and when
        ``missing_share`` of all values are; None to leave this out
    :param missing_share: of the values, from 0 (not tried) to 1
    :param max_latency_ms: greatest 95th percentile of a single-row prediction, milliseconds; None for no limit
    :param max_p99_ms: greatest 99th percentile, milliseconds; None for no limit
    :param max_memory_mib: greatest resident size of a process that serves the model, MiB; None for no limit
    :param max_latency_ratio: greatest 95th percentile relative to the champion's; None for no limit
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
    method: str | None = None
    threshold: float = 0.5
    greater_is_better: bool = True
    replicates: int = 2000
    floors: Mapping[str, float] = field(default_factory=lambda: {"auc": 0.5})
    ceilings: Mapping[str, float] = field(default_factory=dict)
    max_calibration_error: float | None = None
    max_expected_calibration_error: float | None = None
    calibration_slope: tuple[float, float] | None = None
    fairness: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    max_missing_loss: float | None = None
    missing_share: float = 0.1
    max_latency_ms: float | None = None
    max_p99_ms: float | None = None
    max_memory_mib: float | None = None
    max_latency_ratio: float | None = None
    slice_tolerance: float = 0.02
    slice_min_rows: int = 200
    min_rows: int = 500
    min_clusters: int = 5
    min_labelled: float = 0.8

    def validate(self) -> GatePolicy:
        """This policy.

        :raises InvalidInputError: a field has a value no rule can be made of
        """
        self._validate_names()
        if not 0 < self.alpha < 0.5:
            raise InvalidInputError(f"the gate's alpha is {self.alpha}; expected an error rate between 0 and 0.5")
        greatest = [getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name.startswith("max_")]
        limits = [*greatest, *(self.calibration_slope or ())]
        limits += [
            limit for given in (self.floors, self.ceilings) for name, limit in given.items() if not is_function(name)
        ]
        for value in [self.margin, self.slice_tolerance, *limits]:
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InvalidInputError(f"the gate's limits must be finite and not negative; got {value}")
        if any(not math.isfinite(limit) for limit in [*self.floors.values(), *self.ceilings.values()]):
            raise InvalidInputError("the gate's floors and ceilings must be finite numbers")
        if self.calibration_slope is not None and not self.calibration_slope[0] <= 1 <= self.calibration_slope[1]:
            raise InvalidInputError(
                f"the gate's calibration_slope is {list(self.calibration_slope)}; expected a least and a greatest "
                "value with 1 between them, such as [0.8, 1.25]"
            )
        for name in ("threshold", "missing_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"the gate's {name} is {getattr(self, name)}; expected a number from 0 to 1")
        if self.replicates < 200:
            raise InvalidInputError(f"the gate's replicates are {self.replicates}; fewer than 200 tell nothing")
        if self.rule == "non_inferiority" and self.margin == 0:
            raise InvalidInputError("non-inferiority needs a positive margin: how much worse is still acceptable?")
        if not 0 <= self.min_labelled <= 1:
            raise InvalidInputError(f"the gate's min_labelled is {self.min_labelled}; expected a share from 0 to 1")
        if self.min_clusters < 2 or self.min_rows < 2 or self.slice_min_rows < 2:
            raise InvalidInputError("the gate's min_rows, min_clusters and slice_min_rows must be at least 2")
        self._validate_method()
        fairness_rules(self.fairness)
        return self

    def _validate_names(self) -> None:
        if not is_function(self.metric) and self.metric not in METRICS:
            raise InvalidInputError(
                f"the gate's metric is {self.metric!r}; expected one of {METRICS}, or package.module:function"
            )
        if self.rule not in RULES:
            raise InvalidInputError(f"the gate's rule is {self.rule!r}; expected one of {RULES}")
        for name, allowed in (("floors", FLOORS), ("ceilings", CEILINGS)):
            if unknown := {given for given in getattr(self, name) if not is_function(given)} - set(allowed):
                raise InvalidInputError(
                    f"the gate's {name} name {sorted(unknown)}; expected some of {allowed}, or package.module:function"
                )

    def _validate_method(self) -> None:
        allowed = METHODS["function" if is_function(self.metric) else self.metric]
        if self.method is not None and self.method not in allowed:
            raise InvalidInputError(
                f"the gate's method is {self.method!r}; for the metric {self.metric} expected one of {allowed}"
            )
        if self.method == "permutation" and self.margin and self.metric not in (*LOSSES, "accuracy"):
            raise InvalidInputError(
                f"a permutation tests that the arms can be exchanged, which says nothing of a margin in {self.metric}; "
                "use method='bootstrap' with a margin"
            )
        if self.test == "permutation" and self.alpha * (self.replicates + 1) <= 1:
            raise InvalidInputError(
                f"{self.replicates} permutations give no p-value below {1 / (self.replicates + 1):.2g}, so nothing "
                f"could pass at alpha={self.alpha:g}; set replicates to more than {1 / self.alpha:.0f}"
            )

    @property
    def test(self) -> str:
        """The method that decides: the one given, else the metric's own."""
        if self.method is not None:
            return self.method
        if is_function(self.metric):
            return "bootstrap" if self.margin else "permutation"
        return METHODS[self.metric][0]

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON types."""
        slope = None if self.calibration_slope is None else list(self.calibration_slope)
        own = {"floors": dict(self.floors), "ceilings": dict(self.ceilings), "calibration_slope": slope}
        return {**dataclasses.asdict(self), **own}

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
                fields[name] = _field(name, given)
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"the gate policy's {name} is {given!r}: {error}") from error
        optional = {name for name in fields if name.startswith("max_")} | set(OPTIONAL)
        if empty := [name for name, given in fields.items() if given is None and name not in optional]:
            raise InvalidInputError(f"the gate policy's {empty} are empty; give numbers or leave them out")
        return cls(**fields).validate()


def _field(name: str, given: Any) -> Any:
    if given is None or given in ("", "None"):
        return None
    if name in TEXTS:
        return str(given)
    if name in ("floors", "ceilings"):
        return {str(key): float(limit) for key, limit in given.items()}
    if name == "fairness":
        return given
    if name == "calibration_slope":
        low, high = given
        return float(low), float(high)
    if name == "greater_is_better":
        if str(given).lower() not in ("true", "false"):
            raise ValueError("expected true or false")
        return str(given).lower() == "true"
    return int(given) if name in COUNTS else float(given)
