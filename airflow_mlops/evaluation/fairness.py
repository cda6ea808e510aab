"""Whether the groups of a column are treated alike: fairlearn's metrics, with intervals that know of clusters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from airflow_mlops.evaluation.metrics import Floats
from airflow_mlops.evaluation.paired import Codes
from airflow_mlops.evaluation.rules import FairnessRule
from airflow_mlops.evaluation.verdict import Check
from airflow_mlops.exceptions import InvalidInputError

REPLICATES = 400
#: Share of resamples that a metric must exist on for its interval to be known.
MIN_KNOWN = 0.9
MISSING = "missing"


def assess(
    rules: Sequence[FairnessRule],
    label: npt.NDArray[np.int8],
    probability: Floats,
    columns: Mapping[str, npt.ArrayLike],
    codes: Codes | None,
    *,
    threshold: float = 0.5,
    alpha: float = 0.05,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every metric of every rule, with an interval of a bootstrap over clusters, or over rows without any.

    Rows enter as counts of cluster, group, label and decision, so that time hardly grows with the rows.

    :param rules: of the policy
    :param label: shape (n,), 0 or 1
    :param probability: shape (n,), the challenger's; decided at ``threshold``
    :param columns: for each rule's column the value of each row, shape (n,)
    :param codes: shape (n,), clusters as 0, 1, ...; None for independent rows
    :param alpha: on either side of the interval
    :return: a mapping for each metric: ``column``, ``metric``, ``estimate``, ``interval`` (both None where they do not
        exist), ``limit``, ``at_least``, ``require``, ``problem`` (why it cannot be told, or None), ``groups`` (for each
        ``group``, ``rows``, ``positive_rate``, ``selection_rate``, ``true_positive_rate``, ``false_positive_rate``)
    :raises InvalidInputError: fairlearn is missing, a metric it does not have, a column that was not given, a group
        that is listed and has no rows
    """
    rng = np.random.default_rng(seed)
    found = []
    for rule in rules:
        if rule.column not in columns:
            raise InvalidInputError(f"the fairness of {rule.column!r} needs that column; it was not given")
        values = np.asarray(columns[rule.column], dtype=object)
        if len(values) != len(label):
            raise InvalidInputError(f"{rule.column} has {len(values)} values for {len(label)} rows")
        functions = {name: _function(name) for name in rule.metrics}
        cells = _cells(rule, label, probability >= threshold, values, codes)
        groups = _groups(cells)
        for name, limit in rule.metrics.items():
            problem = _problem(rule, name, groups)
            estimate, interval = None, None
            if problem is None:
                estimate, interval = _interval(functions[name], cells, codes is None, alpha, rng)
                problem = None if estimate is not None else f"{name} does not exist on these rows"
            found.append(
                {
                    "column": rule.column,
                    "metric": name,
                    "estimate": estimate,
                    "interval": interval,
                    "limit": limit,
                    "at_least": name.endswith("_ratio"),
                    "require": rule.require,
                    "problem": problem,
                    "groups": groups,
                }
            )
    return found


