"""The driver: one attempt of a training run with Ray Train, from its spec to its result file.

Ray Train v2 resumes a run of the same name under the same storage path from its last committed checkpoint; the
training loop asks for it with ``ray.train.get_checkpoint()``.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError
from airflow_mlops.training.decide import EXIT_APP, EXIT_INFRA, EXIT_OK, EXIT_REFUSED, EXIT_STOPPED
from airflow_mlops.training.export import export_model
from airflow_mlops.training.fence import Fence
from airflow_mlops.training.result import TrainingResult, finite, read_result, write_result
from airflow_mlops.training.runs import committed_checkpoint
from airflow_mlops.training.spec import TrainingSpec, load_callable
from airflow_mlops.training.usage import Meter, measured

log = logging.getLogger(__name__)

TRAINER_CLASSES = {
    "xgboost": ("ray.train.xgboost", "XGBoostTrainer"),
    "lightgbm": ("ray.train.lightgbm", "LightGBMTrainer"),
    "torch": ("ray.train.torch", "TorchTrainer"),
    "jax": ("ray.train.v2.jax.jax_trainer", "JaxTrainer"),
    "data_parallel": ("ray.train.v2.api.data_parallel_trainer", "DataParallelTrainer"),
}
#: Ray Train looks for reports this often; its own 2 s would make every ``ray.train.report`` cost up to 2 s.
POLL_INTERVAL = 0.1
WORKER_START_TIMEOUT = 300.0
ERROR_TAIL = 8_000


class Clusterless(Exception):
    """Ray could not be started or joined."""


def drive(spec: TrainingSpec) -> int:
    """Run one attempt; returns the exit code of :mod:`airflow_mlops.training.decide`."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_INTERVAL))
    # A busy machine needs more than Ray's 60 s to start workers.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(WORKER_START_TIMEOUT))
    own_ray = spec.ray_address is None
    workers = None if own_ray else spec.file(f"workers-a{spec.attempt}")
    per_worker = (spec.resources_per_worker or {}).get("GPU", 1.0 if spec.use_gpu else 0.0)
    meter = Meter(gpus=per_worker * spec.num_workers, worker_dir=workers)
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
        base = replace(base, resumed_from=committed_checkpoint(spec))
        if base.resumed_from:
            log.info("attempt %d goes on from %s", spec.attempt, base.resumed_from)
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


def _train(spec: TrainingSpec, meter: Meter, seconds: dict[str, float]) -> dict[str, Any]:
    with _timed(seconds, "import"):
        if spec.ray_address is None:
            _prepare_own_ray()
        import ray
        import ray.train

        train_fn = load_callable(spec.train_fn)
        if meter.worker_dir is not None:
            train_fn = measured(train_fn, meter.worker_dir)
    with _timed(seconds, "ray"):
        _start_ray(spec)
        # Ray has put a handler of its own in place, which would make a stop look like a failure.
        signal.signal(signal.SIGTERM, _raise_stopped)
    try:
        with _timed(seconds, "train"):
            meter.reserve()
            trainer = _trainer(spec, train_fn)
            _without_cleaner(trainer)
            result = trainer.fit()
            meter.release()
        if result.checkpoint is None:
            raise InvalidInputError(
                "the training loop reported no checkpoint, so there is nothing to resume from or to export; call "
                "ray.train.report(metrics, checkpoint=...) in it at least once, at the end"
            )
        with _timed(seconds, "export"), result.checkpoint.as_directory() as checkpoint_dir:
            model_uri = export_model(spec, checkpoint_dir)
    finally:
        meter.read()
        with _timed(seconds, "shutdown"):
            ray.shutdown()
    checkpoint_uri = storage.join(spec.run_dir, os.path.basename(result.checkpoint.path.rstrip("/")))
    return {"metrics": finite(result.metrics or {}), "checkpoint_uri": checkpoint_uri, "model_uri": model_uri}


