"""A success that ends in Airflow's own triggerer: what the next task gets from it, through a real metadata database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.ray_dashboard import RayDashboard

from airflow_mlops.training.result import TrainingResult, outcome, read_result, write_result
from airflow_mlops.training.spec import TrainingSpec
from airflow_mlops.triggers.ray import RayJobTrigger

DAG = """
import datetime as dt
from airflow.sdk import DAG, BaseOperator

with DAG("trainings", schedule=None, start_date=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)):
    BaseOperator(task_id="train")
"""

RUNNER = """
import datetime as dt, json, os, sys, time

from airflow.utils import db
db.initdb()
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import BundleDagBag, sync_bag_to_db
from airflow.jobs.job import Job
from airflow.jobs.triggerer_job_runner import TriggererJobRunner, TriggerRunnerSupervisor
from airflow.models.serialized_dag import SerializedDagModel
from airflow.models.trigger import Trigger
from airflow.utils.session import create_session
from airflow.utils.state import DagRunState, TaskInstanceState
from airflow.utils.types import DagRunTriggeredByType, DagRunType

manager = DagBundlesManager()
manager.sync_bundles_to_db()
(bundle,) = manager.get_all_dag_bundles()
bundle.initialize()
bag = BundleDagBag(dag_folder=bundle.path, bundle_path=bundle.path, bundle_name=bundle.name)
assert not bag.import_errors, bag.import_errors
sync_bag_to_db(bag, bundle.name, bundle.version)
with open(sys.argv[1]) as file:
    classpath, kwargs = json.load(file)
now = dt.datetime.now(dt.timezone.utc)
with create_session() as session:
    run = SerializedDagModel.get_dag("trainings", session=session).create_dagrun(
        run_id="r", logical_date=now, data_interval=(now, now), run_after=now, run_type=DagRunType.MANUAL,
        state=DagRunState.RUNNING, triggered_by=DagRunTriggeredByType.TEST, start_date=now, session=session,
    )
    (ti,) = run.get_task_instances(session=session)
    waiting = Trigger(classpath=classpath, kwargs=kwargs)
    session.add(waiting)
    session.flush()
    ti.state, ti.trigger_id, ti.next_method, ti.start_date = TaskInstanceState.DEFERRED, waiting.id, "resumed", now
    ti.try_number = 1


def state():
    with create_session() as session:
        return session.get(type(ti), ti.id).state


os.environ["_AIRFLOW_PROCESS_CONTEXT"] = "server"
job = Job()
TriggererJobRunner(job)
with create_session() as session:
    session.add(job)
    session.flush()
    session.refresh(job)
    session.expunge(job)
supervisor = TriggerRunnerSupervisor.start(job=job, capacity=10)
try:
    deadline = time.monotonic() + 60
    while state() == "deferred" and time.monotonic() < deadline:
        supervisor.run_once()
    # As the worker of the next task asks for them, and reads what it is told.
    from airflow.sdk.execution_time.xcom import XCom
    read = lambda key: supervisor.client.xcoms.get("trainings", "r", "train", key)
    with open(sys.argv[2], "w") as file:
        xcoms = {key: XCom.deserialize_value(read(key)) for key in ("return_value", "model_uri", "metrics")}
        json.dump({"state": str(state()), "xcoms": xcoms}, file)
finally:
    supervisor.kill(escalation_delay=5, force=True)
"""


def test_the_next_task_gets_what_the_training_has_returned(tmp_path):
    dags, home = tmp_path / "dags", tmp_path / "airflow"
    for folder in (dags, home):
        folder.mkdir()
    (dags / "trainings.py").write_text(DAG)
    spec = TrainingSpec("pkg.mod:loop", "torch", str(tmp_path / "runs"), "r1")
    result = TrainingResult("SUCCEEDED", 1, spec.fingerprint, metrics={"auc": 0.5}, model_uri="s3://models/m")
    write_result(spec, result)
    waiting = RayJobTrigger(
        submission_id="j",
        ray_conn_id="ray_default",
        address=None,
        poll_interval=0.1,
        unreachable_timeout=5.0,
        cancel_on_kill=True,
        state={"spec": spec.to_json(), "adopted": False},
        finish_in_triggerer=True,
    )
    (tmp_path / "trigger.json").write_text(json.dumps(waiting.serialize()))
    with RayDashboard() as dashboard:
        dashboard.jobs["j"] = {"status": "SUCCEEDED"}
        told = run(tmp_path, {"AIRFLOW_CONN_RAY_DEFAULT": dashboard.connection()})
    value = json.loads(json.dumps(outcome(spec, read_result(spec))))
    assert told == {
        "state": "success",
        "xcoms": {"return_value": value, "model_uri": "s3://models/m", "metrics": {"auc": 0.5}},
    }


def run(root: Path, environment: dict[str, str]) -> dict:
    home = root / "airflow"
    env = os.environ | environment
    env |= {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(root / "dags"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(root / "trigger.json"), str(root / "told.json")],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return json.loads((root / "told.json").read_text())
