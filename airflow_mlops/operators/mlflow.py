"""Register a trained model once, move the champion's alias safely, and move it back."""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError, RegistryError
from airflow_mlops.hooks.mlflow import MlflowHook, alias_tag
from airflow_mlops.shell import permanent_errors_fail
from airflow_mlops.storage import join, read_bytes, write_json

if TYPE_CHECKING:
    from airflow.sdk import Context

RUN_KEY = "mlops.run_key"
ROLLED_BACK = "mlops.rolled_back"
# Artifact stores that only an MLflow server can read.
SERVER_ONLY = ("mlflow-artifacts:", "dbfs:", "databricks:")


def is_blank(value: Any) -> bool:
    """Whether a templated argument came out empty; a missing XCom renders as ``None``."""
    return value is None or str(value).strip() in ("", "None")


def task_key(context: Context) -> str:
    """What stays the same over the tries of one task and differs between all others."""
    ti = context["ti"]
    return "/".join([ti.dag_id, ti.run_id, ti.task_id, str(getattr(ti, "map_index", -1))])


def as_mapping(value: Any, name: str) -> dict[str, Any]:
    """A templated mapping: given as one, or as the text that Jinja makes of one.

    :raises InvalidInputError: it is something else
    """
    return _literal(value, name, Mapping, dict)


def as_names(value: Any, name: str) -> list[str]:
    """A templated list of names: given as one, or as the text that Jinja makes of one.

    :raises InvalidInputError: it is something else
    """
    return _literal(value, name, Sequence, list)


def _literal(value: Any, name: str, kind: type, make: type) -> Any:
    if is_blank(value):
        return make()
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            with suppress(SyntaxError, ValueError):
                value = parse(value)
                break
    if isinstance(value, str) or not isinstance(value, kind):
        raise InvalidInputError(f"{name} is {value!r:.200}; expected a {make.__name__}, or its text")
    return make(value)


