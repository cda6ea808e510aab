"""The start of every retraining: has the champion come to do harm, and has its input drifted?"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator, PokeReturnValue
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowSensorTimeout, AirflowSkipException

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError, InvalidInputError, RegistryError
from airflow_mlops.links import ReportLink
from airflow_mlops.shell import (
    as_mapping,
    as_names,
    is_blank,
    log_table,
    permanent_errors_fail,
    push_result,
    require,
)
from airflow_mlops.triggers.drift import REPORT_SUFFIX, DataReadyTrigger, data_ready
from airflow_mlops.windows import Window, resolve_window

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlops.drift import DriftPolicy, DriftReport, HarmPolicy, HarmReport, Profile
    from airflow_mlops.hooks.mlflow import MlflowHook

_SHOWN = 15
# Evidently draws two charts a column: a hundred columns are 10 MB of page and as many seconds.
_PAGE_COLUMNS = 20


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
    finds it, with Evidently's page on a sample beside it. The result is pushed before a skip too.

    :param current_uri: Parquet file, directory or glob with the window's data (templated)
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
        harm (templated)
    :param prediction_column: the champion's probability of label 1 (templated)
    :param policy: :class:`~airflow_mlops.drift.DriftPolicy` or a mapping of its fields (templated)
    :param harm_policy: :class:`~airflow_mlops.drift.HarmPolicy` or a mapping of its fields (templated)
    :param on_stable: ``skip`` downstream tasks, ``proceed``, or ``wait`` for other data at ``current_uri`` (templated)
    :param retrain_on: which verdicts ask for retraining: ``harm``, ``drift`` (templated)
    :param report_dir: folder or URI for reports (templated)
    :param window_start: start of the window, for the report; the run's data interval when not given (templated)
    :param window_end: end of the window (templated)
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
    )
    template_fields_renderers = {"policy": "json", "harm_policy": "json"}
    operator_extra_links = (ReportLink(),)
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
        self.evidently = evidently
        self.deferrable = deferrable

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
            result = self.check(context)
            if self.on_stable == "skip" and not result["retrain"]:
                push_result(self, context, result)
                raise AirflowSkipException(f"{self.model_name} {result['verdict']}: no retraining ({_short(result)})")
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

    # --- the check ----------------------------------------------------------------------------------------------

    def check(self, context: Context) -> dict[str, Any]:
        """Compare, write the reports, and return the result; the data are there."""
        from airflow_mlops.hooks.mlflow import MlflowHook

        window = self._window(context)
        hook = MlflowHook(self.mlflow_conn_id, tracking_uri=None if is_blank(self.tracking_uri) else self.tracking_uri)
        champion = self._champion(hook)
        model = {"name": self.model_name, "version": str(champion.version) if champion else None, "alias": self.alias}
        report_uri = storage.join(self.report_dir, self._report_name(context, window) + REPORT_SUFFIX)
        if champion is None:
            reasons = [f"{self.model_name} has no champion yet: train the first one"]
            return self._publish(report_uri, model, window, "no_champion", True, reasons)
        reference = self._reference_profile(hook, champion)
        current, drift = self._drift(reference)
        harm = self._harm(hook, champion)
        verdict, retrain, reasons = self._decide(drift, harm)
        html_uri = self._page(report_uri, reference, current, drift) if self.evidently else None
        return self._publish(report_uri, model, window, verdict, retrain, reasons, drift, harm, html_uri)

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

        return Profile.from_json(self._tagged_json(hook, champion, "mlops.profile_uri", "training profile"))

    def _tagged_json(self, hook: MlflowHook, champion: Any, tag: str, what: str) -> Any:
        uri = (champion.tags or {}).get(tag)
        name = f"{self.model_name} version {champion.version}"
        fix = (
            f"register the version with MlflowRegisterOperator, or write the JSON and set it: MlflowClient()"
            f".set_model_version_tag({self.model_name!r}, {str(champion.version)!r}, {tag!r}, <uri>)"
        )
        if not uri:
            raise RegistryError(f"{name} has no {what} (tag {tag}); {fix}")
        try:
            return _read_json(hook, uri)
        except FileNotFoundError:
            raise RegistryError(f"the {what} of {name} is not at {uri} any more; restore it, or {fix}") from None
        except ValueError as error:
            raise RegistryError(f"the {what} of {name} at {uri} is no JSON ({error}); {fix}") from error

    def _drift(self, reference: Profile) -> tuple[Profile, DriftReport]:
        from airflow_mlops.drift import DriftPolicy, Profile, compare
        from airflow_mlops.drift.profile import column_names

        present = column_names(self.current_uri)
        wanted = as_names(self.columns, "columns") or list(reference.columns)
        unknown = [name for name in wanted if name not in reference.columns and name not in present]
        if unknown:
            raise DataError(f"column(s) {', '.join(unknown)} are neither in the champion's profile nor in the data")
        reference = Profile(
            reference.rows, {name: column for name, column in reference.columns.items() if name in wanted}
        )
        if not set(present) & set(reference.columns):
            raise DataError(
                f"{self.current_uri} has none of the columns of the champion's profile: it has {', '.join(present)}, "
                f"the profile {', '.join(reference.columns)}. Point current_uri at the feature set the model reads."
            )
        # Numbers that the training took for names are names here too.
        names = {n for n, c in reference.columns.items() if c.kind == "categorical" and "string" not in c.type}
        current = Profile.of(
            self.current_uri,
            columns=[name for name in wanted if name in present],
            categorical=sorted(names | set(as_names(self.categorical, "categorical"))),
        )
        report = compare(reference, current, _policy(DriftPolicy, self.policy, "policy"))
        self.log.info("Drift: %s\n%s", report.verdict, _drift_table(report))
        return current, report

    def _harm(self, hook: MlflowHook, champion: Any) -> HarmReport | None:
        """The verdict on the champion's losses, or None when no predictions are given and none are asked for."""
        from airflow_mlops.drift import HarmPolicy, LossReference, assess_harm

        if is_blank(self.predictions_uri):
            if "harm" in self._retrain_on:
                raise InvalidInputError(
                    "retrain_on names harm, which needs predictions_uri: Parquet with event_timestamp, "
                    f"{self.label_column} and {self.prediction_column}. Give it, or set retrain_on=['drift']."
                )
            return None
        stored = self._tagged_json(hook, champion, "mlops.loss_reference_uri", "loss reference")
        frame = _read_predictions(str(self.predictions_uri), [self.label_column, self.prediction_column])
        report = assess_harm(
            LossReference.from_json(stored),
            frame[self.label_column],
            frame[self.prediction_column],
            frame["event_timestamp"].dt.date,
            _policy(HarmPolicy, self.harm_policy, "harm_policy"),
        )
        self.log.info("Harm: %s (%s)\n%s", report.verdict, "; ".join(report.reasons), _harm_table(report))
        return report

    def _decide(self, drift: DriftReport, harm: HarmReport | None) -> tuple[str, bool, list[str]]:
        """The verdict of both together, whether to retrain, and why."""
        harmful, drifted = harm is not None and harm.verdict == "harm", drift.verdict == "drift"
        reasons = [f"harm: {reason}" for reason in (harm.reasons if harm else ())]
        reasons += [f"drift: {reason}" for reason in drift.reasons]
        relevant = drifted and len(drift.drifted) >= drift.policy.min_columns
        retrain = ("harm" in self._retrain_on and harmful) or ("drift" in self._retrain_on and relevant)
        lacking = drift.verdict == "not_enough_data" or (harm is not None and harm.verdict == "not_enough_data")
        verdict = "harm" if harmful else "drift" if drifted else "not_enough_data" if lacking else "stable"
        return verdict, retrain, reasons

    def _page(self, report_uri: str, reference: Profile, current: Profile, drift: DriftReport) -> str | None:
        from airflow_mlops.drift import Profile
        from airflow_mlops.drift.page import write_page

        shown = [column.name for column in drift.columns][:_PAGE_COLUMNS]

        def most_different(profile: Profile) -> Profile:
            return Profile(profile.rows, {name: profile.columns[name] for name in shown if name in profile.columns})

        uri = report_uri.removesuffix(REPORT_SUFFIX) + ".html"
        try:
            left_out = write_page(uri, most_different(reference), most_different(current), self.current_uri)
        except Exception:
            # A picture that fails must not cost the verdict.
            self.log.warning("Evidently's page could not be written to %s", uri, exc_info=True)
            return None
        if left_out:
            self.log.info("not on Evidently's page: %s", ", ".join(left_out))
        return uri if storage.exists(uri) else None

    def _publish(
        self,
        report_uri: str,
        model: dict[str, Any],
        window: Window | None,
        verdict: str,
        retrain: bool,
        reasons: list[str],
        drift: DriftReport | None = None,
        harm: HarmReport | None = None,
        html_uri: str | None = None,
    ) -> dict[str, Any]:
        """Write the whole report and return the small one."""
        head = {
            "verdict": verdict,
            "retrain": retrain,
            "model": model,
            "window": window.to_json() if window else None,
            "html_uri": html_uri,
        }
        storage.write_json(
            report_uri,
            {
                **head,
                "reasons": reasons,
                "retrain_on": self._retrain_on,
                "drift": drift.to_json() if drift else None,
                "harm": harm.to_json() if harm else None,
            },
        )
        self.log.info(
            "Verdict: %s, %s. %s. Report: %s",
            verdict,
            "retrain" if retrain else "no retraining",
            "; ".join(reasons[:_SHOWN]),
            report_uri,
        )
        by_status = {status: _names(drift, status) for status in ("drift", "calendar", "broken", "not_enough_data")}
        return {
            **head,
            "reasons": reasons[:_SHOWN],
            "columns": by_status["drift"][:_SHOWN],
            "calendar_columns": by_status["calendar"][:_SHOWN],
            "broken_columns": by_status["broken"][:_SHOWN],
            "compared": len(drift.columns) if drift else 0,
            "drift": drift.verdict if drift else None,
            "harm": _small_harm(harm),
            "report_uri": report_uri,
        }


