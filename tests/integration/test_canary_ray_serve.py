"""Rollouts on a real Ray Serve under real HTTP traffic: promoted, rolled back, refused, resumed, abandoned."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import shutil
import threading
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, TaskDeferred

from airflow_mlops.hooks.ray_serve import RayServeHook
from airflow_mlops.operators.canary import CanaryPromoteOperator
from airflow_mlops.rollout.replay import frame_rows, replay, rollout_begun, rollout_settled
from airflow_mlops.triggers.canary import CanaryTrigger

pytestmark = pytest.mark.ray

# A slow machine needs a late deadline, and no test may fail because the judge errs once in twenty rollouts.
POLICY = {"steps": [20, 50, 100], "deadline_seconds": 300, "alpha": 0.01}
FEATURES = ["f0", "f1", "f2", "f3"]
SCRIPT = """
import time, mlflow
class Model(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        {body}
        return 1 / (1 + 2.718281828 ** -(model_input["f0"] + model_input["f1"]).to_numpy())
mlflow.models.set_model(Model())
"""


def make_frame(rows, seed):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(rows, 4)), columns=FEATURES)
    frame["late"] = (rng.random(rows) < 1 / (1 + np.exp(-frame.f0 - frame.f1))).astype(int)
    return frame


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories: 1 and 2 equal, ``worse`` trained on inverted labels, ``failing``, ``slow``, ``broken``."""
    import mlflow
    import xgboost
    from mlflow.models import infer_signature

    folder, frame = tmp_path_factory.mktemp("models"), make_frame(3000, 0)
    signature = infer_signature(frame[FEATURES], np.array([0.5]))
    for name, seed in (("1", 1), ("2", 2), ("3", 3), ("worse", 4)):
        label = 1 - frame.late if name == "worse" else frame.late
        model = xgboost.XGBClassifier(n_estimators=20, max_depth=2, random_state=seed, subsample=0.8, n_jobs=1)
        model.fit(frame[FEATURES], label)
        mlflow.xgboost.save_model(model, folder / name, signature=signature, pip_requirements=[])
    bodies = {"failing": 'assert (model_input["f0"] < 1).all(), "unknown carrier"', "slow": "time.sleep(1.0)"}
    for name, body in bodies.items():
        script = folder / f"{name}.py"
        script.write_text(SCRIPT.format(body=body))
        mlflow.pyfunc.save_model(folder / name, python_model=str(script), signature=signature, pip_requirements=[])
    (folder / "broken").mkdir()
    return folder


@pytest.fixture(autouse=True)
def cluster(ray_cluster, monkeypatch):
    """The shared Ray, and a connection to it."""
    extra = {"serve_url": ray_cluster.serve_url}
    value = {"conn_type": "ray", "host": ray_cluster.dashboard_url, "password": ray_cluster.token, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(value))
    return ray_cluster


@pytest.fixture(scope="module")
def registry(models, _mlflow_template, tmp_path_factory):
    """An MLflow that knows models 1 and 2 as versions of ``flights``."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(_mlflow_template, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri, uri)
    client.create_registered_model("flights")
    for version in ("1", "2", "3"):
        assert str(client.create_model_version("flights", str(models / version)).version) == version
    return uri


@pytest.fixture
def operator(models):
    def make(version, stable="", **options):
        settings = {
            "task_id": "canary",
            "model_name": "flights",
            "version": version,
            "model_uri": str(models / version),
            "stable_version": stable,
            "stable_uri": str(models / stable) if stable else "",
            "policy": {**POLICY, "min_requests": 60},
            "guardrails": [
                {"kind": "errors", "tolerance": 0.02},
                {"kind": "latency", "factor": 2.0, "tolerance": 0.1},
                {"kind": "log_loss", "margin": 0.25},
            ],
            "poll_interval": 0.3,
            "ttl": 4,
            **options,
        }
        return CanaryPromoteOperator(**settings)

    return make


def context(run):
    push = {"xcom_push": lambda key, value: None}
    return {"ti": SimpleNamespace(id="0198", dag_id="flights", task_id="canary", run_id=run, map_index=-1, **push)}


@pytest.fixture
def traffic(cluster):
    """Replays labelled requests in the background until told to stop; collects the reports."""

    @contextlib.contextmanager
    def start(prefix, until=None, batch_size=8):
        rows = frame_rows(make_frame(20_000, 9), FEATURES, "late", prefix)
        stopped, reports = threading.Event(), []

        def stop(state):
            return stopped.is_set() or (until is not None and rollout_settled(until)(state))

        begun = None if until is None else rollout_begun(until)
        options = {
            "concurrency": 4,
            "start_when": begun,
            "stop_when": stop,
            "batch_size": batch_size,
            "single_share": 0.3,
        }
        thread = threading.Thread(
            target=lambda: reports.append(replay(f"{cluster.serve_url}/flights", rows, max_seconds=310, **options))
        )
        thread.start()
        try:
            yield reports
        finally:
            stopped.set()
            thread.join(60)

    return start


def route_state(cluster):
    with urllib.request.urlopen(f"{cluster.serve_url}/flights/state", timeout=10) as response:
        return json.load(response)


def wait_for(cluster, reached, seconds=120):
    deadline = time.monotonic() + seconds
    while not reached(route_state(cluster)):
        assert time.monotonic() < deadline, route_state(cluster)
        time.sleep(0.1)


def judged(looks):
    """Whether the rollout on the route has been looked at so often."""
    return lambda state: (state["rollout"].get("judge") or {}).get("looks", 0) >= looks


async def deploy_other_application():
    async with RayServeHook().get_conn() as client:
        other = {"name": "other", "route_prefix": "/other", "import_path": "other_app:app"}
        await client.put_application(other, timeout=180)


async def application_names():
    async with RayServeHook().get_conn() as client:
        return {name: app["status"] for name, app in (await client.serve())["applications"].items()}


def test_without_a_champion_the_first_version_gets_all_traffic(operator, cluster, registry):
    asyncio.run(deploy_other_application())
    result = operator("1", mlflow_tracking_uri=registry).execute(context("first"))
    assert (result["verdict"], result["compared"], result["previous"]) == ("PROMOTE", False, None)
    assert "no champion" in result["reasons"][0]
    state = route_state(cluster)
    assert state["versions"][state["stable"]] == "1" and state["canary"] is None
    assert asyncio.run(application_names()).keys() == {"other", "flights"}
    ok, message = RayServeHook().test_connection()
    assert ok and "2 applications" in message


def test_a_wrong_token_is_explained(cluster, monkeypatch, operator):
    extra = {"serve_url": cluster.serve_url}
    value = {"conn_type": "ray", "host": cluster.dashboard_url, "password": "wrong", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(value))
    with pytest.raises(AirflowFailException, match="token as password"):
        operator("2", "1").execute(context("wrong token"))
    assert RayServeHook().test_connection()[0] is False
    request = urllib.request.Request(
        f"{cluster.serve_url}/flights/rollout", b'{"action": "claim", "owner": "x"}', method="POST"
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


def test_an_equal_version_of_the_registry_is_promoted_without_a_failed_request(operator, cluster, traffic):
    with traffic("equal-", until="2") as reports:
        result = operator("2", "1", model_uri="models:/flights/2").execute(context("equal"))
        served = route_state(cluster)
    assert served["slots"][served["stable"]]["uri"] == "models:/flights/2"
    assert result["verdict"] == "PROMOTE" and result["previous"] == "1", result
    assert [step["decision"] for step in result["steps"]] == ["PROMOTE_STEP", "PROMOTE"]
    assert min(result["requests"].values()) >= 120
    assert served["versions"][served["stable"]] == "2" and served["canary"] is None
    assert reports[0].failed == 0 and reports[0].errors == [] and reports[0].stopped
    assert reports[0].arms["canary"] > 0
    assert {slot["version"]: slot["ready"] for slot in served["slots"].values()} == {"1": True, "2": True}
    # The task again, in a fresh operator, after the verdict: the same answer, nothing moved.
    again = operator("2", "1").execute(context("equal"))
    assert again == result and route_state(cluster)["epoch"] == served["epoch"]


@pytest.mark.parametrize(("version", "guardrail"), [("failing", "errors"), ("slow", "latency"), ("worse", "log_loss")])
def test_a_bad_version_is_rolled_back(operator, cluster, traffic, version, guardrail):
    with traffic(f"{version}-", until=version) as reports:
        with pytest.raises(AirflowFailException, match=f"{guardrail}: the canary is worse"):
            operator(version, "2").execute(context(version))
        state = route_state(cluster)
    assert state["weight"] == 0 and state["canary"] is None and state["versions"][state["stable"]] == "2"
    assert state["rollout"]["finished"]["verdict"] == "ROLLBACK"
    assert reports[0].failed == 0, reports[0].errors
    if version == "failing":
        assert reports[0].fallbacks > 0


def test_a_version_that_cannot_be_loaded_is_rolled_back(operator, cluster):
    result = operator("broken", "2", on_rollback="return").execute(context("broken"))
    assert result["verdict"] == "ROLLBACK" and "could not be loaded" in result["reasons"][0]
    assert route_state(cluster)["weight"] == 0
    with pytest.raises(AirflowSkipException, match="could not be loaded"):
        operator("broken", "2", on_rollback="skip").execute(context("broken"))


def test_a_lost_trigger_is_refused_to_others_continued_by_its_owner_and_ended_by_the_lease(operator, cluster, traffic):
    slow_policy = {**POLICY, "min_requests": 250}
    with pytest.raises(TaskDeferred) as deferred:
        operator("3", "2", policy=slow_policy, deferrable=True).execute(context("lost"))
    trigger = deferred.value.trigger
    path, arguments = trigger.serialize()
    assert path == "airflow_mlops.triggers.canary.CanaryTrigger"

    async def run_and_lose():
        running = asyncio.ensure_future(anext(CanaryTrigger(**json.loads(json.dumps(arguments))).run()))
        await asyncio.to_thread(wait_for, cluster, judged(2))
        running.cancel()

    async def run_to_the_end():
        return await anext(CanaryTrigger(**arguments).run())

    with traffic("lost-", until="3"):
        asyncio.run(run_and_lose())
        lost = route_state(cluster)
        assert lost["weight"] == 20 and lost["owner"] == "flights/canary/lost/-1"
        with pytest.raises(AirflowFailException, match="two rollouts of one model"):
            operator("1", "2").execute(context("second"))
        wait_for(cluster, lambda state: state["weight"] == 0)
        assert route_state(cluster)["configured_weight"] == 20
        event = asyncio.run(run_to_the_end()).payload
    assert event["status"] == "done", event
    result = operator("3", "2").execute_complete(context("lost"), event)
    assert result["verdict"] == "PROMOTE"
    assert result["looks"] > lost["rollout"]["judge"]["looks"] >= 2
    assert min(result["requests"].values()) >= 500 > lost["rollout"]["judge"]["requests"][1]


def test_a_killed_task_gives_the_traffic_back_and_can_start_again(operator, cluster, traffic):
    policy = {**POLICY, "min_requests": 10**6}
    task, failures = operator("1", "3", policy=policy), []

    def execute():
        try:
            task.execute(context("killed"))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=execute)
    with traffic("killed-"):
        thread.start()
        wait_for(cluster, lambda state: state["weight"] == 20)
        task.on_kill()
        state = route_state(cluster)
        assert state["weight"] == 0 and state["configured_weight"] == 0
        thread.join(60)
    assert not thread.is_alive() and "ended from outside" in str(failures[0])
    assert route_state(cluster)["weight"] == 0 and state["versions"][state["stable"]] == "3"


def test_a_restarted_router_neither_promotes_nor_loses_the_rollout(operator, cluster, traffic):
    policy = {**POLICY, "min_requests": 150}
    results = []
    thread = threading.Thread(
        target=lambda: results.append(operator("2", "3", policy=policy, on_rollback="return").execute(context("crash")))
    )
    with traffic("crash-", until="2"):
        thread.start()
        wait_for(cluster, judged(2))
        boot = route_state(cluster)["boot"]
        for process in psutil.Process(cluster.pid).children(recursive=True):
            if "ray::ServeReplica:flights:router" in " ".join(process.cmdline()):
                process.kill()
        thread.join(310)
    assert results and results[0]["verdict"] == "PROMOTE", results
    state = route_state(cluster)
    assert state["boot"] != boot and state["versions"][state["stable"]] == "2"


def in_thread(task, run):
    """Execute a task beside the test; its results."""
    results = []
    thread = threading.Thread(target=lambda: results.append(task.execute(context(run))))
    thread.start()
    return thread, results


def test_the_alias_follows_the_traffic_and_one_that_somebody_moved_undoes_it(
    operator, cluster, traffic, registry, tmp_path
):
    from mlflow import MlflowClient

    client = MlflowClient(registry, registry)

    def aliases():
        return {name: str(v) for name, v in client.get_registered_model("flights").aliases.items()}

    options = {"alias": "champion", "mlflow_tracking_uri": registry, "on_rollback": "return"}
    client.set_registered_model_alias("flights", "champion", "1")
    with pytest.raises(
        AirflowFailException, match="champion of flights is version 1, but this rollout compares with 2"
    ):
        operator("3", "2", **options).execute(context("alias of another"))

    client.set_registered_model_alias("flights", "champion", "2")
    policy = {**POLICY, "min_requests": 60, "steps": [50, 100], "bake_seconds": 3}
    with traffic("moved-"):
        thread, results = in_thread(operator("3", "2", policy=policy, **options), "moved")
        wait_for(cluster, judged(2))
        client.set_registered_model_alias("flights", "champion", "1")
        thread.join(300)
    assert results[0]["verdict"] == "ROLLBACK" and "somebody else moved it" in results[0]["reasons"][0], results
    state = route_state(cluster)
    assert state["weight"] == 0 and state["versions"][state["stable"]] == "2" and aliases()["champion"] == "1"

    client.set_registered_model_alias("flights", "champion", "2")
    report = {"report_dir": str(tmp_path), "experiment": "flights/rollouts"}
    with traffic("followed-"):
        result = operator("3", "2", policy=policy, **options, **report).execute(context("followed"))
    assert result["verdict"] == "PROMOTE" and "history" not in result
    assert aliases() == {"champion": "3", "previous_champion": "2"}
    assert "<svg" in pathlib.Path(result["html_uri"]).read_text()
    assert {file.path for file in client.list_artifacts(result["mlflow_run_id"])} >= {"rollout.html", "rollout.png"}
    assert [step["weight"] for step in result["steps"]] == [50, 100], "watched at 100 % before the alias moved"


@pytest.fixture(scope="module")
def metrics(ray_cluster, tmp_path_factory):
    """A real Prometheus that scrapes the route."""
    from support.prometheus import prometheus

    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is missing: install Debian's package prometheus")
    address = ray_cluster.serve_url.removeprefix("http://")
    targets = [(address, {"__metrics_path__": "/flights/metrics"})]
    with prometheus(tmp_path_factory.mktemp("prometheus"), targets) as url:
        yield {"type": "prometheus", "set": "route", "url": url, "name": "flights"}


def test_copies_then_traffic_judged_by_prometheus(operator, cluster, traffic, metrics):
    policy = {**POLICY, "min_requests": 60, "steps": [0, 50, 100]}
    with traffic("copies-", until="2") as reports:
        thread, results = in_thread(operator("2", "3", policy=policy, evidence=metrics, poll_interval=1), "copies")
        wait_for(cluster, lambda state: state["shadow"])
        assert route_state(cluster)["weight"] == 0
        thread.join(300)
    assert results and results[0]["verdict"] == "PROMOTE", results
    copies, half = results[0]["steps"]
    assert copies["weight"] == 0 and min(copies["requests"]) >= 60 and half["weight"] == 50
    assert reports[0].failed == 0, reports[0].errors


def test_a_failing_version_is_rolled_back_by_what_prometheus_saw(operator, cluster, traffic, metrics):
    options = {"evidence": metrics, "poll_interval": 1, "on_rollback": "return"}
    with traffic("scraped-", until="failing") as reports:
        result = operator("failing", "2", **options).execute(context("scraped"))
    assert result["verdict"] == "ROLLBACK" and "errors: the canary is worse" in result["reasons"][0], result
    assert route_state(cluster)["weight"] == 0 and reports[0].failed == 0


def test_other_applications_are_still_there():
    assert asyncio.run(application_names()) == {"other": "RUNNING", "flights": "RUNNING"}
