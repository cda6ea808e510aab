"""What the operator adds around a training of a minute on an existing Ray cluster.

The other side is Ray's own job submission client with the very command and environment that the operator submitted, on
the same cluster, in the same process. Both follow their job to its end: Ray's client by its log, the operator by looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from airflow_mlops.embedded import ray_head
from airflow_mlops.embedded.ray_head import RayHead

HERE = Path(__file__).resolve().parents[2]
SECONDS = 60
#: Seconds between two looks: a short one, and the operator's default.
INTERVALS = (1.0, 10.0)
SHARE = 0.05
LIMIT_SECONDS = 900


def measure() -> list[dict[str, object]]:
    """Wall seconds from the call to the result, on both sides."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        root, token = Path(folder), "token-of-the-benchmark"
        foreign = ("AIRFLOW", "RAY_", "MLFLOW_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        env["PYTHONPATH"] = str(HERE)
        head = RayHead(root, env=env, token=token, num_cpus=4)
        head.start()
        try:
            head.wait_healthy(240)
            connection = {"conn_type": "ray", "host": "127.0.0.1", "port": head.dashboard_port, "password": token}
            env |= {**RayHead.client_env(token), "AIRFLOW_HOME": str(root / "airflow")}
            env |= {"AIRFLOW_CONN_RAY_DEFAULT": json.dumps({**connection, "schema": "http"})}
            done = subprocess.run(
                [sys.executable, "-m", "tests.bench.overhead", head.dashboard_url, str(root / "runs")],
                env=env,
                cwd=root,
                capture_output=True,
                text=True,
                timeout=LIMIT_SECONDS,
            )
        finally:
            head.stop()
            ray_head.remove_files(root)
    if done.returncode:
        raise RuntimeError(f"the training failed:\n{done.stderr[-4000:]}")
    return _rows(json.loads(done.stdout.splitlines()[-1]))


def _rows(timed: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    plain = timed["plain"]

    def row(what: str, mine: float, theirs: float, goal: str = "", met: bool | str = "") -> dict[str, object]:
        return {
            "what": what,
            "ours": round(mine, 2),
            "otherwise": round(theirs, 2),
            # Of nearly nothing any multiple is possible and says nothing.
            "ratio": "" if theirs < 0.5 else round(mine / theirs, 3),
            "against": "the same command and environment by ray.job_submission.JobSubmissionClient, same cluster",
            "goal": goal,
            "met": met,
        }

    rows = []
    for interval in INTERVALS:
        ours = timed[f"{interval}"]
        # The end is seen at the next look: that is the constant.
        most = plain["wall"] * (1 + SHARE) + interval
        goal = f"under {SHARE:.0%} + {interval:.0f} s"
        rows += [
            row(f"a training of {SECONDS} s, poll_interval={interval:.0f}, s", ours["wall"], plain["wall"], goal)
            | {"met": ours["wall"] < most},
            row("... until Ray has the job, s", ours["before"], plain["before"]),
            row("... from the job's end to the result, s", ours["after"], plain["after"]),
        ]
    return rows


class _Task:
    """What the operator uses of a task instance."""

    dag_id, task_id, run_id, map_index, try_number = "bench", "train", "run", -1, 1

    def xcom_push(self, key: str, value: object) -> None:
        """Nobody reads it."""


def _operator(storage: str, run_key: str, command: str, interval: float) -> tuple[float, float]:
    from airflow_mlops.operators.ray import RayTrainOperator

    operator = RayTrainOperator(
        task_id="train",
        mode="jobs",
        entrypoint=command,
        storage_path=storage,
        run_key=run_key,
        poll_interval=interval,
        deferrable=False,
    )
    context: Any = {"ti": _Task()}
    begin = time.time()
    outcome = operator.execute(context)
    end = time.time()
    assert outcome["status"] == "SUCCEEDED", outcome
    return begin, end


def _plain(client: Any, entrypoint: str, runtime_env: dict[str, Any] | None) -> tuple[str, float, float]:
    async def follow(name: str) -> None:
        async for _ in client.tail_job_logs(name):
            pass

    begin = time.time()
    name = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
    asyncio.run(follow(name))
    status = client.get_job_status(name)
    end = time.time()
    assert status == "SUCCEEDED", (status, client.get_job_logs(name))
    return name, begin, end


def _timed(info: Any, begin: float, end: float) -> dict[str, float]:
    return {"wall": end - begin, "before": info.start_time / 1000 - begin, "after": end - info.end_time / 1000}


def _both(address: str, storage: str) -> dict[str, dict[str, float]]:
    from ray.job_submission import JobSubmissionClient

    from airflow_mlops.training.runs import begin_attempt
    from airflow_mlops.training.spec import TrainingSpec, submission_id_of

    client = JobSubmissionClient(address)
    command, timed = f"sleep {SECONDS}", {}
    # What is slow the first time only is not counted, and what the operator submits is what the other side submits.
    _operator(storage, "first", "true", 0.5)
    first = TrainingSpec.from_json(json.loads((Path(storage) / "first" / "_mlops" / "spec-a1.json").read_text()))
    job = client.get_job_info(submission_id_of(first))
    uri = begin_attempt(replace(first, run_key="plain", entrypoint=command))
    entrypoint, count = re.subn(r"--spec .*", lambda _: f"--spec {uri}", job.entrypoint)
    assert count == 1, job.entrypoint
    name, begin, end = _plain(client, entrypoint, job.runtime_env)
    timed["plain"] = _timed(client.get_job_info(name), begin, end)
    for interval in INTERVALS:
        run = replace(first, run_key=f"every-{interval:.0f}-s")
        begin, end = _operator(storage, run.run_key, command, interval)
        timed[f"{interval}"] = _timed(client.get_job_info(submission_id_of(run)), begin, end)
    return timed


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        measured = _both(*sys.argv[1:])
    print(json.dumps(measured))
