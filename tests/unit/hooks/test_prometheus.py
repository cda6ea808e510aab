"""The ``prometheus`` connection: addresses, credentials, what is refused."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
from pathlib import Path

import pytest

import airflow_mlops.hooks.prometheus as module
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.get_provider_info import get_provider_info
from airflow_mlops.hooks.prometheus import PrometheusHook, aevidence_source, evidence_source
from airflow_mlops.rollout.sources import PrometheusSource


@pytest.fixture
def connection(monkeypatch):
    def make(name="PROMETHEUS_DEFAULT", **fields):
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps({"conn_type": "prometheus", **fields}))

    return make


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"host": "prom"}, "http://prom:9090"),
        ({"host": "prom", "port": 80, "schema": "https"}, "https://prom:80"),
        ({"host": "https://prom.example.com"}, "https://prom.example.com"),
        ({"host": "https://prom.example.com/prometheus/"}, "https://prom.example.com/prometheus"),
        ({"host": "http://mimir", "extra": {"path_prefix": "/prometheus"}}, "http://mimir/prometheus"),
        ({"host": "http://prom:9090/api/v1"}, "http://prom:9090"),
        ({"host": "http://[::1]:9090"}, "http://[::1]:9090"),
    ],
)
def test_addresses(connection, fields, url):
    connection(**fields)
    assert PrometheusHook().get_conn().url == url
    assert asyncio.run(PrometheusHook().aget_conn()).url == url


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no host"),
        ({"host": "ftp://prom"}, "no address of a server"),
        ({"host": "http://user:secret@prom"}, "no address of a server"),
        ({"host": "http://prom:0"}, "no address of a server"),
        ({"host": "http://prom?query=up"}, "no address of a server"),
        ({"host": "prom", "extra": {"timeout": "soon"}}, "expected seconds"),
        ({"host": "prom", "extra": {"timeout": 0}}, "expected seconds"),
        ({"host": "prom", "extra": {"headers": "x"}}, "no JSON object"),
        ({"host": "prom", "extra": {"headers": "[1]"}}, "no JSON object"),
        ({"host": "prom", "extra": {"verify": "/nowhere/ca.pem"}}, "no CA can be read"),
    ],
)
def test_what_cannot_be_used_is_explained_without_its_secrets(connection, fields, message):
    connection(**fields)
    with pytest.raises(InvalidInputError, match=message) as raised:
        PrometheusHook().get_conn()
    assert "secret" not in str(raised.value)
    ok, text = PrometheusHook().test_connection()
    assert not ok and re.search(message, text)


def headers(hook=None):
    return (hook or PrometheusHook()).get_conn()._headers


def test_credentials_tenant_and_further_headers(connection):
    connection(host="prom", login="me", password="secret")
    assert headers() == {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
    connection(host="prom", password="token")
    assert headers() == {"Authorization": "Bearer token"}
    connection(host="prom", extra={"org_id": "team-a", "headers": '{"X-Dashboard": "canary"}', "timeout": "2.5"})
    assert headers() == {"X-Scope-OrgID": "team-a", "X-Dashboard": "canary"}
    assert PrometheusHook().get_conn()._timeout == 2.5


def test_certificates_are_checked_unless_told_otherwise(connection):
    import certifi

    for verify, expected in ((None, True), ("", True), ("true", True), (True, True), ("False", False), (False, False)):
        connection(host="prom", extra={"verify": verify})
        assert PrometheusHook().get_conn()._ssl is expected
    connection(host="prom", extra={"verify": certifi.where()})
    assert isinstance(PrometheusHook().get_conn()._ssl, ssl.SSLContext)


def test_without_a_connection_one_on_this_machine_is_meant():
    assert PrometheusHook().get_conn().url == "http://127.0.0.1:9090"
    with pytest.raises(InvalidInputError, match="the connection 'other' does not exist; create one of type prometheus"):
        PrometheusHook("other").get_conn()
    with pytest.raises(InvalidInputError, match="the connection 'other' does not exist"):
        asyncio.run(PrometheusHook("other").aget_conn())


def test_a_source_asks_the_server_of_its_connection(connection):
    connection("METRICS", host="metrics")
    config = {"type": "prometheus", "set": "istio", "conn_id": "metrics"}
    source = evidence_source(config, name="flights", namespace="ml")
    assert isinstance(source, PrometheusSource) and source._api.url == "http://metrics:9090"
    assert asyncio.run(aevidence_source(config, name="flights"))._api.url == "http://metrics:9090"
    assert (
        type(evidence_source(None)).__name__
        == type(asyncio.run(aevidence_source("target"))).__name__
        == "TargetCounters"
    )


def test_the_form_has_the_fields_that_are_read():
    (own,) = (entry for entry in get_provider_info()["connection-types"] if entry["connection-type"] == "prometheus")
    read = set(re.findall(r'extra(?:_dejson)?\.get\("(\w+)"\)|extra\["(\w+)"\]', Path(module.__file__).read_text()))
    assert set(own["conn-fields"]) == {name for pair in read for name in pair if name}