def _without_cleaner(trainer: Any) -> None:
    # That actor frees a cluster of what a dead controller held while its job lives on. Here the job ends with its one
    # controller, which frees the same; a process less, and one that fails every second without a dashboard.
    create = getattr(trainer, "_create_default_callbacks", None)
    if create is not None:
        trainer._create_default_callbacks = lambda: [
            callback for callback in create() if type(callback).__name__ != "PlacementGroupCleanerCallback"
        ]


def _prepare_own_ray() -> None:
    import secrets

    # One machine that is never preempted: one process less.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    # Without a token of its own Ray would write one into the home directory, which may not be writable.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ.pop("RAY_ADDRESS", None)
    # Told that it is on one machine, Ray listens on the loopback address and not on the outward one.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _start_ray(spec: TrainingSpec) -> None:
    import ray

    try:
        if spec.ray_address is not None:
            ray.init(address=spec.ray_address)
            return
        ray.init(address="local", num_cpus=spec.num_cpus, include_dashboard=False)
    except Exception as error:
        where = "a local Ray cannot be started" if spec.ray_address is None else f"Ray at {spec.ray_address} is away"
        raise Clusterless(f"{where}: {type(error).__name__}: {error}") from error
    require_capacity(spec, ray.cluster_resources())


def require_capacity(spec: TrainingSpec, have: Mapping[str, float]) -> None:
    """Check that a Ray that does not grow can hold the workers, which would else be waited for in vain.

    :param have: amount of each resource
    :raises InvalidInputError: it cannot; says what is lacking
    """
    needs = {"CPU": 1.0, **(spec.resources_per_worker or {})}
    if spec.use_gpu:
        needs.setdefault("GPU", 1.0)
    for resource, amount in needs.items():
        if amount * spec.num_workers > have.get(resource, 0.0):
            raise InvalidInputError(
                f"{spec.num_workers} workers with {amount:g} {resource} each need {amount * spec.num_workers:g}, and "
                f"this machine has {have.get(resource, 0.0):g}; lower num_workers or resources_per_worker"
            )


def _trainer(spec: TrainingSpec, train_fn: Any) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    local = storage.is_local(spec.storage_path)
    path = os.path.abspath(storage.local_path(spec.storage_path)) if local else spec.storage_path
    return trainer_class(spec.trainer)(
        train_fn,
        train_loop_config=dict(spec.config),
        scaling_config=ScalingConfig(
            num_workers=spec.num_workers,
            use_gpu=spec.use_gpu,
            resources_per_worker=dict(spec.resources_per_worker) if spec.resources_per_worker else None,
        ),
        run_config=RunConfig(
            name=spec.run_key,
            storage_path=path,
            # Ray would wait for ever for capacity that does not come.
            failure_config=FailureConfig(max_failures=spec.max_failures, controller_failure_limit=3),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=spec.checkpoints_to_keep),
        ),
    )


def trainer_class(trainer: str) -> Any:
    """Ray Train's class for ``trainer``, importing only that framework.

    :raises InvalidInputError: its library is not installed where the driver runs
    """
    module, name = TRAINER_CLASSES[trainer]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise InvalidInputError(
            f'trainer "{trainer}" needs a library that is not installed where the driver runs ({error}); install it '
            f"there, for example with pip install 'airflow-mlops[{trainer}]'"
        ) from error


def is_infrastructure(error: BaseException) -> bool:
    """Whether machines are to blame for ``error`` rather than the training code or its input."""
    import ray.exceptions
    from ray.train import TrainingFailedError

    if isinstance(error, Clusterless | SystemExit):
        return True
    failures = getattr(error, "worker_failures", None)
    if failures:
        return all(_worker_was_lost(failure) for failure in failures.values())
    if isinstance(error, TrainingFailedError):
        return True
    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)


def _worker_was_lost(failure: BaseException) -> bool:
    import ray.exceptions

    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, ray.exceptions.RayError) and not isinstance(seen, ray.exceptions.RayTaskError):
            return True
        if type(seen).__name__ in ("WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError"):
            return True
        seen = getattr(seen, "health_check_failure", None) or seen.__cause__
    return False


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
