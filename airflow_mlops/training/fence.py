"""One driver per run directory: ``{run_dir}/_mlops/owner.json``, held by a heartbeat.

Two drivers on one Ray Train directory would both report success and the last writer would win, without an error.
On one machine an owner is alive if the process with its id and start time is; on another one, while its
heartbeat is younger than :data:`STALE_AFTER`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import ConcurrentChangeError
from airflow_mlops.training.decide import Observation
from airflow_mlops.training.result import Usage
from airflow_mlops.training.spec import TrainingSpec

log = logging.getLogger(__name__)

HEARTBEAT = 5.0
STALE_AFTER = 60.0
#: Seconds in which a competing write to an object store without compare-and-swap becomes visible.
SETTLE = 1.0


def this_host() -> str:
    """Names this process table: two containers with one host name have different ones."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def start_time(pid: int) -> float | None:
    """When process ``pid`` started, None if there is none (or it only waits to be reaped)."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


@dataclass(frozen=True)
class Owner:
    """The driver that works in a run directory.

    :param token: drawn by the driver; tells apart two of one attempt
    :param host: of :func:`this_host`
    :param pid: its process id there
    :param started: when that process started
    :param attempt: which attempt it is
    :param heartbeat: Unix time of its last sign of life
    :param released: whether it has said goodbye
    :param usage: consumed by the run so far, this attempt included
    """

    token: str
    host: str
    pid: int
    started: float
    attempt: int
    heartbeat: float
    released: bool = False
    usage: Usage = field(default_factory=Usage)

    def to_json(self) -> dict[str, Any]:
        """Plain types, for :meth:`from_json`."""
        return {**vars(self), "usage": vars(self.usage)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Owner:
        """The owner behind ``to_json()``."""
        return cls(**{**value, "usage": Usage(**value["usage"])})

    def alive(self, now: float) -> bool:
        """Whether the driver may still be writing, at Unix time ``now``."""
        if self.released:
            return False
        if self.host == this_host():
            started = start_time(self.pid)
            return started is not None and abs(started - self.started) < 1.0
        return now - self.heartbeat < STALE_AFTER


def read_owner(spec: TrainingSpec) -> Owner | None:
    """Who works, or last worked, in the run's directory; None if nobody has."""
    try:
        return Owner.from_json(storage.read_json(spec.file("owner.json")))
    except FileNotFoundError:
        return None


def wait_until_free(
    spec: TrainingSpec,
    patience: float,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Owner | None:
    """Wait until no driver works in the run's directory; returns the last one that did.

    :param patience: seconds to wait
    :raises ConcurrentChangeError: one still does
    """
    deadline = clock() + patience
    while True:
        owner = read_owner(spec)
        if owner is None or not owner.alive(clock()):
            return owner
        if clock() >= deadline:
            raise ConcurrentChangeError(
                f"another driver (process {owner.pid} on {owner.host.partition('/')[0]}, attempt {owner.attempt}) "
                f"works in {spec.run_dir}. Two would overwrite each other's checkpoints: wait for it, stop it, or give "
                "this run another run_key."
            )
        sleep(min(0.5, patience / 4 or 0.5))


def signs_of_life(spec: TrainingSpec, now: float, doubt: str = "") -> Observation:
    """Whether the attempt's driver lives, by its heartbeat in the run directory: RUNNING, or LOST; SUBMITTER_LOST where
    that cannot be read.

    :param now: Unix time
    :param doubt: why it is asked, for the message
    """
    try:
        owner = read_owner(spec)
    except Exception as error:  # a store that is away for a moment must not end the training
        log.warning("whether the driver in %s lives cannot be read: %s", spec.run_dir, error)
        return Observation("SUBMITTER_LOST", message=doubt)
    if owner is not None and owner.attempt == spec.attempt and owner.alive(now):
        return Observation("RUNNING", message=doubt)
    return Observation("LOST", message=f"{doubt} Its driver gives no sign of life.".strip())


class Fence:
    """Holds a run directory while its ``with`` block lasts.

    :param spec: the attempt
    :param measure: consumption of this attempt so far, called at every heartbeat
    :param on_lost: called once, from the heartbeat's thread, when somebody else has taken the directory
    :param patience: seconds to wait for an earlier driver to go
    """

    def __init__(
        self, spec: TrainingSpec, measure: Callable[[], Usage], on_lost: Callable[[], None], patience: float = 0.0
    ) -> None:
        self._spec, self._measure, self._on_lost, self._patience = spec, measure, on_lost, patience
        self._token = uuid.uuid4().hex
        self._done = threading.Event()
        self._before = Usage()

    @property
    def usage(self) -> Usage:
        """Consumed over all attempts, this one up to now."""
        return self._before + self._measure()

    def __enter__(self) -> Fence:
        local = storage.is_local(self._spec.run_dir)
        with _exclusive(self._spec) if local else nullcontext():
            previous = wait_until_free(self._spec, self._patience)
            self._before = previous.usage if previous is not None else Usage()
            self._write()
        if not local:
            time.sleep(SETTLE)
            if not self._mine():
                wait_until_free(self._spec, 0.0)
        self._thread = threading.Thread(target=self._beat, name="run-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._mine():
            self._write(released=True)

    def _write(self, released: bool = False) -> None:
        owner = Owner(
            token=self._token,
            host=this_host(),
            pid=os.getpid(),
            started=start_time(os.getpid()) or 0.0,
            attempt=self._spec.attempt,
            heartbeat=time.time(),
            released=released,
            usage=self.usage,
        )
        storage.write_json(self._spec.file("owner.json"), owner.to_json())

    def _mine(self) -> bool:
        owner = read_owner(self._spec)
        return owner is not None and owner.token == self._token

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT):
            try:
                if not self._mine():
                    self._on_lost()
                    return
                self._write()
            except Exception as error:  # a store that is away for a moment must not end the training
                log.warning("heartbeat of %s failed: %s", self._spec.run_dir, error)


@contextmanager
def _exclusive(spec: TrainingSpec) -> Iterator[None]:
    """Only one process of this machine at a time looks for an owner and becomes one."""
    path = storage.local_path(spec.file("owner.lock"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