def _policy(kind: Any, value: Any, name: str) -> Any:
    return value if isinstance(value, kind) else kind.from_json(as_mapping(value, name))


def _read_json(hook: MlflowHook, uri: str) -> Any:
    if not uri.startswith(("runs:/", "models:/", "mlflow-artifacts:")):
        return storage.read_json(uri)
    import mlflow

    with hook.session():
        try:
            return mlflow.artifacts.load_dict(uri)
        except (OSError, mlflow.exceptions.MlflowException) as error:
            raise FileNotFoundError(uri) from error


def _read_predictions(uri: str, columns: list[str]) -> Any:
    """The predictions as a ``pandas.DataFrame``; ``event_timestamp`` in UTC."""
    import pandas as pd
    import pyarrow as pa

    from airflow_mlops.drift.profile import batches, column_names

    wanted = ["event_timestamp", *columns]
    absent = [name for name in wanted if name not in (present := column_names(uri))]
    if absent:
        raise DataError(
            f"{uri} lacks {', '.join(absent)}; it has {', '.join(present)}. Set label_column and prediction_column."
        )
    found = list(batches(uri, wanted))
    frame = pa.Table.from_batches(found).to_pandas() if found else pd.DataFrame(columns=wanted)
    frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], utc=True)
    return frame


