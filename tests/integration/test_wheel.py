"""The wheel carries the package and its entry point, and nothing else."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    # Built from a copy: setuptools leaves a build folder in the source tree.
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_it_carries_every_module_and_no_tests_or_dags(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "airflow_mlops").rglob("*.py")}
    assert here | {"airflow_mlops/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"airflow_mlops"}


def test_its_metadata_names_the_entry_point_and_a_bound_for_every_dependency(wheel):
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(entry).decode()
    assert "[apache_airflow_provider]\nprovider_info = airflow_mlops.get_provider_info:get_provider_info" in text
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = [
        line.removeprefix("Requires-Dist: ").split(";")[0].strip()
        for line in wheel.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "airflow-mlops[" not in line
    ]
    # Without lower bounds the resolver falls back to ancient versions of feast and mlflow.
    assert required and all(">=" in line or "==" in line for line in required), required
