"""What the embedded server imports before it forks: it must leave nothing behind that a fork would break."""

from __future__ import annotations

import json
import subprocess
import sys

from airflow_mlops.embedded import airflow_server

_CODE = """
import gc, json, sys, threading
from airflow_mlops.embedded import airflow_server
airflow_server._import_for_tasks(lambda: False)
print(json.dumps({
    "threads": [thread.name for thread in threading.enumerate()],
    "modules": [name for name in ("pandas", "mlflow", "feast", "evidently", "ray") if name in sys.modules],
    "frozen": gc.get_freeze_count(),
}))
"""


def test_the_libraries_of_tasks_start_no_thread_and_no_ray():
    run = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["threads"] == ["MainThread"]
    assert found["modules"] == ["pandas", "mlflow", "feast", "evidently"]
    assert found["frozen"] > 100_000


def test_a_library_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(airflow_server, "_LIBRARIES_OF_TASKS", ("no_such_library", "this"))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    monkeypatch.setattr(airflow_server.gc, "freeze", lambda: None)
    airflow_server._import_for_tasks(lambda: False)
    assert "this" in sys.modules


def test_a_server_that_is_asked_to_stop_imports_no_more(monkeypatch):
    monkeypatch.setattr(airflow_server, "_LIBRARIES_OF_TASKS", ("this",))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    airflow_server._import_for_tasks(lambda: True)
    assert "this" not in sys.modules
