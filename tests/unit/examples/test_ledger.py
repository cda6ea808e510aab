from __future__ import annotations

import pytest

from airflow_mlops.examples.flights import ledger
from airflow_mlops.exceptions import InvalidInputError


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
    for done in ("2013-03", "2013-04", "2013-05"):
        ledger.finish(str(tmp_path), done, {})
    for past in ("2013-02", "2013-03", "2013-04"):
        with pytest.raises(InvalidInputError, match=f"{past} comes before 2013-05"):
            ledger.begin(str(tmp_path), past, "1")


def test_a_gap_is_refused_and_names_the_months_to_run(tmp_path):
    ledger.finish(str(tmp_path), "2013-04", {})
    with pytest.raises(InvalidInputError, match="2013-05, 2013-06 has not run"):
        ledger.begin(str(tmp_path), "2013-07", "1")
    assert ledger.finished_months(str(tmp_path)) == ["2013-04"]


def test_a_month_that_did_not_come_to_its_end_is_not_passed_over(tmp_path):
    root = str(tmp_path)
    ledger.begin(root, "2013-03", None)
    with pytest.raises(InvalidInputError, match=r"2013-04 cannot run yet: 2013-03 was begun.*Clear its failed tasks"):
        ledger.begin(root, "2013-04", "1")
    assert ledger.begin(root, "2013-03", "1") is None
    ledger.finish(root, "2013-03", {})
    assert ledger.begin(root, "2013-04", "1") == "1"
