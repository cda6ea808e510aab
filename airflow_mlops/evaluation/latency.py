"""How long a single prediction takes, measured in a process of its own as a server would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd

WARM_UP = 20


def measure(
    model_dir: str | Path,
    frame: pd.DataFrame,
    features: Sequence[str] | None = None,
    calls: int = 200,
    limit: float = 300,
) -> dict[str, Any]:
    """Load the model in a fresh process, warm up, and time single-row predictions.

    :param model_dir: the MLflow model's folder
    :param frame: rows to predict, one a call, cycled through
    :param features: as of :func:`airflow_mlops.evaluation.scorer.predict_proba`
    :param calls: predictions to time, after a warm-up
    :param limit: seconds after which the process is given up
    :return: ``p50_ms``, ``p95_ms``, ``p99_ms``, ``calls``, ``load_seconds`` (the model's load, libraries not
        counted), ``memory_mib`` (the process's greatest resident size)
    :raises InvalidInputError: the model cannot be loaded or does not answer in time
    """
    with tempfile.TemporaryDirectory(prefix="gate-latency-") as folder:
        rows = Path(folder) / "rows.parquet"
        frame.head(calls).to_parquet(rows, index=False)
        job = {"model": str(model_dir), "rows": str(rows), "features": list(features or ()), "calls": calls}
        command = [sys.executable, "-m", "airflow_mlops.evaluation.latency", json.dumps(job)]
        # The model's own code must not see what the task may: no Airflow or MLflow settings go along.
        secret = ("AIRFLOW_", "MLFLOW_", "AWS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(secret)}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        except subprocess.TimeoutExpired:
            raise InvalidInputError(f"the model in {model_dir} made no {calls} predictions in {limit:.0f} s") from None
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise InvalidInputError(f"the model in {model_dir} fails in a fresh process:\n{tail}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(job: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process does; ``job`` as :func:`measure` writes it."""
    import mlflow.pyfunc  # noqa: F401  its import is no part of the model's load
    import numpy as np
    import pandas as pd

    from airflow_mlops.evaluation.scorer import load, prepare

    begun = time.perf_counter()
    model = load(job["model"], allow_pickle=job.get("allow_pickle", False))
    loaded = time.perf_counter() - begun
    call, inputs = prepare(model, pd.read_parquet(job["rows"]), job["features"])
    single = [inputs.iloc[i : i + 1] for i in range(len(inputs))]
    seconds = np.empty(job["calls"])
    for i in range(-WARM_UP, job["calls"]):
        row = single[i % len(single)]
        start = time.perf_counter()
        call(row)
        if i >= 0:
            seconds[i] = time.perf_counter() - start
    p50, p95, p99 = (float(value) for value in np.percentile(seconds * 1000, [50, 95, 99]))
    return {
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "calls": job["calls"],
        "load_seconds": loaded,
        "memory_mib": _peak_memory() / 2**20,
    }


def _peak_memory() -> int:
    """Greatest resident size of this process, bytes."""
    try:
        # Linux hands ru_maxrss down from the process that started this one, however large that was.
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
