"""Score the models that serve on a month with labels, and let a challenger pass only when it has shown to be better."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.branch import BranchMixIn
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mlops.evaluation import GatePolicy, GateVerdict
from airflow_mlops.exceptions import ConcurrentChangeError, DataError, InvalidInputError
from airflow_mlops.links import MlflowRunLink, ReportLink
from airflow_mlops.operators._approval import ApprovalMixin, decided, gate_question
from airflow_mlops.operators._audit import audited
from airflow_mlops.operators._gate import behaviour, branches, fairness_columns, load, to_mlflow
from airflow_mlops.operators._mlflow import MlflowBaseOperator, task_key
from airflow_mlops.shell import as_mapping, as_names, is_blank, log_table, permanent_errors_fail, push_result, require
from airflow_mlops.storage import join, write_bytes, write_json
from airflow_mlops.windows import Window, resolve_window

if TYPE_CHECKING:
    import pandas as pd
    from airflow.sdk import Context

TIME = "event_timestamp"
ON_FAIL = ("fail", "skip", "branch")


def read_rows(uri: str, label: str, window: Window | None = None) -> pd.DataFrame:
    """The rows of the Parquet at ``uri``, those whose label is not known yet included.

    :param window: only rows whose ``event_timestamp`` is in it; None for all
    :raises DataError: nothing is there, it lacks the label or the time, or a row has no time
    """
    import pandas as pd

    try:
        frame = pd.read_parquet(uri)
    except FileNotFoundError:
        raise DataError(f"there is no data at {uri}; did the task that writes it succeed?") from None
    if missing := {label, TIME} - set(frame.columns):
        raise DataError(f"{uri} lacks {sorted(missing)}; it has {list(frame.columns)[:20]}")
    frame[TIME] = pd.to_datetime(frame[TIME], utc=True)
    if timeless := int(frame[TIME].isna().sum()):
        raise DataError(f"{timeless} rows of {uri} have no {TIME}, so no window can be told; every row needs one")
    if window is not None:
        frame = frame[(frame[TIME] >= window.start) & (frame[TIME] < window.end)]
    return frame.reset_index(drop=True)


def _write_predictions(uri: str, frame: pd.DataFrame, label: str, arms: Mapping[str, Any]) -> str:
    import pandas as pd

    labels = frame[label].astype("Int8" if frame[label].isna().any() else "int8")
    buffer = io.BytesIO()
    pd.DataFrame({TIME: frame[TIME], "label": labels, **arms}).to_parquet(buffer, index=False)
    return write_bytes(uri, buffer.getvalue())


class ModelScoreOperator(MlflowBaseOperator):
    """Put on record how good the models that serve were on a window whose labels are in.

    Each result goes into one MLflow run for this task in this Dag run (``champion_auc``, ``frozen_log_loss``, ...,
    step ``step``), which a retry finds again.

    :param models: name to model URI, ``{"champion": "models:/flights@champion", "frozen": "models:/flights/1"}``; an
        empty URI, or an alias of a model without versions, is a model that does not exist yet (templated)
    :param data_uri: Parquet with ``event_timestamp``, features and label (templated)
    :param label_column: its column of 0 and 1; rows where it is missing are predicted and not scored (templated)
    :param predictions_uri: where to write ``event_timestamp``, ``label`` (missing where not known) and a column for
        each model, all rows (templated)
    :param features: the models' inputs, where they have no signature (templated)
    :param optional: names of models whose alias may never have been set though the model has versions
    :param experiment: MLflow experiment (templated)
    :param step: of the metrics; None for the window's first day as YYYYMMDD (templated)
    :param window_start: first instant of the window, a tag of the run; else the Dag run's (templated)
    :param window_end: first instant after it (templated)
    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's (templated)
    :param signing_conn_id: connection of type ``model_signing``; every model then has to be a signed version
    :param allow_pickle: the models may be pickles; they then answer from a sandbox
    :return: ``rows``, ``unlabelled``, ``models`` (name to ``version``, ``uri`` and the scores of
        :func:`airflow_mlops.evaluation.score`, or None), ``predictions_uri``, ``run_id`` (None when there is no model)
    """

    template_fields: Sequence[str] = (
        "models",
        "data_uri",
        "label_column",
        "predictions_uri",
        "features",
        "experiment",
        "step",
        "window_start",
        "window_end",
        "tracking_uri",
    )

    def __init__(
        self,
        *,
        models: Mapping[str, str | None],
        data_uri: str,
        label_column: str,
        predictions_uri: str,
        features: Sequence[str] | str | None = None,
        optional: Sequence[str] = (),
        experiment: str = "monitoring",
        step: int | str | None = None,
        window_start: str | None = None,
        window_end: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.models = models
        self.data_uri = data_uri
        self.label_column = label_column  # Airflow owns the name label
        self.predictions_uri = predictions_uri
        self.features = features
        self.optional = optional
        self.experiment = experiment
        self.step = step
        self.window_start = window_start
        self.window_end = window_end

    def execute(self, context: Context) -> dict[str, Any]:
        from airflow_mlops.evaluation import score
        from airflow_mlops.evaluation.metrics import check_label

        with permanent_errors_fail():
            require(data_uri=self.data_uri, label_column=self.label_column, predictions_uri=self.predictions_uri)
            models = as_mapping(self.models, "models")
            window = resolve_window(context, self.window_start, self.window_end)
            features = as_names(self.features, "features") or None
            frame = read_rows(self.data_uri, self.label_column)
            known = frame[self.label_column].notna().to_numpy()
            unlabelled = int((~known).sum())
            if not known.any():
                raise DataError(f"{self.data_uri} has no labelled rows ({unlabelled} unlabelled); nothing to score")
            labels = check_label(frame.loc[known, self.label_column])
            results: dict[str, dict[str, Any] | None] = {}
            arms: dict[str, Any] = {}
            for name, given in models.items():
                uri, version = self._resolve(name, given)
                if uri is None:
                    results[name] = None
                    continue
                arms[name] = self.hook.predict_proba(uri, frame, features)
                results[name] = {
                    "version": version,
                    "uri": uri,
                    **score(labels, arms[name][known]),
                }
            _write_predictions(self.predictions_uri, frame, self.label_column, arms)
            columns = ["version", "rows", "base_rate", "mean_probability", "auc", "log_loss", "brier"]
            rows = [[name, *[_shown((found or {}).get(key)) for key in columns]] for name, found in results.items()]
            self.log.info("scores on %s\n%s", window, log_table(["model", *columns], rows))
            return {
                "rows": len(labels),
                "unlabelled": unlabelled,
                "models": results,
                "predictions_uri": self.predictions_uri,
                "run_id": self._record(context, window, results) if arms else None,
            }

    def _resolve(self, name: str, given: str | None) -> tuple[str | None, str | None]:
        """A URI with the version in it, so that what was scored stays known after the alias moves on."""
        if is_blank(given):
            return None, None
        uri = str(given)
        if not uri.startswith("models:/"):
            return uri, None
        model, _, alias = uri.removeprefix("models:/").rpartition("@")
        if model:
            found = self.hook.version_by_alias(model, alias, missing_ok=name in self.optional)
            return (f"models:/{model}/{found.version}", str(found.version)) if found is not None else (None, None)
        return uri, self.hook.resolve(uri)[1]

    def _record(self, context: Context, window: Window, results: Mapping[str, dict[str, Any] | None]) -> str:
        import math

        from mlflow.entities import Metric, RunTag

        step = int(f"{window.start:%Y%m%d}") if is_blank(self.step) else int(str(self.step))
        # One fixed instant for each window, so that a retry writes the same point and not a second one.
        when = int(window.end.timestamp() * 1000)
        run = self.hook.run_for_key(
            self.experiment, task_key(context), name=f"{window.start:%Y-%m-%d}", tags={"mlops.kind": "monitoring"}
        )
        scored = {name: found for name, found in results.items() if found}
        metrics = [
            Metric(f"{name}_{key}", float(value), when, step)
            for name, found in scored.items()
            for key, value in found.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        tags = {"mlops.window_start": window.start.isoformat(), "mlops.window_end": window.end.isoformat()}
        tags |= {f"mlops.version.{name}": str(found["version"] or found["uri"]) for name, found in scored.items()}
        self.hook.client.log_batch(run.info.run_id, metrics, tags=[RunTag(*tag) for tag in tags.items()])
        self.hook.client.set_terminated(run.info.run_id, "FINISHED")
        return run.info.run_id


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


class ModelGateOperator(ApprovalMixin, MlflowBaseOperator, BranchMixIn):
    """Compare the challenger with the champion on the same held-out rows and stop it unless the policy is met.

    The champion is ``champion_uri``; else version ``champion_version`` of ``model_name``; else what ``alias`` of
    ``model_name`` points to. Without one, the challenger is judged by floors alone, and with ``model_name`` the
    registry has to agree that there is none.

    Rows of one day are not independent, so days are the unit of the tests. The verdict's table goes to the log;
    ``report.html``, ``verdict.json`` and ``predictions.parquet`` (``event_timestamp``, ``label``, ``challenger`` and,
    with one, ``champion``) to ``report_dir``.

    :param challenger_uri: MLflow model folder or URI (templated)
    :param data_uri: Parquet with ``event_timestamp``, features and label (templated)
    :param label_column: its column of 0 and 1; rows where it is missing are left out (templated)
    :param report_dir: folder for the report, one for each run (templated)
    :param champion_uri: of the champion; empty for none (templated)
    :param model_name: registered model of the champion (templated)
    :param champion_version: its version at the start of the run; empty for none; not given for ``alias`` (templated)
    :param alias: of the champion
    :param window_start: first instant of the rows to use; with ``window_end``, or neither for all rows (templated)
    :param window_end: first instant after them (templated)
    :param features: the models' inputs, where they have no signature (templated)
    :param policy: a :class:`airflow_mlops.evaluation.GatePolicy` or a mapping of its fields (templated)
    :param cluster: ``"day"`` (UTC) of ``event_timestamp``; a column of the data; or ``"row"`` when rows are independent
    :param slice_columns: columns whose values are judged one by one (templated)
    :param cases: rows on which the challenger has to behave, see :mod:`airflow_mlops.evaluation.cases`: a list, or the
        URI of a JSON list or of a Parquet table (templated)
    :param experiment: MLflow experiment that gets page, picture and verdict; None for none (templated)
    :param measure_latency: time single predictions in a fresh process; done anyway when the policy limits it
    :param on_fail: ``"fail"`` fails the task without retry, ``"skip"`` skips it and what follows; ``"branch"`` goes on
        with ``fail_task_ids`` or ``pass_task_ids`` and skips the rest of what comes directly after; the result is
        pushed in all cases
    :param pass_task_ids: with ``"branch"``, tasks or task groups that follow a pass; None for all but ``fail_task_ids``
    :param fail_task_ids: with ``"branch"``, tasks or task groups that follow a failure
    :param approval: a person's word on the verdict before the task ends: a rejection is a verdict that did not pass, an
        approval of one that did not pass overrules it, and ``approval`` of the result says who, see
        :class:`airflow_mlops.approval.Approval`; None for none (templated)
    :param approval_notifiers: told when somebody is asked
    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's (templated)
    :param signing_conn_id: connection of type ``model_signing``; registered versions then need a signature
    :param allow_pickle: the models may be pickles; they then answer from a sandbox
    :return: :meth:`GateVerdict.to_json` and ``challenger_uri``, ``challenger_digest``, ``champion_uri``,
        ``champion_version``, ``unlabelled``, ``report_uri``, ``verdict_uri``, ``predictions_uri``, ``mlflow_run_id``,
        ``mlflow_url``
    """

    # So that a task of the branch not taken stays skipped when it is cleared.
    inherits_from_skipmixin = True
    operator_extra_links = (ReportLink(), MlflowRunLink())
    template_fields: Sequence[str] = (
        "challenger_uri",
        "data_uri",
        "label_column",
        "report_dir",
        "champion_uri",
        "model_name",
        "champion_version",
        "window_start",
        "window_end",
        "features",
        "policy",
        "slice_columns",
        "cases",
        "experiment",
        "approval",
        "tracking_uri",
    )

    def __init__(
        self,
        *,
        challenger_uri: str,
        data_uri: str,
        label_column: str,
        report_dir: str,
        champion_uri: str | None = None,
        model_name: str | None = None,
        champion_version: str | None = None,
        alias: str = "champion",
        window_start: str | None = None,
        window_end: str | None = None,
        features: Sequence[str] | str | None = None,
        policy: GatePolicy | Mapping[str, Any] | None = None,
        cluster: str = "day",
        slice_columns: Sequence[str] | str = (),
        cases: Sequence[Mapping[str, Any]] | str | None = None,
        experiment: str | None = None,
        measure_latency: bool = True,
        on_fail: str = "fail",
        pass_task_ids: str | Sequence[str] | None = None,
        fail_task_ids: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.challenger_uri = challenger_uri
        self.data_uri = data_uri
        self.label_column = label_column  # Airflow owns the name label
        self.report_dir = report_dir
        self.champion_uri = champion_uri
        self.model_name = model_name
        self.champion_version = champion_version
        self.alias = alias
        self.window_start = window_start
        self.window_end = window_end
        self.features = features
        self.policy = policy
        self.cluster = cluster
        self.slice_columns = slice_columns
        self.cases = cases
        self.experiment = experiment
        self.measure_latency = measure_latency
        self.on_fail = on_fail
        self.pass_task_ids = pass_task_ids
        self.fail_task_ids = fail_task_ids

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail():
            self._branches()
            approval, result = self._approval(), self._judge(context)
            if approval is not None and approval.concerns(result["passed"]):
                question = gate_question(result, self.task_id)
                self._ask(context, approval, *question, overriding=not result["passed"], result=result)
        return self._conclude(context, result, self.on_fail)

    def execute_complete(self, context: Context, event: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """Take over from the person who was asked, or from their silence."""
        with permanent_errors_fail():
            answer = self._answer(event)
        return self._conclude(context, decided(result, answer), self.on_fail if answer else "fail")

    def _conclude(self, context: Context, result: dict[str, Any], on_fail: str) -> dict[str, Any]:
        """Return a verdict that passed; otherwise do as ``on_fail`` says, the verdict pushed in any case."""
        with permanent_errors_fail():
            result = audited(context, "gate", result)
        if on_fail == "branch":
            push_result(self, context, result)
            self.do_branch(context, self._branches()[result["passed"]])
            return result
        if result["passed"]:
            return result
        push_result(self, context, result)
        message = f"the challenger does not pass: {'; '.join(result['reasons'])}. Report: {result['report_uri']}"
        raise AirflowSkipException(message) if on_fail == "skip" else AirflowFailException(message)

    def _branches(self) -> Mapping[bool, list[str]]:
        """By verdict what follows; nothing unless ``on_fail`` is ``"branch"``."""
        if self.on_fail not in ON_FAIL:
            raise InvalidInputError(f"on_fail is {self.on_fail!r}; expected one of {ON_FAIL}")
        if self.on_fail == "branch":
            return branches(self, self.pass_task_ids, self.fail_task_ids)
        if self.pass_task_ids or self.fail_task_ids:
            raise InvalidInputError(f"pass_task_ids and fail_task_ids need on_fail='branch'; it is {self.on_fail!r}")
        return {}

    def _judge(self, context: Context) -> dict[str, Any]:
        from airflow_mlops.evaluation import cases as behave
        from airflow_mlops.evaluation import evaluate
        from airflow_mlops.evaluation.robustness import missing_losses

        require(data_uri=self.data_uri, label_column=self.label_column, report_dir=self.report_dir)
        if is_blank(self.challenger_uri):
            raise InvalidInputError("challenger_uri is empty; the training left no model (model_uri of its result)")
        policy, cases = self._policy(), behaviour(self.cases)
        champion_uri, champion_version = self._champion()
        features = as_names(self.features, "features") or None
        window = None
        if not (is_blank(self.window_start) and is_blank(self.window_end)):
            window = resolve_window(context, self.window_start, self.window_end)
        frame = read_rows(self.data_uri, self.label_column, window)
        known = frame[self.label_column].notna()
        unlabelled, frame = int((~known).sum()), frame[known].reset_index(drop=True)
        slices = as_names(self.slice_columns, "slice_columns")
        if missing := [name for name in slices if name not in frame.columns]:
            raise DataError(f"{self.data_uri} lacks the slice columns {missing}; it has {list(frame.columns)[:20]}")

        groups = fairness_columns(policy, frame, self.data_uri)

        models = self.hook.models
        # Before it is registered a challenger has no signature yet; its digest goes along to the registration.
        challenger = load(models, self.challenger_uri, features, unregistered=True)
        labels = frame[self.label_column].to_numpy()
        arms = {"challenger": challenger.predict(frame)}
        if champion_uri is not None:
            arms["champion"] = self.hook.predict_proba(champion_uri, frame, features)
        lost: list[dict[str, Any]] = []
        if policy.max_missing_loss is not None and frame[self.label_column].nunique() == 2:
            lost = missing_losses(challenger.predict, frame, labels, challenger.features, policy)
        latency, champion_latency = self._latency(policy, frame, features, champion_uri)
        verdict = evaluate(
            labels,
            arms.get("champion"),
            arms["challenger"],
            clusters=self._clusters(frame),
            slices={name: frame[name].to_numpy() for name in slices},
            groups=groups,
            policy=policy,
            latency=latency,
            champion_latency=champion_latency,
            missing=lost,
            cases=behave.run(cases, challenger.predict, frame),
            unlabelled=unlabelled,
        )
        self._show(verdict)
        return {
            **verdict.to_json(),
            "challenger_uri": self.challenger_uri,
            "challenger_digest": models.open(self.challenger_uri, unregistered=True).digest,
            "champion_uri": champion_uri,
            "champion_version": champion_version,
            **self._publish(context, verdict, frame, arms),
        }

    def _latency(
        self, policy: GatePolicy, frame: pd.DataFrame, features: list[str] | None, champion_uri: str | None
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Of the challenger, and of the champion where the policy compares them."""
        compared = policy.max_latency_ratio is not None and champion_uri is not None
        limited = any(limit is not None for limit in (policy.max_latency_ms, policy.max_p99_ms, policy.max_memory_mib))
        if not len(frame) or not (self.measure_latency or limited or compared):
            return None, None
        measure = self.hook.models.latency
        challenger = measure(self.challenger_uri, frame, features)
        return challenger, measure(str(champion_uri), frame, features) if compared else None

    def _policy(self) -> GatePolicy:
        if isinstance(self.policy, GatePolicy):
            return self.policy.validate()
        return GatePolicy.from_json(as_mapping(self.policy, "policy"))

    def _champion(self) -> tuple[str | None, str | None]:
        """The champion's URI and version; both None when there is none, which a lost value must not look like."""
        if not is_blank(self.champion_uri):
            uri = str(self.champion_uri)
            name, version = self.hook.resolve(uri) if uri.startswith("models:/") else ("", None)
            return (f"models:/{name}/{version}" if version else uri), version
        if is_blank(self.model_name):
            if self.champion_uri == "":
                return None, None
            raise InvalidInputError(
                f"champion_uri is {self.champion_uri!r} and there is no model_name: no champion, or a lost one? Give "
                "model_name, so that the registry can tell; or champion_uri='' when there really is none."
            )
        if not is_blank(self.champion_version):
            found = self.hook.version(str(self.model_name), str(self.champion_version))
        else:
            found = self.hook.version_by_alias(str(self.model_name), self.alias, missing_ok=True)
            if found is not None and (self.champion_version is not None or self.champion_uri is not None):
                raise ConcurrentChangeError(
                    f"the champion was given as none, but the registry has version {found.version} of "
                    f"{self.model_name} as {self.alias!r}; run this from the start"
                )
        if found is None:
            return None, None
        return f"models:/{self.model_name}/{found.version}", str(found.version)

    def _clusters(self, frame: pd.DataFrame) -> Any:
        if self.cluster == "row":
            return None
        if self.cluster == "day":
            return frame[TIME].dt.strftime("%Y-%m-%d").to_numpy()
        if self.cluster not in frame.columns:
            raise DataError(f"{self.data_uri} lacks the cluster column {self.cluster!r}")
        if frame[self.cluster].isna().any():
            raise DataError(f"the cluster column {self.cluster!r} has missing values")
        return frame[self.cluster].to_numpy()

    def _show(self, verdict: GateVerdict) -> None:
        rows: list[list[object]] = [
            [check.name, check.value, check.limit, "yes" if check.passed else "NO"] for check in verdict.checks
        ]
        table = log_table(["check", "found", "required", "holds"], rows)
        self.log.info("the challenger %s\n%s", "passes" if verdict.passed else "does NOT pass", table)

    def _publish(
        self, context: Context, verdict: GateVerdict, frame: pd.DataFrame, arms: Mapping[str, Any]
    ) -> dict[str, str | None]:
        from airflow_mlops.evaluation.report import render, render_png

        curves = (frame[self.label_column].to_numpy(), arms["challenger"], arms.get("champion"))
        page = render(verdict, *curves, title=f"Gate, {self.task_id}")
        run: dict[str, str | None] = {"mlflow_run_id": None, "mlflow_url": None}
        if not is_blank(self.experiment):
            name, key = f"gate {self.challenger_uri}"[:250], task_key(context)
            run = to_mlflow(self.hook, str(self.experiment), key, name, verdict, page, render_png(*curves))
        return {
            "report_uri": write_bytes(join(self.report_dir, "report.html"), page.encode()),
            "verdict_uri": write_json(join(self.report_dir, "verdict.json"), verdict.to_json()),
            "predictions_uri": _write_predictions(
                join(self.report_dir, "predictions.parquet"), frame, self.label_column, arms
            ),
            **run,
        }
