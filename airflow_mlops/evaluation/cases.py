"""Rows on which a model must behave: behavioural tests, after CheckList (Ribeiro et al., ACL 2020).

    {"name": "a quiet day", "row": {"wind": 2, "hour": 10}, "expect": {"max": 0.3}}
    {"name": "the id means nothing", "change": {"id": 0}, "same_within": 0.01}
    {"name": "more wind, more delay", "row": {"wind": 2, "hour": 10}, "change": {"wind": {"add": 20}},
     "direction": "not_lower", "tolerance": 0.01}

A case without ``row`` is tried on rows of the held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from airflow_mlops.evaluation.metrics import Floats, check_probability
from airflow_mlops.evaluation.verdict import Check
from airflow_mlops.exceptions import InvalidInputError

KEYS = ("name", "row", "expect", "change", "same_within", "direction", "tolerance", "max_failed")
DIRECTIONS = ("not_lower", "not_higher")
#: Rows of the held-out data that a case without a row of its own is tried on.
DATA_ROWS = 1000


@dataclass(frozen=True)
class Case:
    """One requirement on predictions.

    :param name: shown when it fails
    :param row: features of one row; None for rows of the held-out data
    :param low: least probability, for a case that expects one
    :param high: greatest probability
    :param change: column to its new value, or ``{"add": number}``; empty for a case that expects a probability
    :param direction: ``"same"``, ``"not_lower"`` or ``"not_higher"`` after the change
    :param tolerance: probability by which that may be missed
    :param max_failed: share of the rows that may fail, for a case on the held-out data
    """

    name: str
    row: Mapping[str, Any] | None
    low: float
    high: float
    change: Mapping[str, Any]
    direction: str
    tolerance: float
    max_failed: float


def read_cases(value: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Cases from mappings.

    :raises InvalidInputError: one that says nothing, or something that is not understood; names it
    """
    cases = []
    for number, given in enumerate(value, 1):
        if not isinstance(given, Mapping):
            raise InvalidInputError(f"case {number} is {given!r:.100}; expected a mapping with {KEYS}")
        name = str(given.get("name") or f"case {number}")
        try:
            cases.append(_case(name, given))
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"the case {name!r}: {error}") from error
    if twice := sorted({case.name for case in cases if sum(other.name == case.name for other in cases) > 1}):
        raise InvalidInputError(f"several cases have the names {twice[:5]}; a failed one could not be told")
    return cases


def cases_of_table(frame: pd.DataFrame) -> list[Case]:
    """Must-pass rows of a table: ``name``, ``expect_min`` and ``expect_max`` (either may be missing), features.

    :raises InvalidInputError: a column is lacking, or a row expects nothing
    """
    if "name" not in frame.columns or not {"expect_min", "expect_max"} & set(frame.columns):
        raise InvalidInputError(
            f"a table of cases needs the columns name and expect_min or expect_max; it has {list(frame.columns)[:20]}"
        )
    given = []
    for row in frame.to_dict("records"):
        expect = {
            key: row[f"expect_{key}"] for key in ("min", "max") if not pd.isna(row.get(f"expect_{key}", math.nan))
        }
        features = {key: value for key, value in row.items() if key not in ("name", "expect_min", "expect_max")}
        given.append({"name": row["name"], "row": features, "expect": expect})
    return read_cases(given)


def _case(name: str, given: Mapping[str, Any]) -> Case:
    if unknown := set(given) - set(KEYS):
        raise ValueError(f"has no {sorted(unknown)}; expected some of {KEYS}")
    row, change, expect = given.get("row"), given.get("change") or {}, given.get("expect") or {}
    if row is not None and not (isinstance(row, Mapping) and row):
        raise ValueError(f"row is {row!r:.100}; expected features by name")
    if not isinstance(change, Mapping) or not isinstance(expect, Mapping) or set(expect) - {"min", "max"}:
        raise ValueError("expect is a mapping of min and max, change one of columns to values")
    for column, value in change.items():
        if isinstance(value, Mapping) and set(value) != {"add"}:
            raise ValueError(f"changes {column} to {dict(value)}; expected a value, or {{'add': number}}")
    change = {c: {"add": float(v["add"])} if isinstance(v, Mapping) else v for c, v in change.items()}
    same, direction = given.get("same_within"), given.get("direction")
    if given.get("tolerance") is not None and direction is None:
        raise ValueError("tolerance goes with direction; same_within and expect have limits of their own")
    said = [bool(expect), same is not None, direction is not None]
    if sum(said) != 1:
        raise ValueError("says nothing or too much; give one of expect, same_within and direction")
    if bool(change) == bool(expect):
        raise ValueError("same_within and direction need a change, expect has none")
    if direction is not None and direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; expected one of {DIRECTIONS}")
    low, high = float(expect.get("min", 0.0)), float(expect.get("max", 1.0))
    tolerance = float(same if same is not None else given.get("tolerance", 0.0))
    failed = float(given.get("max_failed", 0.0))
    if not (0 <= low <= high <= 1 and 0 <= tolerance < 1 and 0 <= failed < 1):
        raise ValueError("probabilities, tolerances and shares are from 0 to 1, min at most max")
    return Case(name, row, low, high, dict(change), direction or "same", tolerance, failed)


