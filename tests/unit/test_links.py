"""Links made from XCom alone."""

from __future__ import annotations

import pytest

from airflow_mlops.links import RolloutReportLink


@pytest.mark.parametrize(
    ("store", "link"),
    [
        ({}, ""),
        ({"return_value": None}, ""),
        ({"return_value": {"html_uri": None, "mlflow_url": None}}, ""),
        ({"return_value": {"html_uri": "/reports/r.html"}}, "file:///reports/r.html"),
        ({"return_value": {"mlflow_url": "http://mlflow/#/r/1"}}, "http://mlflow/#/r/1/artifacts/rollout.html"),
        ({"return_value": {"html_uri": "http://a/r.html", "mlflow_url": "http://mlflow/#/r/1"}}, "http://a/r.html"),
        (
            {"return_value": {"html_uri": "s3://a/r.html", "mlflow_url": "http://mlflow/#/r/1"}},
            "http://mlflow/#/r/1/artifacts/rollout.html",
        ),
        ({"return_value": {"html_uri": "s3://a/r.html"}}, "s3://a/r.html"),
    ],
)
def test_a_rollouts_report_is_linked_from_what_the_task_has_pushed(monkeypatch, store, link):
    monkeypatch.setattr("airflow_mlops.links.XCom.get_value", lambda *, ti_key, key: store.get(key))
    assert RolloutReportLink().get_link(None, ti_key=None) == link
