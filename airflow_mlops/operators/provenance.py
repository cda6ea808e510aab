"""A model version's papers: its record, bill of materials and model card."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowSkipException

from airflow_mlops.exceptions import DataError, InvalidInputError
from airflow_mlops.operators._mlflow import MlflowBaseOperator
from airflow_mlops.operators.mlflow import SERVER_ONLY
from airflow_mlops.shell import as_mapping, is_blank, log_table, permanent_errors_fail
from airflow_mlops.storage import join, write_bytes

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlops.provenance import ModelRecord

#: Folder of the papers in the run's artifacts.
PAPERS = "papers"
#: What the first record of a version has said, whoever writes a later one.
_FIRST = ("who", "when", "code")


class ModelRecordOperator(MlflowBaseOperator):
    """Puts down where a registered version comes from and what was decided about it, and writes its papers.

    The papers go to the version's MLflow run, below ``papers``, and to ``evidence_uri``: ``record.json`` (see
    :class:`airflow_mlops.provenance.ModelRecord`), ``bom.json`` (CycloneDX 1.6 ML-BOM), ``card.md`` and ``card.html``
    (model card), ``openlineage.json``. The version's tags ``mlops.record_uri``, ``mlops.bom_uri`` and
    ``mlops.card_uri`` say where. Running again writes the same; a later task with more results, such as the canary's,
    completes the record and does not forget what an earlier one knew. What nobody knows is listed as unknown.

    :param registration: the result of ``MlflowRegisterOperator`` (templated)
    :param model_name: registered model, instead of the registration's (templated)
    :param version: instead of the registration's (templated)
    :param snapshot: the result of ``DvcSnapshotOperator`` (templated)
    :param training_set: the result of ``FeastTrainingSetOperator`` (templated)
    :param training: the result of ``RayTrainOperator`` (templated)
    :param gate: the result of ``ModelGateOperator`` (templated)
    :param canary: the result of ``CanaryPromoteOperator`` (templated)
    :param promotion: the result of ``MlflowPromoteOperator`` (templated)
    :param approvals: what people answered: a list of ``{"about", "approved", "by"}`` (templated)
    :param documentation: what no run can tell, see :mod:`airflow_mlops.provenance.card` (templated)
    :param feature_service: of the training set (templated)
    :param entity_uri: of the training set (templated)
    :param code_path: folder of the code whose git revision counts; None for the Dag file's (templated)
    :param evidence_uri: folder for the papers beside the run's artifacts; needed where only the MLflow server can read
        those (templated)
    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's (templated)
    :return: ``model``, ``version``, ``record_uri``, ``bom_uri``, ``card_uri`` (the page), ``completeness`` (0 to 100,
        see :mod:`airflow_mlops.provenance.completeness`), ``unknown``
    :raises AirflowSkipException: neither a registration nor a version came in: the gate let none through
    :raises AirflowFailException: there is no such version, or its files are not those that were registered
    """

    template_fields: Sequence[str] = (
        "registration",
        "model_name",
        "version",
        "snapshot",
        "training_set",
        "training",
        "gate",
        "canary",
        "promotion",
        "approvals",
        "documentation",
        "feature_service",
        "entity_uri",
        "code_path",
        "evidence_uri",
        "tracking_uri",
    )

    def __init__(
        self,
        *,
        registration: Mapping[str, Any] | str | None = None,
        model_name: str | None = None,
        version: str | None = None,
        snapshot: Mapping[str, Any] | str | None = None,
        training_set: Mapping[str, Any] | str | None = None,
        training: Mapping[str, Any] | str | None = None,
        gate: Mapping[str, Any] | str | None = None,
        canary: Mapping[str, Any] | str | None = None,
        promotion: Mapping[str, Any] | str | None = None,
        approvals: Sequence[Mapping[str, Any]] | None = None,
        documentation: Mapping[str, Any] | None = None,
        feature_service: str | None = None,
        entity_uri: str | None = None,
        code_path: str | None = None,
        evidence_uri: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.registration = registration
        self.model_name = model_name
        self.version = version
        self.snapshot = snapshot
        self.training_set = training_set
        self.training = training
        self.gate = gate
        self.canary = canary
        self.promotion = promotion
        self.approvals = approvals
        self.documentation = documentation
        self.feature_service = feature_service
        self.entity_uri = entity_uri
        self.code_path = code_path
        self.evidence_uri = evidence_uri

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail():
            from airflow_mlops.provenance.completeness import completeness

            found = self._registered()
            run = self.hook.client.get_run(found.run_id)
            folder = self._folder(found, run)
            record = self._record(context, found)
            papers = self._papers(record, run)
            uris = self._write(found, folder, papers)
            score = completeness(json.loads(papers["bom.json"]))
            rows = [
                [question, path, "unknown" if value is None else _short(value)]
                for question, answers in record.answers().items()
                for path, value in answers.items()
            ]
            self.log.info("%s version %s\n%s", record.model, record.version, log_table(["", "what", "answer"], rows))
            missing = f"; it lacks {', '.join(score.missing)}" if score.missing else ""
            self.log.info("the ML-BOM is complete to %.1f of 100%s", score.score, missing)
            return {
                "model": record.model,
                "version": record.version,
                **uris,
                "completeness": score.score,
                "unknown": record.unknown,
            }

    def _registered(self) -> Any:
        """The version in the registry."""
        given = as_mapping(self.registration, "registration")
        name = given.get("name") if is_blank(self.model_name) else self.model_name
        version = given.get("version") if is_blank(self.version) else self.version
        if is_blank(name) and is_blank(version):
            raise AirflowSkipException("no version was registered in this run, so there is nothing to put down")
        if is_blank(name) or is_blank(version):
            raise InvalidInputError(
                f"model_name is {name!r} and version {version!r}; give both, or registration: the result of "
                "MlflowRegisterOperator"
            )
        return self.hook.version(str(name), str(version))

    def _folder(self, found: Any, run: Any) -> str:
        """Where the papers are read from."""
        if not is_blank(self.evidence_uri):
            return join(str(self.evidence_uri), found.name, str(found.version))
        folder = join(run.info.artifact_uri, PAPERS)
        if folder.startswith(SERVER_ONLY):
            raise InvalidInputError(
                f"the artifacts of this MLflow are at {folder}, which only its server can read; give evidence_uri, a "
                "folder that every worker can read"
            )
        return folder

    def _record(self, context: Context, found: Any) -> ModelRecord:
        from airflow_mlops.provenance.assemble import assemble
        from airflow_mlops.provenance.code import code_state

        gate, canary = as_mapping(self.gate, "gate"), as_mapping(self.canary, "canary")
        registration, promotion = as_mapping(self.registration, "registration"), as_mapping(self.promotion, "promotion")
        results, training = (gate, registration, canary, promotion), as_mapping(self.training, "training")
        record = assemble(
            found.name,
            str(found.version),
            tags=found.tags,
            who=_who(context),
            when={"started": _started(context), "registered": _time(found.creation_timestamp)},
            code=code_state(_dag_folder(context) if is_blank(self.code_path) else str(self.code_path)),
            snapshot=as_mapping(self.snapshot, "snapshot"),
            training_set=as_mapping(self.training_set, "training_set"),
            # The run directory is read from, whatever Airflow takes for a secret in its name.
            training=_masked(training) | {"run_dir": training.get("run_dir")},
            gate=gate,
            canary=canary,
            promotion={name: value for name, value in promotion.items() if name != "audit"},
            approvals=self.approvals,
            artifacts=self._files(found),
            documentation=as_mapping(self.documentation, "documentation"),
            feature_service=None if is_blank(self.feature_service) else self.feature_service,
            entity_uri=None if is_blank(self.entity_uri) else self.entity_uri,
            audit=[result["audit"] for result in results if result.get("audit")],
        )
        record = replace(record, parameters=_masked(record.parameters))
        earlier = self._earlier(found)
        return record if earlier is None else _completed(earlier, record)

    def _files(self, found: Any) -> list[dict[str, Any]]:
        """The hashes of the version's files, which must be those that were registered."""
        from airflow_mlops.hooks._models import DIGEST
        from airflow_mlops.model_files.digest import check_digest
        from airflow_mlops.provenance.code import file_hashes

        folder = self.hook.model_dir(f"models:/{found.name}/{found.version}")
        if recorded := found.tags.get(DIGEST):
            check_digest(folder, recorded, f"version {found.version} of {found.name}")
        return file_hashes(folder)

    def _earlier(self, found: Any) -> ModelRecord | None:
        """The record that an earlier task has written; None where there is none, or it is gone."""
        from airflow_mlops.provenance.record import find
        from airflow_mlops.provenance.trace import RECORD_TAG

        uri = found.tags.get(RECORD_TAG)
        earlier = find(uri) if uri else None
        if uri and earlier is None:
            self.log.warning(
                "the record of %s version %s is not at %s any more; the new one holds only what this task knows",
                found.name,
                found.version,
                uri,
            )
        return earlier

    def _papers(self, record: ModelRecord, run: Any) -> dict[str, str]:
        """File name to content."""
        from airflow_mlops.provenance.bom import bom_of
        from airflow_mlops.provenance.card import html, markdown
        from airflow_mlops.provenance.openlineage import event_of

        uri = self.hook.tracking_uri
        server = uri.rpartition("@")[2] if uri.startswith(("http://", "https://")) else None
        bom = bom_of(record, download_url=join(run.info.artifact_uri, "model"), registry_url=server)
        return {
            "record.json": _json(record.to_json()),
            "bom.json": _json(bom),
            "card.md": markdown(record),
            "card.html": html(record),
            "openlineage.json": _json(event_of(record)),
        }

    def _write(self, found: Any, folder: str, papers: Mapping[str, str]) -> dict[str, str]:
        client, written = self.hook.client, {}
        for name, content in papers.items():
            client.log_text(found.run_id, content, f"{PAPERS}/{name}")
            uri = join(folder, name)
            written[name] = uri if is_blank(self.evidence_uri) else write_bytes(uri, content.encode())
        # Last: who follows them finds the papers.
        uris = {"record_uri": written["record.json"], "bom_uri": written["bom.json"], "card_uri": written["card.html"]}
        for name, uri in uris.items():
            client.set_model_version_tag(found.name, str(found.version), f"mlops.{name}", uri)
        return uris


