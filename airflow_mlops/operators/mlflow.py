"""Register a trained model once, move the champion's alias safely, and move it back."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import ConcurrentChangeError, DataError, InvalidInputError, RegistryError
from airflow_mlops.hooks._models import ALLOW_PICKLE, DIGEST, RUN_KEY, SIGNATURE, SIGNED_BY, findings_of
from airflow_mlops.operators._alias import compare_and_set, move_alias
from airflow_mlops.operators._mlflow import MlflowBaseOperator, task_key
from airflow_mlops.shell import as_mapping, as_names, is_blank, permanent_errors_fail
from airflow_mlops.storage import join, read_bytes, write_bytes, write_json

if TYPE_CHECKING:
    from airflow.sdk import Context

ROLLED_BACK = "mlops.rolled_back"
COSTS = ("wall_seconds", "cpu_seconds", "gpu_seconds", "attempts")
# Artifact stores that only an MLflow server can read.
SERVER_ONLY = ("mlflow-artifacts:", "dbfs:", "databricks:")


@dataclass(frozen=True)
class _Papers:
    """One training as the arguments of a registration describe it."""

    key: str
    model_uri: str
    training: dict[str, Any]
    data: dict[str, Any]
    gate: dict[str, Any]
    snapshot: dict[str, Any]
    task: str


class MlflowRegisterOperator(MlflowBaseOperator):
    """Put a trained model into the registry, with everything needed to judge it later.

    One training makes one version, whatever happens to the task: the version carries ``run_key``, a try that finds
    it takes it over, and of two tries that create it at once the later one withdraws.

    The version's tags: ``mlops.run_key``, ``mlops.window_start``, ``mlops.window_end``, ``mlops.dataset_uri``,
    ``mlops.dataset_md5``, ``mlops.profile_uri`` (profile of the training set), ``mlops.loss_reference_uri`` (losses on
    the gate's hold-out), ``mlops.performance_uri`` (what estimates its performance without labels, where the hold-out
    has enough rows), ``mlops.gate``, ``mlops.gate_uri``, ``mlops.model_digest`` (of the model's files),
    ``mlops.model_formats``, with a signature ``mlops.signature_uri`` and ``mlops.signed_by``, and those given.

    :param model_name: registered model (templated)
    :param training: the result of ``RayTrainOperator``: ``run_key``, ``model_uri``, ``metrics``, seconds (templated)
    :param model_uri: the MLflow model's folder, a path or URI; instead of the training's (templated)
    :param run_key: identity of the training; else the training's, else this task in this Dag run (templated)
    :param training_set: the result of ``FeastTrainingSetOperator``, or a Parquet URI; its profile is stored
        (templated)
    :param features: columns of the profile; instead of the training set's (templated)
    :param categorical: those of them whose numbers are names (templated)
    :param gate: the result of ``ModelGateOperator``; refused when it did not pass (templated)
    :param snapshot: the result of ``DvcSnapshotOperator`` (templated)
    :param metrics: further numbers of the training (templated)
    :param parameters: of the training (templated)
    :param window_start: first instant of the data, kept as a tag; else the training set's (templated)
    :param window_end: first instant after it (templated)
    :param tags: further tags of the version (templated)
    :param experiment: MLflow experiment; None for the model's name (templated)
    :param evidence_uri: folder for profile, loss reference and estimator; None for the run's artifacts. Needed where
        only the MLflow server can read artifacts (templated)
    :param alias: set on the version, unless a later version has it; None for none (templated)
    :param signing_conn_id: connection of type ``model_signing`` that signs the model's files; None: no signature
    :param allow_pickle: the model may be a pickle: it is then scanned, what the scanners say is kept
        (``mlops.pickle_findings_uri``), and the version says so (``mlops.allow_pickle``)
    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's (templated)
    :return: ``name``, ``version``, ``run_id``, ``model_uri`` (``models:/name/version``), ``created``
    """

    template_fields: Sequence[str] = (
        "model_name",
        "training",
        "model_uri",
        "run_key",
        "training_set",
        "features",
        "categorical",
        "gate",
        "snapshot",
        "metrics",
        "parameters",
        "window_start",
        "window_end",
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
        training: Mapping[str, Any] | str | None = None,
        model_uri: str | None = None,
        run_key: str | None = None,
        training_set: Mapping[str, Any] | str | None = None,
        features: Sequence[str] | str | None = None,
        categorical: Sequence[str] | str = (),
        gate: Mapping[str, Any] | str | None = None,
        snapshot: Mapping[str, Any] | str | None = None,
        metrics: Mapping[str, Any] | str | None = None,
        parameters: Mapping[str, Any] | str | None = None,
        window_start: str | None = None,
        window_end: str | None = None,
        tags: Mapping[str, str] | str | None = None,
        experiment: str | None = None,
        evidence_uri: str | None = None,
        alias: str | None = "challenger",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.training = training
        self.model_uri = model_uri
        self.run_key = run_key
        self.training_set = training_set
        self.features = features
        self.categorical = categorical
        self.gate = gate
        self.snapshot = snapshot
        self.metrics = metrics
        self.parameters = parameters
        self.window_start = window_start
        self.window_end = window_end
        self.tags = tags
        self.experiment = experiment
        self.evidence_uri = evidence_uri
        self.alias = alias
        self._findings: list[dict[str, Any]] = []

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail():
            papers = self._papers(context)
            known = self.hook.versions_tagged(self.model_name, RUN_KEY, papers.key)
            version, created = (known[0], False) if known else self._create(papers)
            self._set_alias(version)
            uri = f"models:/{self.model_name}/{version.version}"
            self.log.info("%s %s for run %s", "registered" if created else "found", uri, papers.key)
            return {
                "name": self.model_name,
                "version": str(version.version),
                "run_id": version.run_id,
                "model_uri": uri,
                "created": created,
            }

    def _papers(self, context: Context) -> _Papers:
        """What the arguments say about the training, checked."""
        training, gate = as_mapping(self.training, "training"), as_mapping(self.gate, "gate")
        model_uri = training.get("model_uri") if is_blank(self.model_uri) else self.model_uri
        if is_blank(self.model_name) or is_blank(model_uri):
            raise InvalidInputError(
                f"model_name is {self.model_name!r} and the model's URI {model_uri!r}; both are needed (a loop "
                "that saves no MLflow model has model_uri null in its result)"
            )
        if gate and gate.get("passed") is not True:
            raise InvalidInputError(f"the gate did not pass: {'; '.join(gate.get('reasons') or ['no verdict'])}")
        key = next((k for k in (self.run_key, training.get("run_key")) if not is_blank(k)), task_key(context))
        given = self.training_set
        is_uri = isinstance(given, str) and not is_blank(given) and not given.lstrip().startswith("{")
        data = {"uri": given} if is_uri else as_mapping(given, "training_set")
        return _Papers(
            str(key), str(model_uri), training, data, gate, as_mapping(self.snapshot, "snapshot"), task_key(context)
        )

    def _create(self, papers: _Papers) -> tuple[Any, bool]:
        """Record the run, then the version with all its tags at once, so that a version is never half-described."""
        client = self.hook.client
        model_dir = self.hook.model_dir(papers.model_uri)
        if not os.path.isfile(os.path.join(model_dir, "MLmodel")):
            raise InvalidInputError(f"{papers.model_uri} holds no MLflow model (no file MLmodel)")
        files = self._files(papers, model_dir)
        experiment = self.model_name if is_blank(self.experiment) else str(self.experiment)
        name = _file_name(papers.key)[-80:]
        run = self.hook.run_for_key(experiment, papers.key, name=name, tags={"mlops.kind": "training"})
        window = papers.data.get("window") or {}
        tags = {
            RUN_KEY: papers.key,
            "mlops.created_by": papers.task,
            "mlops.window_start": window.get("start") if is_blank(self.window_start) else self.window_start,
            "mlops.window_end": window.get("end") if is_blank(self.window_end) else self.window_end,
            "mlops.dataset_uri": papers.data.get("uri"),
            "mlops.dataset_sha256": papers.data.get("sha256"),
            "mlops.dataset_md5": papers.snapshot.get("md5"),
            "mlops.run_dir": papers.training.get("run_dir"),
            "mlops.gate": "passed" if papers.gate else "none",
            "mlops.gate_uri": papers.gate.get("report_uri"),
            **self._evidence(run, papers),
            **as_mapping(self.tags, "tags"),
            **files,
            **self._signature(run, papers, model_dir, files[DIGEST]),
        }
        self._record(run, papers)
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

    def _evidence(self, run: Any, papers: _Papers) -> dict[str, str]:
        """Store the training profile and the loss reference; the tags that point to them."""
        found: dict[str, Any] = {}
        source, predictions = papers.data.get("uri"), papers.gate.get("predictions_uri")
        if not is_blank(source):
            from airflow_mlops.drift import Profile

            columns = as_names(self.features, "features") or papers.data.get("features")
            categorical = as_names(self.categorical, "categorical")
            found["profile"] = Profile.of(source, columns=columns, categorical=categorical).to_json()
            self._log_dataset(run, papers, found["profile"]["digest"])
        if not is_blank(predictions):
            held_out = _held_out(str(predictions))
            found["loss_reference"] = _loss_reference(held_out)
            found |= self._performance(held_out)
        if self._findings:
            found["pickle_findings"] = self._findings
        folder = self._evidence_folder(run, papers) if found else ""
        return {f"mlops.{name}_uri": write_json(join(folder, f"{name}.json"), item) for name, item in found.items()}

    def _evidence_folder(self, run: Any, papers: _Papers) -> str:
        if is_blank(self.evidence_uri):
            folder = join(run.info.artifact_uri, "evidence")
        else:
            folder = join(str(self.evidence_uri), _file_name(papers.key))
        if folder.startswith(SERVER_ONLY):
            raise InvalidInputError(
                f"the artifacts of this MLflow are at {folder}, which only its server can read; give evidence_uri, a "
                "folder that every worker can read"
            )
        return folder

    def _files(self, papers: _Papers, model_dir: str) -> dict[str, str]:
        """What the files are, as tags; only allowed formats, and only what the gate has judged."""
        from airflow_mlops.model_files.digest import model_digest
        from airflow_mlops.model_files.formats import check

        files = check(model_dir, allow_pickle=self.allow_pickle is True)
        pickled = any(file.pickled for file in files)
        self._findings = findings_of(papers.model_uri, model_dir) if pickled else []
        digest, judged = model_digest(model_dir), papers.gate.get("challenger_digest")
        if not is_blank(judged) and judged != digest:
            raise InvalidInputError(
                f"the gate judged a model with the digest {judged}, but {papers.model_uri} has {digest}: its files "
                "were changed since. Clear the gate, so that it judges what is registered."
            )
        formats = sorted({file.format for file in files} - {"text", "json", "mlmodel"})
        return {DIGEST: digest, "mlops.model_formats": ",".join(formats), **({ALLOW_PICKLE: "true"} if pickled else {})}

    def _signature(self, run: Any, papers: _Papers, model_dir: str, digest: str) -> dict[str, str]:
        """Sign the model for this training; the tags that say where and by whom."""
        if is_blank(self.signing_conn_id):
            return {}
        from airflow_mlops.hooks.signing import SigningHook

        signed = SigningHook(str(self.signing_conn_id)).sign(model_dir, self.model_name, papers.key)
        if signed.digest != digest:
            raise InvalidInputError(f"{papers.model_uri} changed while it was signed; see who else writes there")
        place = join(self._evidence_folder(run, papers), "model.sig")
        return {SIGNATURE: write_bytes(place, signed.content), SIGNED_BY: signed.signed_by}

    def _performance(self, held_out: Any) -> dict[str, Any]:
        """The estimator of performance without labels; a hold-out that cannot carry one costs only that."""
        from airflow_mlops.drift.performance import CalibratedEstimate

        try:
            estimator = CalibratedEstimate.fit(held_out["challenger"].to_numpy(), held_out["label"].to_numpy())
        except DataError as error:
            self.log.warning("no estimator of performance without labels is kept: %s", error)
            return {}
        for warning in estimator.warnings:
            self.log.warning("performance without labels: %s", warning)
        return {"performance": estimator.to_json()}

    def _log_dataset(self, run: Any, papers: _Papers, digest: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": papers.data["uri"]})
        dataset = Dataset(name=f"{self.model_name}-training", digest=digest[:32], source_type="uri", source=source)
        marks = {"mlflow.data.context": "training", "dvc_md5": papers.snapshot.get("md5")}
        tags = [InputTag(name, str(value)) for name, value in marks.items() if not is_blank(value)]
        self.hook.client.log_inputs(run.info.run_id, [DatasetInput(dataset, tags)])

    def _record(self, run: Any, papers: _Papers) -> None:
        """Parameters, metrics and the gate's papers; repeating it changes nothing."""
        from mlflow.entities import Metric, Param

        client, run_id, when = self.hook.client, run.info.run_id, run.info.start_time
        numbers = {**(papers.training.get("metrics") or {}), **as_mapping(self.metrics, "metrics")}
        numbers |= {name: papers.training.get(name) for name in COSTS}
        for arm, metrics in (papers.gate.get("metrics") or {}).items():
            numbers |= {f"gate_{arm}_{name}": value for name, value in (metrics or {}).items()}
        finite = {n: float(v) for n, v in numbers.items() if isinstance(v, int | float) and math.isfinite(v)}
        params = [Param(n, str(v)[:6000]) for n, v in as_mapping(self.parameters, "parameters").items()]
        client.log_batch(run_id, [Metric(n, v, when, 0) for n, v in finite.items()], params)
        if papers.gate:
            client.log_dict(run_id, papers.gate, "gate/verdict.json")
        report = papers.gate.get("report_uri")
        if not is_blank(report):
            client.log_text(run_id, read_bytes(str(report)).decode(), "gate/report.html")

    def _set_alias(self, version: Any) -> None:
        if is_blank(self.alias):
            return
        holder = self.hook.version_by_alias(self.model_name, str(self.alias), missing_ok=True)
        if holder is None or int(holder.version) < int(version.version):
            self.hook.client.set_registered_model_alias(self.model_name, self.alias, version.version)


def _held_out(predictions_uri: str) -> Any:
    """The gate's predictions in the order of time."""
    import pandas as pd

    frame = pd.read_parquet(predictions_uri, columns=["event_timestamp", "label", "challenger"])
    return frame.sort_values("event_timestamp", kind="stable")


def _loss_reference(held_out: Any) -> Any:
    import pandas as pd

    from airflow_mlops.drift.harm import LossReference

    day = pd.to_datetime(held_out["event_timestamp"], utc=True).dt.strftime("%Y-%m-%d")
    return LossReference.of(held_out["label"].to_numpy(), held_out["challenger"].to_numpy(), day.to_numpy()).to_json()


def _file_name(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key)


class MlflowPromoteOperator(MlflowBaseOperator):
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
                changed = compare_and_set(
                    self.hook, self.model_name, self.alias, version, expected, previous_alias=self.previous_alias
                )
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


class MlflowRollbackOperator(MlflowBaseOperator):
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
            bad, good = self._decided(key)
            champion = self.hook.version_by_alias(name, self.alias)
            current = None if champion is None else str(champion.version)
            changed = current == bad
            if changed:
                move_alias(self.hook, name, self.alias, good, keep=(self.previous_alias, None))
            way_back = self.hook.version_by_alias(name, self.previous_alias, missing_ok=True)
            # Of a later promotion it is the way back to the same version, and stays.
            if current in (bad, good) and way_back is not None and str(way_back.version) == good:
                client.delete_registered_model_alias(name, self.previous_alias)
            self.log.info("%s of %s is version %s again, %s was rolled back", self.alias, name, good, bad)
            for asset in self.outlets or ():
                context["outlet_events"][asset].extra = {"name": name, "version": good, "rolled_back": bad}
            return {"name": name, "version": good, "rolled_back": bad, "alias": self.alias, "changed": changed}

    def _decided(self, key: str) -> tuple[str, str]:
        """The version to leave and the one to return to, on record from here on; the caller holds the lease."""
        client, name = self.hook.client, self.model_name
        begun = self.hook.versions_tagged(name, ROLLED_BACK, key)
        if begun:
            return str(begun[0].version), begun[0].tags["mlops.rolled_back_to"]
        bad, good = self._plan()
        client.set_model_version_tag(name, bad, "mlops.rolled_back_to", good)
        client.set_model_version_tag(name, bad, ROLLED_BACK, key)
        return bad, good

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
