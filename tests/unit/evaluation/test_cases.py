from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.evaluation import GatePolicy, evaluate
from airflow_mlops.evaluation.cases import DATA_ROWS, cases_of_table, checks, read_cases, run
from airflow_mlops.exceptions import DataError, InvalidInputError


def predict(frame):
    """More wind, more delay; the id does nothing."""
    if missing := {"wind", "id"} - set(frame.columns):
        raise DataError(f"the data lacks {sorted(missing)}")
    return 1 / (1 + np.exp(-(frame["wind"].to_numpy(float) - 10) / 5))


DATA = pd.DataFrame({"wind": np.linspace(0, 30, 3000), "id": np.arange(3000)})
ROW = {"wind": 10, "id": 1}


def outcome(case, data=DATA):
    (found,) = run(read_cases([{"name": "it", **case}]), predict, data)
    return found


@pytest.mark.parametrize(
    ("case", "passed", "found"),
    [
        ({"row": ROW, "expect": {"min": 0.4, "max": 0.6}}, True, "0.5"),
        ({"row": ROW, "expect": {"min": 0.5}}, True, "0.5"),
        ({"row": ROW, "expect": {"max": 0.4}}, False, "0.5"),
        ({"row": ROW, "expect": {"min": 0.6}}, False, "0.5"),
        ({"row": ROW, "change": {"id": 9}, "same_within": 0}, True, "0.5, then 0.5"),
        ({"row": ROW, "change": {"wind": 11}, "same_within": 0.01}, False, "0.5, then 0.5498"),
        ({"row": ROW, "change": {"wind": 11}, "same_within": 0.06}, True, "0.5, then 0.5498"),
        ({"row": ROW, "change": {"wind": {"add": 5}}, "direction": "not_lower"}, True, "0.5, then 0.7311"),
        ({"row": ROW, "change": {"wind": {"add": 5}}, "direction": "not_higher"}, False, "0.5, then 0.7311"),
        ({"row": ROW, "change": {"wind": {"add": 1}}, "direction": "not_higher", "tolerance": 0.05}, True, "0.5, then"),
        ({"change": {"id": 0}, "same_within": 0.0}, True, f"0 of {DATA_ROWS} rows fail, greatest change 0"),
        ({"change": {"wind": {"add": -1}}, "direction": "not_lower"}, False, f"{DATA_ROWS} of {DATA_ROWS} rows fail"),
        ({"expect": {"max": 0.9}, "max_failed": 0.4}, True, "rows fail"),
        ({"expect": {"max": 0.9}, "max_failed": 0.1}, False, "rows fail"),
        ({"row": {"wind": 3}, "expect": {"max": 0.9}}, False, "no answer: the data lacks ['id']"),
        ({"row": {"wind": float("nan"), "id": 1}, "expect": {"max": 1.0}}, False, "no answer: 1 of 1 predictions"),
        ({"row": ROW, "change": {"rain": 1}, "same_within": 0.1}, False, "no answer: the row has no 'rain' to change"),
    ],
)
def test_each_kind_of_case(case, passed, found):
    result = outcome(case)
    assert result["passed"] is passed
    assert result["found"].startswith(found) or found in result["found"]
    assert result["expected"]


def test_a_case_on_data_needs_data():
    assert outcome({"expect": {"max": 0.9}}, DATA[:0])["found"] == "no answer: there are no rows to try it on"


def test_every_failed_case_is_named_in_the_verdict():
    rng = np.random.default_rng(0)
    label, probability = rng.integers(0, 2, 1000), rng.random(1000)
    given = [
        {"name": "calm", "row": ROW, "expect": {"max": 0.1}},
        {"name": "storm", "row": {"wind": 40, "id": 1}, "expect": {"min": 0.9}},
        {"name": "id", "row": ROW, "change": {"wind": {"add": 3}}, "same_within": 0.01},
    ]
    found = run(read_cases(given), predict, DATA)
    verdict = evaluate(label, None, probability, policy=GatePolicy(floors={}), cases=found)
    assert [check.name for check in verdict.checks if not check.passed] == ["case calm", "case id"]
    assert "the same within 0.01 when wind +3" in verdict.reasons[1]
    passed = checks([entry for entry in found if entry["passed"]])
    assert [(check.name, check.passed, check.value) for check in passed] == [("cases", True, "1 of 1 as expected")]
    assert checks([]) == []


def test_a_table_holds_must_pass_rows():
    table = pd.DataFrame(
        {"name": ["calm", "storm"], "wind": [0, 40], "id": [1, 2], "expect_min": [None, 0.9], "expect_max": [0.2, None]}
    )
    assert [entry["passed"] for entry in run(cases_of_table(table), predict, DATA)] == [True, True]
    with pytest.raises(InvalidInputError, match="needs the columns name and expect_min or expect_max"):
        cases_of_table(table.drop(columns="name"))
    with pytest.raises(InvalidInputError, match="the case 'calm': says nothing"):
        cases_of_table(table.assign(expect_max=np.nan))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("storm", "case 1 is 'storm'"),
        ({"row": ROW}, "says nothing or too much"),
        ({"row": ROW, "expect": {"min": 0.1}, "same_within": 0.1}, "says nothing or too much"),
        ({"row": ROW, "direction": "not_lower"}, "need a change"),
        ({"row": ROW, "expect": {"min": 0.1}, "change": {"id": 1}}, "expect has none"),
        ({"row": ROW, "change": {"id": 1}, "direction": "up"}, "direction is 'up'"),
        ({"row": ROW, "change": {"id": {"times": 2}}, "same_within": 0.1}, "changes id to"),
        ({"row": ROW, "expect": {"at_least": 0.1}}, "expect is a mapping of min and max"),
        ({"row": ROW, "expect": {"min": 0.6, "max": 0.2}}, "min at most max"),
        ({"row": ROW, "expect": {"min": "much"}}, "could not convert"),
        ({"row": [1, 2], "expect": {"min": 0.1}}, "expected features by name"),
        ({"rows": 3, "expect": {"min": 0.1}}, r"has no \['rows'\]"),
    ],
)
def test_a_case_that_says_nothing_is_refused(case, message):
    with pytest.raises(InvalidInputError, match=message):
        read_cases([case])


def test_names_are_told_apart():
    case = {"row": ROW, "expect": {"min": 0.1}}
    assert [entry.name for entry in read_cases([case, case])] == ["case 1", "case 2"]
    with pytest.raises(InvalidInputError, match=r"have the names \['x'\]"):
        read_cases([{**case, "name": "x"}, {**case, "name": "x"}])
