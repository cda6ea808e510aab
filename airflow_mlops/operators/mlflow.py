"""Register a trained model once, move the champion's alias safely, and move it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError, RegistryError
from airflow_mlops.hooks._models import ALLOW_PICKLE, DIGEST, RUN_KEY, SIGNATURE, SIGNED_BY, findings_of
from airflow_mlops.hooks.mlflow import SERVER_ONLY
from airflow_mlops.operators._alias import ROLLED_BACK, compare_and_set, move_alias, refuse_rolled_back, to_move
from airflow_mlops.operators._approval import ApprovalMixin
from airflow_mlops.operators._audit import audited
from airflow_mlops.operators._mlflow import MlflowBaseOperator, task_key
from airflow_mlops.operators._promotion import APPROVED_AT, APPROVED_BY, promotion_question, said_before
from airflow_mlops.operators._registration import (
    Papers,
    checked_model,
    described,
    file_name,
    first_rows,
    held_out,
    log_dataset,
    loss_reference,
    performance,
    record,
    stored_example,
    tags_of,
)
from airflow_mlops.shell import as_mapping, as_names, is_blank, permanent_errors_fail, push_result
from airflow_mlops.storage import join, write_bytes, write_json

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlops.approval import Said
    from airflow_mlops.drift import Profile

# Rows of a training set from which the types of its columns are told.
SCHEMA_ROWS = 100


class MlflowRegisterOperator(MlflowBaseOperator):
    """Put a trained model into the registry, with everything needed to judge it later.

    One training makes one version, whatever happens to the task: the version carries ``run_key``, a try that finds
    it takes it over, and of two tries that create it at once the later one withdraws.

    The version's tags: ``mlops.run_key``, ``mlops.window_start``, ``mlops.window_end``, ``mlops.dataset_uri``,
    ``mlops.dataset_md5``, ``mlops.profile_uri`` (profile of the training set), ``mlops.loss_reference_uri`` (losses on
    the gate's hold-out), ``mlops.performance_uri`` (what estimates its performance without labels, where the hold-out
    has enough rows), ``mlops.input_example_uri``, ``mlops.model_digest`` (of the model's files),
    ``mlops.model_formats``, with a signature ``mlops.signature_uri`` and ``mlops.signed_by``, ``mlops.gate``
    (``passed``, ``overruled`` or ``none``), ``mlops.gate_uri``, ``mlops.gate_approved_by`` and
    ``mlops.gate_approved_at`` where somebody was asked, and those given.

    The model has to be one that can be loaded here without running code it holds, and its signature has to name its
    inputs. Its folder is kept as it was judged, byte by byte: where it has no input example, one made of the training
    set's first rows, in MLflow's format, lies beside it.

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
    :param description: of the version; None for a line that names training, window, rows and verdict (templated)
    :param require_signature: refuse a model without a signature
    :param example_rows: rows of the input example that is made where the model has none; 0 for no example, where rows
        of the training set must not be seen in the registry
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
        "description",
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
        description: str | None = None,
        require_signature: bool = True,
        example_rows: int = 5,
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
        self.description = description
        self.require_signature = require_signature
        self.example_rows = example_rows
        self.experiment = experiment
        self.evidence_uri = evidence_uri
        self.alias = alias
        self._findings: list[dict[str, Any]] = []
        # A gate that was skipped must not look like none.
        self._gate_given = gate is not None

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail(), self.hook.answering():
            papers = self._papers(context)
            known = self.hook.versions_tagged(self.model_name, RUN_KEY, papers.key)
            version, created = (_judged(known[0], papers), False) if known else self._create(papers)
            self._set_alias(version)
            uri = f"models:/{self.model_name}/{version.version}"
            self.log.info("%s %s for run %s", "registered" if created else "found", uri, papers.key)
            result = {
                "name": self.model_name,
                "version": str(version.version),
                "run_id": version.run_id,
                "model_uri": uri,
                "created": created,
            }
            return audited(context, "register", result)

    def _papers(self, context: Context) -> Papers:
        """What the arguments say about the training, checked."""
        training, gate = as_mapping(self.training, "training"), as_mapping(self.gate, "gate")
        model_uri = training.get("model_uri") if is_blank(self.model_uri) else self.model_uri
        if is_blank(self.model_name) or is_blank(model_uri):
            raise InvalidInputError(
                f"model_name is {self.model_name!r} and the model's URI {model_uri!r}; both are needed (a loop "
                "that saves no MLflow model has model_uri null in its result)"
            )
        if self._gate_given and not gate:
            raise InvalidInputError("gate is empty after templating: did the gate run? Leave it out if there is none")
        if gate and gate.get("passed") is not True:
            raise InvalidInputError(f"the gate did not pass: {'; '.join(gate.get('reasons') or ['no verdict'])}")
        key = next((k for k in (self.run_key, training.get("run_key")) if not is_blank(k)), task_key(context))
        given = self.training_set
        is_uri = isinstance(given, str) and not is_blank(given) and not given.lstrip().startswith("{")
        data = {"uri": given} if is_uri else as_mapping(given, "training_set")
        return Papers(
            str(key), str(model_uri), training, data, gate, as_mapping(self.snapshot, "snapshot"), task_key(context)
        )

    def _create(self, papers: Papers) -> tuple[Any, bool]:
        """Record the run, then the version with all its tags at once, so that a version is never half-described."""
        client = self.hook.client
        model_dir = self.hook.model_dir(papers.model_uri)
        model = checked_model(model_dir, papers.model_uri, require_signature=self.require_signature)
        files = self._files(papers, model_dir)
        experiment = self.model_name if is_blank(self.experiment) else str(self.experiment)
        name = file_name(papers.key)[-80:]
        run = self.hook.run_for_key(experiment, papers.key, name=name, tags={"mlops.kind": "training"})
        profile, rows = self._profile(papers)
        window = papers.data.get("window") or {}
        start = window.get("start") if is_blank(self.window_start) else self.window_start
        end = window.get("end") if is_blank(self.window_end) else self.window_end
        tags = {
            **tags_of(papers),
            "mlops.window_start": start,
            "mlops.window_end": end,
            **self._evidence(run, papers, profile),
            "mlops.input_example_uri": stored_example(client, run, model, rows, int(self.example_rows)),
            **as_mapping(self.tags, "tags"),
            **files,
            **self._signature(run, papers, model_dir, files[DIGEST]),
        }
        if profile is not None:
            log_dataset(client, run, f"{self.model_name}-training", papers, profile, rows)
        metrics, parameters = as_mapping(self.metrics, "metrics"), as_mapping(self.parameters, "parameters")
        record(client, run, papers, metrics, parameters)
        client.log_artifacts(run.info.run_id, model_dir, "model")
        _only_these(client, run.info.run_id, model_dir)
        client.set_terminated(run.info.run_id, "FINISHED")
        told = self.description
        if is_blank(told):
            told = described(papers.key, (start, end), profile.rows if profile else None, papers.gate)
        kept = {name: str(value) for name, value in tags.items() if not is_blank(value)}
        return self._create_version(run, kept, str(told))

    def _create_version(self, run: Any, tags: dict[str, str], description: str) -> tuple[Any, bool]:
        from mlflow.exceptions import MlflowException

        client = self.hook.client
        try:
            client.create_registered_model(self.model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{run.info.artifact_uri}/model"
        made = client.create_model_version(self.model_name, source, run.info.run_id, tags=tags, description=description)
        # Numbers are handed out in order: whoever holds the lowest was first, and every later one sees it.
        first = self.hook.versions_tagged(self.model_name, RUN_KEY, tags[RUN_KEY])[0]
        if int(first.version) < int(made.version):
            self.log.warning("another try registered version %s first; withdrawing %s", first.version, made.version)
            client.delete_model_version(self.model_name, made.version)
        return first, first.version == made.version

    def _profile(self, papers: Papers) -> tuple[Profile | None, Any]:
        """The profile of the training set, and its first rows; None for both where there is none."""
        source = papers.data.get("uri")
        if is_blank(source):
            return None, None
        from airflow_mlops.drift import Profile

        columns = as_names(self.features, "features") or papers.data.get("features")
        categorical = as_names(self.categorical, "categorical")
        profile = Profile.of(source, columns=columns, categorical=categorical)
        return profile, first_rows(str(source), max(int(self.example_rows), SCHEMA_ROWS))

    def _evidence(self, run: Any, papers: Papers, profile: Profile | None) -> dict[str, str]:
        """Store the training profile and the loss reference; the tags that point to them."""
        found: dict[str, Any] = {} if profile is None else {"profile": profile.to_json()}
        predictions = papers.gate.get("predictions_uri")
        if not is_blank(predictions):
            frame = held_out(str(predictions))
            found["loss_reference"] = loss_reference(frame)
            found |= performance(frame, self.log)
        if self._findings:
            found["pickle_findings"] = self._findings
        folder = self._evidence_folder(run, papers) if found else ""
        return {f"mlops.{name}_uri": write_json(join(folder, f"{name}.json"), item) for name, item in found.items()}

    def _evidence_folder(self, run: Any, papers: Papers) -> str:
        if is_blank(self.evidence_uri):
            folder = join(run.info.artifact_uri, "evidence")
        else:
            folder = join(str(self.evidence_uri), file_name(papers.key))
        if folder.startswith(SERVER_ONLY):
            raise InvalidInputError(
                f"the artifacts of this MLflow are at {folder}, which only its server can read; give evidence_uri, a "
                "folder that every worker can read"
            )
        return folder

    def _files(self, papers: Papers, model_dir: str) -> dict[str, str]:
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

    def _signature(self, run: Any, papers: Papers, model_dir: str, digest: str) -> dict[str, str]:
        """Sign the model for this training; the tags that say where and by whom."""
        if is_blank(self.signing_conn_id):
            return {}
        from airflow_mlops.hooks.signing import SigningHook

        signed = SigningHook(str(self.signing_conn_id)).sign(model_dir, self.model_name, papers.key)
        if signed.digest != digest:
            raise InvalidInputError(f"{papers.model_uri} changed while it was signed; see who else writes there")
        place = join(self._evidence_folder(run, papers), "model.sig")
        return {SIGNATURE: write_bytes(place, signed.content), SIGNED_BY: signed.signed_by}

    def _set_alias(self, version: Any) -> None:
        if is_blank(self.alias):
            return
        holder = self.hook.version_by_alias(self.model_name, str(self.alias), missing_ok=True)
        if holder is None or int(holder.version) < int(version.version):
            self.hook.client.set_registered_model_alias(self.model_name, self.alias, version.version)


def _judged(version: Any, papers: Papers) -> Any:
    """The version that the training made before, if it holds what this gate has judged."""
    judged, kept = papers.gate.get("challenger_digest"), version.tags.get(DIGEST)
    if kept and not is_blank(judged) and kept != judged:
        raise InvalidInputError(
            f"the run {papers.key} made version {version.version} before, with the digest {kept}, but the gate judged "
            f"{judged}: another model. Give the training that made it a run_key of its own."
        )
    return version


def _only_these(client: Any, run_id: str, model_dir: str) -> None:
    """Refuse a run whose folder ``model`` holds files of another try besides those of ``model_dir``."""
    from airflow_mlops.model_files.digest import files_of

    found, folders = set(), ["model"]
    while folders:
        for entry in client.list_artifacts(run_id, folders.pop()):
            folders.append(entry.path) if entry.is_dir else found.add(entry.path.removeprefix("model/"))
    if further := sorted(found - set(files_of(model_dir))):
        raise InvalidInputError(
            f"the MLflow run {run_id} holds {further[:3]} of another model that an earlier try left there; delete the "
            "folder model of the run's artifacts, or give another run_key"
        )


class MlflowPromoteOperator(ApprovalMixin, MlflowBaseOperator):
    """Give a version the champion's alias, if the champion is still the one the decision was made against.

    MLflow has no compare-and-set. This reads, compares, sets and reads back under a lease of the model (see
    :meth:`airflow_mlops.hooks.mlflow.MlflowHook.lease`), which keeps out every other promotion by this operator;
    somebody who moves the alias by other means within those milliseconds is noticed only by the last read.

    When the task has outlets, such as :func:`airflow_mlops.assets.model_asset`, each asset event carries the result, so
    that other Dags can be scheduled on a promotion.

    With ``approval`` a person has to agree first: they are shown the verdict that is kept with the version, and the
    champion is compared again when they have answered. The tags ``mlops.approved_by`` and ``mlops.approved_at`` of a
    version that was promoted say whose word it was. A version that is the champion already is asked about no more.

    :param model_name: registered model (templated)
    :param version: to promote (templated)
    :param expected_version: champion at the time of the decision; empty for none (templated)
    :param alias: the champion's (templated)
    :param previous_alias: given to the champion that is replaced (templated)
    :param approval: a person's word before the alias moves, see :class:`airflow_mlops.approval.Approval`; None for none
        (templated)
    :param approval_notifiers: told when somebody is asked
    :param on_reject: a rejection will ``"fail"`` the task without retry, or ``"skip"`` it and what follows; the result
        is pushed in both cases
    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's (templated)
    :return: ``name``, ``version``, ``previous`` (None for none), ``alias``, ``changed``; where somebody was asked
        ``approval``: ``approved``, ``by``, ``user_id``, ``at``
    :raises AirflowFailException: the version does not exist, another champion than expected was found, or nobody agreed
    """

    template_fields: Sequence[str] = (
        "model_name",
        "version",
        "expected_version",
        "alias",
        "previous_alias",
        "approval",
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
        on_reject: str = "fail",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.version = version
        self.expected_version = expected_version
        self.alias = alias
        self.previous_alias = previous_alias
        self.on_reject = on_reject

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail(), self.hook.answering():
            if is_blank(self.version):
                raise InvalidInputError("version is empty; give the number that MlflowRegisterOperator returned")
            if self.on_reject not in ("fail", "skip"):
                raise InvalidInputError(f"on_reject is {self.on_reject!r}; expected 'fail' or 'skip'")
            version = str(self.version)
            expected = None if is_blank(self.expected_version) else str(self.expected_version)
            approval = self._approval()
            target = self._target(version)
            if approval is not None:
                if approval.when != "passed":
                    raise InvalidInputError(
                        f"approval: when={approval.when!r} is for the gate; a promotion always asks"
                    )
                if to_move(self.hook, self.model_name, self.alias, version, expected):
                    question = promotion_question(self.hook, target, self.alias, expected)
                    self._ask(context, approval, *question, version=version, expected=expected)
            return self._promote(context, version, expected, said_before(target) if approval else None)

    def execute_complete(
        self, context: Context, event: dict[str, Any], version: str, expected: str | None
    ) -> dict[str, Any]:
        """Take over from the person who was asked about this version, or from their silence."""
        with permanent_errors_fail(), self.hook.answering():
            answer = self._answer(event)
            if answer is not None and answer.approved:
                self._target(version)
                return self._promote(context, version, expected, answer)
            result = self._result(version, expected, changed=False, answer=answer)
            result = audited(context, "refuse", result)
        push_result(self, context, result)
        message = f"version {version} of {self.model_name} stays where it is: "
        if answer is None:
            raise AirflowFailException(f"{message}nobody answered in time")
        message += f"rejected by {answer.by}"
        raise AirflowSkipException(message) if self.on_reject == "skip" else AirflowFailException(message)

    def _target(self, version: str) -> Any:
        """The version to promote; one that was rolled back is none."""
        target = self.hook.version(self.model_name, version)
        refuse_rolled_back(target)
        self._verify(version)
        return target

    def _promote(self, context: Context, version: str, expected: str | None, answer: Said | None) -> dict[str, Any]:
        hook, name = self.hook, self.model_name
        with hook.lease(name):
            if answer is not None and to_move(hook, name, self.alias, version, expected):
                # First, so that no version serves without its approval on record.
                hook.client.set_model_version_tag(name, version, APPROVED_AT, answer.at or "")
                hook.client.set_model_version_tag(name, version, APPROVED_BY, answer.by)
            changed = compare_and_set(hook, name, self.alias, version, expected, previous_alias=self.previous_alias)
        result = self._result(version, expected, changed=changed, answer=answer)
        self.log.info("%s of %s is version %s (before: %s)", self.alias, name, version, expected)
        for asset in self.outlets or ():
            context["outlet_events"][asset].extra = dict(result)
        return audited(context, "promote", result)

    def _result(self, version: str, expected: str | None, *, changed: bool, answer: Said | None) -> dict[str, Any]:
        result = {
            "name": self.model_name,
            "version": version,
            "previous": expected,
            "alias": self.alias,
            "changed": changed,
        }
        return result if answer is None else {**result, "approval": answer.to_json()}


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
        with permanent_errors_fail(), self.hook.answering(), self.hook.lease(self.model_name):
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
            result = {"name": name, "version": good, "rolled_back": bad, "alias": self.alias, "changed": changed}
            return audited(context, "rollback", result)

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
        self._verify(str(previous.version))
        return str(champion.version), str(previous.version)
