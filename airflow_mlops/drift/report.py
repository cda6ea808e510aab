"""What :func:`airflow_mlops.drift.compare` finds: column by column, and of the dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from airflow_mlops.drift.limits import DriftPolicy


@dataclass(frozen=True)
class ColumnDrift:
    """What was found in one column.

    :param name: column
    :param status: ``drift``, ``calendar`` (changed, as declared or as in the same season of another year),
        ``uncounted`` (drifted, of weight 0), ``stable``, ``not_enough_data`` or ``broken``
    :param method: the distance used, see :class:`airflow_mlops.drift.distances.Distance`; None when none could be
    :param distance: the distance between the two samples
    :param effect: the distance less what sampling alone gives
    :param psi: population stability index
    :param p_value: of no change, not adjusted
    :param adjusted_p: adjusted for the number and the weights of the columns
    :param reference: mean (numeric) or number of categories, on the reference
    :param current: the same on the current data
    :param missing: share of missing values on both sides
    :param reason: why, in words
    :param kind: ``data``, ``prediction``, ``quality`` (broken) or ``calendar``
    :param weight: importance, 1 on average over the columns of its kind; 0 is shown and never counted
    :param season_effect: the effect against the same season of another year, where it was asked for
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
    kind: str = "data"
    weight: float = 1.0
    season_effect: float | None = None


@dataclass(frozen=True)
class DriftReport:
    """The verdict on a dataset.

    :param verdict: ``drift``, ``stable`` or ``not_enough_data``; a break of quality is never ``stable``
    :param reasons: why, in words
    :param columns: one entry for each column, broken and drifted ones first, then by effect
    :param breaks: column to what broke: missing, new, of another type, all missing, many missing, out of range, stale
    :param rows: rows of the reference and of the current data
    :param digests: digests of the two profiles
    :param policy: the policy used
    :param kinds: verdict by kind: ``data`` and, where the policy names predictions, ``prediction`` are ``drift``,
        ``stable`` or ``not_enough_data``; ``quality`` is ``broken`` or ``stable``
    """

    verdict: str
    reasons: tuple[str, ...]
    columns: tuple[ColumnDrift, ...]
    breaks: dict[str, str]
    rows: tuple[int, int]
    digests: tuple[str, str]
    policy: DriftPolicy
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def drifted(self) -> list[str]:
        """Names of the drifted columns that count, largest effect first."""
        return [column.name for column in self.columns if column.status == "drift"]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, without NaN."""
        return {
            "verdict": self.verdict,
            "kinds": dict(self.kinds),
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
            dict(value.get("kinds", {})),
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
