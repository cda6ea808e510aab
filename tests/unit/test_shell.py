"""What the operators share: arguments as templates leave them, and results pushed before an exception."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.shell import (
    as_mapping,
    as_names,
    is_blank,
    log_table,
    permanent_errors_fail,
    push_result,
    require,
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"multiple_outputs": True}, {"verdict": "harm", "columns": ["a"], "return_value": "all"}),
        ({"multiple_outputs": False}, {"return_value": "all"}),
        ({"multiple_outputs": True, "do_xcom_push": False}, {}),
    ],
)
def test_a_pushed_result_is_what_a_returned_one_leaves(settings, expected):
    result, pushed = {"verdict": "harm", "columns": ["a"]}, {}
    context = {"ti": SimpleNamespace(xcom_push=lambda key, value: pushed.update({key: value}))}
    push_result(BaseOperator(task_id="t", **settings), context, result)
    assert pushed == {key: result if value == "all" else value for key, value in expected.items()}


@pytest.mark.parametrize("value", [None, "", "  ", "None"])
def test_blank_is_what_templates_render_for_nothing(value):
    assert is_blank(value) and as_names(value, "names") == [] and as_mapping(value, "mapping") == {}
    with pytest.raises(InvalidInputError, match="empty after templating: path="):
        require(uri="x", path=value)


def test_zero_and_false_are_not_blank():
    assert not is_blank(0) and not is_blank(False)


@pytest.mark.parametrize("value", [["a", "b"], ("a", "b"), "['a', 'b']", '["a", "b"]', "('a', 'b')"])
def test_names_as_list_or_text(value):
    assert as_names(value, "names") == ["a", "b"]


@pytest.mark.parametrize("value", [{"a": 1}, "{'a': 1}", '{"a": 1}'])
def test_a_mapping_as_such_or_text(value):
    assert as_mapping(value, "mapping") == {"a": 1}


@pytest.mark.parametrize("value", ["harm", "{'a': 1}", 3])
def test_what_is_no_list_of_names_is_named(value):
    with pytest.raises(InvalidInputError, match=r"retrain_on is .*expected a list"):
        as_names(value, "retrain_on")


def test_text_is_never_run():
    with pytest.raises(InvalidInputError, match="expected a dict"):
        as_mapping("__import__('os').environ", "policy")


def test_only_errors_that_no_retry_mends_fail_at_once():
    with pytest.raises(AirflowFailException, match="wrong"), permanent_errors_fail():
        raise InvalidInputError("wrong")
    with pytest.raises(ExternalSystemError), permanent_errors_fail():
        raise ExternalSystemError("down")


def test_a_table_is_aligned():
    assert log_table(["a", "long"], [["value", 1], ["b", 22]]).splitlines() == [
        "a      long",
        "-----  ----",
        "value  1",
        "b      22",
    ]
