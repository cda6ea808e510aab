"""Sources from small JSON."""

from __future__ import annotations

import json

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.sources import PrometheusSource, TargetCounters, source_of
from airflow_mlops.rollout.sources.config import connection_of
from airflow_mlops.rollout.sources.prediction_log import PredictionLogSource
from airflow_mlops.rollout.sources.prometheus_api import PrometheusApi
from airflow_mlops.rollout.sources.query_sets import QUERY_SETS

API = PrometheusApi("http://127.0.0.1:9090")


@pytest.mark.parametrize("config", [None, "target", {"type": "target"}])
async def test_the_target_counts_itself_unless_told_otherwise(config, target):
    source = source_of(config, name="flights", metrics=["errors"])
    assert isinstance(source, TargetCounters) and connection_of(config) is None
    counters = {arm: {"": {"counts": {"requests": n}}} for arm, n in (("stable", 9), ("canary", 1))}
    state = target(counters=counters, routed=(9, 1), boot="b", shadow=True)
    seen = await source.observe(state, 0.0)
    assert (seen.time, seen.boot, seen.epoch, seen.weight) == (state.time, "b", "1", 10.0)
    assert (seen.stable, seen.canary, seen.routed) == (counters["stable"], counters["canary"], (9, 1))
    assert seen.shadow and seen.problem is None
    assert "name a source of evidence" in (await source.observe(target(), 0.0)).problem
    assert (await source.observe(target(problem="refused"), 0.0)).problem == "refused"
    await source.check(target(), 0.0)


@pytest.mark.parametrize("name", QUERY_SETS)
def test_a_query_set_by_its_name_alone(name):
    assert connection_of(name) == "prometheus_default"
    source = source_of(name, name="flights", namespace="ml", prometheus=API, metrics=["latency"])
    assert isinstance(source, PrometheusSource) and set(source.metrics) == {"requests", "latency"}


def test_every_option_arrives():
    config = {
        "type": "prometheus",
        "set": "istio",
        "conn_id": "metrics",
        "queries": {"timeouts": 'istio_requests_total{response_flags="UT",destination_workload="{workload}"}'},
        "namespace": "own",
        "workload": {"stable": "a", "canary": "b"},
        "labels": {"reporter": "source"},
        "max_age": 30,
        "delay": 2,
        "settle": 3,
    }
    assert connection_of(config) == "metrics"
    source = source_of(json.loads(json.dumps(config)), name="flights", namespace="ml", prometheus=API)
    assert set(source.metrics) == {"requests", "errors", "latency", "timeouts"}
    assert (source._namespace, source._max_age, source._delay, source._settle) == ("own", 30, 2, 3)
    assert source._labels == {"reporter": "source"} and source._name == "flights" and source._api is API
    assert config["type"] == "prometheus"


def test_a_url_needs_no_connection():
    config = {"type": "prometheus", "set": "route", "url": "http://prom:9090/", "timeout": 3}
    assert connection_of(config) is None
    assert source_of(config)._api.url == "http://prom:9090"


def test_a_prediction_log():
    config = {"type": "prediction_log", "path": "/data/log", "columns": {"version": "v"}, "delay": 5}
    source = source_of(config, name="flights", namespace="ml", metrics=["errors"])
    assert isinstance(source, PredictionLogSource) and connection_of(config) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("linkerd", "expected a dictionary with type target, prometheus, prediction_log, or the name of a query set"),
        ({}, "expected a dictionary with type"),
        ({"type": "datadog"}, "expected a dictionary with type"),
        ({"type": "target", "set": "istio"}, "unknown options set; expected none"),
        ({"type": "prometheus", "set": "istio", "interval": 5}, "unknown options interval; expected arm_label, delay"),
        ({"type": "prometheus", "set": "linkerd"}, "query set 'linkerd' is unknown"),
        ({"type": "prometheus"}, "no counter 'requests'"),
        ({"type": "prometheus", "set": "kserve", "metrics": ["errors"]}, "no query is known for the metric errors"),
        ({"type": "prediction_log"}, "cannot be made of.*path"),
        ({"type": "prediction_log", "path": "x", "colums": {}}, "unknown options colums"),
    ],
)
def test_what_is_wrong_is_said(config, message):
    with pytest.raises(InvalidInputError, match=message):
        source_of(config, prometheus=API)


def test_without_a_server_it_says_so():
    with pytest.raises(InvalidInputError, match="no Prometheus is known"):
        source_of("istio")