class _MlflowOperator(BaseOperator):
    """An operator that talks to one MLflow."""

    def __init__(
        self, *, mlflow_conn_id: str = MlflowHook.default_conn_name, tracking_uri: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.mlflow_conn_id = mlflow_conn_id
        self.tracking_uri = tracking_uri

    @cached_property
    def hook(self) -> MlflowHook:
        """The hook of this task's MLflow."""
        uri = None if is_blank(self.tracking_uri) else self.tracking_uri
        return MlflowHook(self.mlflow_conn_id, tracking_uri=uri)


class MlflowRegisterOperator(_MlflowOperator):
    """Put a trained model into the registry, with everything needed to judge it later.

    One training makes one version, whatever happens to the task: the version carries ``run_key``, a try that finds
    it takes it over, and of two tries that create it at once the later one withdraws.

    The version's tags: ``mlops.run_key``, ``mlops.window_start``, ``mlops.window_end``, ``mlops.dataset_uri``,
    ``mlops.dataset_md5``, ``mlops.profile_uri`` (profile of the training set), ``mlops.loss_reference_uri`` (losses on
    the gate's hold-out), ``mlops.gate``, ``mlops.gate_uri``, and those given.

    :param model_name: registered model (templated)
    :param model_uri: the MLflow model's folder: a path or URI (templated)
    :param run_key: identity of the training, such as ``RayTrainOperator``'s; None for this task in this Dag run
        (templated)
    :param training_set_uri: the Parquet the model was trained on; its profile is stored (templated)
    :param features: columns of the profile (templated)
    :param categorical: those of them whose numbers are names (templated)
    :param gate: the result of ``ModelGateOperator``; refused when it did not pass (templated)
    :param metrics: numbers of the training (templated)
    :param parameters: parameters of the training (templated)
    :param window_start: first instant of the training data, kept as a tag (templated)
    :param window_end: first instant after it (templated)
    :param dataset_md5: DVC's md5 of the data (templated)
    :param tags: further tags of the version (templated)
    :param experiment: MLflow experiment; None for the model's name (templated)
    :param evidence_uri: folder for the profile and the loss reference; None for the run's artifacts. Needed where
        only the MLflow server can read artifacts (templated)
    :param alias: set on the version, unless a later version has it; None for none (templated)
    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's (templated)
    :return: ``name``, ``version``, ``run_id``, ``model_uri`` (``models:/name/version``), ``created``
    """

    template_fields: Sequence[str] = (
        "model_name",
        "model_uri",
        "run_key",
        "training_set_uri",
        "features",
        "categorical",
        "gate",
        "metrics",
        "parameters",
        "window_start",
        "window_end",
        "dataset_md5",
        "tags",
        "experiment",
        "evidence_uri",
        "alias",
        "tracking_uri",
    )

    def __init__(
        self,
        *,
        model_name: str,
        model_uri: str,
        run_key: str | None = None,
        training_set_uri: str | None = None,
        features: Sequence[str] | str | None = None,
        categorical: Sequence[str] | str = (),
        gate: Mapping[str, Any] | str | None = None,
        metrics: Mapping[str, Any] | str | None = None,
        parameters: Mapping[str, Any] | str | None = None,
        window_start: str | None = None,
        window_end: str | None = None,
        dataset_md5: str | None = None,
        tags: Mapping[str, str] | str | None = None,
        experiment: str | None = None,
        evidence_uri: str | None = None,
        alias: str | None = "challenger",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.model_uri = model_uri
        self.run_key = run_key
        self.training_set_uri = training_set_uri
        self.features = features
        self.categorical = categorical
        self.gate = gate
        self.metrics = metrics
        self.parameters = parameters
        self.window_start = window_start
        self.window_end = window_end
        self.dataset_md5 = dataset_md5
        self.tags = tags
        self.experiment = experiment
        self.evidence_uri = evidence_uri
        self.alias = alias

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail():
            if is_blank(self.model_name) or is_blank(self.model_uri):
                raise InvalidInputError(
                    f"model_name is {self.model_name!r} and model_uri {self.model_uri!r}; both are needed (a training "
                    "loop that saves no MLflow model has model_uri null in its result)"
                )
            key = task_key(context) if is_blank(self.run_key) else str(self.run_key)
            gate = as_mapping(self.gate, "gate")
            if gate and gate.get("passed") is not True:
                raise InvalidInputError(f"the gate did not pass: {'; '.join(gate.get('reasons') or ['no verdict'])}")
            known = self.hook.versions_tagged(self.model_name, RUN_KEY, key)
            version, created = (known[0], False) if known else self._create(key, gate, context)
            self._set_alias(version)
            uri = f"models:/{self.model_name}/{version.version}"
            self.log.info("%s %s for run %s", "registered" if created else "found", uri, key)
            return {
                "name": self.model_name,
                "version": str(version.version),
                "run_id": version.run_id,
                "model_uri": uri,
                "created": created,
            }

    def _create(self, key: str, gate: Mapping[str, Any], context: Context) -> tuple[Any, bool]:
        """Record the run, then the version with all its tags at once, so that a version is never half-described."""
        from airflow_mlops.evaluation.scorer import HOW_TO_STORE, pickled_files

        client = self.hook.client
        model_dir = self.hook.model_dir(self.model_uri)
        if not os.path.isfile(os.path.join(model_dir, "MLmodel")):
            raise InvalidInputError(f"{self.model_uri} holds no MLflow model (no file MLmodel)")
        if pickles := pickled_files(model_dir):
            raise InvalidInputError(f"the model in {self.model_uri} is pickled ({pickles[0]}). {HOW_TO_STORE}")
        experiment = self.model_name if is_blank(self.experiment) else str(self.experiment)
        run = self.hook.run_for_key(experiment, key, name=_file_name(key)[-80:], tags={"mlops.kind": "training"})
        tags = {
            RUN_KEY: key,
            "mlops.created_by": task_key(context),
            "mlops.window_start": self.window_start,
            "mlops.window_end": self.window_end,
            "mlops.dataset_uri": self.training_set_uri,
            "mlops.dataset_md5": self.dataset_md5,
            "mlops.gate": "passed" if gate else "none",
            "mlops.gate_uri": gate.get("report_uri"),
            **self._evidence(run, key, gate),
            **as_mapping(self.tags, "tags"),
        }
        self._record(run, gate)
        client.log_artifacts(run.info.run_id, model_dir, "model")
        client.set_terminated(run.info.run_id, "FINISHED")
        return self._create_version(run, {name: str(value) for name, value in tags.items() if not is_blank(value)})

    def _create_version(self, run: Any, tags: dict[str, str]) -> tuple[Any, bool]:
        from mlflow.exceptions import MlflowException

        client = self.hook.client
        try:
            client.create_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{run.info.artifact_uri}/model"
        made = client.create_model_version(self.model_name, source, run.info.run_id, tags=tags)
        # Numbers are handed out in order: whoever holds the lowest was first, and every later one sees it.
        first = self.hook.versions_tagged(self.model_name, RUN_KEY, tags[RUN_KEY])[0]
        if int(first.version) < int(made.version):
            self.log.warning("another try registered version %s first; withdrawing %s", first.version, made.version)
            client.delete_model_version(self.model_name, made.version)
        return first, first.version == made.version

    def _evidence(self, run: Any, key: str, gate: Mapping[str, Any]) -> dict[str, str]:
        """Store the training profile and the loss reference; the tags that point to them."""
        found: dict[str, Any] = {}
        if not is_blank(self.training_set_uri):
            from airflow_mlops.drift import Profile

            columns = as_names(self.features, "features") or None
            categorical = as_names(self.categorical, "categorical")
            found["profile"] = Profile.of(self.training_set_uri, columns=columns, categorical=categorical).to_json()
        if not is_blank(gate.get("predictions_uri")):
            found["loss_reference"] = _loss_reference(str(gate["predictions_uri"]))
        if not found:
            return {}
        base = self.evidence_uri
        if is_blank(base):
            base = run.info.artifact_uri
            if str(base).startswith(SERVER_ONLY):
                raise InvalidInputError(
                    f"the artifacts of this MLflow are at {base}, which only its server can read; give evidence_uri, a "
                    "folder that every worker can read"
                )
            folder = join(str(base), "evidence")
        else:
            folder = join(str(base), _file_name(key))
        tags = {f"mlops.{name}_uri": write_json(join(folder, f"{name}.json"), item) for name, item in found.items()}
        if "profile" in found and not is_blank(self.training_set_uri):
            self._log_dataset(run, found["profile"])
        return tags

    def _log_dataset(self, run: Any, profile: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=f"{self.model_name}-training",
            digest=profile["digest"][:32],
            source_type="uri",
            source=json.dumps({"uri": self.training_set_uri}),
        )
        marks = {"mlflow.data.context": "training", "dvc_md5": self.dataset_md5}
        tags = [InputTag(name, str(value)) for name, value in marks.items() if not is_blank(value)]
        self.hook.client.log_inputs(run.info.run_id, [DatasetInput(dataset, tags)])

    def _record(self, run: Any, gate: Mapping[str, Any]) -> None:
        """Parameters, metrics and the gate's papers; repeating it changes nothing."""
        from mlflow.entities import Metric, Param

        client, run_id, when = self.hook.client, run.info.run_id, run.info.start_time
        numbers = dict(as_mapping(self.metrics, "metrics"))
        for arm, metrics in (gate.get("metrics") or {}).items():
            numbers |= {f"gate_{arm}_{name}": value for name, value in (metrics or {}).items()}
        finite = {n: float(v) for n, v in numbers.items() if isinstance(v, int | float) and math.isfinite(v)}
        params = [Param(n, str(v)[:6000]) for n, v in as_mapping(self.parameters, "parameters").items()]
        client.log_batch(run_id, [Metric(n, v, when, 0) for n, v in finite.items()], params)
        if gate:
            client.log_dict(run_id, dict(gate), "gate/verdict.json")
        if not is_blank(gate.get("report_uri")):
            client.log_text(run_id, read_bytes(str(gate["report_uri"])).decode(), "gate/report.html")

    def _set_alias(self, version: Any) -> None:
        if is_blank(self.alias):
            return
        holder = self.hook.version_by_alias(self.model_name, str(self.alias), missing_ok=True)
        if holder is None or int(holder.version) < int(version.version):
            self.hook.client.set_registered_model_alias(self.model_name, self.alias, version.version)


def _loss_reference(predictions_uri: str) -> Any:
    import pandas as pd

    from airflow_mlops.drift.harm import LossReference

    frame = pd.read_parquet(predictions_uri, columns=["event_timestamp", "label", "challenger"])
    day = pd.to_datetime(frame["event_timestamp"], utc=True).dt.strftime("%Y-%m-%d")
    return LossReference.of(frame["label"].to_numpy(), frame["challenger"].to_numpy(), day.to_numpy()).to_json()


def _file_name(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key)


class MlflowPromoteOperator(_MlflowOperator):
    """Give a version the champion's alias, if the champion is still the one the decision was made against.

    MLflow has no compare-and-set. This reads, compares, sets and reads back under a lease of the model (see
    :meth:`airflow_mlops.hooks.mlflow.MlflowHook.lease`), which keeps out every other promotion by this operator;
    somebody who moves the alias by other means within those milliseconds is noticed only by the last read.

    When the task has outlets, each asset event carries ``name``, ``version`` and ``previous``, so that other Dags
    can be scheduled on a promotion.

    :param model_name: registered model (templated)
    :param version: to promote (templated)
    :param expected_version: champion at the time of the decision; empty for none (templated)
    :param alias: the champion's (templated)
    :param previous_alias: given to the champion that is replaced (templated)
    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's (templated)
    :return: ``name``, ``version``, ``previous`` (None for none), ``alias``, ``changed``
    :raises AirflowFailException: the version does not exist, or another champion than expected was found
    """

    template_fields: Sequence[str] = (
        "model_name",
        "version",
        "expected_version",
        "alias",
        "previous_alias",
        "tracking_uri",
    )

    def __init__(
        self,
        *,
        model_name: str,
        version: str,
        expected_version: str,
        alias: str = "champion",
        previous_alias: str = "previous_champion",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.version = version
        self.expected_version = expected_version
        self.alias = alias
        self.previous_alias = previous_alias

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail():
            if is_blank(self.version):
                raise InvalidInputError("version is empty; give the number that MlflowRegisterOperator returned")
            version = str(self.version)
            expected = None if is_blank(self.expected_version) else str(self.expected_version)
            target = self.hook.version(self.model_name, version)
            if ROLLED_BACK in target.tags:
                raise InvalidInputError(
                    f"{self.model_name} version {version} was rolled back; delete its tag {ROLLED_BACK!r} to allow it"
                )
            with self.hook.lease(self.model_name):
                changed = self._compare_and_set(version, expected)
            result = {
                "name": self.model_name,
                "version": version,
                "previous": expected,
                "alias": self.alias,
                "changed": changed,
            }
            self.log.info("%s of %s is version %s (before: %s)", self.alias, self.model_name, version, expected)
            for asset in self.outlets or ():
                context["outlet_events"][asset].extra = dict(result)
            return result

    def _compare_and_set(self, version: str, expected: str | None) -> bool:
        holder = self.hook.version_by_alias(self.model_name, self.alias, missing_ok=True)
        current = None if holder is None else str(holder.version)
        if current == version:
            return False
        if current != expected:
            raise ConcurrentChangeError(
                f"{self.alias} of {self.model_name} is version {current or 'none'}, but this promotion was decided "
                f"against {expected or 'none'}; somebody else moved it. Run the gate again against the new champion."
            )
        move_alias(self.hook, self.model_name, self.alias, version, keep=(self.previous_alias, expected))
        return True


def move_alias(hook: MlflowHook, name: str, alias: str, version: str, keep: tuple[str, str | None]) -> None:
    """Point ``alias`` to ``version`` and check that it stayed; ``keep`` is the alias and version to go back to.

    :raises ConcurrentChangeError: it was moved elsewhere at once
    """
    previous_alias, previous = keep
    if previous is not None:
        # First, so that a task that dies in between leaves a way back.
        hook.client.set_registered_model_alias(name, previous_alias, previous)
    hook.client.set_registered_model_alias(name, alias, version)
    hook.client.set_registered_model_tag(name, alias_tag(alias), version)
    holder = hook.version_by_alias(name, alias)
    if holder is None or str(holder.version) != version:
        raise ConcurrentChangeError(
            f"{alias} of {name} was set to {version} and is {holder.version if holder else 'gone'}: somebody moves it "
            "by other means; look at the registry before you clear this task"
        )


class MlflowRollbackOperator(_MlflowOperator):
    """Make the previous champion the champion again, and mark the one it replaces so that it cannot come back.

    Repeating it, as a retry does, changes nothing more: the version rolled back carries this task's key.

    :param model_name: registered model (templated)
    :param version: champion to roll back from; empty for whichever it is now (templated)
    :param alias: the champion's (templated)
    :param previous_alias: of the version to go back to; removed afterwards (templated)
    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's (templated)
    :return: ``name``, ``version`` (champion now), ``rolled_back``, ``alias``, ``changed``
    :raises AirflowFailException: there is no champion or no previous one, or ``version`` is not the champion
    """

    template_fields: Sequence[str] = ("model_name", "version", "alias", "previous_alias", "tracking_uri")

    def __init__(
        self,
        *,
        model_name: str,
        version: str = "",
        alias: str = "champion",
        previous_alias: str = "previous_champion",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.version = version
        self.alias = alias
        self.previous_alias = previous_alias

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail(), self.hook.lease(self.model_name):
            client, name, key = self.hook.client, self.model_name, task_key(context)
            begun = self.hook.versions_tagged(name, ROLLED_BACK, key)
            if begun:
                bad, good = str(begun[0].version), begun[0].tags["mlops.rolled_back_to"]
            else:
                bad, good = self._plan()
                client.set_model_version_tag(name, bad, "mlops.rolled_back_to", good)
                client.set_model_version_tag(name, bad, ROLLED_BACK, key)
            champion = self.hook.version_by_alias(name, self.alias)
            changed = champion is not None and str(champion.version) == bad
            if changed:
                move_alias(self.hook, name, self.alias, good, keep=(self.previous_alias, None))
            way_back = self.hook.version_by_alias(name, self.previous_alias, missing_ok=True)
            if way_back is not None and str(way_back.version) == good:
                client.delete_registered_model_alias(name, self.previous_alias)
            self.log.info("%s of %s is version %s again, %s was rolled back", self.alias, name, good, bad)
            for asset in self.outlets or ():
                context["outlet_events"][asset].extra = {"name": name, "version": good, "rolled_back": bad}
            return {"name": name, "version": good, "rolled_back": bad, "alias": self.alias, "changed": changed}

    def _plan(self) -> tuple[str, str]:
        """The version to leave and the one to return to."""
        champion = self.hook.version_by_alias(self.model_name, self.alias)
        previous = self.hook.version_by_alias(self.model_name, self.previous_alias, missing_ok=True)
        if champion is None or previous is None:
            missing = self.alias if champion is None else self.previous_alias
            raise RegistryError(f"{self.model_name} has no {missing!r} to roll back {'from' if not champion else 'to'}")
        if not is_blank(self.version) and str(champion.version) != str(self.version):
            raise ConcurrentChangeError(
                f"version {self.version} is not the {self.alias} of {self.model_name}, {champion.version} is; nothing "
                "was changed"
            )
        return str(champion.version), str(previous.version)
