"""A hyper-parameter search: trials as Ray Train runs of their own, chosen by Ray Tune with Optuna.

Each trial has a directory ``{run_dir}/trials/{name}``, a Ray Train run, and a record
``{run_dir}/_mlops/trials/{name}.json``, written when it begins and when it ends. An attempt that follows an interrupted
one tells Optuna what the ended trials have shown, goes on with the unfinished ones at their last committed checkpoints,
and draws as many as are left.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError, TrainingError
from airflow_mlops.training.raytrain import (
    NO_CHECKPOINT,
    Clusterless,
    build_trainer,
    is_infrastructure,
    prepare,
    wrapped_loop,
)
from airflow_mlops.training.result import finite
from airflow_mlops.training.search import Search
from airflow_mlops.training.spec import TrainingSpec

log = logging.getLogger(__name__)

ERROR_TAIL = 2_000


@dataclass(frozen=True)
class Trial:
    """What is known of a trial.

    :param name: of its directory
    :param params: the sample it tries
    :param status: ``RUNNING`` until it has ended, for the search may be resumed; then ``FINISHED`` or ``FAILED``
    :param value: of the searched metric, when finished
    """

    name: str
    params: Mapping[str, Any]
    status: str
    value: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_uri: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Best:
    """The best trial of a search.

    :param spec: with which its training loop was run
    :param finished: trials that have a value
    :param failed: trials that have none
    """

    spec: TrainingSpec
    params: Mapping[str, Any]
    metrics: Mapping[str, Any]
    checkpoint_uri: str
    finished: int
    failed: int

    @contextmanager
    def checkpoint(self) -> Iterator[str]:
        """Its last checkpoint as a local directory."""
        if storage.is_local(self.checkpoint_uri):
            yield storage.local_path(self.checkpoint_uri)
            return
        import fsspec

        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            fs, path = fsspec.core.url_to_fs(self.checkpoint_uri)
            fs.get(path.rstrip("/") + "/", folder, recursive=True)
            yield folder


def require_optuna() -> None:
    """Check that what a search needs is installed.

    :raises InvalidInputError: it is not
    """
    try:
        import optuna  # noqa: F401
        import ray.tune  # noqa: F401
    except ImportError as error:
        raise InvalidInputError(
            f'trainer "tune" needs Ray Tune and Optuna where the driver runs ({error}); install them there, for '
            "example with pip install 'airflow-mlops[tune]'"
        ) from error


def search(spec: TrainingSpec, *, worker_dir: str | None, on_trials: Callable[[int], None]) -> Best:
    """Run what is left of the search in the Ray that this process has joined.

    :param worker_dir: see :class:`airflow_mlops.training.usage.Meter`
    :param on_trials: called with the number of running trials, again and again
    :raises Clusterless: machines were lost before any trial could finish
    :raises TrainingError: all trials failed
    """
    what = Search.of(spec.config)
    known = read_trials(spec)
    left = what.num_samples - sum(trial.status != "RUNNING" for trial in known)
    if known:
        log.info("%d trials have ended, %d are left", what.num_samples - left, left)
    if left > 0:
        _run_trials(spec, what, known, left, worker_dir, on_trials)
    return best_of(spec, what, read_trials(spec))


def search_records(spec: TrainingSpec) -> str | None:
    """Where the records of the search lie, None if there are none yet."""
    folder = spec.file("trials")
    return folder if storage.list_files(folder, ".json") else None


def read_trials(spec: TrainingSpec) -> list[Trial]:
    """All trials of the run that have begun, by name."""
    return [Trial(**storage.read_json(uri)) for uri in storage.list_files(spec.file("trials"), ".json")]


def best_of(spec: TrainingSpec, what: Search, trials: Sequence[Trial]) -> Best:
    """The finished trial with the best value, the first of several.

    :raises Clusterless: none has finished, and one at least was lost with its machine
    :raises TrainingError: all have failed
    """
    finished = [trial for trial in trials if trial.status == "FINISHED"]
    if not finished:
        if any(trial.status == "RUNNING" for trial in trials):
            raise Clusterless("the machines of the trials were lost before any could finish")
        errors = "\n".join(f"{trial.name} {dict(trial.params)}: {trial.error}" for trial in trials[-3:])
        raise TrainingError(f"all {len(trials)} trials have failed; the last of them:\n{errors}")
    best = finished[0]
    for trial in finished[1:]:
        if what.better(_value(trial), _value(best)):
            best = trial
    assert best.checkpoint_uri is not None
    return Best(
        trial_spec(spec, what, best.name, best.params),
        best.params,
        best.metrics,
        best.checkpoint_uri,
        len(finished),
        len(trials) - len(finished),
    )


def trial_spec(spec: TrainingSpec, what: Search, name: str, params: Mapping[str, Any]) -> TrainingSpec:
    """The trial as a training run of its own."""
    return replace(
        spec,
        trainer=what.trainer,
        config=what.trial_config(params),
        storage_path=storage.join(spec.run_dir, "trials"),
        run_key=name,
    )


def run_trial(spec: TrainingSpec, name: str, params: Mapping[str, Any], worker_dir: str | None) -> float:
    """Train one trial, or go on with it, and write down how it ends; returns its value.

    What machines are to blame for is not written down: the trial can be run again.
    """
    what = Search.of(spec.config)
    uri = spec.file("trials", f"{name}.json")
    known = Trial(**storage.read_json(uri)) if storage.exists(uri) else Trial(name, params, "RUNNING")
    if dict(known.params) != dict(params):
        raise ConcurrentChangeError(f"trial {name} tries {dict(known.params)} already and cannot try {dict(params)}")
    if known.status == "FINISHED":
        return _value(known)
    if known.status == "FAILED":
        raise TrainingError(known.error or "failed before")
    storage.write_json(uri, asdict(known))
    inner = trial_spec(spec, what, name, params)
    try:
        result = build_trainer(inner, wrapped_loop(inner, worker_dir)).fit()
        if result.checkpoint is None:
            raise InvalidInputError(NO_CHECKPOINT)
        metrics = finite(result.metrics or {})
        value = metrics.get(what.metric)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidInputError(
                f"{what.metric} is {value!r} in the last report of the training loop; it reported {sorted(metrics)}"
            )
    except Exception as error:
        if not is_infrastructure(error):
            text = traceback.format_exc()[-ERROR_TAIL:]
            storage.write_json(uri, asdict(replace(known, status="FAILED", error=text)))
        raise
    checkpoint = storage.join(inner.run_dir, os.path.basename(result.checkpoint.path.rstrip("/")))
    ended = replace(known, status="FINISHED", value=float(value), metrics=metrics, checkpoint_uri=checkpoint)
    storage.write_json(uri, asdict(ended))
    return _value(ended)


def distributions(space: Mapping[str, Any]) -> dict[str, Any]:
    """The search space in Optuna's terms."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for name, domain in space.items():
        if isinstance(domain, list):
            made[name] = CategoricalDistribution(domain)
        elif domain["type"] == "int":
            made[name] = IntDistribution(
                domain["low"], domain["high"], log=bool(domain.get("log")), step=domain.get("step") or 1
            )
        else:
            made[name] = FloatDistribution(
                domain["low"], domain["high"], log=bool(domain.get("log")), step=domain.get("step")
            )
    return made


