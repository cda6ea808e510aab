"""What Airflow reads while it starts: one wrong key there stops every Airflow command."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import jsonschema
import pytest

from airflow_mlops.get_provider_info import get_provider_info

INFO = get_provider_info()


def test_it_fits_airflows_own_schema():
    import airflow

    schema = json.loads((pathlib.Path(airflow.__file__).parent / "provider_info.schema.json").read_text())
    jsonschema.validate(INFO, schema)


def test_the_entry_point_names_it():
    entries = importlib.metadata.entry_points(group="apache_airflow_provider")
    (entry,) = (entry for entry in entries if entry.value.startswith("airflow_mlops"))
    assert entry.load()() == INFO


def test_reading_it_imports_nothing_of_airflow():
    code = "import sys, airflow_mlops.get_provider_info as g; g.get_provider_info(); print('airflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("kind", ["operators", "sensors", "hooks", "triggers"])
def test_every_module_of_the_package_is_named_and_every_named_one_exists(kind):
    named = {module for entry in INFO[kind] for module in entry["python-modules"]}
    folder = pathlib.Path(importlib.import_module(f"airflow_mlops.{kind}").__file__).parent
    there = {f"airflow_mlops.{kind}.{path.stem}" for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert named == there
    known = {entry["integration-name"] for entry in INFO["integrations"]}
    assert {entry["integration-name"] for entry in INFO[kind]} <= known


@pytest.mark.parametrize("connection", INFO["connection-types"], ids=lambda c: c["connection-type"])
def test_each_connection_type_has_a_hook_that_can_be_tested(connection):
    module, name = connection["hook-class-name"].rsplit(".", 1)
    hook = getattr(importlib.import_module(module), name)
    assert hook.conn_type == connection["connection-type"]
    assert hook.hook_name == connection["hook-name"]
    # A kuberay connection is a Kubernetes connection with a form of its own: without one Kubernetes' default counts.
    assert hook.default_conn_name in (f"{hook.conn_type}_default", "kubernetes_default")
    assert (hook.default_conn_name == "kubernetes_default") == (hook.conn_type == "kuberay")
    assert callable(hook.test_connection)
    for field in connection["conn-fields"].values():
        jsonschema.Draft7Validator.check_schema(field["schema"])


def test_the_form_of_kuberay_has_the_fields_that_its_hook_reads(monkeypatch):
    from airflow.providers.cncf.kubernetes.get_provider_info import get_provider_info as stock_info

    from airflow_mlops.hooks.kubernetes import CustomResourceHook

    (own,) = (entry for entry in INFO["connection-types"] if entry["connection-type"] == "kuberay")
    (stock,) = (entry for entry in stock_info()["connection-types"] if entry["connection-type"] == "kubernetes")
    known = {name: field["schema"]["type"] for name, field in stock["conn-fields"].items()}
    assert {name: field["schema"]["type"] for name, field in own["conn-fields"].items()}.items() <= known.items()
    extra = {"in_cluster": False, "namespace": "ml-training"}
    monkeypatch.setenv("AIRFLOW_CONN_KUBE", json.dumps({"conn_type": "kuberay", "extra": extra}))
    assert CustomResourceHook("kube").namespace_of() == "ml-training"


def test_the_form_of_ray_has_the_fields_that_its_endpoint_reads():
    import airflow_mlops.hooks._ray_endpoint as endpoint

    (ray,) = (entry for entry in INFO["connection-types"] if entry["connection-type"] == "ray")
    read = set(re.findall(r'extra\.get\("(\w+)"\)', pathlib.Path(endpoint.__file__).read_text()))
    assert set(ray["conn-fields"]) == read


def test_the_links_the_notifier_and_the_decorator_are_classes_that_exist():
    for path in [
        *INFO["extra-links"],
        *INFO["notifications"],
        *(entry["class-name"] for entry in INFO["task-decorators"]),
    ]:
        module, name = path.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), name))


def test_airflow_lists_the_provider_with_its_hooks_and_decorator():
    from airflow.providers_manager import ProvidersManager
    from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime

    manager, runtime = ProvidersManager(), ProvidersManagerTaskRuntime()
    assert "airflow-mlops" in manager.providers
    assert {"ray", "kuberay", "feast", "mlflow", "dvc_remote"} <= set(runtime.hooks)
    assert "ray_train" in runtime.taskflow_decorators
    assert "airflow_mlops.links.RayDashboardLink" in manager.extra_links_class_names
    assert any("DriftNotifier" in str(entry) for entry in manager.notification)


def test_the_config_section_has_defaults():
    from airflow.sdk.configuration import conf

    default = INFO["config"]["mlops"]["options"]["root"]["default"]
    assert conf.get("mlops", "root") == os.path.expanduser(default)
