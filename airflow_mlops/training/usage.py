"""Processor time of a driver, its children and its workers."""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from airflow_mlops import storage
from airflow_mlops.training.result import Usage

log = logging.getLogger(__name__)


class Meter:
    """Consumption of this process, its descendants and the workers that report to ``worker_dir``.

    A descendant that has ended counts with what it had used when last seen, so call :meth:`read` now and then.

    :param gpus: GPUs reserved from :meth:`reserve` to :meth:`release`
    :param worker_dir: where :func:`measured` workers outside this process tree leave their time; None: they are inside
    """

    def __init__(self, gpus: float = 0.0, worker_dir: str | None = None) -> None:
        self._began = time.monotonic()
        self._gpus, self._gpu_seconds = gpus, 0.0
        self._gpu_since: float | None = None
        self.worker_dir = worker_dir
        self._seen: dict[tuple[int, float], float] = {}

    def reserve(self) -> None:
        """The GPUs are taken from now on."""
        self._gpu_since = time.monotonic()

    def release(self) -> None:
        """The GPUs are free again."""
        if self._gpu_since is not None:
            self._gpu_seconds += self._gpus * (time.monotonic() - self._gpu_since)
            self._gpu_since = None

    def read(self) -> Usage:
        """Consumption up to now, workers outside the process tree as far as they have ended."""
        now = time.monotonic()
        running = self._gpus * (now - self._gpu_since) if self._gpu_since is not None else 0.0
        return Usage(round(now - self._began, 3), round(self._tree(), 3), round(self._gpu_seconds + running, 3))

    def read_all(self) -> Usage:
        """Like :meth:`read`, with the ended workers outside the process tree; reads storage."""
        return self.read() + Usage(cpu_seconds=self._workers())

    def _tree(self) -> float:
        import psutil

        try:
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                try:
                    times = process.cpu_times()
                    self._seen[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:
                    continue
        except psutil.Error as error:
            log.warning("processor time is not known: %s", error)
        return sum(self._seen.values())

    def _workers(self) -> float:
        if self.worker_dir is None:
            return 0.0
        return sum(float(storage.read_bytes(uri)) for uri in storage.list_files(self.worker_dir, ".cpu"))


def measured(train_fn: Callable[..., Any], worker_dir: str) -> Callable[..., Any]:
    """``train_fn``, leaving its process's processor time in ``worker_dir`` when it ends, well or not."""

    def note() -> None:
        try:
            storage.write_bytes(
                storage.join(worker_dir, f"{uuid.uuid4().hex}.cpu"), f"{time.process_time():.3f}".encode()
            )
        except Exception as error:  # accounting must not fail a training
            log.warning("processor time of a worker is lost: %s", error)

    @functools.wraps(train_fn)
    def loop(*args: Any) -> Any:
        try:
            return train_fn(*args)
        finally:
            note()

    return loop
