"""Whether the groups of a column are treated alike: fairlearn's metrics, with intervals that know of clusters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from airflow_mlops.evaluation.metrics import Floats
from airflow_mlops.evaluation.paired import Codes
from airflow_mlops.evaluation.rules import FairnessRule
from airflow_mlops.evaluation.verdict import Check
from airflow_mlops.exceptions import InvalidInputError

REPLICATES = 1000
#: For a rate the rows it counts and among which, by label and decision: [[0 0, 0 1], [1 0, 1 1]].
RATES = {
    "selection_rate": ([[0, 1], [0, 1]], [[1, 1], [1, 1]]),
    "true_positive_rate": ([[0, 0], [0, 1]], [[0, 0], [1, 1]]),
    "false_negative_rate": ([[0, 0], [1, 0]], [[0, 0], [1, 1]]),
    "false_positive_rate": ([[0, 1], [0, 0]], [[1, 1], [0, 0]]),
    "true_negative_rate": ([[1, 0], [0, 0]], [[1, 1], [0, 0]]),
    "accuracy_score": ([[1, 0], [0, 1]], [[1, 1], [1, 1]]),
    "zero_one_loss": ([[0, 1], [1, 0]], [[1, 1], [1, 1]]),
}
#: fairlearn's metrics without ``_difference`` or ``_ratio``, and the rates that they compare; the worst counts.
METRICS = {
    "demographic_parity": ("selection_rate",),
    "equal_opportunity": ("true_positive_rate",),
    "equalized_odds": ("true_positive_rate", "false_positive_rate"),
    **{rate: (rate,) for rate in RATES},
}
#: Share of resamples that a metric must exist on for its interval to be known.
MIN_KNOWN = 0.9
#: Of fewer clusters a bootstrap tells nothing: that of one has no width.
MIN_CLUSTERS = 5
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

    The estimate is fairlearn's; the resamples are the same rates, of all of them at once. Rows enter as counts of
    cluster, group, label and decision.

    :param rules: of the policy
    :param label: shape (n,), 0 or 1
    :param probability: shape (n,), the challenger's; decided at ``threshold``
    :param columns: for each rule's column the value of each row, shape (n,)
    :param codes: shape (n,), clusters as 0, 1, ...; None for independent rows
    :param alpha: on either side of the interval
    :return: a mapping for each metric: ``column``, ``metric``, ``estimate``, ``interval`` (both None where they do not
        exist), ``limit``, ``at_least``, ``require``, ``problem`` (why it cannot be told, or None), ``groups`` (for each
        ``group``, ``rows``, ``positive_rate``, ``selection_rate``, ``true_positive_rate``, ``false_positive_rate``)
    :raises InvalidInputError: fairlearn is missing, an unknown metric, a column that was not given, a group
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
        _check_metrics(rule)
        cells = _cells(rule, label, probability >= threshold, values, codes)
        groups = _groups(cells)
        for name, limit in rule.metrics.items():
            problem = _problem(rule, name, groups)
            estimate, interval = None, None
            if problem is None:
                found_here = _estimate(name, cells)
                if np.isfinite(found_here):
                    estimate, interval = found_here, _interval(name, cells, codes is None, alpha, rng)
                else:
                    problem = f"{name} does not exist on these rows"
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


def _check_metrics(rule: FairnessRule) -> None:
    if find_spec("fairlearn") is None:
        raise InvalidInputError("fairness by group needs fairlearn: pip install 'airflow-mlops[fairness]'")
    known = [f"{metric}_{kind}" for metric in METRICS for kind in ("difference", "ratio")]
    if unknown := [name for name in rule.metrics if name not in known]:
        raise InvalidInputError(f"the fairness of {rule.column!r} names {unknown}; expected some of {known}")


def _cells(
    rule: FairnessRule, label: Any, decided: npt.NDArray[np.bool_], values: npt.NDArray[Any], codes: Codes | None
) -> pd.DataFrame:
    """How many rows there are of each cluster, group, label and decision."""
    names = np.where(pd.isna(values), MISSING, values).astype(str)
    if rule.groups and (absent := [group for group in rule.groups if group not in set(names)]):
        raise InvalidInputError(
            f"the fairness of {rule.column!r} lists the groups {absent}, which have no rows; there are "
            f"{sorted(set(names.tolist()))[:20]}. Check the spelling, or that the window holds them."
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
    rates = METRICS[metric.rpartition("_")[0]]
    for rate, kind, needed in (
        ("true_positive_rate", "positive", {"true_positive_rate", "false_negative_rate"}),
        ("false_positive_rate", "negative", {"false_positive_rate", "true_negative_rate"}),
    ):
        if needed & set(rates) and (lacking := [group["group"] for group in groups if group[rate] is None]):
            return f"not enough: {', '.join(lacking[:5])} has no {kind} rows"
    return None


def _estimate(name: str, cells: pd.DataFrame) -> float:
    """The metric on these rows, by fairlearn."""
    import fairlearn.metrics as library

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rates that do not exist, which is not finite then
        given = {"sensitive_features": cells["group"], "sample_weight": cells["rows"]}
        return float(getattr(library, name)(cells["label"], cells["decided"], **given))


def _interval(
    name: str, cells: pd.DataFrame, independent: bool, alpha: float, rng: np.random.Generator
) -> list[float] | None:
    """Percentiles of a bootstrap; None where the metric exists on too few resamples."""
    counts = cells["rows"].to_numpy(np.float64)
    if independent:
        drawn = rng.multinomial(int(counts.sum()), counts / counts.sum(), size=REPLICATES).astype(np.float64)
    else:
        codes = np.unique(cells["cluster"], return_inverse=True)[1]
        clusters = int(codes.max()) + 1
        if clusters < MIN_CLUSTERS:
            return None
        drawn = counts * rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=REPLICATES)[:, codes]
    groups = pd.factorize(cells["group"])[0]
    place = (groups * 2 + cells["label"].to_numpy(np.int64)) * 2 + cells["decided"].to_numpy(np.int64)
    where = np.zeros((len(cells), 4 * (groups.max() + 1)))
    where[np.arange(len(cells)), place] = 1
    found = by_tables(name, (drawn @ where).reshape(REPLICATES, -1, 2, 2))
    known = found[np.isfinite(found)]
    if len(known) < MIN_KNOWN * REPLICATES:
        return None
    low, high = np.quantile(known, [alpha, 1 - alpha])
    return [float(low), float(high)]


def by_tables(name: str, tables: Floats) -> Floats:
    """The metric ``name`` of many resamples at once; NaN where it does not exist.

    :param tables: shape (resamples, groups, 2, 2): rows by label and decision
    :return: shape (resamples,)
    """
    metric, _, kind = name.rpartition("_")
    found = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for rate in METRICS[metric]:
            wanted, among = RATES[rate]
            values = (tables * wanted).sum(axis=(2, 3)) / (tables * among).sum(axis=(2, 3))
            low, high = values.min(axis=1), values.max(axis=1)
            found.append(high - low if kind == "difference" else low / high)
    return np.max(found, axis=0) if kind == "difference" else np.min(found, axis=0)
