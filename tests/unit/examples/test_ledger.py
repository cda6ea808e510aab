from __future__ import annotations

import pytest

from airflow_mlops.examples.flights import ledger
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.windows import Window, parse_instant


def window(start: str, end: str) -> Window:
    return Window(parse_instant(start), parse_instant(end))


def test_months_are_named_by_their_window():
    assert ledger.month_of(window("2013-12-01", "2014-01-01")) == "2013-12"
    assert ledger.months_between("2012-11", "2013-02") == ["2012-11", "2012-12", "2013-01", "2013-02"]


@pytest.mark.parametrize(
    "start, end", [("2013-04-01", "2013-04-15"), ("2013-04-02", "2013-05-01"), ("2013-04-01", "2013-06-01")]
)
def test_a_window_that_is_no_month_is_refused(start, end):
    with pytest.raises(InvalidInputError, match="one calendar month"):
        ledger.month_of(window(start, end))


def test_months_run_in_order_and_the_newest_may_run_again(tmp_path):
    root = str(tmp_path)
    assert ledger.begin(root, "2013-03", None) is None
    ledger.finish(root, "2013-03", {})
    assert ledger.begin(root, "2013-04", "1") == "1"
    ledger.finish(root, "2013-04", {})
    assert ledger.finished_months(root) == ["2013-03", "2013-04"]
    # The alias has moved since: a cleared run judges against the champion it met the first time.
    assert ledger.begin(root, "2013-04", "2") == "1"


def test_a_month_of_the_past_is_refused(tmp_path):
    ledger.finish(str(tmp_path), "2013-07", {})
    with pytest.raises(InvalidInputError, match="2013-04 comes before 2013-07"):
        ledger.begin(str(tmp_path), "2013-04", "1")


def test_a_gap_is_refused_and_names_the_months_to_run(tmp_path):
    ledger.finish(str(tmp_path), "2013-04", {})
    with pytest.raises(InvalidInputError, match="2013-05, 2013-06 has not run"):
        ledger.begin(str(tmp_path), "2013-07", "1")
    assert ledger.finished_months(str(tmp_path)) == ["2013-04"]
