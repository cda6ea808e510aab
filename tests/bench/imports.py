"""What importing every operator module adds to a Dag file, beyond ``airflow.sdk``."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

MODULES = [
    *(f"airflow_mlops.operators.{name}" for name in ("canary", "dvc", "feast", "gate", "mlflow", "ray")),
    "airflow_mlops.sensors.drift",
]
# What a user would otherwise import at the top of the Dag file to do the same work.
LIBRARIES = ["ray", "mlflow", "feast", "evidently", "dvc.api"]

_CODE = """
import json, sys, time
import airflow.sdk, airflow.sdk.bases.sensor
cpu, modules = time.process_time(), len(sys.modules)
for name in {names!r}:
    __import__(name)
print(json.dumps([1000 * (time.process_time() - cpu), len(sys.modules) - modules]))
"""


def _milliseconds(names: list[str], repeats: int) -> float:
    def once() -> float:
        run = subprocess.run(
            [sys.executable, "-c", _CODE.format(names=names)], capture_output=True, text=True, check=True
        )
        return json.loads(run.stdout.splitlines()[-1])[0]

    once()  # the first run writes the bytecode
    return statistics.median(once() for _ in range(repeats))


def measure() -> list[dict[str, object]]:
    """CPU milliseconds in a fresh process, median."""
    ours, theirs = _milliseconds(MODULES, 7), _milliseconds(LIBRARIES, 3)
    return [
        {
            "what": "import every operator module, CPU ms beyond airflow.sdk",
            "ours": round(ours, 1),
            "otherwise": round(theirs, 1),
            "ratio": round(ours / theirs, 3),
            "against": "importing ray, mlflow, feast, evidently and dvc at the top of the Dag file",
            "goal": "under 50 ms",
            "met": ours < 50,
        }
    ]
