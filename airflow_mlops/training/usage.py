"""Processor time of a driver, its children and its workers."""

from __future__ import annotations

import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import ExternalSystemError
from airflow_mlops.training.result import Usage

log = logging.getLogger(__name__)


class Meter:
    """Consumption of this process, its descendants and the workers that report to ``worker_dir``.

    A descendant that has ended counts with what it had used when last seen, so call :meth:`read` now and then.

    :param gpus: GPUs that one worker has
    :param worker_dir: where :func:`measured` workers outside this process tree leave their time; None: they are inside
    :param world_file: where :func:`sized` workers leave their number, where that changes; None: it does not
    """

    def __init__(self, gpus: float = 0.0, worker_dir: str | None = None, world_file: str | None = None) -> None:
        self._began = self._since = time.monotonic()
        self._gpus, self._workers_now, self._gpu_seconds = gpus, 0, 0.0
        self._lock = threading.Lock()
        self.worker_dir, self.world_file = worker_dir, world_file
        self._seen: dict[tuple[int, float], float] = {}

    def hold(self, workers: int) -> None:
        """From now on this many workers hold their GPUs; 0: the GPUs are free again."""
        with self._lock:
            self._add_up()
            self._workers_now = workers

    def read(self) -> Usage:
        """Consumption up to now, workers outside the process tree as far as they have ended."""
        with self._lock:
            self._add_up()
            gpu_seconds = self._gpu_seconds
        return Usage(round(time.monotonic() - self._began, 3), round(self._tree(), 3), round(gpu_seconds, 3))

    def read_all(self) -> Usage:
        """Like :meth:`read`, with the ended workers outside the process tree; reads storage."""
        if self.world_file is not None and self._workers_now:
            try:
                self.hold(int(storage.read_json(self.world_file)))
            except (OSError, ValueError, ExternalSystemError) as error:
                log.debug("the number of workers is not known yet: %s", error)
        return self.read() + Usage(cpu_seconds=self._workers())

    def _add_up(self) -> None:
        now = time.monotonic()
        self._gpu_seconds += self._gpus * self._workers_now * (now - self._since)
        self._since = now

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


def sized(train_fn: Callable[..., Any], world_file: str) -> Callable[..., Any]:
    """``train_fn``, whose first worker leaves the number of workers in ``world_file`` when it starts."""

    @functools.wraps(train_fn)
    def loop(*args: Any) -> Any:
        import ray.train

        context = ray.train.get_context()
        if context.get_world_rank() == 0:
            try:
                storage.write_json(world_file, context.get_world_size())
            except Exception as error:  # accounting must not fail a training
                log.warning("the number of workers is lost: %s", error)
        return train_fn(*args)

    return loop
