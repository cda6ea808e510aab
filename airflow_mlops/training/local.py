"""The driver as a child process of this one, with a Ray of its own; nothing of it outlives this process."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping

from airflow_mlops.training.decide import Observation
from airflow_mlops.training.fence import start_time
from airflow_mlops.training.spec import TrainingSpec

log = logging.getLogger(__name__)

#: Environment variable that marks the driver and all it has started.
MARK = "AIRFLOW_MLOPS_DRIVER"
TAIL = 200


class LocalRunner:
    """Runs attempts one at a time.

    :param on_line: called with every line the driver writes, from a thread
    :param env: additional environment of the driver and its workers
    :param stop_grace: seconds a stopped driver has before it is killed
    """

    def __init__(
        self, on_line: Callable[[str], None], env: Mapping[str, str] | None = None, stop_grace: float = 15.0
    ) -> None:
        self._on_line, self._env, self._stop_grace = on_line, dict(env or {}), stop_grace
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=TAIL)
        self._mark = self._temporary = ""
        self._stopped = False

    def start(self, spec: TrainingSpec, spec_uri: str) -> bool:
        """Start the driver of one attempt; True, for its name is new."""
        self._mark, self._lines, self._stopped = uuid.uuid4().hex, deque(maxlen=TAIL), False
        # Ray's sockets lie below it and their paths must be short.
        self._temporary = tempfile.mkdtemp(prefix="ray-")
        threads = int((spec.resources_per_worker or {}).get("CPU", 1)) or 1
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_COLOR_PREFIX": "0",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(_import_path()),
            "PYTHONUNBUFFERED": "1",
            "RAY_TMPDIR": self._temporary,
            MARK: self._mark,
            **self._env,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "airflow_mlops.training", "--spec", spec_uri, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="driver-log", daemon=True)
        self._reader.start()
        return True

    def wait(self, spec: TrainingSpec, give_up: Callable[[], bool] = lambda: False) -> Observation:
        """Wait for the driver to end; whatever it leaves running is ended too.

        :param give_up: asked again and again; true ends the driver
        """
        process = self._process
        if process is None:
            return Observation("STOPPED", message="The task was killed.")
        try:
            # Not process.wait(): stop() may be called from a signal handler in the middle of it, and its lock is held.
            while start_time(process.pid) is not None and not give_up():
                time.sleep(0.2)
        finally:
            stopped = self._stopped
            self.stop()
        code = process.wait()
        if stopped:
            return Observation("STOPPED", code, "The task was killed.")
        if code == 0:
            return Observation("SUCCEEDED", 0)
        if code < 0:
            return Observation("LOST", code, f"The driver was killed by {signal.Signals(-code).name}.")
        return Observation("FAILED", code)

    def stop(self, spec: TrainingSpec | None = None) -> None:
        """End the driver and all it has started: first by asking, then by force. Harmless when nothing runs."""
        process, self._process = self._process, None
        if process is None:
            return
        self._stopped = True
        if start_time(process.pid) is not None:
            os.kill(process.pid, signal.SIGTERM)
            if not _gone(process.pid, self._stop_grace):
                os.kill(process.pid, signal.SIGKILL)
                _gone(process.pid, 5.0)
        end_marked(self._mark, patience=5.0)
        self._reader.join(timeout=5.0)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def tail(self, spec: TrainingSpec) -> str:
        """The last lines of the driver's log."""
        return "\n".join(self._lines)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                self._lines.append(line.rstrip("\n"))
                self._on_line(line.rstrip("\n"))
        except ValueError:
            return  # closed by stop()


def end_marked(mark: str, patience: float) -> int:
    """Wait ``patience`` seconds for all processes with this mark to end, then kill them; returns how many were."""
    deadline = time.monotonic() + patience
    while processes := _marked(mark):
        if time.monotonic() >= deadline:
            for process in processes:
                log.warning("killing process %d (%s), left behind by a driver", process.pid, process.name())
                process.kill()
            return len(processes)
        time.sleep(0.1)
    return 0


def _gone(pid: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while start_time(pid) is not None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def _marked(mark: str) -> list:
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _import_path() -> list[str]:
    # A training loop beside the Dags is importable in the worker by sys.path alone.
    own = (sys.prefix, sys.base_prefix)
    return [path for path in sys.path if path and not path.startswith(own)]
