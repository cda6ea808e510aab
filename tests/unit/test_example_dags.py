"""The Dags for Kubernetes describe clusters that can be made, and the images have the versions that were tested."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import re
from typing import Any

import pytest
import yaml
from airflow.dag_processing.dagbag import DagBag
from support.crd import CrdSchemas, crd_dir

from airflow_mlops.hooks.kubernetes import NEEDED_ACCESS
from airflow_mlops.operators.ray import RayTrainOperator
from airflow_mlops.training.cluster import KubeCluster, fitted
from airflow_mlops.training.limits import Limits
from airflow_mlops.training.manifest import Owner, render_rayjob
from airflow_mlops.training.spec import TrainingSpec, load_callable, worker_count

ROOT = pathlib.Path(__file__).parents[2]
DAGS = sorted((ROOT / "airflow_mlops/example_dags").glob("ray_*.py"))


def of(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    return {entry.name: given[entry.name] for entry in dataclasses.fields(kind) if given.get(entry.name) is not None}


def of_readme() -> RayTrainOperator:
    """The task that the README shows."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (text,) = (block for block in blocks if 'mode="kuberay"' in block)
    names: dict[str, Any] = {"RayTrainOperator": RayTrainOperator}
    exec(text, names)
    return names["train"]


@pytest.fixture(params=[*DAGS, ROOT / "README.md"], ids=lambda path: path.stem)
def training(request) -> RayTrainOperator:
    """The Dag's one task as Airflow's Dag processor reads it, rendered with the Dag's defaults."""
    if request.param.suffix == ".md":
        return of_readme()
    bag = DagBag(request.param, known_pools={"default_pool"})
    assert not bag.import_errors
    (dag,) = bag.dags.values()
    assert dag.dag_id == request.param.stem and dag.doc_md and not dag.schedule
    (task,) = dag.tasks
    assert isinstance(task, RayTrainOperator)
    task.render_template_fields({"params": {name: dag.params[name] for name in dag.params}})
    return task


def test_its_cluster_can_be_made_and_its_training_found(training):
    assert training.mode == "kuberay" and training.deferrable
    given = vars(training)
    spec = TrainingSpec(**of(TrainingSpec, {**given, "run_key": "r1"}))
    assert spec.num_workers == worker_count(training.num_workers)
    cluster = KubeCluster.from_mapping(training.cluster)
    assert cluster.namespace == "ml-training" and cluster.image.startswith("registry.example.com/training:")
    assert not {"startup_timeout", "attempt_timeout"} & set(training.cluster)
    spec = fitted(spec, cluster)
    load_callable(spec.train_fn)
    limits = Limits.from_mapping(of(Limits, given))
    limits.validate(gpus=spec.gpus_per_worker)
    manifest = render_rayjob(
        spec, cluster, name="r1-a1", owner=Owner("dag", "train", "run"), spec_uri="s3://runs/r1/_mlops/spec-a1.json"
    )
    if crd_dir() is None:
        pytest.skip("the CRDs are not at hand (KUBE_CRD_DIR)")
    assert CrdSchemas(crd_dir()).errors(manifest) == []


def test_the_training_image_has_the_tested_versions():
    constraints = (ROOT / "constraints.txt").read_text()
    (ray,) = re.findall(r"^ray==(\S+)$", constraints, re.MULTILINE)
    (torch,) = re.findall(r"^TORCH \?= torch==(\d[\d.]*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = (ROOT / "docker/training.Dockerfile").read_text()
    # The default for CPUs, and what is built for GPUs.
    for kind, given in (("cpu", "ARG "), ("gpu", "--build-arg ")):
        assert f"{given}RAY_IMAGE=rayproject/ray:{ray}-py311-{kind}" in text
    assert f"ARG TORCH=torch=={torch}\n" in text and text.count(f":ray{ray}-") == 2
    installed = set(re.findall(r"^        (?:\")?([a-z][\w -]*?)(?:\[[\w,]+\]\")? \\$", text, re.MULTILINE))
    wanted = {name for names in installed for name in names.split()}
    assert {"ray", "optuna", "xgboost", "mlflow-skinny", "s3fs"} <= wanted, wanted
    unpinned = {name for name in wanted if not re.search(rf"^{name}==", constraints, re.MULTILINE)}
    assert not unpinned


def test_no_image_names_the_package_index():
    """pip's own configuration may name a mirror."""
    for image in (ROOT / "docker").glob("*.Dockerfile"):
        text = image.read_text()
        assert " --index-url" not in text and not re.search(r"://\S*/simple\b", text)


@pytest.mark.parametrize("path", DAGS, ids=lambda path: path.stem)
def test_the_ray_of_an_example_is_the_images(path):
    (ray,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    text = path.read_text()
    assert f'"ray_version": "{ray}"' in text and f":ray{ray}-" in text


def test_the_role_is_what_the_hook_needs_and_no_more():
    documents = list(yaml.safe_load_all((ROOT / "docker/kubernetes/rbac.yaml").read_text()))
    roles = {entry["metadata"]["name"]: entry for entry in documents if entry["kind"] == "Role"}
    bindings = {entry["roleRef"]["name"] for entry in documents if entry["kind"] == "RoleBinding"}
    assert bindings == set(roles)
    given = {
        (group, resource, verb)
        for rule in roles["airflow-mlops-training"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert given == {(group, resource, verb) for group, resource, verbs in NEEDED_ACCESS for verb in verbs}
    assert "*" not in (ROOT / "docker/kubernetes/rbac.yaml").read_text()


def test_the_examples_come_with_the_package():
    assert importlib.import_module("airflow_mlops.example_dags").__doc__
    assert len(DAGS) == 3
