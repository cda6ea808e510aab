"""The verdict on drift between two profiles.

A column has drifted when its effect is at least ``min_effect`` *and* its p-value survives the control of the false
discovery rate over all columns (Benjamini and Yekutieli, 2001: valid under any dependence between columns). The
first keeps harmless changes of huge windows silent, the second keeps small windows from crying wolf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from airflow_mlops.drift import distances
from airflow_mlops.drift.limits import check_ranges, known_fields
from airflow_mlops.drift.profile import Column, Profile
from airflow_mlops.exceptions import DataError, InvalidInputError


@dataclass(frozen=True)
class DriftPolicy:
    """When a difference between two profiles is drift.

    :param min_effect: smallest debiased effect that counts: standard deviations (Wasserstein) for numbers,
        Jensen-Shannon distance for categories
    :param fdr: bound on the expected share of false ones among the columns called drifted; with no drift at all it
        bounds the share of windows that alarm
    :param min_rows: values needed on both sides of a column; fewer is "not enough data"
    :param max_missing_rise: largest harmless rise of a column's share of missing (or infinite) values
    :param max_unseen: largest harmless share of values in categories that the reference never had
    :param min_columns: drifted columns that make the dataset drifted
    :param calendar_columns: columns that move with the season or the calendar: their drift is shown, never counted
    """

    min_effect: float = 0.1
    fdr: float = 0.01
    min_rows: int = 500
    max_missing_rise: float = 0.1
    max_unseen: float = 0.05
    min_columns: int = 1
    calendar_columns: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DriftPolicy:
        """A policy from a mapping of its fields.

        :raises InvalidInputError: an unknown field, or a value out of range
        """
        given = known_fields(cls, "drift policy", value)
        if isinstance(given.get("calendar_columns"), str):
            raise InvalidInputError(f"calendar_columns is the text {given['calendar_columns']!r}; expected a list")
        policy = cls(**{**given, "calendar_columns": tuple(given.get("calendar_columns", ()))})
        policy.check()
        return policy

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON."""
        return {**asdict(self), "calendar_columns": list(self.calendar_columns)}

    def check(self) -> None:
        """Raise :class:`InvalidInputError` when a value is out of range."""
        check_ranges(self, "drift policy", _RANGES)


_RANGES = {
    "min_effect": (0.0, math.inf),
    "fdr": (1e-12, 0.5),
    "min_rows": (2, math.inf),
    "max_missing_rise": (0.0, 1.0),
    "max_unseen": (0.0, 1.0),
    "min_columns": (1, math.inf),
}


@dataclass(frozen=True)
class ColumnDrift:
    """What was found in one column.

    :param name: column
    :param status: ``drift``, ``calendar`` (drifted, declared to move with the calendar), ``stable``,
        ``not_enough_data`` or ``broken``
    :param method: the distance used, see :class:`airflow_mlops.drift.distances.Distance`; None when none could be
    :param distance: the distance between the two samples
    :param effect: the distance less what sampling alone gives
    :param psi: population stability index
    :param p_value: of no change, not adjusted
    :param adjusted_p: adjusted for the number of columns
    :param reference: mean (numeric) or number of categories, on the reference
    :param current: the same on the current data
    :param missing: share of missing values on both sides
    :param reason: why, in words
    """

    name: str
    status: str
    method: str | None = None
    distance: float | None = None
    effect: float | None = None
    psi: float | None = None
    p_value: float | None = None
    adjusted_p: float | None = None
    reference: float | None = None
    current: float | None = None
    missing: tuple[float, float] = (0.0, 0.0)
    reason: str = ""


