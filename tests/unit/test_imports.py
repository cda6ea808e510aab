"""Parsing is free: no module that a Dag file imports loads a heavy library."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

import airflow_mlops

PACKAGE = pathlib.Path(airflow_mlops.__file__).parent
#: They extend the stock Kubernetes hook, which loads Kubernetes' clients, so no Dag file may lead to them.
ACTING = {
    "airflow_mlops.hooks._kubernetes_connection",
    "airflow_mlops.hooks.kubernetes",
    "airflow_mlops.hooks.kuberay",
    "airflow_mlops.operators._kuberay",
}
SHELL = [
    ".".join(("airflow_mlops", *path.relative_to(PACKAGE).with_suffix("").parts))
    for room in ("hooks", "operators", "sensors", "triggers", "decorators", "notifications")
    for path in sorted((PACKAGE / room).glob("*.py"))
    if path.stem != "__init__"
] + [f"airflow_mlops.{name}" for name in ("approval", "assets", "links", "shell", "windows")]
FREE = [name for name in SHELL if name not in ACTING]
HEAVY = {
    "ray",
    "mlflow",
    "feast",
    "evidently",
    "pandas",
    "numpy",
    "scipy",
    "sklearn",
    "matplotlib",
    "pyarrow",
    "duckdb",
    "kubernetes",
    "kubernetes_asyncio",
    "boto3",
    "dvc",
    "dvc_data",
    "torch",
    "xgboost",
    "lightgbm",
    "aiohttp",
    "requests",
    "fsspec",
}


def loaded(code: str) -> set[str]:
    """The top-level names of the modules in a fresh process after ``code``."""
    report = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    command = [sys.executable, "-W", "error::DeprecationWarning:airflow_mlops", "-c", f"{code}\n{report}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def airflow_alone() -> set[str]:
    return loaded("import airflow.sdk, airflow.triggers.base, airflow.sdk.bases.decorator")


@pytest.mark.parametrize("room", ["all", *("operators", "sensors", "triggers")])
def test_no_heavy_library_is_loaded(room, airflow_alone):
    modules = FREE if room == "all" else [name for name in FREE if f".{room}." in name]
    added = loaded("import airflow.sdk, airflow.triggers.base\n" + "\n".join(f"import {name}" for name in modules))
    heavy = (added - airflow_alone) & HEAVY
    assert not heavy


def test_what_is_excepted_is_there_and_its_reason_holds():
    assert set(SHELL) >= ACTING
    imports = "\n".join(f"import {name}" for name in sorted(ACTING))
    assert "kubernetes" in loaded(imports)


def test_the_core_runs_without_airflow():
    rooms = ["drift", "evaluation", "rollout", "training", "features", "provenance"]
    assert "airflow" not in loaded("\n".join(f"import airflow_mlops.{room}" for room in rooms))
