"""Child processes of the embedded stack: started under a guard, recorded, and never left behind.

Each :class:`Service` runs in a session of its own under :mod:`airflow_mlops.embedded.guard`, writes its output to
``{root}/logs/{name}.log`` and its process id with start time to ``{root}/run/{name}.json``. A later start stops
what a crashed one left, but only when id and start time both match: process ids are used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from airflow_mlops.embedded import guard
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError

_START_TIME_TOLERANCE = 0.05  # seconds; the kernel counts start times in hundredths


class ServiceDiedError(ExternalSystemError):
    """A service of the stack ended by itself, or never became healthy; the message ends with its log."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """``count`` different TCP ports of 127.0.0.1 that nobody listens on now."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def require_free_port(port: int, what: str) -> int:
    """``port`` if nobody listens there.

    :param what: what would listen there, for the message
    :raises InvalidInputError: the port is taken; names the process where it can be seen
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InvalidInputError(
                f"port {port}, asked for {what}, cannot be used: {error.strerror}{_listener(port)}. Stop what uses "
                "it, choose another port, or give none and let a free one be picked."
            ) from None
    return port


def _listener(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" (process {connection.pid}, {psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def tail(path: str | os.PathLike[str], lines: int = 25) -> str:
    """The last ``lines`` lines of a text file; empty when there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 400 * lines))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def wait_until(probe: Callable[[], bool], *, timeout: float, interval: float = 0.1) -> bool:
    """Whether ``probe`` became true within ``timeout`` seconds; asked every ``interval`` seconds."""
    deadline = time.monotonic() + timeout
    while not probe():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


class Service:
    """One long-running child of the stack.

    :param name: for messages, the log file and the record
    :param command: program and arguments; secrets belong into ``env``, not here
    :param root: folder of the stack
    :param env: the child's whole environment
    :param grace: seconds between the stop signal and SIGKILL
    :param stop_signal: what asks the command to stop
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        root: Path,
        env: Mapping[str, str],
        grace: float = 5.0,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.env = dict(env)
        self.grace = grace
        self.stop_signal = stop_signal
        self.log = root / "logs" / f"{name}.log"
        self._record = root / "run" / f"{name}.json"
        self._cwd = root
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command under its guard; returns at once."""
        for folder in (self.log.parent, self._record.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as output:
            options = ["--grace", str(self.grace), "--signal", self.stop_signal.name]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, *options, "--", *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self._cwd,
                start_new_session=True,
            )
        record_process(self._record, self._process.pid)

    @property
    def pid(self) -> int | None:
        """Process id of the guard, whose children are the service; None when not started."""
        return self._process.pid if self._process else None

    def check(self) -> None:
        """:raises ServiceDiedError: the service has ended; the message shows the end of its log"""
        if self._process is not None and self._process.poll() is not None:
            raise ServiceDiedError(
                f"{self.name} ended by itself with exit status {self._process.returncode}. "
                f"The end of {self.log}:\n{tail(self.log)}"
            )

    def wait_healthy(self, probe: Callable[[], bool], *, timeout: float, interval: float = 0.1) -> None:
        """Wait until ``probe`` is true.

        :raises ServiceDiedError: the service ended, or ``timeout`` seconds passed
        """

        def alive_and_healthy() -> bool:
            self.check()
            return probe()

        if not wait_until(alive_and_healthy, timeout=timeout, interval=interval):
            raise ServiceDiedError(
                f"{self.name} is not healthy after {timeout:.0f} s. The end of {self.log}:\n{tail(self.log)}"
            )

    def wait_end(self, *, timeout: float) -> None:
        """Wait until the command has done its work and ended.

        :raises ServiceDiedError: it failed, or takes longer than ``timeout`` seconds
        """
        process = self._process
        if process is None:
            return
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            status = None
        if status != 0:
            problem = f"takes longer than {timeout:.0f} s" if status is None else f"ended with exit status {status}"
            raise ServiceDiedError(f"{self.name} {problem}. The end of {self.log}:\n{tail(self.log)}")
        self.stop()

    def ask_stop(self) -> None:
        """Begin to stop the service without waiting."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Stop the service and everything below it; does nothing when it is not running."""
        if self._process is None:
            return
        self.ask_stop()
        try:
            # The guard needs a moment to kill what is left after the grace.
            self._process.wait(self.grace + 5)
        except subprocess.TimeoutExpired:
            kill_tree(self._process.pid)
            self._process.wait(10)
        self._process = None
        self._record.unlink(missing_ok=True)


def record_process(path: Path, pid: int) -> None:
    """Write the identity of process ``pid``, id and start time, to ``path``."""
    try:
        created = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return
    path.write_text(json.dumps({"pid": pid, "created": created}))


def recorded_process(path: Path) -> psutil.Process | None:
    """The living process that ``path`` identifies; None when it is gone or its id belongs to another one now."""
    try:
        record = json.loads(path.read_text())
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["created"]) < _START_TIME_TOLERANCE
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def kill_tree(pid: int) -> None:
    """SIGKILL process ``pid`` and all below it, leaves last so that none is orphaned first."""
    for victim in [*guard.descendants(pid), pid]:
        with contextlib.suppress(OSError):
            os.kill(victim, signal.SIGKILL)


def stop_leftovers(root: Path, *, grace: float = 15.0) -> list[str]:
    """Stop the services that an earlier, crashed start in ``root`` left running; returns their names.

    :param grace: seconds given to each guard to stop its service
    """
    stopped = []
    for path in sorted((root / "run").glob("*.json")):
        process = recorded_process(path)
        if process is not None:
            stopped.append(path.stem)
            process.terminate()
            try:
                process.wait(grace)
            except psutil.TimeoutExpired:
                kill_tree(process.pid)
        path.unlink(missing_ok=True)
    return stopped


@contextlib.contextmanager
def folder_lock(root: Path) -> Iterator[IO[str]]:
    """Hold ``root`` for this process; the kernel lets go of it however the process ends.

    :raises InvalidInputError: another living process holds it
    """
    path = root / "run" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise InvalidInputError(
                f"another demo (process {file.read().strip() or 'unknown'}) is running in {root}. Wait for it, stop it "
                "with Ctrl-C, or give this one a folder of its own with --root."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


def memory_mb(pids: Sequence[int]) -> float:
    """Proportional set size of the processes ``pids`` and all below them, in MiB; shared pages count once."""
    total = 0
    for pid in pids:
        for member in [pid, *guard.descendants(pid)]:
            try:
                with open(f"/proc/{member}/smaps_rollup") as file:
                    total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
            except (OSError, StopIteration):
                continue
    return total / 1024