def _completed(before: ModelRecord, now: ModelRecord) -> ModelRecord:
    """What is known now, and, where that is nothing, what was known before.

    :raises DataError: the files of the model are others
    """
    if before.artifacts is not None and list(before.artifacts) != list(now.artifacts or ()):
        then = {file["path"]: file["sha256"] for file in before.artifacts}
        here = {file["path"]: file["sha256"] for file in now.artifacts or ()}
        wrong = sorted(name for name in then.keys() | here.keys() if then.get(name) != here.get(name))
        raise DataError(
            f"the files {wrong[:5]} of {now.model} version {now.version} are not those on record; a registered version "
            "must not change: register the new files as another version"
        )
    merged: dict[str, Any] = {name: getattr(before, name) or getattr(now, name) for name in _FIRST}
    for field in fields(now):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if field.name in ("cost", "data", "training", "environment", "cluster", "integrity"):
            merged[field.name] = _laid_over(old, new)
        elif field.name in ("audit", "approvals") and old and new:
            # A later task need not have been told of what the earlier one put down.
            merged[field.name] = [*old, *(one for one in new if one not in old)]
        elif field.name not in _FIRST:
            # That there is none, such as nobody who was asked, is more than not to know.
            merged[field.name] = new or (old if old or new is None else new)
    return replace(now, **merged)


