"""Breaks of data quality in one column: what no model survives, however the values are distributed.

A break is a column that is gone, of another kind or without a value; a share of missing values that has risen; values
outside the range they may have; and times that are too old. Drift is not looked for in a broken column.
"""

from __future__ import annotations

import math

import numpy as np

from airflow_mlops.drift.column import Column, zone_of
from airflow_mlops.drift.histogram import edges
from airflow_mlops.drift.limits import DriftPolicy

# One-sided, one in 3.5 million: rare even over hundreds of columns with many missing values.
_CERTAIN = 5.0


def find_break(name: str, reference: Column, current: Column, policy: DriftPolicy) -> str:
    """What is broken in a column that both sides have, in words; empty when nothing is.

    :param name: column
    :param reference: the column as the model was trained on
    :param current: the column of the window to judge
    :param policy: what counts as a break
    """
    if reference.kind == "empty" or not reference.count:
        return "" if not current.count else "new values: the reference has none in this column"
    if not current.count:
        return "all missing: the current data have no usable value in this column"
    if current.kind != reference.kind:
        return f"type changed: {reference.type} in the reference, {current.type} now"
    if reference.kind == "time" and (zone_of(reference.type) is None) != (zone_of(current.type) is None):
        return (
            f"type changed: {reference.type} in the reference, {current.type} now: with a zone and without; write both "
            "in UTC"
        )
    return _missing(reference, current, policy) or _outside(name, current, policy) or _old(name, current, policy)


def lost(column: Column) -> float:
    """The share of values that are missing or infinite."""
    return (column.rows - column.count) / max(column.rows, 1)


def _missing(reference: Column, current: Column, policy: DriftPolicy) -> str:
    before, now = lost(reference), lost(current)
    noise = math.sqrt(before * (1 - before) / reference.rows + now * (1 - now) / current.rows)
    if now - before <= max(policy.max_missing_rise, _CERTAIN * noise):
        return ""
    infinite = f", {current.infinite} of them infinite" if current.infinite else ""
    return f"missing values: {before:.1%} in the reference, {now:.1%} now{infinite}"


def _outside(name: str, current: Column, policy: DriftPolicy) -> str:
    """Values outside the policy's range; their share is a lower bound, by the bins that lie outside as a whole."""
    least, largest = policy.ranges.get(name, (None, None))
    if current.kind != "numeric" or (least is None and largest is None):
        return ""
    assert isinstance(current.minimum, float) and isinstance(current.maximum, float)
    below, above = least is not None and current.minimum < least, largest is not None and current.maximum > largest
    if not below and not above:
        return ""
    low, high = edges(current.histogram.keys, current.histogram.shift, current.minimum, current.maximum)
    outside = np.zeros(len(low), bool)
    if least is not None:
        outside |= high < least
    if largest is not None:
        outside |= low > largest
    # The smallest and the largest value are known exactly, though their bins may reach inside.
    count = max(int(current.histogram.counts[outside].sum()), int(below) + int(above))
    if count <= policy.max_outside * current.count:
        return ""
    allowed = " to ".join("any" if limit is None else f"{limit:g}" for limit in (least, largest))
    share = count / current.count
    return f"range: {current.minimum:g} to {current.maximum:g}, allowed {allowed}; at least {share:.2%} are outside"


def _old(name: str, current: Column, policy: DriftPolicy) -> str:
    """Times too old at the policy's deadline, or after it, which would hide that the others are old."""
    limit, deadline = policy.max_age.get(name), policy.deadline
    if limit is None or deadline is None or current.kind != "time":
        return ""
    newest, due = np.datetime64(str(current.maximum)), np.datetime64(deadline.replace(tzinfo=None))
    age = float((due - newest) / np.timedelta64(1, "s"))
    if age < 0:
        return f"times in the future: the newest is {newest}, after {due} (UTC)"
    if age > limit:
        return f"stale: the newest is {newest}, {age:.0f} s before {due} (UTC); at most {limit:g} s allowed"
    return ""
