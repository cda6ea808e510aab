"""
### Continuous training on New York's flights of 2013

Month by month: land the data, check it, score the model that served, look for harm and drift; where the model has
been harmed, train a challenger on Ray, hold it against the champion on days neither has seen, register it, give it a
share of the traffic, and make it champion or take it back.

* **No champion** yet: train one on all months since `history_start`.
* **No harm**: nothing is trained, and the run says so.
* **A challenger that loses**, at the gate or in the canary, changes nothing that serves.

Months run in order, because each is judged against the champion of the month before; only the newest may run again.
Backfill with `airflow backfill create --dag-id continuous_training --from-date 2013-03-01 --to-date 2013-07-31`.
"""

from __future__ import annotations

import datetime as dt
import os
import pathlib
from typing import Any

from airflow.sdk import DAG, Param, TaskGroup, TriggerRule, get_current_context, task
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowSkipException
from airflow.timetables.interval import CronDataIntervalTimetable

from airflow_mlops.assets import model_asset
from airflow_mlops.examples.flights import CALENDAR_BOUND, HARM, LABEL, MODEL, PARAMS, SERVICE
from airflow_mlops.examples.flights.documentation import DOCUMENTATION
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.operators.canary import CanaryPromoteOperator
from airflow_mlops.operators.dvc import DvcSnapshotOperator
from airflow_mlops.operators.feast import FeastApplyOperator, FeastMaterializeOperator, FeastTrainingSetOperator
from airflow_mlops.operators.gate import ModelGateOperator, ModelScoreOperator
from airflow_mlops.operators.mlflow import MlflowPromoteOperator, MlflowRegisterOperator
from airflow_mlops.operators.provenance import ModelRecordOperator
from airflow_mlops.operators.ray import RayTrainOperator
from airflow_mlops.sensors.drift import DriftSensor
from airflow_mlops.shell import permanent_errors_fail

ROOT = os.path.abspath(os.path.expanduser(conf.get("mlops", "root")))
# Where a connection is named, what is registered is signed, and nothing unsigned is scored, judged or served.
SIGNING = conf.get("mlops", "signing_conn_id") or None
REPOSITORY = os.environ.get("MLOPS_FEATURE_REPO", str(pathlib.Path(__file__).parents[1] / "feature_repo"))
# feature_store.yaml keeps its registry and its online store below the same folder.
os.environ["MLOPS_ROOT"] = ROOT

# What a week of held-out flights can show: each margin is the worst that is accepted, at the policy's error rates. On
# one machine the versions wait for the training and for each other, so of latency only much counts.
GUARDRAILS = [
    {"kind": "errors", "tolerance": 0.01},
    {"kind": "latency", "factor": 3, "tolerance": 0.2},
    {"kind": "log_loss", "margin": 0.15},
]

# The same rows and settings are the same training, whichever run asks for it: it is found, not repeated.
RUN_KEY = (
    "flights-{{ ti.xcom_pull(task_ids='plan')['month'] }}"
    "-{{ ti.xcom_pull(task_ids='train.training_set')['sha256'][:12] }}"
    "-{{ params.rounds }}x{{ params.num_workers }}"
)


def model_uri(version: str | None) -> str:
    """The registry's URI of a version, or nothing where there is none yet."""
    return f"models:/{MODEL}/{version}" if version else ""


