"""``on_fail="branch"`` in Dags that Airflow itself runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DAG = """
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, TaskGroup

from airflow_mlops.operators.gate import ModelGateOperator

GATE = {gate!r}

for name, models in {models!r}.items():
    with DAG(name, schedule=None):
        gate = ModelGateOperator(
            task_id="gate", on_fail="branch", fail_task_ids=["tell"], policy={{"min_clusters": 5}}, **GATE, **models,
        )
        with TaskGroup("release") as release:
            EmptyOperator(task_id="register") >> EmptyOperator(task_id="promote")
        gate >> [EmptyOperator(task_id="tell"), release]
        ends = EmptyOperator(task_id="ends", trigger_rule="none_failed_min_one_success")
        release >> ends
        gate >> EmptyOperator(task_id="archive")
"""

RUNNER = """
import datetime as dt, json, sys

from airflow.utils import db
db.initdb()
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
found = {}
for name, dag in bag.dags.items():
    run = dag.test(logical_date=dt.datetime(2013, 5, 1, tzinfo=dt.timezone.utc))
    tasks = {ti.task_id: ti for ti in run.get_task_instances()}
    found[name] = {"state": str(run.state), "tasks": {name: str(ti.state) for name, ti in tasks.items()}}
    found[name]["passed"] = tasks["gate"].xcom_pull(task_ids="gate", key="passed")
    found[name]["report"] = tasks["gate"].xcom_pull(task_ids="gate", key="report_uri")
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def runs(mlflow_models, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("branch")
    (root / "dags").mkdir()
    gate = {
        "data_uri": mlflow_models.data,
        "label_column": "late",
        "report_dir": str(root / "{{ dag.dag_id }}"),
        "measure_latency": False,
        "tracking_uri": f"sqlite:///{root}/mlflow.db",
    }
    good, poor = mlflow_models.good, mlflow_models.poor
    models = {
        "better": {"challenger_uri": good, "champion_uri": poor},
        "worse": {"challenger_uri": poor, "champion_uri": good},
        "chosen": {"challenger_uri": good, "champion_uri": poor, "pass_task_ids": "release"},
    }
    (root / "dags" / "gates.py").write_text(DAG.format(gate=gate, models=models))
    environment = os.environ | {
        "AIRFLOW_HOME": str(root / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(root / "dags"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{root}/airflow.db",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", RUNNER, str(root / "dags"), str(root / "found.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((root / "found.json").read_text())


def test_a_pass_follows_all_but_the_tasks_of_a_failure(runs):
    assert runs["better"]["passed"] is True
    assert runs["better"]["state"].endswith("success")
    assert runs["better"]["tasks"] == {
        "gate": "success",
        "tell": "skipped",
        "release.register": "success",
        "release.promote": "success",
        "ends": "success",
        "archive": "success",
    }


def test_a_failure_goes_its_own_way_and_leaves_its_verdict(runs):
    assert runs["worse"]["passed"] is False
    assert Path(runs["worse"]["report"]).is_file()
    assert runs["worse"]["tasks"] == {
        "gate": "success",
        "tell": "success",
        "release.register": "skipped",
        "release.promote": "skipped",
        "ends": "skipped",
        "archive": "skipped",
    }


def test_a_pass_can_name_what_follows(runs):
    tasks = runs["chosen"]["tasks"]
    assert (tasks["release.promote"], tasks["archive"], tasks["tell"]) == ("success", "skipped", "skipped")