def _names(drift: DriftReport | None, status: str) -> list[str]:
    return [column.name for column in drift.columns if column.status == status] if drift else []


def _small_harm(harm: HarmReport | None) -> dict[str, Any] | None:
    if harm is None:
        return None
    tests = {
        test.name: {"change": test.change, "p_value": test.p_value, "harmful": test.harmful} for test in harm.tests
    }
    return {"verdict": harm.verdict, "rows": harm.rows, "clusters": harm.clusters, "tests": tests}


def _short(result: Mapping[str, Any]) -> str:
    return "; ".join(result["reasons"])[:300]


def _drift_table(report: DriftReport) -> str:
    header = ["column", "status", "distance", "effect", "adjusted p", "reference", "current", "missing", "reason"]
    rows: list[list[object]] = []
    for c in report.columns[:40]:
        numbers = [_number(value) for value in (c.effect, c.adjusted_p, c.reference, c.current)]
        rows.append([c.name, c.status, c.method or "", *numbers, f"{c.missing[1]:.1%}", c.reason])
    return log_table(header, rows)


def _harm_table(report: HarmReport) -> str:
    rows: list[list[object]] = [
        [
            t.name,
            _number(t.reference),
            _number(t.current),
            _number(t.change),
            t.tolerance,
            _number(t.p_value),
            t.harmful,
        ]
        for t in report.tests
    ]
    return log_table(["test", "reference", "current", "change", "tolerance", "p", "harmful"], rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
