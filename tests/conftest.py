"""Every test gets an Airflow home of its own and quiet, offline libraries, set before anything is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

_home = tempfile.mkdtemp(prefix="airflow-mlops-test-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ.update(
    AIRFLOW_HOME=_home,
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{_home}/airflow.db",
    DO_NOT_TRACK="1",
    FEAST_USAGE="False",
    GIT_PYTHON_REFRESH="quiet",
    MLFLOW_DISABLE_TELEMETRY="true",
    RAY_USAGE_STATS_ENABLED="0",
    # Ray on one machine: it listens on the loopback address only.
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    DVC_NO_ANALYTICS="1",
)


@pytest.fixture
def s3(monkeypatch) -> Iterator[Any]:
    """A boto3 client of an S3 with the bucket ``runs``; the environment leads every other client there too."""
    boto3 = pytest.importorskip("boto3")
    s3fs = pytest.importorskip("s3fs", reason="storage on S3 needs: pip install 'airflow-mlops[s3]'")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        values = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
        for name, value in {**values, "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        s3fs.S3FileSystem.clear_instance_cache()
        # All servers of a process share what is in them.
        pytest.importorskip("requests").post(f"http://{host}:{port}/moto-api/reset", timeout=10).raise_for_status()
        client = boto3.client("s3")
        client.create_bucket(Bucket="runs")
        yield client
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


@pytest.fixture(scope="session")
def isolation() -> None:
    """Skips what needs a process that is kept apart, on a machine that cannot do so."""
    from airflow_mlops.provenance.sandbox import ALL, available

    if missing := sorted(set(ALL) - set(available())):
        pytest.skip(f"the kernel lacks what keeps {', '.join(missing)} from a process (seccomp, Landlock)")