@dataclass(frozen=True)
class DriftReport:
    """The verdict on a dataset.

    :param verdict: ``drift``, ``stable`` or ``not_enough_data``; a break of quality is never ``stable``
    :param reasons: why, in words
    :param columns: one entry for each column, drifted ones first, then by effect
    :param breaks: column to what broke: missing, new, of another type, all missing, many missing
    :param rows: rows of the reference and of the current data
    :param digests: digests of the two profiles
    :param policy: the policy used
    """

    verdict: str
    reasons: tuple[str, ...]
    columns: tuple[ColumnDrift, ...]
    breaks: dict[str, str]
    rows: tuple[int, int]
    digests: tuple[str, str]
    policy: DriftPolicy

    @property
    def drifted(self) -> list[str]:
        """Names of the drifted columns that count, largest effect first."""
        return [column.name for column in self.columns if column.status == "drift"]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, without NaN."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "drifted": self.drifted,
            "columns": [_plain(asdict(column)) for column in self.columns],
            "breaks": dict(self.breaks),
            "rows": {"reference": self.rows[0], "current": self.rows[1]},
            "digests": {"reference": self.digests[0], "current": self.digests[1]},
            "policy": self.policy.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DriftReport:
        """The inverse of :meth:`to_json`."""
        return cls(
            value["verdict"],
            tuple(value["reasons"]),
            tuple(ColumnDrift(**{**column, "missing": tuple(column["missing"])}) for column in value["columns"]),
            dict(value["breaks"]),
            (value["rows"]["reference"], value["rows"]["current"]),
            (value["digests"]["reference"], value["digests"]["current"]),
            DriftPolicy.from_json(value["policy"]),
        )


def compare(reference: Profile, current: Profile, policy: DriftPolicy | None = None) -> DriftReport:
    """Whether ``current`` has drifted from ``reference``.

    :param reference: profile of the data the model was trained on
    :param current: profile of the window to judge
    :param policy: what counts as drift
    :raises DataError: the two have no column in common
    """
    policy = policy or DriftPolicy()
    policy.check()
    unknown = set(policy.calendar_columns) - set(reference.columns) - set(current.columns)
    if unknown:
        raise InvalidInputError(
            f"calendar_columns names {', '.join(sorted(unknown))}, which neither profile has; correct the names"
        )
    common = [name for name in reference.columns if name in current.columns]
    if not common:
        raise DataError(
            f"no column in common: the reference has {', '.join(reference.columns)}, the current data "
            f"{', '.join(current.columns)}. Compare windows of the same dataset."
        )
    breaks = {
        name: "missing: the current data lack this column" for name in reference.columns if name not in current.columns
    }
    found = [ColumnDrift(name, "broken", reason=text) for name, text in breaks.items()]
    found += [_judge_column(name, reference.columns[name], current.columns[name], policy) for name in common]
    breaks |= {column.name: column.reason for column in found if column.status == "broken"}
    new = [name for name in current.columns if name not in reference.columns]
    found = _control_discoveries(found, policy)
    found.sort(key=lambda column: (_ORDER.index(column.status), -(column.effect or 0.0), column.name))
    verdict, reasons = _judge_dataset(found, reference, current, policy)
    if new:
        reasons.append(f"new column(s), not in the reference: {', '.join(new)}")
    return DriftReport(
        verdict,
        tuple(reasons),
        tuple(found),
        breaks | {name: "new: the reference lacks this column" for name in new},
        (reference.rows, current.rows),
        (reference.digest, current.digest),
        policy,
    )


_ORDER = ("broken", "drift", "calendar", "not_enough_data", "stable")


def _judge_column(name: str, reference: Column, current: Column, policy: DriftPolicy) -> ColumnDrift:
    """The distance of one column, or why there is none; status ``stable`` until the p-values are adjusted."""
    lost = tuple((column.rows - column.count) / max(column.rows, 1) for column in (reference, current))
    base: dict[str, Any] = {"missing": lost}
    broken = _broken(reference, current, lost, policy)
    if broken:
        return ColumnDrift(name, "broken", reason=broken, **base)
    fewer = min(reference.count, current.count)
    if fewer < policy.min_rows:
        reason = f"{fewer} values, at least {policy.min_rows} needed"
        return ColumnDrift(name, "not_enough_data", reason=reason, **base)
    if reference.kind == "time":
        spans = [f"{column.minimum} to {column.maximum}" for column in (reference, current)]
        reason = f"times, not compared: from {spans[0]} in the reference, {spans[1]} now"
        return ColumnDrift(name, "stable", reason=reason, **base)
    numeric = reference.kind == "numeric"
    distance = distances.between(reference, current)
    base |= {
        "method": distance.method,
        "distance": distance.raw,
        "effect": distance.effect,
        "psi": distance.psi,
        "p_value": distance.p_value,
        "reference": reference.mean if numeric else reference.categories.distinct(),
        "current": current.mean if numeric else current.categories.distinct(),
    }
    if distance.unseen > policy.max_unseen and name not in policy.calendar_columns:
        reason = f"unseen: at least {distance.unseen:.1%} of the values are in categories that the reference never had"
        return ColumnDrift(name, "drift", reason=reason, **base)
    return ColumnDrift(name, "stable", **base)


