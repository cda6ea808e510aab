"""What the example Dags have the operator create, as an API server that checks the CRDs' schemas takes it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk.exceptions import TaskDeferred

import airflow_mlops.example_dags
from airflow_mlops import storage

DAGS = sorted(pathlib.Path(airflow_mlops.example_dags.__file__).parent.glob("ray_*.py"))
pytestmark = pytest.mark.timeout(120)


class Task:
    """What the operator uses of a task instance."""

    run_id, map_index, try_number = "manual__1", -1, 1

    def __init__(self, dag_id: str, task_id: str) -> None:
        self.dag_id, self.task_id = dag_id, task_id

    def xcom_push(self, key: str, value: object) -> None:
        """Take what links are made of."""


@pytest.mark.parametrize("path", DAGS, ids=lambda path: path.stem)
def test_an_example_creates_one_ray_job_and_waits_without_a_worker(path, kube_api, kubeconfig, crds, s3, monkeypatch):
    extra = {"kube_config_path": str(kubeconfig)}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERNETES_DEFAULT", json.dumps({"conn_type": "kuberay", "extra": extra}))
    kube_api.create_namespace("ml-training")
    (dag,) = DagBag(path, known_pools={"default_pool"}).dags.values()
    (task,) = dag.tasks
    context: Any = {
        "params": {name: dag.params[name] for name in dag.params} | {"storage_path": "s3://runs/example"},
        "ti": Task(dag.dag_id, task.task_id),
    }
    task.render_template_fields(context)
    with pytest.raises(TaskDeferred):
        task.execute(context)

    (rayjob,) = kube_api.list("RayJob")
    assert rayjob["metadata"]["namespace"] == "ml-training"
    assert crds is None or crds.errors(rayjob) == []
    assert rayjob["metadata"]["labels"]["team"] == "ml-platform"
    uri = rayjob["spec"]["entrypoint"].split("--spec ")[1].strip("'")
    assert storage.read_json(uri)["storage_path"] == "s3://runs/example"
    workers = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert {"secretRef": {"name": "s3-credentials"}} in workers["envFrom"]
    assert ("nvidia.com/gpu" in workers["resources"]["limits"]) == ("ddp" in path.stem)