with DAG(
    dag_id="continuous_training",
    description="Keeps the flight-delay model trained: drift, features, Ray training, gate, registry, canary.",
    doc_md=__doc__,
    schedule=CronDataIntervalTimetable("0 0 1 * *", timezone="UTC"),
    start_date=dt.datetime(2013, 1, 1, tzinfo=dt.timezone.utc),
    catchup=False,
    max_active_runs=1,
    tags=["mlops", "flights"],
    default_args={"retries": 1, "retry_delay": dt.timedelta(seconds=10)},
    params={
        "window_start": Param(
            None, type=["null", "string"], format="date", title="First day", section="Window",
            description="First day of the month to learn from. Empty: the run's data interval.",
        ),
        "window_end": Param(
            None, type=["null", "string"], format="date", title="Day after the last", section="Window",
            description="First day of the month after. Empty: the run's data interval.",
        ),
        "history_start": Param(
            "2013-01-01", type="string", format="date", title="History starts", section="Window",
            description="Months before it are not used; the first run lands every month since.",
        ),
        "training_months": Param(
            0, type="integer", minimum=0, maximum=12, title="Months to train on", section="Training",
            description="The challenger learns from that many latest months. 0: from all since the history starts.",
        ),
        "holdout_days": Param(
            7, type="integer", minimum=6, maximum=20, title="Held-out days", section="Training",
            description="The last days of the month: never trained on, used by the gate and replayed to the canary.",
        ),
        "retrain": Param(
            "on_harm", type="string", enum=["on_harm", "on_harm_or_drift", "always"], title="Retrain",
            section="Training", description="What makes the loop train a challenger.",
        ),
        "rounds": Param(150, type="integer", minimum=10, maximum=2000, title="Boosting rounds", section="Training"),
        "num_workers": Param(2, type="integer", minimum=1, maximum=64, title="Ray workers", section="Training"),
        "canary_steps": Param(
            [10, 50, 100], type="array", items={"type": "number"}, minItems=2, title="Canary steps in percent",
            section="Canary",
            description="Shares of the traffic the challenger gets, rising, the last one 100.",
        ),
    },
) as dag:  # fmt: skip

    @task(doc_md="Resolves the month and every parameter once, and refuses a month whose turn it is not.")
    def plan(**context: Any) -> dict[str, Any]:
        from airflow_mlops.examples.flights import ledger, source
        from airflow_mlops.examples.flights.months import month_of, months_between
        from airflow_mlops.hooks.mlflow import MlflowHook
        from airflow_mlops.windows import parse_instant, resolve_window

        params = context["params"]
        with permanent_errors_fail():
            window = resolve_window(context, params["window_start"], params["window_end"])
            month = month_of(window)
            # An end_date would end the schedule too, and take the tasks of every run made today by hand or by drift.
            if context["dag_run"].run_type == "scheduled" and not source.has(month):
                raise AirflowSkipException(f"the flights end in 2013, and {month} has none; backfill months of 2013")
            history = parse_instant(params["history_start"], "history_start")
            months = months_between(f"{history:%Y-%m}", month)
            if not months:
                raise InvalidInputError(f"history_start is {history:%Y-%m-%d}, after {month}; let it start before")
            hook = MlflowHook()
            # A first month that was stopped before its promotion leaves a version and no champion.
            serving = hook.version_by_alias(MODEL, "champion", missing_ok=not ledger.finished_months(ROOT))
            champion = ledger.begin(ROOT, month, str(serving.version) if serving else None)
            frozen = hook.version_by_alias(MODEL, "frozen", missing_ok=True) if serving else None
            latest = months[-params["training_months"] :] if params["training_months"] else months
        return {
            "month": month,
            "window_start": window.start.isoformat(),
            "window_end": window.end.isoformat(),
            "months": months,
            "champion": champion or "",
            "champion_uri": model_uri(champion),
            "frozen_uri": model_uri(str(frozen.version)) if frozen and champion else "",
            "train_start": f"{latest[0]}-01",
            "holdout_start": (window.end - dt.timedelta(days=params["holdout_days"])).isoformat(),
            "retrain_on": ["harm"] if params["retrain"] == "on_harm" else ["harm", "drift"],
            "on_stable": "proceed" if params["retrain"] == "always" or not champion else "skip",
            "canary_steps": params["canary_steps"],
            "month_set_uri": f"{ROOT}/sets/{month}/month.parquet",
            "training_set_uri": f"{ROOT}/sets/{month}/training.parquet",
            "predictions_uri": f"{ROOT}/reports/{month}/month_predictions.parquet",
            "drift_dir": f"{ROOT}/reports/{month}/drift",
            "gate_dir": f"{ROOT}/reports/{month}/gate",
        }

    planned = plan()

    with TaskGroup("data", tooltip="The month's raw data, checked, and the feature tables made of it") as data:

        @task(doc_md="Lands the month, and at the first run every month since the history starts. Again: no change.")
        def land(planned: dict[str, Any]) -> dict[str, Any]:
            from airflow_mlops.examples.flights import source

            with permanent_errors_fail():
                landed = [source.land(ROOT, month) for month in planned["months"]]
            return {"files": landed[-1]["files"], "months": planned["months"]}

        @task(doc_md="Holds the landed months against their contract: days, rows, carriers, ranges, duplicates.")
        def check_quality(landed: dict[str, Any]) -> list[dict[str, Any]]:
            from airflow_mlops.examples.flights import quality

            with permanent_errors_fail():
                return [quality.check(ROOT, month) for month in landed["months"]]

        @task(doc_md="Builds the feature tables: recent delays of carriers and airports, weather, planes.")
        def build_features(planned: dict[str, Any]) -> dict[str, Any]:
            from airflow_mlops.examples.flights import features

            with permanent_errors_fail():
                months = planned["months"]
                return [features.build(ROOT, month, first_month=months[0]) for month in months][-1]

        landed = land(planned)
        built = build_features(planned)
        check_quality(landed) >> built

    with TaskGroup("features", tooltip="Feast: definitions, and the online store that serving reads"):
        apply = FeastApplyOperator(
            task_id="apply",
            repo_path=REPOSITORY,
            doc_md="Registers the entities, feature views and the feature service of `feature_repo/`.",
        )
        materialize = FeastMaterializeOperator(
            task_id="materialize",
            repo_path=REPOSITORY,
            window_start=planned["window_start"],
            window_end=planned["window_end"],
            doc_md="Brings the online store up to the end of the month, whether or not a model is trained.",
        )

    with TaskGroup("monitor", tooltip="How the champion did, and whether that calls for another") as monitor:
        month_set = FeastTrainingSetOperator(
            task_id="month_set",
            repo_path=REPOSITORY,
            feature_service=SERVICE,
            entity_uri=f"{ROOT}/entities/flights",
            label_column=LABEL,
            window_start=planned["window_start"],
            window_end=planned["window_end"],
            output_uri=planned["month_set_uri"],
            doc_md="The month's flights with the features that were known two hours before departure, and the label.",
        )
        score = ModelScoreOperator(
            task_id="score",
            models={"champion": planned["champion_uri"], "frozen": planned["frozen_uri"]},
            data_uri=month_set.output["uri"],
            features=month_set.output["features"],
            label_column=LABEL,
            window_start=planned["window_start"],
            window_end=planned["window_end"],
            predictions_uri=planned["predictions_uri"],
            experiment=f"{MODEL}/monitoring",
            signing_conn_id=SIGNING,
            doc_md="Scores the champion, and the first model of all, on the month once its labels are in.",
        )
        drift = DriftSensor(
            task_id="drift",
            current_uri=month_set.output["uri"],
            model_name=MODEL,
            model_version=planned["champion"],
            window_start=planned["window_start"],
            window_end=planned["window_end"],
            columns=month_set.output["features"],
            predictions_uri=score.output["predictions_uri"],
            prediction_column="champion",
            scores_column="champion",
            policy={"calendar_columns": list(CALENDAR_BOUND)},
            harm_policy=HARM,
            retrain_on=planned["retrain_on"],
            on_stable=planned["on_stable"],
            report_dir=planned["drift_dir"],
            doc_md="Retrains on harm: a loss or calibration worse than the champion's own reference, with a stated "
            "error rate. Drift of the features is shown as evidence, and so is what the scores alone let expect.",
        )

    with TaskGroup("train", tooltip="A challenger, and whether it is better than the champion") as train:
        snapshot = DvcSnapshotOperator(
            task_id="snapshot",
            path=f"{ROOT}/raw",
            remote_url=f"{ROOT}/dvc_remote",
            doc_md="Pins the exact bytes the challenger learns from.",
        )
        training_set = FeastTrainingSetOperator(
            task_id="training_set",
            repo_path=REPOSITORY,
            feature_service=SERVICE,
            entity_uri=f"{ROOT}/entities/flights",
            label_column=LABEL,
            window_start=planned["train_start"],
            window_end=planned["holdout_start"],
            output_uri=planned["training_set_uri"],
            doc_md="Everything before the held-out days, joined as of the time of each prediction.",
        )
        challenger = RayTrainOperator(
            task_id="ray_train",
            mode="jobs",
            ray_conn_id="ray_default",
            train_fn="airflow_mlops.examples.flights.train:train_loop_per_worker",
            trainer="xgboost",
            num_workers="{{ params.num_workers }}",
            config={
                "train_uri": training_set.output["uri"],
                "features": training_set.output["features"],
                "label": LABEL,
                "rounds": "{{ params.rounds }}",
                "params": PARAMS,
            },
            storage_path=f"{ROOT}/runs",
            run_key=RUN_KEY,
            poll_interval=1,
            deferrable=True,
            doc_md="Distributed XGBoost on Ray; goes on from its last checkpoint whatever dies in between.",
        )
        gate = ModelGateOperator(
            task_id="gate",
            challenger_uri=challenger.output["model_uri"],
            champion_uri=planned["champion_uri"],
            data_uri=month_set.output["uri"],
            window_start=planned["holdout_start"],
            window_end=planned["window_end"],
            features=month_set.output["features"],
            label_column=LABEL,
            slice_columns=["origin"],
            policy={"metric": "log_loss", "rule": "improvement", "alpha": 0.05, "floors": {"auc": 0.6}},
            report_dir=planned["gate_dir"],
            on_fail="skip",
            signing_conn_id=SIGNING,
            doc_md="Challenger against champion on the held-out days: a paired test of the log loss, floors, slices.",
        )

    with TaskGroup("release", tooltip="Registry, canary, champion") as release:
        register = MlflowRegisterOperator(
            task_id="register",
            model_name=MODEL,
            training=challenger.output,
            training_set=training_set.output,
            gate=gate.output,
            snapshot=snapshot.output,
            window_start=planned["window_start"],
            window_end=planned["window_end"],
            signing_conn_id=SIGNING,
            doc_md="One version for one training, with the profile of its data, its loss and where it came from.",
        )
        canary = CanaryPromoteOperator(
            task_id="canary",
            model_name=MODEL,
            version=register.output["version"],
            model_uri=register.output["model_uri"],
            stable_version=planned["champion"],
            stable_uri=planned["champion_uri"],
            policy={"steps": planned["canary_steps"], "deadline_seconds": 600},
            guardrails=GUARDRAILS,
            poll_interval=1,
            ttl=30,
            ray_conn_id="ray_default",
            on_rollback="skip",
            deferrable=True,
            signing_conn_id=SIGNING,
            doc_md="Shifts the traffic step by step, judges both arms at every look, promotes or rolls back.",
        )

        @task(doc_md="Stands for the users: sends the held-out flights to the model, and the labels once they landed.")
        def replay(month_set: dict[str, Any], registered: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any]:
            from airflow_mlops.examples.flights.traffic import replay_holdout
            from airflow_mlops.hooks.ray_serve import RayServeHook

            route = f"{RayServeHook().get_conn().serve_url}/{MODEL}"
            with permanent_errors_fail():
                return replay_holdout(route, registered["version"], month_set, planned["holdout_start"])

        promote = MlflowPromoteOperator(
            task_id="promote",
            model_name=MODEL,
            version=register.output["version"],
            expected_version=planned["champion"],
            outlets=[model_asset(MODEL)],
            doc_md="Moves the champion alias, if it still names the version this run was judged against.",
        )

        @task(doc_md="Keeps the first champion under the alias `frozen`, to show what never retraining costs.")
        def freeze_first(registered: dict[str, Any], planned: dict[str, Any]) -> None:
            from airflow_mlops.hooks.mlflow import MlflowHook

            if not planned["champion"]:
                MlflowHook().client.set_registered_model_alias(MODEL, "frozen", registered["version"])

        papers = ModelRecordOperator(
            task_id="papers",
            registration=register.output,
            snapshot=snapshot.output,
            training_set=training_set.output,
            training=challenger.output,
            gate=gate.output,
            canary=canary.output,
            promotion=promote.output,
            documentation=DOCUMENTATION,
            feature_service=SERVICE,
            entity_uri=f"{ROOT}/entities/flights",
            trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,
            doc_md="The version's record, bill of materials and model card, whatever the canary decided.",
        )

        replay(month_set.output, register.output, planned)
        register >> canary >> promote >> papers
        promote >> freeze_first(register.output, planned)

    @task(
        trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,
        doc_md="Puts the month on record: what was found, what was decided, on which numbers.",
    )
    def record(planned: dict[str, Any]) -> str:
        from airflow_mlops.examples.flights import ledger
        from airflow_mlops.hooks.mlflow import MlflowHook

        context = get_current_context()
        ti = context["ti"]

        def result(task_id: str) -> Any:
            return ti.xcom_pull(task_ids=task_id)

        champion = MlflowHook().version_by_alias(MODEL, "champion", missing_ok=True)
        return ledger.finish(
            ROOT,
            planned["month"],
            {
                "window": {"start": planned["window_start"], "end": planned["window_end"]},
                "champion_before": planned["champion"] or None,
                "champion_after": str(champion.version) if champion else None,
                "drift": result("monitor.drift"),
                "score": result("monitor.score"),
                "training": result("train.ray_train"),
                "gate": result("train.gate"),
                "register": result("release.register"),
                "canary": result("release.canary"),
                "papers": result("release.papers"),
                "seconds": (dt.datetime.now(dt.timezone.utc) - context["dag_run"].start_date).total_seconds(),
            },
        )

    built >> apply >> [materialize, month_set]
    month_set >> score >> drift >> snapshot >> training_set
    [release, materialize] >> record(planned)
