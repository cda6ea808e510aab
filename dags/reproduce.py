"""
### Train a version of the flights model again

From what the version's record says, and from nothing else: the raw data of the DVC snapshot, the same window and
features, the same loop, parameters, seed and number of workers. The run fails where the rebuilt training set is not the
same to the byte, or where a metric differs by more than `tolerance`. Nothing that serves is touched.

`airflow_mlops.provenance.reproduce("flights_delay", "3")` shows what will be trained.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from airflow.sdk import DAG, Param, task
from airflow.sdk.configuration import conf

from airflow_mlops.examples.flights import MODEL
from airflow_mlops.exceptions import DataError
from airflow_mlops.operators.ray import RayTrainOperator
from airflow_mlops.shell import permanent_errors_fail

ROOT = os.path.abspath(os.path.expanduser(conf.get("mlops", "root")))
REPOSITORY = os.environ.get("MLOPS_FEATURE_REPO", str(pathlib.Path(__file__).parents[1] / "feature_repo"))

with DAG(
    dag_id="reproduce",
    description="Trains a registered version again from its record, and compares.",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    max_active_runs=1,
    tags=["mlops", "flights"],
    params={
        "version": Param(
            "champion", type="string", minLength=1, title="Version",
            description="Number of the registered version, or an alias.",
        ),
        "tolerance": Param(
            1e-9, type="number", minimum=0, title="Tolerance",
            description="Share by which a metric may differ from the recorded one.",
        ),
    },
) as dag:  # fmt: skip

    @task(doc_md="What is trained again, from the version's record; says what has changed around it since.")
    def plan(**context: Any) -> dict[str, Any]:
        from airflow_mlops.hooks.mlflow import MlflowHook
        from airflow_mlops.provenance import trace
        from airflow_mlops.provenance.reproduce import configuration, surroundings_changed

        with permanent_errors_fail():
            record = trace(MODEL, context["params"]["version"], MlflowHook().client)
            for change in surroundings_changed(record):
                print(change)
            return {**configuration(record), "folder": f"{ROOT}/reproduced/{record.version}"}

    @task(doc_md="The raw data, out of the DVC remote; every file's hash is checked.")
    def restore(planned: dict[str, Any]) -> str:
        import shutil

        from airflow_mlops.hooks.dvc import DvcHook

        with permanent_errors_fail():
            raw = f"{planned['folder']}/raw"
            shutil.rmtree(raw, ignore_errors=True)
            return DvcHook(remote_url=planned["snapshot"]["remote"]).restore(planned["snapshot"]["md5"], raw)

    @task(doc_md="Features and training set, built anew; refused unless the bytes are those the version learned from.")
    def rebuild(planned: dict[str, Any], raw: str) -> dict[str, Any]:
        from airflow_mlops.examples.flights import features
        from airflow_mlops.features.repository import apply_repository
        from airflow_mlops.features.training_set import build_training_set
        from airflow_mlops.hooks.feast import FeastHook
        from airflow_mlops.windows import Window, parse_instant

        folder, wanted = planned["folder"], planned["training_set"]
        # The repository's sources, registry and online store lie below it.
        os.environ["MLOPS_ROOT"] = folder
        with permanent_errors_fail():
            months = sorted(file.stem for file in pathlib.Path(raw, "flights").glob("*.parquet"))
            for month in months:
                features.build(folder, month, first_month=months[0])
            hook = FeastHook(repo_path=REPOSITORY)
            apply_repository(hook.store, hook.repo_path)
            built = build_training_set(
                hook.store,
                hook.service(wanted["feature_service"]),
                entity_uri=f"{folder}/entities/flights",
                output_uri=f"{folder}/training.parquet",
                window=Window(*(parse_instant(wanted["window"][end]) for end in ("start", "end"))),
                label=wanted["label"],
            )
            if built.sha256 != wanted["sha256"]:
                raise DataError(
                    f"the training set built anew has the sha256 {built.sha256}, and version {planned['version']} "
                    f"learned from {wanted['sha256']}: features or their code have changed since "
                    f"{planned['code']['revision']}; check that revision out and run this again"
                )
            return {**planned["training"]["config"], "train_uri": built.uri}

    @task(doc_md="Fails where a metric is not the recorded one.")
    def compare(planned: dict[str, Any], trained: dict[str, Any], **context: Any) -> dict[str, Any]:
        from airflow_mlops.provenance import compare_metrics

        with permanent_errors_fail():
            differs = compare_metrics(planned["metrics"], trained["metrics"], context["params"]["tolerance"])
            if differs:
                raise DataError(f"version {planned['version']} was not reproduced: {differs}")
            return {"version": planned["version"], "expected": planned["metrics"], "found": trained["metrics"]}

    planned = plan()
    config = rebuild(planned, restore(planned))
    train = RayTrainOperator(
        task_id="train",
        mode="jobs",
        ray_conn_id="ray_default",
        train_fn="{{ ti.xcom_pull(task_ids='plan')['training']['train_fn'] }}",
        trainer="{{ ti.xcom_pull(task_ids='plan')['training']['trainer'] }}",
        num_workers="{{ ti.xcom_pull(task_ids='plan')['training']['num_workers'] }}",
        config=config,
        storage_path=f"{ROOT}/reproduced/runs",
        run_key="{{ dag_run.run_id | replace(':', '-') | replace('+', '-') }}",
        poll_interval=1,
        deferrable=True,
        doc_md="The same loop, on a directory of its own.",
    )
    compare(planned, train.output)