def _broken(reference: Column, current: Column, lost: tuple[float, ...], policy: DriftPolicy) -> str:
    if reference.kind == "empty" or not reference.count:
        return "" if not current.count else "new values: the reference has none in this column"
    if not current.count:
        return "all missing: the current data have no usable value in this column"
    if current.kind != reference.kind:
        return f"type changed: {reference.type} in the reference, {current.type} now"
    if lost[1] - lost[0] > policy.max_missing_rise:
        infinite = f", {current.infinite} of them infinite" if current.infinite else ""
        return f"missing values: {lost[0]:.1%} in the reference, {lost[1]:.1%} now{infinite}"
    return ""


def _control_discoveries(found: list[ColumnDrift], policy: DriftPolicy) -> list[ColumnDrift]:
    """Adjusted p-values over the columns that count, and by them which have drifted.

    Calendar columns are judged apart, so that their many discoveries do not loosen the threshold for the others.
    """
    adjusted: dict[str, float] = {}
    for calendar in (False, True):
        family = [
            (column.name, column.p_value)
            for column in found
            if column.p_value is not None and (column.name in policy.calendar_columns) == calendar
        ]
        values = adjust([p for _, p in family])
        adjusted |= {name: value for (name, _), value in zip(family, values)}
    return [
        _with_status(column, adjusted[column.name], policy) if column.name in adjusted else column for column in found
    ]


def _with_status(column: ColumnDrift, adjusted: float, policy: DriftPolicy) -> ColumnDrift:
    status, reason = column.status, column.reason
    if status == "stable" and column.effect is not None:
        if column.effect >= policy.min_effect and adjusted <= policy.fdr:
            status = "calendar" if column.name in policy.calendar_columns else "drift"
            p = "below 1e-16" if adjusted < 1e-16 else f"{adjusted:.2g}"
            reason = f"{column.method} {column.effect:.3f} (at least {policy.min_effect:g}), adjusted p {p}"
        elif adjusted <= policy.fdr:
            reason = f"a real change, too small to matter: {column.effect:.3f} below {policy.min_effect:g}"
    return ColumnDrift(**{**asdict(column), "status": status, "reason": reason, "adjusted_p": adjusted})


def adjust(p_values: list[float]) -> list[float]:
    """Benjamini-Yekutieli adjusted p-values, in the order given."""
    p = np.asarray(p_values, float)
    count = len(p)
    if not count:
        return []
    order = np.argsort(p, kind="stable")
    harmonic = np.sum(1.0 / np.arange(1, count + 1))
    scaled = p[order] * count * harmonic / np.arange(1, count + 1)
    result = np.empty(count)
    result[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return result.tolist()


def _judge_dataset(
    found: list[ColumnDrift], reference: Profile, current: Profile, policy: DriftPolicy
) -> tuple[str, list[str]]:
    by_status = {status: [column for column in found if column.status == status] for status in _ORDER}
    reasons = [f"{column.name}: {column.reason}" for column in by_status["broken"] + by_status["drift"]]
    if by_status["calendar"]:
        names = ", ".join(column.name for column in by_status["calendar"])
        reasons.append(f"drifted with the calendar, not counted: {names}")
    if by_status["not_enough_data"]:
        names = ", ".join(f"{column.name} ({column.reason})" for column in by_status["not_enough_data"])
        reasons.append(f"not enough data: {names}")
    fewer = min(reference.rows, current.rows)
    if fewer < policy.min_rows:
        return "not_enough_data", [f"{fewer} rows, at least {policy.min_rows} needed", *reasons]
    if by_status["broken"] or len(by_status["drift"]) >= policy.min_columns:
        return "drift", reasons
    judged = [column for column in found if column.p_value is not None and column.name not in policy.calendar_columns]
    if not judged:
        return "not_enough_data", [*reasons, "no column that counts could be compared"]
    return "stable", [*reasons, f"{len(judged)} column(s) compared, {len(by_status['drift'])} drifted"]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
