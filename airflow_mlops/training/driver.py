"""The driver: one attempt of a training run with Ray Train, from its spec to its result file.

Ray Train v2 resumes a run of the same name under the same storage path from its last committed checkpoint; the
training loop asks for it with ``ray.train.get_checkpoint()``.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError
from airflow_mlops.training.command import run_command
from airflow_mlops.training.decide import EXIT_APP, EXIT_INFRA, EXIT_OK, EXIT_REFUSED, EXIT_STOPPED
from airflow_mlops.training.export import export_model
from airflow_mlops.training.fence import Fence
from airflow_mlops.training.raytrain import (
    NO_CHECKPOINT,
    build_trainer,
    cluster_facts,
    is_infrastructure,
    prepare,
    prepare_own_ray,
    require_ray_version,
    start_ray,
    wrapped_loop,
)
from airflow_mlops.training.result import TrainingResult, finite, read_result, write_environment, write_result
from airflow_mlops.training.runs import committed_checkpoint
from airflow_mlops.training.spec import TrainingSpec, load_callable
from airflow_mlops.training.tune import require_optuna, search, search_records
from airflow_mlops.training.usage import Meter

log = logging.getLogger(__name__)

ERROR_TAIL = 8_000


def drive(spec: TrainingSpec) -> int:
    """Run one attempt; returns the exit code of :mod:`airflow_mlops.training.decide`."""
    prepare()
    inside = spec.ray_address is None  # workers are descendants of this process
    meter = Meter(
        gpus=spec.gpus_per_worker,
        worker_dir=None if inside else spec.file(f"workers-a{spec.attempt}"),
        world_file=None if spec.min_workers == spec.max_workers else spec.file(f"world-a{spec.attempt}.json"),
    )
    signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        with Fence(spec, meter.read_all, on_lost=lambda: os._exit(EXIT_REFUSED), patience=spec.patience) as fence:
            done = read_result(spec)
            if done is not None and done.succeeded and done.fingerprint == spec.fingerprint:
                write_result(spec, replace(done, attempt=spec.attempt))
                return EXIT_OK
            result, code = _attempt(spec, meter)
            write_result(spec, replace(result, usage=fence.usage))
            return code
    except ConcurrentChangeError as error:
        log.error("%s", error)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_STOPPED


def _attempt(spec: TrainingSpec, meter: Meter) -> tuple[TrainingResult, int]:
    base = TrainingResult("FAILED", spec.attempt, spec.fingerprint)
    seconds: dict[str, float] = {}
    try:
        require_ray_version(spec.ray_version)
        write_environment(spec)
        before = search_records(spec) if spec.trainer == "tune" else committed_checkpoint(spec)
        base = replace(base, resumed_from=before)
        if base.resumed_from:
            log.info("attempt %d goes on from %s", spec.attempt, base.resumed_from)
        if spec.entrypoint is not None:
            trained = _run(spec, meter, seconds)
        elif spec.trainer == "tune":
            trained = _search(spec, meter, seconds)
        else:
            trained = _train(spec, meter, seconds)
        succeeded = replace(base, status="SUCCEEDED", **trained)
        return replace(succeeded, seconds=seconds), EXIT_OK
    except KeyboardInterrupt:
        log.warning("stopped; committed checkpoints are kept")
        return replace(base, exit_class="stopped", seconds=seconds), EXIT_STOPPED
    except BaseException as error:
        infra = is_infrastructure(error)
        log.exception("attempt %d failed (%s)", spec.attempt, "infrastructure" if infra else "training code")
        text = traceback.format_exc()[-ERROR_TAIL:]
        failed = replace(base, exit_class="infra" if infra else "app", error=text, seconds=seconds)
        return failed, EXIT_INFRA if infra else EXIT_APP
    finally:
        # A second SIGTERM must not cut off the result.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _run(spec: TrainingSpec, meter: Meter, seconds: dict[str, float]) -> dict[str, Any]:
    if spec.ray_address is None:
        prepare_own_ray()  # the command may start one
    meter.hold(spec.max_workers)
    try:
        with _timed(seconds, "train"):
            return run_command(spec)
    finally:
        meter.hold(0)
        meter.read()


def _train(spec: TrainingSpec, meter: Meter, seconds: dict[str, float]) -> dict[str, Any]:
    with _timed(seconds, "import"):
        if spec.ray_address is None:
            prepare_own_ray()
        import ray.train  # noqa: F401

        train_fn = wrapped_loop(spec, meter.worker_dir, meter.world_file)
    with _ray(spec, meter, seconds):
        meter.hold(spec.max_workers)
        with _timed(seconds, "train"):
            result = build_trainer(spec, train_fn).fit()
        meter.hold(0)
        if result.checkpoint is None:
            raise InvalidInputError(NO_CHECKPOINT)
        with _timed(seconds, "export"), result.checkpoint.as_directory() as checkpoint_dir:
            model_uri = export_model(spec, checkpoint_dir)
    checkpoint_uri = storage.join(spec.run_dir, os.path.basename(result.checkpoint.path.rstrip("/")))
    return {"metrics": finite(result.metrics or {}), "checkpoint_uri": checkpoint_uri, "model_uri": model_uri}


def _search(spec: TrainingSpec, meter: Meter, seconds: dict[str, float]) -> dict[str, Any]:
    with _timed(seconds, "import"):
        if spec.ray_address is None:
            prepare_own_ray()
        require_optuna()
        assert spec.train_fn is not None
        load_callable(spec.train_fn)  # what cannot be imported fails here, once, and not in every trial
    with _ray(spec, meter, seconds):
        with _timed(seconds, "train"):
            best = search(spec, worker_dir=meter.worker_dir, on_trials=lambda n: meter.hold(n * spec.max_workers))
        meter.hold(0)
        with _timed(seconds, "export"), best.checkpoint() as checkpoint_dir:
            model_uri = export_model(best.spec, checkpoint_dir, into=spec.run_dir)
    metrics = {**best.metrics, "trials": best.finished, "failed_trials": best.failed}
    return {
        "metrics": finite(metrics),
        "checkpoint_uri": best.checkpoint_uri,
        "model_uri": model_uri,
        "params": finite(best.params),
    }


@contextmanager
def _ray(spec: TrainingSpec, meter: Meter, seconds: dict[str, float]) -> Iterator[None]:
    import ray

    try:
        with _timed(seconds, "ray"):
            start_ray(spec)
            # Ray has put a handler of its own in place, which would make a stop look like a failure.
            signal.signal(signal.SIGTERM, _raise_stopped)
            write_environment(spec, cluster_facts())
        yield
    finally:
        meter.hold(0)
        meter.read()
        with _timed(seconds, "shutdown"):
            ray.shutdown()


def _raise_stopped(*_: object) -> None:
    # Of all exceptions raised in a signal handler Ray lets only this one and SystemExit out of a blocking call.
    raise KeyboardInterrupt


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    finally:
        seconds[phase] = round(time.monotonic() - began, 2)
