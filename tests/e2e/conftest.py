"""A real stack that runs the project's own Dags, and hands on it that look, wait, freeze and kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
DAG = "continuous_training"


class Loop:
    """The running stack, and what its Dags have done."""

    def __init__(self, stack: Any) -> None:
        self.stack = stack
        self.client = stack.client()
        self.secrets: dict[str, str] = json.loads((stack.root / "secrets.json").read_text())

    # --- waiting ----------------------------------------------------------------------------------------------

    def until(self, probe: Callable[[], Any], what: str, timeout: float = 300, interval: float = 0.5) -> Any:
        """The first true answer of ``probe``; meanwhile nothing of the stack may die."""
        deadline = time.monotonic() + timeout
        while not (found := probe()):
            self.stack.check()
            assert time.monotonic() < deadline, f"after {timeout:.0f} s still waiting for: {what}"
            time.sleep(interval)
        return found

    def finished(self, run_id: str, *, dag_id: str = DAG, timeout: float = 900) -> dict[str, str]:
        """Wait for the end of a run; its tasks' states. A run that failed shows the logs of what failed."""

        def ended() -> bool:
            return self.run(run_id, dag_id)["state"] in ("success", "failed")

        try:
            self.until(ended, f"the end of {run_id}", timeout, interval=1)
        except AssertionError as error:
            raise AssertionError(f"{error}; its tasks: {self.states(run_id, dag_id)}") from None
        return self.states(run_id, dag_id)

    def succeeded(self, run_id: str, *, dag_id: str = DAG, timeout: float = 900) -> dict[str, str]:
        """The same for a run that has to succeed."""
        states = self.finished(run_id, dag_id=dag_id, timeout=timeout)
        failed = [task for task, state in states.items() if state == "failed"]
        logs = "\n".join(f"--- {task}\n{self.log(run_id, task, dag_id)[-6000:]}" for task in failed)
        assert self.run(run_id, dag_id)["state"] == "success" and not failed, f"{states}\n{logs}"
        return states

    # --- Airflow ----------------------------------------------------------------------------------------------

    def run(self, run_id: str, dag_id: str = DAG) -> dict[str, Any]:
        return next(run for run in self.client.runs(dag_id) if run["dag_run_id"] == run_id)

    def task(self, run_id: str, task_id: str, dag_id: str = DAG) -> dict[str, Any]:
        """One task's instance; one without a state while the run has none yet."""
        found = self.client.task_instances(dag_id, run_id)
        return next((ti for ti in found if ti["task_id"] == task_id), {"state": None})

    def states(self, run_id: str, dag_id: str = DAG) -> dict[str, str]:
        return {ti["task_id"]: ti["state"] for ti in self.client.task_instances(dag_id, run_id)}

    def log(self, run_id: str, task_id: str, dag_id: str = DAG) -> str:
        tries = self.task(run_id, task_id, dag_id)["try_number"]
        return "\n".join(self.client.log(dag_id, run_id, task_id, try_number=tries))

    def trigger(self, conf: dict[str, Any], dag_id: str = DAG) -> str:
        body = {"logical_date": None, "conf": conf}
        return self.client.call("POST", f"/dags/{dag_id}/dagRuns", json=body)["dag_run_id"]

    def backfill(self, month: str, conf: dict[str, Any]) -> str:
        """Start one month's run as ``airflow backfill create`` does; its id."""
        day = f"{month}-01T00:00:00+00:00"
        body = {"dag_id": DAG, "from_date": day, "to_date": day, "max_active_runs": 1, "dag_run_conf": conf}
        self.client.call("POST", "/backfills", json=body)
        return self.until(
            lambda: next(
                (r["dag_run_id"] for r in self.client.runs(DAG) if (r["data_interval_start"] or "").startswith(month)),
                None,
            ),
            f"the backfill's run of {month}",
            timeout=60,
        )

    def clear(self, run_id: str, tasks: list[str]) -> None:
        """Run tasks of a finished run again, those and no others."""
        body = {"dry_run": False, "dag_run_id": run_id, "task_ids": tasks, "only_failed": False}
        self.client.call("POST", f"/dags/{DAG}/clearTaskInstances", json={**body, "reset_dag_runs": True})

    def refused(self, conf: dict[str, Any]) -> str:
        """Trigger a run that ``plan`` refuses; what its log says. Nothing else may have run."""
        run_id = self.trigger(conf)
        states = self.finished(run_id, timeout=120)
        assert states.pop("plan") == "failed" and set(states.values()) == {"upstream_failed"}, states
        assert self.task(run_id, "plan")["try_number"] == 1, "what no retry can mend was tried again"
        return self.log(run_id, "plan")

    def database(self) -> Iterator[tuple[str, str]]:
        """Every row of Airflow's database as ``(table, text)``."""
        with contextlib.closing(self._connect()) as connection, connection.cursor() as cursor:
            cursor.execute("select tablename from pg_tables where schemaname = 'public'")
            for (table,) in cursor.fetchall():
                cursor.execute(f'select t::text from "{table}" t')
                yield from ((table, row[0]) for row in cursor.fetchall())

    def forget_heartbeat(self, task_instance_id: str) -> None:
        """As if the heartbeat timeout of a task whose worker is gone had passed; nothing if that was noticed before."""
        with contextlib.closing(self._connect()) as connection, connection, connection.cursor() as cursor:
            cursor.execute(
                "update task_instance set last_heartbeat_at = now() - interval '1 hour' where id = %s",
                (task_instance_id,),
            )

    def _connect(self) -> Any:
        import psycopg2

        return psycopg2.connect(self.stack.postgres.sql_alchemy_conn.replace("+psycopg2", ""))

    def result(self, run_id: str, task_id: str, dag_id: str = DAG) -> Any:
        """What a task returned."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/return_value"
        return self.client.call("GET", path, params={"deserialize": "true"})["value"]

    def answer(self, run_id: str, task_id: str, dag_id: str, chosen: str) -> dict[str, Any]:
        """Answer the question of a task, once it is asked, as its required action in the UI does; the question."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}"
        listed = f"{path}/hitlDetails?response_received=false"

        def questions() -> Any:
            state = self.task(run_id, task_id, dag_id)["state"]
            ended = state in ("success", "failed", "skipped")
            assert not ended, f"{task_id} is {state} and asked nothing: {self.log(run_id, task_id, dag_id)[-6000:]}"
            return self.client.call("GET", listed)["hitl_details"]

        asked = self.until(questions, "the question", 180)
        # A person takes a moment, too: the task that asked has to be deferred, and Airflow to have noticed.
        self.until(lambda: self.task(run_id, task_id, dag_id)["state"] == "deferred", "the deferral", 60)
        time.sleep(5)
        body = {"chosen_options": [chosen], "params_input": {}}
        self.client.call("PATCH", f"{path}/taskInstances/{task_id}/-1/hitlDetails", json=body)
        return asked[0]

    # --- what the loop has left behind ------------------------------------------------------------------------

    @property
    def project(self) -> Path:
        return self.stack.project

    @property
    def mlflow(self) -> Any:
        from airflow_mlops.hooks.mlflow import MlflowHook

        return MlflowHook(tracking_uri=self.stack.tracking_uri)

    def ledger(self, month: str) -> dict[str, Any]:
        return json.loads((self.project / "ledger" / f"{month}.json").read_text())

    def registry(self) -> dict[str, list[Any]]:
        """Every row of MLflow's registry."""
        tables = ("registered_models", "model_versions", "registered_model_aliases")
        tables += ("registered_model_tags", "model_version_tags")
        return {table: rows(self.stack.root / "mlflow" / "mlflow.db", table) for table in tables}

    def aliases(self) -> dict[str, str]:
        model = self.mlflow.registered_model("flights_delay")
        return {alias: str(version) for alias, version in model.aliases.items()}

    def standing(self) -> dict[str, Any]:
        """All that a refused run may not change: registry, online store, ledger, landed data, finished runs."""
        files = [path for name in ("ledger", "raw", "runs") for path in sorted((self.project / name).rglob("*"))]
        return {
            "registry": self.registry(),
            "online store": digest(self.project / "feast_online.db"),
            "files": {str(path): digest(path) for path in files if path.is_file()},
        }

    def run_dirs(self, month: str) -> list[Path]:
        return sorted((self.project / "runs").glob(f"flights-{month}-*"))

    # --- Ray --------------------------------------------------------------------------------------------------

    def ray(self, path: str) -> Any:
        """Answer of Ray's dashboard."""
        import requests

        headers = {"Authorization": f"Bearer {self.secrets['ray']}"}
        answer = requests.get(self.stack.ray.dashboard_url + path, headers=headers, timeout=10)
        answer.raise_for_status()
        return answer.json()

    def jobs(self) -> dict[str, str]:
        """State of every Ray job by its name, of those that training submitted."""
        return {job["submission_id"]: job["status"] for job in self.ray("/api/jobs/") if job.get("submission_id")}

    def april_jobs(self) -> dict[str, str]:
        return {name: state for name, state in self.jobs().items() if name.startswith("flights-2013-04-")}

    @property
    def route_url(self) -> str:
        """Where the demo's model serves."""
        return json.loads(self.stack.env["AIRFLOW_CONN_RAY_DEFAULT"])["extra"]["serve_url"] + "/flights_delay"

    def route(self) -> dict[str, Any]:
        """What the route says of itself."""
        import requests

        answer = requests.get(f"{self.route_url}/state", timeout=10)
        answer.raise_for_status()
        return answer.json()

    def train_workers(self) -> list[psutil.Process]:
        """The processes in which Ray trains."""
        return [process for process in self.below("ray") if "RayTrainWorker" in title(process)]

    # --- processes --------------------------------------------------------------------------------------------

    def below(self, part: str) -> list[psutil.Process]:
        """Every process of ``ray`` or ``airflow``."""
        service = self.stack.ray.service if part == "ray" else self.stack.airflow.service
        return psutil.Process(service.pid).children(recursive=True)

    def task_processes(self, task_instance_id: str) -> list[psutil.Process]:
        """The worker that supervises a task, and the process that runs it."""
        for process in self.below("airflow"):
            if title(process).startswith("airflow worker") and task_instance_id in title(process):
                return [process, *process.children(recursive=True)]
        return []

    @staticmethod
    def send(processes: list[psutil.Process], sig: signal.Signals) -> None:
        """A signal to processes of which some may be gone."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sig)

    def kill_ray(self) -> None:
        """SIGKILL to the head, its workers and the drivers of its jobs, then start it at the same addresses."""
        from airflow_mlops.embedded import processes

        processes.kill_tree(self.stack.ray.service.pid)
        self.stack.ray.restart()

    def kill_airflow(self) -> None:
        """SIGKILL to scheduler, triggerer, Dag processor, API server and workers, then start them again."""
        from airflow_mlops.embedded import processes

        processes.kill_tree(self.stack.airflow.service.pid)
        self.stack.airflow.stop()
        self.stack.airflow.start()
        self.stack.airflow.wait_healthy()


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def rows(database: Path, table: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return sorted(map(repr, connection.execute(f'select * from "{table}"')))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """The project's Dags in a stack of their own, unpaused; stopped at the end."""
    from airflow_mlops.embedded.stack import Stack

    root = tmp_path_factory.mktemp("loop")
    with Stack(root, dags_folder=REPOSITORY / "dags", feature_repo=REPOSITORY / "feature_repo") as stack:
        running = Loop(stack)
        for dag_id in (DAG, "drift_check", "drift_watch", "progressive_rollout", "roll_back", "reproduce"):
            running.until(lambda dag_id=dag_id: running.client.dag(dag_id), f"Airflow to find {dag_id}", 60)
            assert not running.client.import_errors()
            running.client.pause(dag_id, False)
        yield running
