"""Trainings in Kubernetes as Airflow runs them: a Dag file, a connection in the environment, a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.crd import CrdSchemas, crd_dir
from support.kube_api import KubeApi
from support.kube_sim import RayJobSimulator, Stop
from support.kube_training import STEPS, train, until

LINES = [f"line {number}" for number in range(30)]

DAG = """
import datetime as dt
import json
from pathlib import Path

from airflow.sdk import DAG, task
from airflow_mlops.operators.ray import RayTrainOperator

RUNS = "{runs}"
volume = {{"name": "runs", "persistentVolumeClaim": {{"claimName": "runs"}}}}
pods = {{
    role: {{
        "spec": {{
            "containers": [{{"name": f"ray-{{role}}", "volumeMounts": [{{"name": "runs", "mountPath": RUNS}}]}}],
            "volumes": [volume],
        }}
    }}
    for role in ("head", "worker")
}}


@task
def record(blocking: dict, deferrable: dict, model: str) -> None:
    Path(RUNS, "seen.json").write_text(json.dumps([blocking, deferrable, model]))


with DAG("trainings", schedule=None, start_date=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)):
    outcomes = {{
        name: RayTrainOperator(
            task_id=name,
            mode="kuberay",
            k8s_conn_id="training",
            train_fn="pkg.mod:loop",
            trainer="torch",
            storage_path=RUNS,
            cluster={{"image": "example.com/t:ray2.60.0", "ray_version": "2.60.0", "pod_template_overrides": pods}},
            poll_interval=0.2,
            logs="live",
            deferrable=name == "deferrable",
        ).output
        for name in ("blocking", "deferrable")
    }}
    record(outcomes["blocking"], outcomes["deferrable"], outcomes["deferrable"]["model_uri"])
"""

RUNNER = """
import json, sys

from airflow.utils import db
db.initdb()
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
run = bag.dags["trainings"].test()
with open(sys.argv[2], "w") as file:
    json.dump({ti.task_id: str(ti.state) for ti in run.get_task_instances()}, file)
"""


def talks(rayjob: dict[str, Any], stop: Stop) -> int:
    for line in LINES:
        stop.log(line)
        stop.wait(0.01)
    return train(rayjob, stop)


@pytest.fixture
def api(tmp_path):
    folder = crd_dir()
    with KubeApi(CrdSchemas(folder) if folder else None) as found:
        yield found


def airflow(root: Path, connection: dict[str, Any]) -> tuple[dict[str, str], str]:
    """The tasks' states after one run of the Dag, and everything the process has printed."""
    dags, home = root / "dags", root / "airflow"
    for folder in (dags, home, root / "runs"):
        folder.mkdir()
    (dags / "trainings.py").write_text(DAG.format(runs=root / "runs"))
    env = os.environ | {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW_CONN_TRAINING": json.dumps(connection),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(dags), str(root / "states.json")],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return json.loads((root / "states.json").read_text()), done.stdout


def test_a_dag_trains_in_kubernetes_blocking_and_deferrable(api, tmp_path):
    kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
    connection = {"conn_type": "kuberay", "extra": {"kube_config_path": str(kubeconfig), "namespace": "default"}}
    with RayJobSimulator(api, scale=0.01, script=talks) as simulator:
        states, output = airflow(tmp_path, connection)
        assert states == dict.fromkeys(["blocking", "deferrable", "record"], "success"), output[-8000:]
        until(lambda: not any(api.list(kind) for kind in ("RayJob", "RayCluster", "Pod", "Job")))
    outcomes = json.loads((tmp_path / "runs" / "seen.json").read_text())
    assert [outcome["status"] for outcome in outcomes[:2]] == ["SUCCEEDED"] * 2 and outcomes[2] == "m"
    assert all(outcome["metrics"] == {"steps": STEPS} and outcome["attempts"] == 1 for outcome in outcomes[:2])
    assert len({outcome["run_dir"] for outcome in outcomes[:2]}) == len(simulator.started) == 2
    # Both waits show the driver's log, each line once and in order.
    assert re.findall(r"\] (line \d+) ", output) == LINES * 2
