"""Makes a record of what the tasks of a run returned and what the training left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from airflow_mlops import storage
from airflow_mlops.environment import REVISION
from airflow_mlops.provenance.code import code_state, entry_source
from airflow_mlops.provenance.record import ModelRecord, cost_of, of_training, plain, seeds_of

#: Of a training's spec: how the loop was started, beside its config.
_TRAINING = (
    "train_fn",
    "entrypoint",
    "trainer",
    "exporter",
    "num_workers",
    "resources_per_worker",
    "use_gpu",
    "max_failures",
    "preemptible",
)
#: What the registration has put down of the files, and the tags it is in.
_INTEGRITY = {"digest": "mlops.model_digest", "signature_uri": "mlops.signature_uri", "signed_by": "mlops.signed_by"}
_SNAPSHOT = ("path", "md5", "nfiles", "size", "remote", "uri")
_SET = ("uri", "manifest_uri", "sha256", "rows", "features", "label", "window", "late_rows", "unlabelled_rows")
_GATE = (
    "passed",
    "first_model",
    "reasons",
    "checks",
    "rows",
    "clusters",
    "metrics",
    "differences",
    "slices",
    "latency",
    "policy",
    "challenger_uri",
    "champion_uri",
    "champion_version",
    "report_uri",
    "verdict_uri",
    "approval",
)
_CANARY = (
    "verdict",
    "version",
    "previous",
    "compared",
    "requests",
    "looks",
    "steps",
    "guardrails",
    "reasons",
    "seconds",
    "html_uri",
    "report_uri",
)


def assemble(
    model: str,
    version: str,
    *,
    tags: Mapping[str, str],
    who: Mapping[str, Any] | None = None,
    when: Mapping[str, Any] | None = None,
    code: Mapping[str, Any] | None = None,
    snapshot: Mapping[str, Any] | None = None,
    training_set: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    gate: Mapping[str, Any] | None = None,
    canary: Mapping[str, Any] | None = None,
    promotion: Mapping[str, Any] | None = None,
    approvals: Sequence[Mapping[str, Any]] | None = None,
    artifacts: Sequence[Mapping[str, Any]] | None = None,
    documentation: Mapping[str, Any] | None = None,
    feature_service: str | None = None,
    entity_uri: str | None = None,
    audit: Sequence[Mapping[str, Any]] = (),
) -> ModelRecord:
    """The record of a model version; what no argument tells is looked for in its tags and in the run's directory.

    The environment and the cluster are those that the training's driver has put down: whoever assembles the record runs
    in another.

    :param tags: of the model version, as ``MlflowRegisterOperator`` sets them
    :param snapshot: result of ``DvcSnapshotOperator``
    :param training_set: result of ``FeastTrainingSetOperator``
    :param training: result of ``RayTrainOperator``
    :param gate: result of ``ModelGateOperator``
    :param canary: result of ``CanaryPromoteOperator``
    :param promotion: result of ``MlflowPromoteOperator``
    :param approvals: answers of people besides those in the results; None where it is not known whether anybody was
        asked
    """
    left = of_training((training or {}).get("run_dir") or tags.get("mlops.run_dir"))
    result, spec = {**left["result"], **(training or {})}, left["spec"]
    surroundings = dict(left["environment"])
    cluster = dict(surroundings.pop("cluster", None) or {})
    config = spec.get("config")
    # A search holds the loop's own config beside what is searched.
    parameters = None if config is None else {**config, **(result.get("params") or {})}
    return ModelRecord(
        model=model,
        version=str(version),
        run_key=tags.get("mlops.run_key") or result.get("run_key"),
        who=plain(who or {}),
        when=plain(when or {}),
        code=_code(code or {}, surroundings, spec),
        data=_data(tags, snapshot or {}, training_set or {}, feature_service, entity_uri),
        training={
            **{name: spec.get(name) for name in _TRAINING},
            "run_dir": result.get("run_dir") or tags.get("mlops.run_dir"),
            "fingerprint": result.get("fingerprint"),
            "model_uri": result.get("model_uri"),
        }
        if spec or result
        else {},
        parameters=plain(parameters),
        seeds=None if parameters is None else seeds_of(parameters),
        environment=surroundings,
        cluster={**cluster, "num_workers": spec.get("num_workers")} if cluster or spec else {},
        cost=cost_of(result) if result else {},
        metrics=plain(result.get("metrics")),
        artifacts=plain(artifacts) if artifacts is not None else None,
        gate=_part(gate, _GATE),
        approvals=_approvals(approvals, gate, canary, promotion),
        canary=_part(canary, _CANARY),
        promotion=plain(promotion) if promotion else None,
        integrity={name: tags.get(tag) for name, tag in _INTEGRITY.items()},
        documentation=plain(documentation or {}),
        audit=tuple(plain(entry) for entry in audit),
    )


def _code(code: Mapping[str, Any], surroundings: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the code, else what the image that trained was built from."""
    found = plain(code)
    if not found.get("revision") and (told := surroundings.get("revision")):
        found |= code_state(None, {REVISION: told})
    return {**found, **entry_source(spec.get("train_fn") or spec.get("entrypoint"))}


def _part(value: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any] | None:
    return plain({name: value[name] for name in names if name in value}) if value else None


def _approvals(
    given: Sequence[Mapping[str, Any]] | None,
    gate: Mapping[str, Any] | None,
    canary: Mapping[str, Any] | None,
    promotion: Mapping[str, Any] | None,
) -> list[Any] | None:
    """What people said, in the gate, in the rollout and before the promotion."""
    steps = sorted(((canary or {}).get("approvals") or {}).items())
    answers = [
        ("gate", (gate or {}).get("approval")),
        *((f"rollout, step {step}", answer) for step, answer in steps),
        ("promotion", (promotion or {}).get("approval")),
    ]
    said = [{"about": about, **answer} for about, answer in answers if answer]
    # After a gate that asked nobody, the rollout may yet ask.
    if given is None and not said and not canary and not promotion:
        return None
    return plain([*(given or ()), *said])


def _data(
    tags: Mapping[str, str],
    snapshot: Mapping[str, Any],
    training_set: Mapping[str, Any],
    feature_service: str | None,
    entity_uri: str | None,
) -> dict[str, Any]:
    taken = {name: snapshot.get(name) for name in _SNAPSHOT}
    taken["md5"] = taken["md5"] or tags.get("mlops.dataset_md5")
    manifest = _json(training_set.get("manifest_uri"))
    found = {name: training_set.get(name, manifest.get(name)) for name in _SET}
    found["uri"] = found["uri"] or tags.get("mlops.dataset_uri")
    found["sha256"] = found["sha256"] or tags.get("mlops.dataset_sha256")
    profile = tags.get("mlops.profile_uri")
    return plain(
        {
            "snapshot": taken,
            "training_set": found,
            "views": manifest.get("views"),
            "feature_service": feature_service,
            "entity_uri": entity_uri,
            "missing_share": manifest.get("missing_share"),
            "profile": {"uri": profile, "digest": _json(profile).get("digest")},
        }
    )


def _json(uri: str | None) -> dict[str, Any]:
    """The JSON object at ``uri``; empty where there is none."""
    if not uri:
        return {}
    try:
        return dict(storage.read_json(uri))
    except FileNotFoundError:
        return {}
