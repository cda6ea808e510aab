"""The start of every retraining: has the champion come to do harm, and has its input drifted?"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator, PokeReturnValue
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowSensorTimeout, AirflowSkipException

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.links import MlflowRunLink, ReportLink
from airflow_mlops.operators._audit import audited
from airflow_mlops.sensors._drift import (
    Found,
    compare_window,
    drift_table,
    judge_by_evidently,
    policy_of,
    read_json,
    tagged_json,
)
from airflow_mlops.sensors._drift_evidence import Evidence, evidence_of, verdict_of
from airflow_mlops.sensors._drift_ray import ProfileJob, check_options
from airflow_mlops.sensors._drift_report import short, small, to_mlflow, to_prometheus, write_page
from airflow_mlops.sensors._drift_state import decide, why_held
from airflow_mlops.shell import as_mapping, as_names, is_blank, permanent_errors_fail, push_result, require
from airflow_mlops.triggers.drift import REPORT_SUFFIX, DataReadyTrigger, data_ready
from airflow_mlops.windows import Window, resolve_window

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

    from airflow_mlops.drift import DriftPolicy, DriftReport, HarmPolicy, Profile
    from airflow_mlops.drift.hysteresis import Decision, Hysteresis
    from airflow_mlops.hooks.mlflow import MlflowHook


@dataclass
class _Seen:
    """One check, for OpenLineage."""

    reference_uri: str | None
    profile: Profile | None
    report: DriftReport | None
    result: dict[str, Any]


ENGINES = ("profile", "ray", "evidently")


class DriftSensor(BaseSensorOperator):
    """Compares a window of data with the champion's training profile, and its losses with those it was accepted on.

    Waits until the data are there, finds the champion's profile through the tag ``mlops.profile_uri`` of its model
    version and its loss reference through ``mlops.loss_reference_uri``, and decides:

    ``harm``
        realised log loss or calibration of the champion is worse than on its reference, see
        :mod:`airflow_mlops.drift.harm`
    ``drift``
        columns have drifted, see :mod:`airflow_mlops.drift.compare`
    ``not_enough_data``
        too little to tell; handled like ``stable``, under its own name
    ``stable``
        neither
    ``no_champion``
        the registered model never had a version, or ``model_version`` is empty: train the first one

    Drift is evidence; by default only harm asks for retraining. A column that is missing, all missing or of another
    type makes the verdict ``drift`` and asks for no retraining by itself: the data need repair first.

    The report is written to ``report_dir`` as JSON, where :class:`airflow_mlops.triggers.drift.DriftEventTrigger`
    finds it, with Evidently's page on a sample beside it; both go to an MLflow run too. The result is pushed before a
    skip too.

    With ``hysteresis``, evidence that asks for retraining is held back by arm and disarm levels, breaches in a row, a
    cool-down and a budget; reasons and ``hysteresis`` of the result say so, and until when. Its state goes by the end
    of the window: a retry, or the same window in a backfill, counts once, and a window older than the newest judged
    changes nothing. It is in the asset state store where the task has exactly one asset among its inlets and outlets,
    which all sensors on the model should share, else in a file. Airflow's store cannot compare and set: let one run of
    the Dag be active at a time (``max_active_runs=1``). A first champion is never held back.

    :param current_uri: Parquet or CSV file, directory or glob with the window's data (templated)
    :param model_name: registered model (templated)
    :param alias: alias of the champion (templated)
    :param model_version: the champion at the start of the run, in place of the alias's; the empty string for none,
        None for the alias's (templated)
    :param mlflow_conn_id: Airflow connection of type ``mlflow``
    :param tracking_uri: MLflow's URI, in place of the connection's (templated)
    :param columns: columns to compare; the reference profile's when not given (templated)
    :param categorical: numeric columns whose numbers are names (templated)
    :param label_column: column of the label in ``predictions_uri`` (templated)
    :param predictions_uri: Parquet with ``event_timestamp``, the label and ``prediction_column``: needed to judge
        harm; the window's, but see ``loss_test`` (templated)
    :param prediction_column: the champion's probability of label 1 (templated)
    :param policy: :class:`~airflow_mlops.drift.DriftPolicy` or a mapping of its fields (templated)
    :param harm_policy: :class:`~airflow_mlops.drift.HarmPolicy` or a mapping of its fields (templated)
    :param on_stable: ``skip`` downstream tasks, ``proceed``, or ``wait`` for other data at ``current_uri`` (templated)
    :param retrain_on: which verdicts ask for retraining: ``harm``, ``drift`` (templated)
    :param report_dir: folder or URI for reports (templated)
    :param window_start: start of the window, for the report; the run's data interval when not given (templated)
    :param window_end: end of the window (templated)
    :param scores_column: column of the champion's scores in ``predictions_uri``, or in ``current_uri`` where that is
        not given: what performance to expect of them, without labels, is shown as ``estimate``. Needs the tag
        ``mlops.performance_uri``: JSON of a :class:`~airflow_mlops.drift.performance.CalibratedEstimate` (templated)
    :param loss_test: fields of a :class:`~airflow_mlops.drift.sequential.LossTest`, and ``label_delay`` such as
        ``"3d"``: the champion's log loss is tested over all windows since it serves, at every one of them, shown as
        ``sequential``, and harm by it is harm. For labels that come after the check ``predictions_uri`` has to go
        back beyond the window, as far as the delay; harm by the window goes by the window's rows alone then. Kept
        where the hysteresis is (templated)
    :param hysteresis: fields of :class:`~airflow_mlops.drift.hysteresis.Hysteresis`, for example
        ``{"cooldown": "7d", "budget_per_window": 2, "window": "30d"}``; the score is 1 where the policy's tolerance is,
        2 at twice of it (templated)
    :param state_dir: folder or URI of the hysteresis' file where no asset keeps it; the same for every window;
        ``report_dir`` when not given (templated)
    :param engine: ``profile``; ``ray`` for the same profile, built by Ray Data in a job on a cluster; or ``evidently``
        for the verdict of Evidently's own preset and tests, on all rows in memory (templated)
    :param engine_options: with ``evidently`` arguments of its ``DataDriftPreset``, such as ``drift_share``; with
        ``ray`` the job's ``runtime_env`` and ``python`` (this interpreter if the cluster is on this machine, else
        ``python``), ``num_cpus`` of each of its tasks and ``poll_interval`` (templated)
    :param ray_conn_id: connection of type ``ray``, for ``engine="ray"``; the cluster's image needs this package, and
        Ray and Airflow the same storage
    :param reference_uri: data that the champion was trained on, for ``engine="evidently"``; those named by the tag
        ``mlops.dataset_uri`` when not given (templated)
    :param season_uri: JSON of a profile of the same season in another year: columns that are as in it are shown as
        ``calendar`` and do not count (templated)
    :param experiment: MLflow experiment for a run with each window's verdict, numbers and pages; empty for none
        (templated)
    :param prometheus_textfile_dir: folder of a node exporter's textfile collector, for metrics of the check; that of
        ``[mlops] prometheus_textfile_dir`` when not given (templated)
    :param pushgateway_url: of a Prometheus push gateway, for the same; ``[mlops] pushgateway_url`` when not given
        (templated)
    :param evidently: write Evidently's page too, on the 20 columns that differ most
    :param deferrable: wait in the triggerer; the comparison always runs on the worker
    """

    template_fields: Sequence[str] = (
        "current_uri",
        "model_name",
        "alias",
        "model_version",
        "tracking_uri",
        "columns",
        "categorical",
        "label_column",
        "predictions_uri",
        "prediction_column",
        "policy",
        "harm_policy",
        "on_stable",
        "retrain_on",
        "report_dir",
        "window_start",
        "window_end",
        "scores_column",
        "loss_test",
        "hysteresis",
        "state_dir",
        "engine",
        "engine_options",
        "reference_uri",
        "season_uri",
        "experiment",
        "prometheus_textfile_dir",
        "pushgateway_url",
    )
    template_fields_renderers = dict.fromkeys(
        ("policy", "harm_policy", "loss_test", "hysteresis", "engine_options"), "json"
    )
    operator_extra_links = (ReportLink(), MlflowRunLink())
    ui_color = "#e8f0fa"

    def __init__(
        self,
        *,
        current_uri: str,
        model_name: str,
        report_dir: str,
        alias: str = "champion",
        model_version: str | None = None,
        mlflow_conn_id: str = "mlflow_default",
        tracking_uri: str | None = None,
        columns: Sequence[str] | None = None,
        categorical: Sequence[str] = (),
        label_column: str = "label",
        predictions_uri: str | None = None,
        prediction_column: str = "champion",
        policy: DriftPolicy | Mapping[str, Any] | None = None,
        harm_policy: HarmPolicy | Mapping[str, Any] | None = None,
        on_stable: str = "skip",
        retrain_on: Sequence[str] = ("harm",),
        window_start: str | None = None,
        window_end: str | None = None,
        scores_column: str | None = None,
        loss_test: Mapping[str, Any] | None = None,
        hysteresis: Hysteresis | Mapping[str, Any] | None = None,
        state_dir: str | None = None,
        engine: str = "profile",
        engine_options: Mapping[str, Any] | None = None,
        ray_conn_id: str = "ray_default",
        reference_uri: str | None = None,
        season_uri: str | None = None,
        experiment: str | None = "drift",
        prometheus_textfile_dir: str | None = None,
        pushgateway_url: str | None = None,
        evidently: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"multiple_outputs": True, **kwargs})
        self.current_uri = current_uri
        self.model_name = model_name
        self.report_dir = report_dir
        self.alias = alias
        self.model_version = model_version
        self.mlflow_conn_id = mlflow_conn_id
        self.tracking_uri = tracking_uri
        self.columns = columns
        self.categorical = categorical
        self.label_column = label_column
        self.predictions_uri = predictions_uri
        self.prediction_column = prediction_column
        self.policy = policy
        self.harm_policy = harm_policy
        self.on_stable = on_stable
        self.retrain_on = retrain_on
        self.window_start = window_start
        self.window_end = window_end
        self.scores_column = scores_column
        self.loss_test = loss_test
        self.hysteresis = hysteresis
        self.state_dir = state_dir
        self.engine = engine
        self.engine_options = engine_options
        self.ray_conn_id = ray_conn_id
        self.reference_uri = reference_uri
        self.season_uri = season_uri
        self.experiment = experiment
        self.prometheus_textfile_dir = prometheus_textfile_dir
        self.pushgateway_url = pushgateway_url
        self.evidently = evidently
        self.deferrable = deferrable
        self._seen: _Seen | None = None
        self._job: ProfileJob | None = None

    def execute(self, context: Context) -> Any:
        """The result, once the data are there and, with ``on_stable="wait"``, ask for retraining."""
        with permanent_errors_fail():
            self._validate()
        if not self.deferrable:
            return super().execute(context)
        return self._wait_deferred(context, started=dt.datetime.now(dt.timezone.utc))

    def execute_complete(self, context: Context, event: Mapping[str, Any], started: str) -> Any:
        """Go on after the trigger saw the data."""
        return self._wait_deferred(context, started=dt.datetime.fromisoformat(started))

    def on_kill(self) -> None:
        """Stop the job that builds the profile."""
        if self._job is not None:
            self._job.stop()

    def _wait_deferred(self, context: Context, started: dt.datetime) -> Any:
        result = self._look(context)
        if result is not None and not self._waits_on(result):
            return result
        left = started + dt.timedelta(seconds=self.timeout) - dt.datetime.now(dt.timezone.utc)
        if left <= dt.timedelta(0):
            raise AirflowSensorTimeout(self._waiting_for(result))
        self.log.info("%s; deferring", self._waiting_for(result))
        self.defer(
            trigger=DataReadyTrigger(self.current_uri, float(self.poke_interval), delay=float(self.poke_interval)),
            method_name="execute_complete",
            kwargs={"started": started.isoformat()},
            timeout=left,
        )

    def poke(self, context: Context) -> PokeReturnValue:
        """One look, for Airflow's own waiting."""
        result = self._look(context)
        done = result is not None and not self._waits_on(result)
        if not done:
            self.log.info("%s", self._waiting_for(result))
        return PokeReturnValue(is_done=done, xcom_value=result)

    def _waits_on(self, result: Mapping[str, Any]) -> bool:
        return self.on_stable == "wait" and not result["retrain"]

    def _waiting_for(self, result: Mapping[str, Any] | None) -> str:
        if result is None:
            return f"waiting for data at {self.current_uri}"
        return f"{result['verdict']}; waiting for other data at {self.current_uri}"

    def _look(self, context: Context) -> dict[str, Any] | None:
        """The result, or None while there are no data."""
        with permanent_errors_fail():
            if not data_ready(self.current_uri):
                return None
            result = audited(context, "drift", self.check(context))
            if self.on_stable == "skip" and not result["retrain"]:
                push_result(self, context, result)
                raise AirflowSkipException(f"{self.model_name} {result['verdict']}: no retraining ({short(result)})")
            return result

    @property
    def _retrain_on(self) -> list[str]:
        return as_names(self.retrain_on, "retrain_on")

    def _validate(self) -> None:
        require(current_uri=self.current_uri, model_name=self.model_name, report_dir=self.report_dir)
        if self.on_stable not in ("wait", "skip", "proceed"):
            raise InvalidInputError(f"on_stable is {self.on_stable!r}; expected wait, skip or proceed")
        if not self._retrain_on or set(self._retrain_on) - {"harm", "drift"}:
            raise InvalidInputError(f"retrain_on is {self.retrain_on!r}; expected a list of harm, drift or both")
        if self.engine not in ENGINES:
            raise InvalidInputError(f"engine is {self.engine!r}; expected {' or '.join(ENGINES)}")
        if self.engine == "profile" and as_mapping(self.engine_options, "engine_options"):
            raise InvalidInputError("engine_options are for engine='ray' or 'evidently'; set it, or leave them out")
        if self.engine == "ray":
            check_options(as_mapping(self.engine_options, "engine_options"))
        self._limits()

    # --- the check ----------------------------------------------------------------------------------------------

    def check(self, context: Context) -> dict[str, Any]:
        """Compare, write the reports, and return the result; the data are there."""
        from airflow_mlops.hooks.mlflow import MlflowHook

        window = self._window(context)
        hook = MlflowHook(self.mlflow_conn_id, tracking_uri=None if is_blank(self.tracking_uri) else self.tracking_uri)
        champion = self._champion(hook)
        model = {"name": self.model_name, "version": str(champion.version) if champion else None, "alias": self.alias}
        report = {"model": model, "window": window.to_json() if window else None, "retrain_on": self._retrain_on}
        report_uri = storage.join(self.report_dir, self._report_name(context, window) + REPORT_SUFFIX)
        if champion is None:
            reasons = [f"{self.model_name} has no champion yet: train the first one"]
            return self._publish(hook, report_uri, report, "no_champion", True, reasons)
        reference, found = self._drift(hook, champion, self._reference_profile(hook, champion), window, report_uri)
        evidence = self._evidence(context, hook, champion, window)
        verdict, wanted, reasons = verdict_of(found, evidence, self._retrain_on)
        held = self._hold(context, window, model["version"], found, evidence, wanted)
        if held is not None and wanted and not held.retrain:
            reasons = [why_held(held), *reasons]
        html_uri = report_uri.removesuffix(REPORT_SUFFIX) + ".html" if self.evidently else None
        if html_uri is not None:
            html_uri = write_page(self.log, html_uri, reference, found, self.current_uri)
        retrain = wanted and (held is None or held.retrain)
        result = self._publish(hook, report_uri, report, verdict, retrain, reasons, found, evidence, held, html_uri)
        self._seen = _Seen(self._reference_uri(champion), found.profile, found.report, result)
        return result

    def _champion(self, hook: MlflowHook) -> Any | None:
        """The version to compare with; None when there is none, which a lost value must not look like."""
        if self.model_version == "":
            return None
        if is_blank(self.model_version):
            return hook.version_by_alias(self.model_name, self.alias)
        return hook.version(self.model_name, str(self.model_version))

    def _window(self, context: Context) -> Window | None:
        if not (is_blank(self.window_start) and is_blank(self.window_end)):
            return resolve_window(context, self.window_start, self.window_end)
        try:
            return resolve_window(context)
        except InvalidInputError:
            return None

    def _report_name(self, context: Context, window: Window | None) -> str:
        part = f"{window.start:%Y%m%dT%H%M}-{window.end:%Y%m%dT%H%M}" if window else context["run_id"]
        return re.sub(r"[^\w.+-]", "_", f"{self.model_name}-{part}")

    def _reference_profile(self, hook: MlflowHook, champion: Any) -> Profile:
        from airflow_mlops.drift import Profile

        return Profile.from_json(tagged_json(hook, champion, "mlops.profile_uri", "training profile"))

    def _reference_uri(self, champion: Any) -> str | None:
        return (champion.tags or {}).get("mlops.dataset_uri") if is_blank(self.reference_uri) else self.reference_uri

    def _drift(
        self, hook: MlflowHook, champion: Any, reference: Profile, window: Window | None, report_uri: str
    ) -> tuple[Profile, Found]:
        from airflow_mlops.drift import Profile

        season = None if is_blank(self.season_uri) else Profile.from_json(read_json(hook, str(self.season_uri)))
        columns, categorical = as_names(self.columns, "columns"), as_names(self.categorical, "categorical")
        policy = self._drift_policy(window)
        options = as_mapping(self.engine_options, "engine_options")

        def by_job(uri: str, *, columns: Sequence[str], categorical: Sequence[str]) -> Profile:
            output = report_uri.removesuffix(REPORT_SUFFIX) + ".profile.json"
            self._job = ProfileJob(self.log, self.ray_conn_id, options)
            return self._job.profile(uri, columns, categorical, output)

        build = by_job if self.engine == "ray" else None
        reference, found = compare_window(reference, self.current_uri, columns, categorical, policy, season, build)
        if self.engine == "evidently":
            reference_uri = self._reference_uri(champion)
            if reference_uri is None:
                raise InvalidInputError(
                    f"engine='evidently' needs the data that {self.model_name} version {champion.version} was trained "
                    "on, and its tag mlops.dataset_uri does not name them; give reference_uri"
                )
            found = judge_by_evidently(reference_uri, self.current_uri, reference, found, options)
        self.log.info("Drift: %s\n%s", found.report.verdict, drift_table(found.report))
        return reference, found

    def _drift_policy(self, window: Window | None) -> DriftPolicy:
        """The policy; data that must be fresh are so as of the end of the window."""
        from airflow_mlops.drift import DriftPolicy

        if isinstance(self.policy, DriftPolicy):
            given = self.policy
            if given.max_age and given.as_of is None and window is not None:
                given = replace(given, as_of=window.end.isoformat())
            given.check()
            return given
        fields = as_mapping(self.policy, "policy")
        if fields.get("max_age") and is_blank(fields.get("as_of")) and window is not None:
            fields["as_of"] = window.end.isoformat()
        return DriftPolicy.from_json(fields)

    def _evidence(self, context: Context, hook: MlflowHook, champion: Any, window: Window | None) -> Evidence:
        """What the champion's scores and losses say."""
        if is_blank(self.predictions_uri) and "harm" in self._retrain_on:
            raise InvalidInputError(
                "retrain_on names harm, which needs predictions_uri: Parquet with event_timestamp, "
                f"{self.label_column} and {self.prediction_column}. Give it, or set retrain_on=['drift']."
            )
        found = evidence_of(
            context,
            hook,
            champion,
            window,
            current_uri=self.current_uri,
            predictions_uri=None if is_blank(self.predictions_uri) else str(self.predictions_uri),
            columns=(self.label_column, self.prediction_column),
            scores_column=None if is_blank(self.scores_column) else str(self.scores_column),
            harm_policy=self.harm_policy,
            loss_test=None if is_blank(self.loss_test) else as_mapping(self.loss_test, "loss_test"),
            state_dir=self._state_dir,
        )
        found.log(self.log)
        return found

    @property
    def _state_dir(self) -> str:
        return str(self.report_dir if is_blank(self.state_dir) else self.state_dir)

    def _limits(self) -> Hysteresis | None:
        from airflow_mlops.drift.hysteresis import Hysteresis

        return None if is_blank(self.hysteresis) else policy_of(Hysteresis, self.hysteresis, "hysteresis")

    def _hold(
        self,
        context: Context,
        window: Window | None,
        version: str | None,
        found: Found,
        evidence: Evidence,
        wanted: bool,
    ) -> Decision | None:
        """What the hysteresis makes of the evidence; None without one."""
        from airflow_mlops.drift.hysteresis import severity

        limits = self._limits()
        if limits is None:
            return None
        if window is None:
            raise InvalidInputError("hysteresis goes by windows, and this run has none; give both ends of one")
        score = severity(found.report, evidence.harm, self._retrain_on, wanted, limits.arm, found.share)
        held = decide(context, limits, self.model_name, self._state_dir, score, window.end, version)
        self.log.info("Hysteresis: score %s, %s", held.score, held.reason or "nothing held back")
        return held

    def _publish(
        self,
        hook: MlflowHook,
        report_uri: str,
        report: dict[str, Any],
        verdict: str,
        retrain: bool,
        reasons: list[str],
        found: Found | None = None,
        evidence: Evidence | None = None,
        held: Decision | None = None,
        html_uri: str | None = None,
    ) -> dict[str, Any]:
        """Write the whole report and return the small one."""
        drift = found.report if found else None
        report = {
            **report,
            "verdict": verdict,
            "retrain": retrain,
            "engine": self.engine,
            "reasons": reasons,
            "html_uri": html_uri,
            "drift": drift.to_json() if drift else None,
            **(evidence or Evidence()).to_json(),
            "hysteresis": held.to_json() if held else None,
        }
        storage.write_json(report_uri, report)
        self.log.info(
            "Verdict: %s, %s. %s. Report: %s",
            verdict,
            "retrain" if retrain else "no retraining",
            short(report),
            report_uri,
        )
        folder = self._setting("prometheus_textfile_dir")
        to_prometheus(self.log, report, folder, self._setting("pushgateway_url"))
        run: dict[str, str | None] = {"mlflow_run_id": None, "mlflow_url": None}
        if not is_blank(self.experiment) and not self._waits_on(report):
            run = to_mlflow(self.log, hook, str(self.experiment), report, report_uri)
        return {**small(report, drift, evidence.harm if evidence else None), "report_uri": report_uri, **run}

    def _setting(self, name: str) -> str:
        """An argument, or what Airflow's configuration has in its place."""
        given = getattr(self, name)
        return conf.get("mlops", name, fallback="") if is_blank(given) else str(given)

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage:
        """What was compared, and how good it is; asked by the OpenLineage provider where it is installed."""
        from airflow_mlops.operators._lineage import lineage_of_check

        seen = self._seen or _Seen(None, None, None, {})
        return lineage_of_check(self.current_uri, seen.reference_uri, seen.profile, seen.report, seen.result)
