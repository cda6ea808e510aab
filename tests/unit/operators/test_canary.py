"""What the operator checks before it touches anything, and what it makes of a verdict."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, TaskDeferred

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.hooks.ray_serve import RayServeHook
from airflow_mlops.operators.canary import CanaryPromoteOperator

PUSHED = {}
CONTEXT = {
    "ti": SimpleNamespace(
        id="0198",
        dag_id="d",
        task_id="t",
        run_id="r",
        map_index=-1,
        try_number=3,
        xcom_push=lambda key, value: PUSHED.update({key: value}),
    )
}


def operator(**options):
    settings = {
        "task_id": "canary",
        "model_name": "flights",
        "version": "2",
        "model_uri": "/models/2",
        "stable_version": "1",
        "stable_uri": "/models/1",
    }
    return CanaryPromoteOperator(**{**settings, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "None"}, "version of the rollout is empty"),
        ({"stable_uri": ""}, "give both, or neither"),
        ({"policy": {"steps": [50, 10]}}, "rise"),
        ({"policy": "steps 10, 100"}, "as JSON"),
        ({"policy": '{"steps": [50, 10]}'}, "rise"),
        ({"guardrails": ["qps"]}, "not a guardrail|unknown metric"),
        ({"on_rollback": "ignore"}, "on_rollback"),
        ({"ttl": 5, "poll_interval": 5}, "at least three looks"),
        ({"route": "a/b"}, "route"),
        ({"ray_conn_id": "nowhere"}, "does not exist"),
    ],
)
def test_bad_input_fails_without_retry_and_names_the_fix(options, message):
    with pytest.raises(AirflowFailException, match=message):
        operator(**options).execute(CONTEXT)


def test_construction_validates_nothing_and_templates_render():
    made = operator(version="{{ params.version }}", policy="{{ params.policy }}", ttl=0)
    assert {"version", "model_uri", "stable_version", "policy", "guardrails"} <= set(made.template_fields)


def test_an_unreachable_ray_is_worth_a_retry(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", "host": "http://127.0.0.1:9"}))
    with pytest.raises(ExternalSystemError, match="Is Ray running there"):
        operator().execute(CONTEXT)


def test_deferring_hands_everything_to_the_trigger():
    with pytest.raises(TaskDeferred) as deferred:
        operator(deferrable=True, policy={"steps": [5, 100]}, mlflow_tracking_uri="http://mlflow").execute(CONTEXT)
    _, arguments = deferred.value.trigger.serialize()
    arguments = json.loads(json.dumps(arguments, allow_nan=False))
    assert (arguments["spec"]["owner"], arguments["spec"]["attempt"]) == ("d/t/r/-1", 3)
    assert arguments["spec"]["policy"]["steps"] == [5, 100]
    assert [guard["name"] for guard in arguments["spec"]["guardrails"]] == ["errors", "latency"]
    assert arguments["place"]["target"]["kind"] == "ray_serve" and arguments["finishing"] is True
    assert arguments["place"]["target"]["runtime_env"] == {"env_vars": {"MLFLOW_TRACKING_URI": "http://mlflow"}}


def test_what_becomes_of_a_verdict():
    rollback = {"verdict": "ROLLBACK", "version": "2", "model": "flights", "reasons": ["errors: the canary is worse"]}
    event = {"status": "done", "result": rollback}
    with pytest.raises(AirflowFailException, match="rolled back: errors"):
        operator().execute_complete(CONTEXT, event)
    assert PUSHED["return_value"] == rollback
    PUSHED.clear()
    with pytest.raises(AirflowSkipException, match="rolled back: errors"):
        operator(on_rollback="skip").execute_complete(CONTEXT, event)
    # A rollback that skips is still on record, whole and by key.
    assert {"return_value": rollback, **rollback} == PUSHED
    assert operator(on_rollback="return").execute_complete(CONTEXT, event) == rollback
    with pytest.raises(ExternalSystemError, match="gone"):
        operator().execute_complete(CONTEXT, {"status": "error", "error": "gone", "retryable": True})
    with pytest.raises(AirflowFailException, match="held"):
        operator().execute_complete(CONTEXT, {"status": "error", "error": "held", "retryable": False})


def test_what_the_trigger_failed_of_is_told_though_mlflow_is_down(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    kept = {}
    store = SimpleNamespace(get=kept.get, set=kept.__setitem__)
    event = {"status": "error", "error": "held", "retryable": False, "kept": {"id": "r"}}
    made = operator(model_uri="models:/flights/2", mlflow_tracking_uri="http://127.0.0.1:9")
    with pytest.raises(AirflowFailException, match="held"):
        made.execute_complete({**CONTEXT, "task_state_store": store}, event)
    assert list(kept.values()) == [{"id": "r"}]


@pytest.mark.parametrize(
    ("connection", "dashboard", "serve"),
    [
        ({"host": "http://ray:8265"}, "http://ray:8265", "http://ray:8000"),
        ({"host": "ray", "port": 8300}, "http://ray:8300", "http://ray:8000"),
        ({"host": "https://ray"}, "https://ray", "http://ray:8000"),
        ({"host": "ray", "extra": {"serve_url": "http://serve:80"}}, "http://ray:8265", "http://serve:80"),
    ],
)
def test_the_connection_gives_both_addresses(monkeypatch, connection, dashboard, serve):
    value = json.dumps({"conn_type": "ray", "password": "secret", **connection})
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", value)
    client = RayServeHook().get_conn()
    assert (client.dashboard_url, client.serve_url, client.token) == (dashboard, serve, "secret")
    assert RayServeHook(serve_url="http://other:1").get_conn().serve_url == "http://other:1"


def test_without_a_connection_a_ray_on_this_machine_is_meant(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "local token")
    client = RayServeHook().get_conn()
    assert (client.dashboard_url, client.serve_url) == ("http://127.0.0.1:8265", "http://127.0.0.1:8000")
    assert client.token == "local token"


def test_a_connection_of_another_kind_is_refused(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", "host": "ray://head:10001"}))
    with pytest.raises(InvalidInputError, match="expected http://host:port"):
        RayServeHook().get_conn()
