"""
### Drift starts the training

`drift_check` looks at a month of flights as soon as it is complete: it lands it, joins the features, scores the
champion and writes a drift report. It trains nothing.

`drift_watch` has no clock. Its asset is watched by a trigger that reads those reports; one that asks for retraining
starts it, and it starts `continuous_training` on the month that the report is about.
"""

from __future__ import annotations

import datetime as dt
import os
import pathlib
from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG, Asset, AssetWatcher, Param, task
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowSkipException
from airflow.timetables.interval import CronDataIntervalTimetable

from airflow_mlops.examples.flights import CALENDAR_BOUND, HARM, LABEL, MODEL, SERVICE
from airflow_mlops.operators.feast import FeastApplyOperator, FeastTrainingSetOperator
from airflow_mlops.operators.gate import ModelScoreOperator
from airflow_mlops.sensors.drift import DriftSensor
from airflow_mlops.shell import permanent_errors_fail
from airflow_mlops.triggers.drift import DriftEventTrigger

ROOT = os.path.abspath(os.path.expanduser(conf.get("mlops", "root")))
REPOSITORY = os.environ.get("MLOPS_FEATURE_REPO", str(pathlib.Path(__file__).parents[1] / "feature_repo"))
os.environ["MLOPS_ROOT"] = ROOT
# Not the reports of continuous_training itself: those have been acted on.
WATCHED = f"{ROOT}/watch"

with DAG(
    dag_id="drift_check",
    description="Looks for harm and drift in a month of flights, and trains nothing.",
    doc_md=__doc__,
    schedule=CronDataIntervalTimetable("0 0 1 * *", timezone="UTC"),
    start_date=dt.datetime(2013, 1, 1, tzinfo=dt.timezone.utc),
    catchup=False,
    max_active_runs=1,
    tags=["mlops", "flights"],
    default_args={"retries": 1, "retry_delay": dt.timedelta(seconds=10)},
    params={
        "window_start": Param(None, type=["null", "string"], format="date", description="Empty: the data interval."),
        "window_end": Param(None, type=["null", "string"], format="date", description="Empty: the data interval."),
    },
) as check_dag:

    @task(doc_md="Lands the month and builds its feature tables; doing it again changes nothing.")
    def prepare(**context: Any) -> dict[str, Any]:
        from airflow_mlops.examples.flights import features, quality, source
        from airflow_mlops.examples.flights.months import month_of, months_before
        from airflow_mlops.hooks.mlflow import MlflowHook
        from airflow_mlops.windows import resolve_window

        with permanent_errors_fail():
            window = resolve_window(context, context["params"]["window_start"], context["params"]["window_end"])
            month = month_of(window)
            if context["dag_run"].run_type == "scheduled" and not source.has(month):
                raise AirflowSkipException(f"the flights end in 2013, and {month} has none; trigger a month of 2013")
            # Rolling delays reach back a month or two.
            for landed in [*months_before(month, 2, source.FIRST_MONTH), month]:
                source.land(ROOT, landed)
            quality.check(ROOT, month)
            features.build(ROOT, month)
            champion = MlflowHook().version_by_alias(MODEL, "champion")
        return {
            "window_start": window.start.isoformat(),
            "window_end": window.end.isoformat(),
            "champion": str(champion.version) if champion else "",
            "champion_uri": f"models:/{MODEL}/{champion.version}" if champion else "",
            "set_uri": f"{ROOT}/sets/{month}/check.parquet",
            "predictions_uri": f"{WATCHED}/predictions/{month}.parquet",
        }

    prepared = prepare()
    month_set = FeastTrainingSetOperator(
        task_id="month_set",
        repo_path=REPOSITORY,
        feature_service=SERVICE,
        entity_uri=f"{ROOT}/entities/flights",
        label_column=LABEL,
        window_start=prepared["window_start"],
        window_end=prepared["window_end"],
        output_uri=prepared["set_uri"],
        doc_md="The month's flights as the model would have seen them, and the label.",
    )
    score = ModelScoreOperator(
        task_id="score",
        models={"champion": prepared["champion_uri"]},
        data_uri=month_set.output["uri"],
        features=month_set.output["features"],
        label_column=LABEL,
        window_start=prepared["window_start"],
        window_end=prepared["window_end"],
        predictions_uri=prepared["predictions_uri"],
        experiment=f"{MODEL}/watch",
        doc_md="The champion's predictions for the month.",
    )
    check = DriftSensor(
        task_id="check",
        current_uri=month_set.output["uri"],
        model_name=MODEL,
        model_version=prepared["champion"],
        window_start=prepared["window_start"],
        window_end=prepared["window_end"],
        columns=month_set.output["features"],
        predictions_uri=score.output["predictions_uri"],
        on_stable="proceed",
        policy={"calendar_columns": list(CALENDAR_BOUND)},
        harm_policy=HARM,
        report_dir=f"{WATCHED}/reports",
        # However the evidence swings: at most one training in four weeks, and six in a year, start from here. What was
        # granted is kept in the asset's state store.
        inlets=[Asset("flights_delay_champion")],
        hysteresis={"cooldown": "28d", "rearm_after": "28d", "budget_per_window": 6, "window": "52w"},
        doc_md="Writes the report that `drift_watch` waits for.",
    )
    apply = FeastApplyOperator(task_id="apply", repo_path=REPOSITORY, doc_md="Registers the feature views.")
    prepared >> apply >> month_set >> score >> check


harm = Asset(
    "flights_delay_harmed",
    watchers=[
        AssetWatcher(
            name="flights_delay_reports",
            trigger=DriftEventTrigger(report_dir=f"{WATCHED}/reports", model_name=MODEL, poll_interval=5),
        )
    ],
)

with DAG(
    dag_id="drift_watch",
    description="Starts continuous_training on the month in which a drift report asks for it.",
    doc_md=__doc__,
    schedule=[harm],
    start_date=dt.datetime(2013, 1, 1, tzinfo=dt.timezone.utc),
    catchup=False,
    tags=["mlops", "flights"],
):

    @task(doc_md="The window of the report, as parameters of the training Dag.")
    def window_of_report(**context: Any) -> dict[str, str]:
        from airflow_mlops.windows import resolve_window

        with permanent_errors_fail():
            window = resolve_window({**context, "data_interval_start": None})
        return {
            "window_start": f"{window.start:%Y-%m-%d}",
            "window_end": f"{window.end:%Y-%m-%d}",
            # The report has decided; the sensor of the training Dag shall not decide again.
            "retrain": "always",
        }

    TriggerDagRunOperator(
        task_id="train",
        trigger_dag_id="continuous_training",
        # XComArgs in conf are resolved before the run is made.
        conf=window_of_report(),
        doc_md="Starts the training Dag; it works on the report's month.",
    )
