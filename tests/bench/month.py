"""One month of the flights Dag under the real embedded Airflow against the same steps as a plain script.

Both sides run here one after the other, on one Ray, from the same state: that which the first month left behind.
Airflow is stopped before the script starts, so that it does not slow it down.
"""

from __future__ import annotations

import ast
import contextlib
import datetime as dt
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from airflow_mlops.embedded import guard
from airflow_mlops.embedded.months import MonthRunner
from airflow_mlops.embedded.ray_head import RayHead
from airflow_mlops.embedded.stack import Stack, load_secrets
from airflow_mlops.examples.flights import CALENDAR_BOUND, HARM
from airflow_mlops.examples.flights.source import month_window
from airflow_mlops.sensors._drift_report import PAGE_COLUMNS

HERE = Path(__file__).resolve().parents[2]
DAG = HERE / "dags" / "continuous_training.py"
BOOTSTRAP, MONTH = "2013-03", "2013-04"
MONTHS = ["2013-01", "2013-02", BOOTSTRAP, MONTH]
GOAL = 1.5
LIMIT_SECONDS = 1800
CHAIN = 10
_CHAIN_DAG = f"""
from airflow.sdk import DAG, chain, task

with DAG("trivial_chain", schedule=None):

    @task
    def nothing():
        return 1

    chain(*[nothing.override(task_id=f"task_{{number}}")() for number in range({CHAIN})])
"""
# The plain script does both at once, as the operator and its traffic do.
_TOGETHER = {"release.replay": "release.canary", "release.freeze_first": "release.promote"}


def measure() -> list[dict[str, object]]:
    """Wall seconds of a month and its steps on both sides, Airflow's constant, memory, start-up."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        dags = root / "dags"
        dags.mkdir()
        shutil.copy(DAG, dags)
        (dags / "chain.py").write_text(_CHAIN_DAG)
        stack = Stack(root / "stack", dags_folder=dags, feature_repo=HERE / "feature_repo")
        begin = time.monotonic()
        with stack:
            started = time.monotonic() - begin
            ours = _airflow_month(stack)
            job = _job(stack, root / "plain")
            stack.airflow.stop()
            if stack.postgres is not None:
                stack.postgres.stop()
            plain = _plain_month(stack, job)
    return _rows(started, ours, plain)


def _airflow_month(stack: Stack) -> dict[str, Any]:
    _run_months(stack, [BOOTSTRAP])
    constant = _constant(stack)
    # What the plain side starts from.
    shutil.copytree(stack.project, stack.root / "before", ignore=shutil.ignore_patterns("runs", "dvc_remote"))
    cpu = _cpu_seconds(stack)
    with _peak_memory(stack) as memory:
        _run_months(stack, [MONTH])
    cpu = _cpu_seconds(stack) - cpu
    client = stack.client()
    run = next(r for r in client.runs("continuous_training") if r["data_interval_start"].startswith(MONTH))
    tasks = client.task_instances("continuous_training", run["dag_run_id"])
    ran = {task["task_id"]: task["duration"] for task in tasks if task["state"] == "success"}
    return {
        "wall": _instant(run["end_date"]) - _instant(run["start_date"]),
        "cpu": cpu,
        "seconds": ran,
        "constant": constant,
        "memory": max(memory),
        "promoted": "release.promote" in ran,
    }


def _run_months(stack: Stack, months: list[str]) -> None:
    runner = MonthRunner(
        stack.client(),
        "continuous_training",
        months,
        on_update=lambda states: None,
        check=stack.check,
        timeout=LIMIT_SECONDS,
    )
    runner.run()


def _constant(stack: Stack) -> float:
    """Seconds of a task that does nothing, from a chain of them: scheduling, a process, the Dag file, the result."""
    client = stack.client()
    client.pause("trivial_chain", False)
    seconds = []
    for _ in range(2):
        body = {"logical_date": None}
        run_id = client.call("POST", "/dags/trivial_chain/dagRuns", json=body)["dag_run_id"]
        while True:
            run = next(r for r in client.runs("trivial_chain") if r["dag_run_id"] == run_id)
            if run["state"] in ("success", "failed"):
                break
            time.sleep(0.5)
        seconds.append((_instant(run["end_date"]) - _instant(run["start_date"])) / CHAIN)
    return min(seconds)


def _job(stack: Stack, root: Path) -> dict[str, Any]:
    """What the plain script is told; policies come from the Dag's own file."""
    from mlflow import MlflowClient

    assert stack.ray is not None
    shutil.copytree(stack.root / "before", root)
    version = MlflowClient(stack.tracking_uri).get_model_version("flights_delay", "1")
    trained = json.loads((root / "ledger" / f"{BOOTSTRAP}.json").read_text())["training"]
    window = month_window(MONTH)
    serve_url = json.loads(stack.env["AIRFLOW_CONN_RAY_DEFAULT"])["extra"]["serve_url"]
    return {
        "root": str(root),
        "repo": str(HERE / "feature_repo"),
        "report": str(root.with_suffix(".json")),
        "tracking_uri": f"sqlite:///{root}.db",
        "ray_address": stack.ray.address,
        "dashboard_url": stack.ray.dashboard_url,
        "serve_url": serve_url,
        "months": MONTHS,
        "window_start": window.start.isoformat(),
        "window_end": window.end.isoformat(),
        "train_start": f"{MONTHS[0]}-01",
        "holdout_start": (window.end - dt.timedelta(days=7)).isoformat(),
        "champion_dir": trained["model_uri"],
        "profile": version.tags["mlops.profile_uri"].removeprefix("file://"),
        "loss_reference": version.tags["mlops.loss_reference_uri"].removeprefix("file://"),
        "page_columns": PAGE_COLUMNS,
        "rounds": 150,
        "num_workers": 2,
        "gate": _argument("ModelGateOperator", "policy"),
        "rollout": {"steps": [10, 50, 100], "deadline_seconds": 600},
        "calendar_bound": CALENDAR_BOUND,
        "harm": HARM,
        "guardrails": _constant_of_dag("GUARDRAILS"),
    }


