"""What a profile keeps of one column."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from airflow_mlops.drift.categories import Categories
from airflow_mlops.drift.distinct import Distinct
from airflow_mlops.drift.histogram import Histogram, from_keys
from airflow_mlops.exceptions import DataError

_UTC = ("UTC", "Etc/UTC", "+00:00", "Z", "GMT")


@dataclass
class Column:
    """What is kept of one column.

    :param kind: ``numeric``, ``categorical``, ``time`` or ``empty`` (no value ever seen, type unknown)
    :param type: the Arrow type last seen, for messages
    :param rows: number of rows
    :param missing: nulls and NaN
    :param infinite: positive and negative infinities (numeric); part of no moment and of no bin
    :param minimum: smallest finite value; ISO 8601 for times
    :param maximum: largest finite value
    """

    kind: str
    type: str
    rows: int = 0
    missing: int = 0
    infinite: int = 0
    minimum: float | str | None = None
    maximum: float | str | None = None
    # Exact: floats added in another order would give other last bits.
    total: Fraction = Fraction(0)
    squares: Fraction = Fraction(0)
    histogram: Histogram = field(default_factory=Histogram)
    categories: Categories = field(default_factory=Categories)
    # None where it is not known: profiles of version 1 have none.
    sketch: Distinct | None = field(default_factory=Distinct)

    @property
    def distinct(self) -> int | None:
        """Number of distinct values, infinities apart: exact while there are few, else within about 3 % (numbers,
        times) or 9 % (categories); None where a profile of version 1 does not tell."""
        if self.kind == "categorical":
            return self.categories.distinct()
        if self.kind == "numeric" and not self.histogram.shift:
            return len(self.histogram.keys)
        return 0 if not self.count else None if self.sketch is None else self.sketch.estimate()

    @property
    def count(self) -> int:
        """Values that a distribution is made of: neither missing nor infinite."""
        return self.rows - self.missing - self.infinite

    @property
    def mean(self) -> float | None:
        """Mean of the finite values of a numeric column."""
        return float(self.total / self.count) if self.kind == "numeric" and self.count else None

    @property
    def std(self) -> float | None:
        """Population standard deviation of the finite values of a numeric column."""
        if self.kind != "numeric" or not self.count:
            return None
        variance = max(self.squares / self.count - (self.total / self.count) ** 2, Fraction(0))
        # Its root can fit a float where the variance itself does not.
        half = (variance.numerator.bit_length() - variance.denominator.bit_length()) // 2
        return math.ldexp(math.sqrt(variance / Fraction(4) ** half), half)

    def merge(self, other: Column, name: str = "") -> None:
        """Add what ``other`` saw of the same column.

        :param name: how errors call the column
        :raises DataError: the two are of different kinds, or times of different zones
        """
        check_mergeable(
            name, (self.kind, self.type), (other.kind, other.type), "in one part of the data and", "in another"
        )
        if self.kind == "empty":
            self.kind, self.type = other.kind, other.type
        self.type = min(self.type, other.type) if other.kind != "empty" else self.type
        self.rows += other.rows
        self.missing += other.missing
        self.infinite += other.infinite
        self.minimum = pick(min, self.minimum, other.minimum)
        self.maximum = pick(max, self.maximum, other.maximum)
        self.total += other.total
        self.squares += other.squares
        self.histogram.merge(other.histogram)
        self.categories.merge(other.categories)
        if self.sketch is not None and other.sketch is not None:
            self.sketch.merge(other.sketch)
        else:
            self.sketch = None

    def to_json(self) -> dict[str, Any]:
        """The column as JSON."""
        value: dict[str, Any] = {"kind": self.kind, "type": self.type, "rows": self.rows, "missing": self.missing}
        if self.kind in ("numeric", "time"):
            value |= {"minimum": self.minimum, "maximum": self.maximum}
        if self.kind == "numeric":
            value |= {"infinite": self.infinite, "mean": self.mean, "std": self.std, **self.histogram.to_json()}
            value |= {"total": _exact(self.total), "squares": _exact(self.squares)}
        if self.kind == "categorical":
            value |= self.categories.to_json()
        # Few distinct numbers are held exactly, and the sketch can be made of them.
        if self.sketch is not None and (self.kind == "time" or self.histogram.shift):
            value |= {"distinct": self.distinct, "sketch": self.sketch.to_json()}
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Column:
        """The inverse of :meth:`to_json`."""
        column = cls(str(value["kind"]), str(value["type"]), int(value["rows"]), int(value["missing"]))
        if column.kind not in ("numeric", "categorical", "time", "empty"):
            raise ValueError(f"unknown kind of column {column.kind!r}")
        if column.kind in ("numeric", "time"):
            column.minimum, column.maximum = value["minimum"], value["maximum"]
        if column.kind == "numeric":
            column.infinite = int(value["infinite"])
            column.total, column.squares = _fraction(value["total"]), _fraction(value["squares"])
            column.histogram = Histogram.from_json(value)
            if column.histogram.total != column.count:
                raise ValueError("the bins do not add up to the rows")
        if column.kind == "time" or column.histogram.shift:
            column.sketch = Distinct.from_json(value["sketch"]) if "sketch" in value else None
        else:
            column.sketch = Distinct()
            column.sketch.add(from_keys(column.histogram.keys).view(np.int64))
        if column.kind == "categorical":
            column.categories = Categories.from_json(value)
            if column.categories.total != column.count:
                raise ValueError("the categories do not add up to the rows")
        return column


def pick(choose: Any, first: Any, second: Any) -> Any:
    return second if first is None else first if second is None else choose(first, second)


def _exact(value: Fraction) -> list[Any]:
    """A sum of floats as a hexadecimal numerator and a power of two, exact."""
    return [f"{value.numerator:x}", value.denominator.bit_length() - 1]


def _fraction(value: list[Any]) -> Fraction:
    return Fraction(int(value[0], 16), 1 << min(int(value[1]), 4096))


def check_mergeable(name: str, first: tuple[str, str], second: tuple[str, str], here: str, there: str) -> None:
    """Whether two parts of a column belong together.

    :param first: kind and type of the column ``here``
    :param second: the same ``there``
    :raises DataError: they are of different kinds, or times of different zones
    """
    if "empty" in (first[0], second[0]):
        return
    if first[0] != second[0]:
        raise DataError(
            f"column {name} is {first[0]} ({first[1]}) {here} {second[0]} ({second[1]}) {there}; give it one type"
        )
    if first[0] == "time" and zone_of(first[1]) != zone_of(second[1]):
        raise DataError(
            f"column {name} is {first[1]} {here} {second[1]} {there}: times in different zones, or with a zone and "
            "without, are not one column. Convert it to UTC everywhere."
        )


def zone_of(type_: str) -> str | None:
    """The zone of a type of times, None without one."""
    found = re.search(r"tz=([^\]]+)", type_)
    return None if not found else "UTC" if found[1] in _UTC else found[1]
