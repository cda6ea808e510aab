"""What the gate decided, on which numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """One requirement of the policy.

    :param name: what was required
    :param passed: whether it holds; False as well when it could not be found out
    :param value: what was found, in words
    :param limit: what was required, in words
    """

    name: str
    passed: bool
    value: str
    limit: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value}; required: {self.limit}"


@dataclass(frozen=True)
class GateVerdict:
    """Whether the challenger may go on, and the evidence.

    :param passed: every check holds
    :param first_model: there was no champion to compare with
    :param reasons: the checks that failed, or, when all hold, the one that decided
    :param checks: every requirement of the policy
    :param rows: rows compared
    :param clusters: independent clusters of rows (days)
    :param unlabelled: rows of the window left out because their label is not known
    :param metrics: of ``"challenger"`` and ``"champion"`` (None without one), see
        :func:`airflow_mlops.evaluation.score`
    :param differences: gains of the challenger, each as of :class:`airflow_mlops.evaluation.paired.Gain`
    :param slices: for each slice column, value, rows, gain in loss, adjusted p-value that it is worse than tolerated
    :param latency: of single-row predictions, milliseconds; None when not measured
    :param champion_latency: the champion's, where the policy compares them
    :param calibration: of the challenger, see :func:`airflow_mlops.evaluation.calibration.recalibration`
    :param fairness: for each metric of each rule, see :func:`airflow_mlops.evaluation.fairness.assess`
    :param missing: without which features the challenger lost how much, see
        :func:`airflow_mlops.evaluation.robustness.missing_losses`
    :param cases: how each behavioural case went, see :func:`airflow_mlops.evaluation.cases.run`
    :param policy: the :class:`GatePolicy` as JSON
    """

    passed: bool
    first_model: bool
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    rows: int
    clusters: int
    metrics: Mapping[str, Any]
    differences: tuple[Mapping[str, Any], ...] = ()
    slices: tuple[Mapping[str, Any], ...] = ()
    latency: Mapping[str, Any] | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    unlabelled: int = 0
    champion_latency: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    fairness: tuple[Mapping[str, Any], ...] = ()
    missing: tuple[Mapping[str, Any], ...] = ()
    cases: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; what is not a finite number is None."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GateVerdict:
        """The verdict that :meth:`to_json` wrote; further keys are left alone."""
        fields: dict[str, Any] = {
            entry.name: value[entry.name] for entry in dataclasses.fields(cls) if entry.name in value
        }
        fields["checks"] = tuple(Check(**check) for check in fields["checks"])
        for name in ("reasons", "differences", "slices", "fairness", "missing", "cases"):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
