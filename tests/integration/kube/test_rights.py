"""The Roles in ``docker/kubernetes/rbac.yaml`` are what a training asks of the API server, and no more."""

from __future__ import annotations

import asyncio
import json
import pathlib
from typing import Any

import pytest
import yaml
from airflow.sdk.exceptions import TaskDeferred
from support.kube_sim import RayJobSimulator
from support.kube_training import Task, operator, train

from airflow_mlops.exceptions import ExternalSystemError
from airflow_mlops.hooks.kuberay import RayJobHook
from airflow_mlops.training.parts import Gang
from airflow_mlops.training.spec import TrainingSpec

ROOT = pathlib.Path(__file__).parents[3]
ROLES = {
    document["metadata"]["name"]: document["rules"]
    for document in yaml.safe_load_all((ROOT / "docker/kubernetes/rbac.yaml").read_text())
    if document["kind"] == "Role"
}


def rights(role: str) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in ROLES[role]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.fixture
def kuberay(kube_api, kubeconfig, monkeypatch):
    connection = {"conn_type": "kuberay", "extra": {"kube_config_path": str(kubeconfig), "namespace": "default"}}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERAY", json.dumps(connection))
    monkeypatch.setattr("airflow_mlops.operators._kuberay.MARGIN", 1e6)
    with RayJobSimulator(kube_api, scale=0.005, script=train) as simulator:
        yield simulator


async def first(trigger: Any) -> Any:
    async for event in trigger.run():
        return event


def test_a_training_needs_each_right_of_its_role_and_no_other(kuberay, kube_api, tmp_path):
    kube_api.role = ROLES["airflow-mlops-training"]
    for number in (1, 2):
        # The second try takes the attempt over.
        with pytest.raises(TaskDeferred) as deferred:
            operator(tmp_path, deferrable=True, logs="live").execute({"ti": Task(number)})
    assert asyncio.run(first(deferred.value.trigger)).xcoms["return_value"]["attempts"] == 1
    kuberay.image_pull_error()
    with pytest.raises(ExternalSystemError, match="cannot be pulled"):
        operator(tmp_path, startup_timeout=1, run_key="r2").execute({"ti": Task()})
    assert kube_api.used == rights("airflow-mlops-training")


def test_queues_are_asked_with_the_rights_of_their_role(kuberay, kube_api, tmp_path):
    kube_api.role = ROLES["airflow-mlops-training"] + ROLES["airflow-mlops-queues"]
    with pytest.raises(TaskDeferred):
        operator(tmp_path, deferrable=True).execute({"ti": Task()})
    spec = TrainingSpec("pkg.mod:loop", "torch", str(tmp_path), "r1")

    async def ask() -> None:
        async with RayJobHook("kuberay") as hook:
            for scheduler in ("volcano", "kueue"):
                await hook.scheduler_problem(spec, Gang(scheduler, "team"))
            await hook.queue_problem(spec)

    asyncio.run(ask())
    assert {right for right in kube_api.used if right[1] in ("podgroups", "workloads")} == rights(
        "airflow-mlops-queues"
    )