def searcher(what: Search, known: Sequence[Trial]) -> Any:
    """Optuna with what ``known`` trials have shown; it proposes the unfinished ones first."""
    from ray.tune.search.optuna import OptunaSearch

    unfinished = [dict(trial.params) for trial in known if trial.status == "RUNNING"]
    seed = None if what.seed is None else what.seed + len(known)  # else it would draw the same again
    optuna = OptunaSearch(
        distributions(what.space), metric=what.metric, mode=what.mode, points_to_evaluate=unfinished, seed=seed
    )
    for trial in known:
        if trial.status == "FINISHED":
            optuna.add_evaluated_point(dict(trial.params), _value(trial))
        elif trial.status == "FAILED":
            optuna.add_evaluated_point(dict(trial.params), math.nan, error=True)
    return optuna


class Names:
    """Names trials: an unfinished one keeps its own, and with it its checkpoints.

    :param known: trials of earlier attempts
    """

    def __init__(self, known: Sequence[Trial]) -> None:
        self._unfinished = [trial for trial in known if trial.status == "RUNNING"]
        self._next = 1 + max((int(trial.name.removeprefix("t")) for trial in known), default=0)
        self._given: dict[str, str] = {}

    def __deepcopy__(self, memo: Any) -> Names:
        return self  # Ray Tune copies it for every trial, and each copy would give out the same names

    def __call__(self, trial: Any) -> str:
        """The name of a trial of Ray Tune, the same whenever it is asked for."""
        if trial.trial_id not in self._given:
            self._given[trial.trial_id] = self._claim(trial.config)
        return self._given[trial.trial_id]

    def _claim(self, params: Mapping[str, Any]) -> str:
        wanted = json.dumps(finite(params), sort_keys=True)
        for trial in self._unfinished:
            if json.dumps(trial.params, sort_keys=True) == wanted:
                self._unfinished.remove(trial)
                return trial.name
        name, self._next = f"t{self._next:05d}", self._next + 1
        return name


def concurrency(spec: TrainingSpec, have: Mapping[str, float]) -> int:
    """How many trials fit into these resources at a time, at least one.

    :param have: amount of each resource
    """
    needs = {"CPU": 1.0, **(spec.resources_per_worker or {})}
    if spec.use_gpu:
        needs.setdefault("GPU", 1.0)
    fits = [have.get(name, 0.0) // (amount * spec.max_workers) for name, amount in needs.items() if amount]
    return max(1, int(min(fits, default=1)))


def _run_trials(
    spec: TrainingSpec,
    what: Search,
    known: Sequence[Trial],
    left: int,
    worker_dir: str | None,
    on_trials: Callable[[int], None],
) -> None:
    # Ctrl-C is a stop like any other, and its own log files would be one more set of them per trial.
    os.environ.update(TUNE_DISABLE_SIGINT_HANDLER="1", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
    import ray
    from ray import tune

    # It misses the log files at the end; what it would tell is in the records.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    value = spec.to_json()

    def trial(params: Mapping[str, Any]) -> None:
        prepare()
        name = tune.get_context().get_trial_name()
        tune.report({what.metric: run_trial(TrainingSpec.from_json(value), name, finite(params), worker_dir)})

    class Watch(tune.Callback):
        def __init__(self, running: Callable[[int], None]) -> None:
            self.running = running

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Ray Tune writes down all it is given, and a meter cannot be

        def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
            self.running(sum(entry.status == "RUNNING" for entry in trials))

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            log.info("%s: %s is %s with %s", trial, what.metric, trial.last_result.get(what.metric), trial.config)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            log.warning("%s failed with %s", trial, trial.config)

    local = storage.is_local(spec.run_dir)
    path = os.path.abspath(storage.local_path(spec.run_dir)) if local else spec.run_dir
    tuner = tune.Tuner(
        # A trial only waits for its workers. It does so on the head, which needs no CPU for it and is not preempted.
        tune.with_resources(trial, {"node:__internal_head__": 0.001}),
        tune_config=tune.TuneConfig(
            metric=what.metric,
            mode=what.mode,
            search_alg=searcher(what, known),
            num_samples=left,
            max_concurrent_trials=what.max_concurrent or min(left, concurrency(spec, ray.cluster_resources())),
            trial_name_creator=Names(known),
        ),
        run_config=tune.RunConfig(
            name=f"tune-a{spec.attempt}",
            storage_path=path,
            # Beside the failures of workers, which the trial's own run repairs: the loss of what waits for them.
            failure_config=tune.FailureConfig(max_failures=min(abs(spec.max_failures), 1)),
            callbacks=[Watch(on_trials)],
            verbose=0,
        ),
    )
    tuner.fit()


def _value(trial: Trial) -> float:
    assert trial.value is not None
    return trial.value
