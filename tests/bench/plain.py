"""The steps of ``dags/continuous_training.py`` for one month as a plain script: one process, no Airflow.

What somebody would write who needs neither a schedule nor retries, a user interface or resumption: the same
libraries, the same order, on the same Ray. ``prepare`` sets up what the month before left behind, ``run`` does the
month and prints the seconds of each step as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

MODEL = "flights_delay"
ROUTE = "plain"
LABEL = "late"
SERVICE = "flights_delay_v1"
CHAMPION = "1"
LIBRARIES = (
    "dvc.repo",
    "evidently.presets",
    "feast.repo_operations",
    "matplotlib.figure",
    "mlflow.pyfunc",
    "mlflow.xgboost",
    "ray.train.xgboost",
)


def prepare(job: dict[str, Any]) -> None:
    """A registry whose champion is the model of the month before, and a route that serves it."""
    from mlflow import MlflowClient

    from airflow_mlops.rollout.targets.client import RayServeClient, Route

    client = MlflowClient(job["tracking_uri"])
    client.create_registered_model(MODEL)
    client.create_model_version(MODEL, job["champion_dir"])
    client.set_registered_model_alias(MODEL, "champion", CHAMPION)

    async def deploy() -> None:
        async with RayServeClient(job["dashboard_url"], job["serve_url"], job["token"]) as serve:
            await Route(serve, ROUTE).deploy(CHAMPION, job["champion_dir"])

    asyncio.run(deploy())


class Month:
    """One month, step by step; each method is a step and leaves what later ones need."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.root: str = job["root"]
        self.seconds: dict[str, float] = {}
        self.promoted = False

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def run(self) -> None:
        """Every step, in the Dag's order; training whatever the drift check says, as the measured month does."""
        with self.step("import"):
            self._import()
        for name, work in {
            "plan": self.plan,
            "data.land": self.land,
            "data.check_quality": self.check_quality,
            "data.build_features": self.build_features,
            "features.apply": self.apply,
            "features.materialize": self.materialize,
            "monitor.month_set": self.month_set,
            "monitor.score": self.score,
            "monitor.drift": self.drift,
            "train.snapshot": self.snapshot,
            "train.training_set": self.training_set,
            "train.ray_train": self.train,
            "train.gate": self.gate,
            "release.register": self.register,
            "release.canary": self.canary,
            "release.promote": self.promote,
            "record": self.record,
        }.items():
            with self.step(name):
                work()

    def _import(self) -> None:
        for name in LIBRARIES:
            importlib.import_module(name)

    def plan(self) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(self.job["tracking_uri"])
        version = self.client.get_model_version_by_alias(MODEL, "champion")
        self.champion_dir = self.client.get_model_version_download_uri(MODEL, version.version)

    def land(self) -> None:
        from airflow_mlops.examples.flights import source

        for month in self.job["months"]:
            source.land(self.root, month)

    def check_quality(self) -> None:
        from airflow_mlops.examples.flights import quality

        for month in self.job["months"]:
            quality.check(self.root, month)

    def build_features(self) -> None:
        from airflow_mlops.examples.flights import features

        for month in self.job["months"]:
            features.build(self.root, month)

    def apply(self) -> None:
        from pathlib import Path

        from feast import FeatureStore, repo_operations
        from feast.repo_config import load_repo_config

        repo = Path(self.job["repo"])
        self.store = FeatureStore(config=load_repo_config(repo, repo / "feature_store.yaml"))
        with contextlib.chdir(repo):
            sys.path.insert(0, str(repo))
            contents = repo_operations.parse_repo(repo)
        repo_operations.apply_total_with_repo_instance(
            self.store, self.store.project, self.store.registry, contents, skip_source_validation=False
        )

    def materialize(self) -> None:
        import datetime as dt

        end = dt.datetime.fromisoformat(self.job["window_end"]) - dt.timedelta(microseconds=1)
        self.store.materialize(dt.datetime.fromisoformat(self.job["window_start"]), end)

    def _set(self, name: str, start: str, end: str) -> Any:
        # Feast's own get_historical_features runs out of memory at this size, so both sides use this join.
        from airflow_mlops.features.training_set import build_training_set
        from airflow_mlops.windows import Window, parse_instant

        return build_training_set(
            self.store,
            self.store.get_feature_service(SERVICE),
            entity_uri=f"{self.root}/entities/flights",
            output_uri=f"{self.root}/plain/{name}.parquet",
            window=Window(parse_instant(start, "start"), parse_instant(end, "end")),
            label=LABEL,
        )

    def month_set(self) -> None:
        self.month = self._set("month", self.job["window_start"], self.job["window_end"])

    def training_set(self) -> None:
        self.training = self._set("training", self.job["train_start"], self.job["holdout_start"])

    def score(self) -> None:
        import pandas as pd

        from airflow_mlops.evaluation import score
        from airflow_mlops.evaluation.scorer import load, predict_proba

        self.frame = pd.read_parquet(self.month.uri)
        names = list(self.month.features)
        # The first model of all is scored beside the champion; in the first month the two are one.
        for arm in ("champion", "frozen"):
            self.probability = predict_proba(load(_path(self.champion_dir)), self.frame, names)
            found = score(self.frame[LABEL].to_numpy(), self.probability)
            self._log("monitoring", {f"{arm}_{key}": value for key, value in found.items()})
        columns = {name: self.frame[name] for name in ("event_timestamp", LABEL)}
        pd.DataFrame({**columns, "champion": self.probability}).to_parquet(f"{self.root}/plain/predictions.parquet")

    def _log(self, experiment: str, values: dict[str, Any]) -> str:
        found = self.client.get_experiment_by_name(experiment)
        location = f"{self.root}/plain/artifacts/{experiment}"
        identity = found.experiment_id if found else self.client.create_experiment(experiment, location)
        run = self.client.create_run(identity).info.run_id
        for name, value in values.items():
            if isinstance(value, int | float):
                self.client.log_metric(run, name, value)
        return run

    def drift(self) -> None:
        from airflow_mlops.drift import DriftPolicy, HarmPolicy, LossReference, Profile, assess_harm, compare
        from airflow_mlops.drift.page import write_page

        with open(self.job["profile"]) as file:
            reference = Profile.from_json(json.load(file))
        with open(self.job["loss_reference"]) as file:
            losses = LossReference.from_json(json.load(file))
        current = Profile.of(self.month.uri, columns=list(self.month.features))
        report = compare(reference, current, DriftPolicy.from_json({"calendar_columns": self.job["calendar_bound"]}))
        days = self.frame["event_timestamp"].dt.date
        harm = assess_harm(losses, self.frame[LABEL], self.probability, days, HarmPolicy.from_json(self.job["harm"]))
        shown = [column.name for column in report.columns][: self.job["page_columns"]]
        pair = [Profile(side.rows, {name: side.columns[name] for name in shown}) for side in (reference, current)]
        write_page(f"{self.root}/plain/drift.html", *pair, self.month.uri)
        self._write("drift", {"drift": report.to_json(), "harm": harm.to_json()})

    def snapshot(self) -> None:
        from dvc.repo import Repo

        repo = Repo.init(self.root, no_scm=True)
        with repo.config.edit() as config:
            config["remote"]["local"] = {"url": f"{self.root}/plain_remote"}
            config["core"]["remote"] = "local"
        repo = Repo(self.root)
        repo.add(f"{self.root}/raw")
        repo.push()

    def train(self) -> None:
        import ray
        from ray.train import CheckpointConfig, RunConfig, ScalingConfig
        from ray.train.xgboost import XGBoostTrainer

        from airflow_mlops.examples.flights.train import train_loop_per_worker
        from airflow_mlops.training.export import export_xgboost

        ray.init(address=self.job["ray_address"], log_to_driver=False)
        config = {"train_uri": self.training.uri, "features": list(self.training.features), "label": LABEL}
        result = XGBoostTrainer(
            train_loop_per_worker,
            train_loop_config={**config, "rounds": self.job["rounds"]},
            scaling_config=ScalingConfig(num_workers=self.job["num_workers"]),
            run_config=RunConfig(
                name="plain",
                storage_path=f"{self.root}/plain/runs",
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        ).fit()
        self.model_dir = f"{self.root}/plain/model"
        with result.checkpoint.as_directory() as folder:
            export_xgboost(folder, config, self.model_dir)
        ray.shutdown()

    def gate(self) -> None:
        import pandas as pd

        from airflow_mlops.evaluation import GatePolicy, evaluate
        from airflow_mlops.evaluation.latency import measure
        from airflow_mlops.evaluation.report import render
        from airflow_mlops.evaluation.scorer import load, predict_proba

        names = list(self.month.features)
        held_out = self.frame["event_timestamp"] >= pd.Timestamp(self.job["holdout_start"])
        frame = self.held_out = self.frame[held_out].reset_index(drop=True)
        label = frame[LABEL].to_numpy()
        self.challenger = predict_proba(load(self.model_dir), frame, names)
        champion = predict_proba(load(_path(self.champion_dir)), frame, names)
        self.days = frame["event_timestamp"].dt.strftime("%Y-%m-%d").to_numpy()
        verdict = evaluate(
            label,
            champion,
            self.challenger,
            clusters=self.days,
            slices={"origin": frame["origin"].to_numpy()},
            policy=GatePolicy.from_json(self.job["gate"]),
            latency=measure(self.model_dir, frame, names),
        )
        page = render(verdict, label, self.challenger, champion, title="Gate")
        with open(f"{self.root}/plain/gate.html", "w") as file:
            file.write(page)
        self._write("gate", verdict.to_json())

    def register(self) -> None:
        from airflow_mlops.drift import LossReference, Profile

        run = self._log(MODEL, {"train_rows": self.training.rows})
        profile = Profile.of(self.training.uri, columns=list(self.training.features))
        losses = LossReference.of(self.held_out[LABEL].to_numpy(), self.challenger, self.days)
        self.client.log_dict(run, profile.to_json(), "evidence/profile.json")
        self.client.log_dict(run, losses.to_json(), "evidence/loss_reference.json")
        self.client.log_artifact(run, f"{self.root}/plain/gate.html", "gate")
        self.client.log_artifacts(run, self.model_dir, "model")
        self.client.set_terminated(run)
        source = f"{self.client.get_run(run).info.artifact_uri}/model"
        self.version = self.client.create_model_version(MODEL, source, run).version

    def canary(self) -> None:
        from airflow_mlops.examples.flights.traffic import replay_holdout
        from airflow_mlops.rollout.controller import run_rollout
        from airflow_mlops.rollout.policy import RolloutPolicy, parse_guardrails
        from airflow_mlops.rollout.sources import TargetCounters
        from airflow_mlops.rollout.spec import RolloutSpec
        from airflow_mlops.rollout.targets.client import RayServeClient, Route

        job, version = self.job, str(self.version)
        spec = RolloutSpec(
            model=MODEL,
            version=version,
            uri=self.model_dir,
            stable_version=CHAMPION,
            stable_uri=job["champion_dir"],
            owner="plain",
            policy=RolloutPolicy.from_json(job["rollout"]),
            guardrails=parse_guardrails(job["guardrails"]),
            poll_interval=1,
            ttl=30,
        )

        async def roll_out() -> dict[str, Any]:
            async with RayServeClient(job["dashboard_url"], job["serve_url"], job["token"]) as serve:
                return await run_rollout(Route(serve, ROUTE), TargetCounters(), spec)

        month_set = {"uri": self.month.uri, "features": list(self.month.features), "label": LABEL}
        arguments = (f"{job['serve_url']}/{ROUTE}", version, month_set, job["holdout_start"])
        users = threading.Thread(target=replay_holdout, args=arguments)
        users.start()
        self.verdict = asyncio.run(roll_out())
        users.join()

    def promote(self) -> None:
        self.promoted = self.verdict["verdict"] == "PROMOTE"
        if self.promoted:
            self.client.set_registered_model_alias(MODEL, "champion", self.version)

    def record(self) -> None:
        self._write("record", {"canary": self.verdict, "training": self.training.to_json()})

    def _write(self, name: str, value: Any) -> None:
        with open(f"{self.root}/plain/{name}.json", "w") as file:
            json.dump(value, file)


def _path(uri: str) -> str:
    return uri.removeprefix("file://")


def main() -> None:
    """``python -m tests.bench.plain prepare|run JOB.json``; the job is written by :mod:`tests.bench.month`."""
    with open(sys.argv[2]) as file:
        job = {**json.load(file), "token": os.environ["RAY_AUTH_TOKEN"]}
    if sys.argv[1] == "prepare":
        prepare(job)
        return
    shutil.rmtree(f"{job['root']}/plain", ignore_errors=True)
    os.makedirs(f"{job['root']}/plain")
    month, begin = Month(job), time.perf_counter()
    month.run()
    wall = time.perf_counter() - begin
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    report = {
        "seconds": month.seconds,
        "wall": wall,
        "cpu": sum(part.ru_utime + part.ru_stime for part in used),
        "promoted": month.promoted,
    }
    with open(job["report"], "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main()