def _laid_over(old: Any, new: Any) -> Any:
    """A mapping's values, of the older one where the newer has none, at every depth."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {name: _laid_over(old.get(name), new.get(name)) for name in [*old, *(n for n in new if n not in old)]}
    return old if new is None else new


def _who(context: Context) -> dict[str, Any]:
    ti, run = context["ti"], context.get("dag_run")
    kind = str(getattr(run, "run_type", None) or "unknown").rpartition(".")[2].lower()
    bundle = getattr(ti, "bundle_instance", None)
    return {
        # A schedule, a backfill or an asset starts a run without a person.
        "user": getattr(run, "triggering_user_name", None) or (f"airflow, {kind}" if run is not None else None),
        "dag_id": ti.dag_id,
        "run_id": ti.run_id,
        "run_type": kind,
        "bundle": getattr(bundle, "name", None),
        "bundle_version": getattr(bundle, "version", None),
    }


def _started(context: Context) -> str | None:
    started = getattr(context.get("dag_run"), "start_date", None)
    return None if started is None else started.isoformat()


def _time(milliseconds: int) -> str:
    return dt.datetime.fromtimestamp(milliseconds / 1000, dt.timezone.utc).isoformat()


def _dag_folder(context: Context) -> str | None:
    file = getattr(context.get("dag"), "fileloc", None)
    return os.path.dirname(file) if file else None


def _masked(value: Any) -> Any:
    """Without what Airflow takes for a secret, by name or because a connection holds it."""
    from airflow.sdk.log import redact

    return _but_text(value, redact(value)) if value is not None else None


def _but_text(value: Any, masked: Any) -> Any:
    """The masked value where it is text: a number is none, whatever its name."""
    if isinstance(value, Mapping):
        shown = masked if isinstance(masked, Mapping) else dict.fromkeys(value, masked)
        return {name: _but_text(entry, shown.get(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        shown_entries = masked if isinstance(masked, list | tuple) else [masked] * len(value)
        return [_but_text(entry, shown) for entry, shown in zip(value, shown_entries)]
    return masked if isinstance(value, str) else value


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
