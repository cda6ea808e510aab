"""How the driver is started on a Ray cluster: its command and its environment, the same for every way to submit it."""

from __future__ import annotations

import math
import shlex

from airflow_mlops.training.spec import TrainingSpec


def driver_command(spec_uri: str, python: str = "python") -> str:
    """The shell command that runs the driver.

    :param spec_uri: where the driver finds its spec
    :param python: Python interpreter on the cluster
    """
    # exec: what Ray stops is the driver itself, not a shell around it.
    return f"exec {shlex.quote(python)} -m airflow_mlops.training --spec {shlex.quote(spec_uri)}"


def driver_env(spec: TrainingSpec, stop_timeout: float) -> dict[str, str]:
    """Environment of the driver; what the user gives comes after it.

    :param stop_timeout: seconds that a stopped driver has to commit a checkpoint and end
    """
    threads = int((spec.resources_per_worker or {}).get("CPU", 1)) or 1
    return {
        # Ray kills a stopped job after 3 s unless told otherwise, which is too soon for a checkpoint.
        "RAY_JOB_STOP_WAIT_TIME_S": str(max(1, math.ceil(stop_timeout))),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }
