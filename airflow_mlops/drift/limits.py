"""The policy on drift; and policies from mappings and their limits, shared with the policy on harm."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from airflow_mlops.exceptions import InvalidInputError

Ranges = Mapping[str, tuple[float, float]]


def known_fields(policy: type, what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as arguments of ``policy``; numbers may be strings, as templates render them.

    :param what: how an error calls the policy
    :raises InvalidInputError: an unknown field
    """
    known = [field.name for field in fields(policy)]
    if unknown := sorted(set(value) - set(known)):
        raise InvalidInputError(f"unknown field(s) of a {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: number_of(given) for name, given in value.items()}


def check_ranges(policy: Any, what: str, ranges: Ranges) -> None:
    """:raises InvalidInputError: a field of ``policy`` is no number or outside its range, both ends included"""
    for name, (low, high) in ranges.items():
        value = getattr(policy, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise InvalidInputError(f"{what}: {name} is {value!r}; expected a number from {low} to {high}")


def number_of(value: Any) -> Any:
    """The number that a string holds, as templates render it; anything else as it is."""
    for kind in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            return kind(value)
    return value


#: Method to the smallest effect that counts when a policy names none. A shift of a normal by d standard deviations
#: has a Wasserstein distance of d, a Jensen-Shannon distance of d / 2.8, a Kolmogorov-Smirnov statistic of d / 2.5 and
#: a PSI of d squared. That of Jensen-Shannon is below 0.1, so that 0.1 is found and not only every other time.
MIN_EFFECT = {"wasserstein": 0.1, "js": 0.07, "psi": 0.1, "ks": 0.05}
CONTROLS = ("by", "e-bh")


@dataclass(frozen=True)
class DriftPolicy:
    """When a difference between two profiles is drift.

    Drift of the data:

    :param min_effect: smallest debiased effect that counts, however many rows there are: standard deviations
        (Wasserstein) for numbers, Jensen-Shannon distance for categories; :data:`MIN_EFFECT` by method when None
    :param fdr: bound on the expected share of false ones among the columns called drifted; with no drift at all it
        bounds the share of windows that alarm. The default and that of the predictions make 1 % together
    :param control: how ``fdr`` is held: ``by`` (Benjamini and Yekutieli) or ``e-bh``, see
        :mod:`airflow_mlops.drift.discoveries`
    :param min_rows: values needed on both sides of a column; fewer is "not enough data"
    :param max_unseen: largest harmless share of values in categories that the reference never had
    :param min_columns: drifted columns that make the dataset drifted
    :param min_weight: share of all weight that the drifted columns must have to make the dataset drifted
    :param weights: column to importance, on any scale: heavier columns get more of ``fdr``. A column of weight 0 is
        shown and never counted; a column not named weighs as much as the mean of those above 0
    :param method: column to ``wasserstein``, ``js``, ``psi`` or ``ks``, see :mod:`airflow_mlops.drift.distances`
    :param calendar_columns: columns that move with the season or the calendar: their drift is shown, never counted

    Drift of predictions, judged apart (its false alarms come on top of those of the data):

    :param prediction_columns: columns that hold the model's predictions; a single one that drifts is enough
    :param prediction_min_effect: as ``min_effect``
    :param prediction_fdr: as ``fdr``

    Quality; the schema (columns, their kinds) is always judged:

    :param max_missing_rise: largest harmless rise of a column's share of missing (or infinite) values
    :param ranges: numeric column to its least and largest allowed value, None for no limit
    :param max_outside: largest harmless share of values outside ``ranges``
    :param max_age: time column to seconds that its newest value may lie before ``as_of``
    :param as_of: when the data should have been complete, ISO 8601 (UTC where it names no zone), for example the
        end of the window; needed by ``max_age``
    """

    min_effect: float | None = None
    fdr: float = 0.005
    min_rows: int = 500
    max_missing_rise: float = 0.1
    max_unseen: float = 0.05
    min_columns: int = 1
    calendar_columns: tuple[str, ...] = ()
    control: str = "by"
    min_weight: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    method: Mapping[str, str] = field(default_factory=dict)
    prediction_columns: tuple[str, ...] = ()
    prediction_min_effect: float | None = None
    prediction_fdr: float = 0.005
    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    max_outside: float = 0.0
    max_age: Mapping[str, float] = field(default_factory=dict)
    as_of: str | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DriftPolicy:
        """A policy from a mapping of its fields.

        :raises InvalidInputError: an unknown field, or a value out of range
        """
        given = known_fields(cls, "drift policy", value)
        for name in ("calendar_columns", "prediction_columns"):
            if isinstance(given.get(name), str):
                raise InvalidInputError(f"{name} is the text {given[name]!r}; expected a list")
            given[name] = tuple(given.get(name) or ())
        for name in _BY_COLUMN:
            given[name] = _by_column(name, given.get(name) or {})
        given["ranges"] = {n: tuple(ends) if isinstance(ends, list) else ends for n, ends in given["ranges"].items()}
        given["as_of"] = None if value.get("as_of") in (None, "") else str(value["as_of"])
        policy = cls(**given)
        policy.check()
        return policy

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON."""
        lists = {name: list(getattr(self, name)) for name in ("calendar_columns", "prediction_columns")}
        return {
            **asdict(self),
            **lists,
            **{name: dict(getattr(self, name)) for name in _BY_COLUMN},
            "ranges": {name: list(limits) for name, limits in self.ranges.items()},
        }

    def check(self) -> None:
        """Raise :class:`InvalidInputError` when a value is out of range."""
        check_ranges(self, "drift policy", _RANGES)
        optional = {name: (0.0, math.inf) for name in _OPTIONAL if getattr(self, name) is not None}
        check_ranges(self, "drift policy", optional)
        if self.control not in CONTROLS:
            raise InvalidInputError(f"drift policy: control is {self.control!r}; expected {' or '.join(CONTROLS)}")
        for name, method in self.method.items():
            if method not in MIN_EFFECT:
                raise InvalidInputError(
                    f"drift policy: method of {name} is {method!r}; expected one of {', '.join(MIN_EFFECT)}"
                )
        for mapping in ("weights", "max_age"):
            for name, number in getattr(self, mapping).items():
                if not _is_number(number) or not 0 <= number < math.inf:
                    raise InvalidInputError(
                        f"drift policy: {mapping} of {name} is {number!r}; expected a number from 0"
                    )
        for name, limits in self.ranges.items():
            if not _is_range(limits):
                raise InvalidInputError(
                    f"drift policy: ranges of {name} is {limits!r}; expected two numbers, the least and the largest "
                    "allowed, or None for no limit"
                )
        if self.max_age and self.as_of is None:
            raise InvalidInputError(
                "drift policy: max_age needs as_of, when the data should have been complete, for example the end of "
                "the window"
            )
        both = sorted(set(self.calendar_columns) & set(self.prediction_columns))
        if both:
            raise InvalidInputError(
                f"drift policy: {', '.join(both)} in both calendar_columns and prediction_columns; name each once"
            )
        _ = self.deadline

    @property
    def deadline(self) -> dt.datetime | None:
        """``as_of`` as a time in UTC; :class:`InvalidInputError` when it is none."""
        if self.as_of is None:
            return None
        try:
            when = dt.datetime.fromisoformat(str(self.as_of))
        except ValueError:
            raise InvalidInputError(
                f"drift policy: as_of is {self.as_of!r}; expected a time such as 2013-02-01T00:00:00+00:00"
            ) from None
        return when.replace(tzinfo=when.tzinfo or dt.timezone.utc).astimezone(dt.timezone.utc)

    def least_effect(self, column: str, method: str) -> float:
        """The smallest effect that counts in ``column`` by ``method``."""
        given = self.prediction_min_effect if column in self.prediction_columns else self.min_effect
        return MIN_EFFECT[method] if given is None else given

    def named(self) -> dict[str, set[str]]:
        """Field to the columns that it names."""
        fields_ = ("calendar_columns", "prediction_columns", *_BY_COLUMN)
        return {field_: set(getattr(self, field_)) for field_ in fields_}


_BY_COLUMN = ("weights", "method", "ranges", "max_age")
_OPTIONAL = ("min_effect", "prediction_min_effect")
_RANGES = {
    "fdr": (1e-12, 0.5),
    "min_rows": (2, math.inf),
    "max_missing_rise": (0.0, 1.0),
    "max_unseen": (0.0, 1.0),
    "min_columns": (1, math.inf),
    "min_weight": (0.0, 1.0),
    "prediction_fdr": (1e-12, 0.5),
    "max_outside": (0.0, 1.0),
}


def _by_column(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"drift policy: {name} is {value!r}; expected a mapping from column")
    return {str(column): number_of(given) for column, given in value.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_range(limits: Any) -> bool:
    if not isinstance(limits, tuple) or len(limits) != 2:
        return False
    low, high = limits
    if not all(limit is None or _is_number(limit) for limit in limits):
        return False
    return low is None or high is None or low <= high