def run(
    cases: Sequence[Case], predict: Callable[[pd.DataFrame], Floats], data: pd.DataFrame, seed: int = 0
) -> list[dict[str, Any]]:
    """Try every case.

    :param predict: a frame to the probability of each row, shape (n,)
    :param data: the held-out rows, for cases without a row; :data:`DATA_ROWS` of them are drawn
    :return: for each case ``name``, ``passed``, ``found``, ``expected``; one that the model cannot answer fails
    """
    sample = data
    if len(data) > DATA_ROWS:
        sample = data.iloc[np.sort(np.random.default_rng(seed).choice(len(data), DATA_ROWS, replace=False))]
    return [_run(case, predict, sample) for case in cases]


def _run(case: Case, predict: Callable[[pd.DataFrame], Floats], sample: pd.DataFrame) -> dict[str, Any]:
    expected = _expected(case)
    try:
        frame = sample if case.row is None else pd.DataFrame([dict(case.row)])
        if not len(frame):
            raise InvalidInputError("there are no rows to try it on")
        before = check_probability(predict(frame), len(frame), "model")
        after = check_probability(predict(_changed(frame, case.change)), len(frame), "model") if case.change else before
    except Exception as error:  # whatever the model raises, it does not behave
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return {"name": case.name, "passed": False, "found": f"no answer: {reason[0][:200]}", "expected": expected}
    # Comparisons are by float32, which is what most models answer with.
    slack = case.tolerance + 1e-6
    if not case.change:
        bad = ~((before >= case.low - 1e-6) & (before <= case.high + 1e-6))
    elif case.direction == "same":
        bad = ~(np.abs(after - before) <= slack)
    else:
        bad = ~((after - before if case.direction == "not_lower" else before - after) >= -slack)
    passed = bool(bad.mean() <= case.max_failed)
    return {"name": case.name, "passed": passed, "found": _found(case, before, after, bad), "expected": expected}


def _changed(frame: pd.DataFrame, change: Mapping[str, Any]) -> pd.DataFrame:
    columns = {}
    for name, value in change.items():
        if name not in frame.columns:
            raise InvalidInputError(f"the row has no {name!r} to change")
        columns[name] = frame[name] + value["add"] if isinstance(value, Mapping) else value
    return frame.assign(**columns)


def _expected(case: Case) -> str:
    if not case.change:
        return f"{case.low:g} to {case.high:g}"
    change = ", ".join(
        f"{name} {value['add']:+g}" if isinstance(value, Mapping) else f"{name}={value}"
        for name, value in case.change.items()
    )
    if case.direction == "same":
        return f"the same within {case.tolerance:g} when {change}"
    return f"{case.direction.replace('_', ' ')} when {change}" + (f", {case.tolerance:g} off" if case.tolerance else "")


def _found(case: Case, before: Floats, after: Floats, bad: Any) -> str:
    if len(before) > 1:
        step = float(np.abs(after - before).max()) if case.change else 0.0
        change = f", greatest change {step:.4g}" if case.change else ""
        return f"{int(bad.sum())} of {len(before)} rows fail{change}"
    return f"{before[0]:.4g}" + (f", then {after[0]:.4g}" if case.change else "")


def checks(found: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Every failed case by name, or one check that all passed."""
    failed = [entry for entry in found if not entry["passed"]]
    if found and not failed:
        return [Check("cases", True, f"{len(found)} of {len(found)} as expected", "every case")]
    return [Check(f"case {entry['name']}", False, entry["found"], entry["expected"]) for entry in failed]