def checks(found: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Whether each metric keeps its limit; one that cannot be told does not."""
    return [_check(entry) for entry in found]


def _check(entry: Mapping[str, Any]) -> Check:
    name = f"fairness by {entry['column']}: {entry['metric']}"
    wanted = f"{'at least' if entry['at_least'] else 'at most'} {entry['limit']:.4g}"
    if entry["require"] == "shown":
        wanted += ", shown by the interval"
    if entry["problem"] is not None:
        return Check(name, False, entry["problem"], wanted)
    interval = entry["interval"]
    value = f"{entry['estimate']:.4g}" + (
        f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else " (no interval)"
    )
    if entry["require"] == "estimate":
        judged = entry["estimate"]
    elif interval is None:
        return Check(name, False, value, wanted)
    else:
        judged = interval[0] if entry["at_least"] else interval[1]
    passed = judged >= entry["limit"] if entry["at_least"] else judged <= entry["limit"]
    return Check(name, bool(passed), value, wanted)


def _function(name: str) -> Callable[..., float]:
    try:
        import fairlearn.metrics as library
    except ImportError:
        raise InvalidInputError("fairness by group needs fairlearn: pip install 'airflow-mlops[fairness]'") from None
    function = getattr(library, name, None)
    if not callable(function):
        known = sorted(entry for entry in dir(library) if entry.endswith(("_difference", "_ratio")))
        raise InvalidInputError(f"fairlearn.metrics has no {name}; it has {known}")
    return function


def _cells(
    rule: FairnessRule, label: Any, decided: npt.NDArray[np.bool_], values: npt.NDArray[Any], codes: Codes | None
) -> pd.DataFrame:
    """How many rows there are of each cluster, group, label and decision."""
    names = np.where(pd.isna(values), MISSING, values).astype(str)
    if rule.groups and (absent := [group for group in rule.groups if group not in set(names)]):
        raise InvalidInputError(
            f"the fairness of {rule.column!r} lists the groups {absent}, which have no rows; there are "
            f"{sorted(set(names))[:20]}. Check the spelling, or that the window holds them."
        )
    frame = pd.DataFrame(
        {"cluster": 0 if codes is None else codes, "group": names, "label": label, "decided": decided.astype(np.int8)}
    )
    if rule.groups:
        frame = frame[frame["group"].isin(rule.groups)]
    return frame.groupby(["cluster", "group", "label", "decided"], observed=True).size().rename("rows").reset_index()


def _groups(cells: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for name, group in cells.groupby("group"):
        table = {
            (y, d): float(group.loc[(group["label"] == y) & (group["decided"] == d), "rows"].sum())
            for y in (0, 1)
            for d in (0, 1)
        }
        rows = sum(table.values())
        positive, negative = table[1, 0] + table[1, 1], table[0, 0] + table[0, 1]
        found.append(
            {
                "group": str(name),
                "rows": int(rows),
                "positive_rate": positive / rows,
                "selection_rate": (table[0, 1] + table[1, 1]) / rows,
                "true_positive_rate": table[1, 1] / positive if positive else None,
                "false_positive_rate": table[0, 1] / negative if negative else None,
            }
        )
    return found


def _problem(rule: FairnessRule, metric: str, groups: list[dict[str, Any]]) -> str | None:
    """Why nothing can be told, or None."""
    if len(groups) < 2:
        return f"only {len(groups)} group has rows; two are needed"
    if small := [f"{group['group']} has {group['rows']} rows" for group in groups if group["rows"] < rule.min_rows]:
        return f"not enough: {', '.join(small[:5])}; at least {rule.min_rows} a group"
    if metric.startswith(("demographic_parity", "selection_rate", "accuracy", "zero_one")):
        return None
    for rate, kind in (("true_positive_rate", "positive"), ("false_positive_rate", "negative")):
        if lacking := [group["group"] for group in groups if group[rate] is None]:
            return f"not enough: {', '.join(lacking[:5])} has no {kind} rows"
    return None


def _interval(
    function: Callable[..., float], cells: pd.DataFrame, independent: bool, alpha: float, rng: np.random.Generator
) -> tuple[float | None, list[float] | None]:
    counts = cells["rows"].to_numpy(np.float64)
    codes = np.unique(cells["cluster"], return_inverse=True)[1]
    clusters = int(codes.max()) + 1
    groups = cells["group"].nunique()

    def value(weight: Floats) -> float:
        there = weight > 0
        part = cells[there]
        if part["group"].nunique() < groups:
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rates that do not exist in a resample, which is not finite then
            return float(
                function(part["label"], part["decided"], sensitive_features=part["group"], sample_weight=weight[there])
            )

    estimate = value(counts)
    if not math.isfinite(estimate):
        return None, None
    rows = int(counts.sum())
    drawn = np.empty(REPLICATES)
    for i in range(REPLICATES):
        if independent:
            weight = rng.multinomial(rows, counts / rows).astype(np.float64)
        else:
            weight = counts * rng.multinomial(clusters, np.full(clusters, 1 / clusters))[codes]
        drawn[i] = value(weight)
    known = drawn[np.isfinite(drawn)]
    if len(known) < MIN_KNOWN * REPLICATES:
        return estimate, None
    low, high = np.quantile(known, [alpha, 1 - alpha])
    return estimate, [float(low), float(high)]
