"""Calendar months and the windows they are."""

from __future__ import annotations

import pytest

from airflow_mlops.examples.flights.months import month_of, months_before, months_between, window_of
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.windows import Window, parse_instant


def window(start: str, end: str) -> Window:
    return Window(parse_instant(start), parse_instant(end))


def test_months_are_named_by_their_window():
    assert month_of(window("2013-12-01", "2014-01-01")) == "2013-12"
    assert months_between("2012-11", "2013-02") == ["2012-11", "2012-12", "2013-01", "2013-02"]


@pytest.mark.parametrize(
    "start, end", [("2013-04-01", "2013-04-15"), ("2013-04-02", "2013-05-01"), ("2013-04-01", "2013-06-01")]
)
def test_a_window_that_is_no_month_is_refused(start, end):
    with pytest.raises(InvalidInputError, match="one calendar month"):
        month_of(window(start, end))


def test_a_year_of_windows_has_no_gap():
    windows = [window_of(month) for month in months_between("2012-12", "2014-01")]
    assert [w.end for w in windows[:-1]] == [w.start for w in windows[1:]]
    assert [month_of(w) for w in windows] == months_between("2012-12", "2014-01")


def test_months_between_that_lie_in_wrong_order_are_none():
    assert months_between("2013-05", "2013-04") == []


def test_months_before():
    assert months_before("2013-04", 2, "2013-01") == ["2013-02", "2013-03"]
    assert months_before("2013-02", 2, "2013-01") == ["2013-01"]
    assert months_before("2013-01", 2, "2013-01") == []
    assert months_before("2013-04", 0, "2013-01") == []
    assert months_before("2013-01", 1, "2012-01") == ["2012-12"]
