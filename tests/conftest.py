"""Every test gets an Airflow home of its own and quiet, offline libraries, set before anything is imported."""

from __future__ import annotations

import os
import tempfile

_home = tempfile.mkdtemp(prefix="airflow-mlops-test-")
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