def _constant_of_dag(name: str) -> Any:
    for node in ast.parse(DAG.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    raise LookupError(f"{DAG} has no constant {name}")


def _argument(operator: str, name: str) -> Any:
    for node in ast.walk(ast.parse(DAG.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == operator:
            return next(ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg == name)
    raise LookupError(f"{DAG} has no {operator}")


def _plain_month(stack: Stack, job: dict[str, Any]) -> dict[str, Any]:
    assert stack.ray is not None
    path = Path(job["report"]).with_name("job.json")
    path.write_text(json.dumps(job))
    # The environment of the tasks: the same thread counts and telemetry settings.
    env = {name: value for name, value in stack.env.items() if not name.startswith("AIRFLOW")}
    env |= {**RayHead.client_env(load_secrets(stack.root)["ray"]), "MLOPS_ROOT": job["root"]}
    env |= {"MLFLOW_TRACKING_URI": job["tracking_uri"], "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "tests.bench.plain"]

    def script(phase: str) -> float:
        begin = time.monotonic()
        done = subprocess.run(
            [*command, phase, str(path)], env=env, cwd=stack.root, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
        if done.returncode:
            raise RuntimeError(f"the plain script failed in {phase}:\n{done.stderr[-4000:]}")
        return time.monotonic() - begin

    script("prepare")
    cpu = _cpu_seconds(stack)
    wall = script("run")
    report = json.loads(Path(job["report"]).read_text())
    return {**report, "wall": wall, "cpu": report["cpu"] + _cpu_seconds(stack) - cpu}


def _cpu_seconds(stack: Stack) -> float:
    """Processor time of all that the stack runs or has run, as far as its end was noted by a parent."""
    ticks = 0
    for part in (stack._airflow and stack._airflow.service, stack.ray and stack.ray.service, stack.postgres):
        pid = getattr(part, "pid", None) or getattr(getattr(part, "service", None), "pid", None)
        for member in [pid, *guard.descendants(pid)] if pid else []:
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(int(value) for value in stat[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _peak_memory(stack: Stack) -> Iterator[list[float]]:
    """MiB of the stack, every few seconds."""
    seen: list[float] = [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(3):
            seen.append(sum(stack.memory_mb().values()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _instant(text: str) -> float:
    return dt.datetime.fromisoformat(text).timestamp()


def _rows(started: float, ours: dict[str, Any], plain: dict[str, Any]) -> list[dict[str, object]]:
    against = "the same steps and libraries as one script, without Airflow, on the same Ray"

    def row(what: str, mine: float, theirs: float | None = None, goal: str = "", met: bool | str = "") -> dict:
        return {
            "what": what,
            "ours": round(mine, 2),
            "otherwise": "" if theirs is None else round(theirs, 2),
            # Of nearly nothing any multiple is possible and says nothing.
            "ratio": "" if theirs is None or theirs < 0.5 else round(mine / theirs, 2),
            "against": against if theirs is not None else "",
            "goal": goal,
            "met": met,
        }

    count = len(ours["seconds"])
    own = ours["constant"] * count
    ratio = ours["wall"] / plain["wall"]
    load = os.getloadavg()[1]
    rows = [
        row("the stack is healthy, s", started),
        row(f"one month ({MONTH}), s", ours["wall"], plain["wall"], f"at most {GOAL} times", ratio <= GOAL),
        row(f"... less Airflow's own for {count} tasks, s", ours["wall"] - own, plain["wall"]),
        row("... processor time, s", ours["cpu"], plain["cpu"]),
        row("Airflow's own for each task, s", ours["constant"]),
        row("memory at the peak, MiB", ours["memory"], goal="at most 6144", met=ours["memory"] <= 6144),
        row("load of the machine while it was measured", load),
    ]
    if ours["promoted"] != plain["promoted"]:
        rows.append({"what": "NOT COMPARABLE: one side promoted the challenger, the other did not"})
    # Tasks that run side by side count once: with what the script does at once.
    seconds = {name: value for name, value in ours["seconds"].items() if name not in _TOGETHER}
    for name, value in plain["seconds"].items():
        rows.append(row(f"step {name}, s", seconds.get(name, 0.0), value))
    return rows
