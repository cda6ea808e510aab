"""From a model version to where it comes from, and from a dataset to the versions that learned from it."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, RegistryError
from airflow_mlops.provenance.assemble import assemble
from airflow_mlops.provenance.record import ModelRecord, read

#: Tag of a version that says where its record lies.
RECORD_TAG = "mlops.record_uri"
#: Tags by which versions are found by their data.
DATA_TAGS = {"md5": "mlops.dataset_md5", "sha256": "mlops.dataset_sha256", "uri": "mlops.dataset_uri"}


def trace(model: str, version: str | int, client: Any | None = None) -> ModelRecord:
    """Where a version comes from: its record, or, where none was written, what its tags and its run still tell.

    :param model: registered model
    :param version: its number, or an alias such as ``champion``
    :param client: a ``mlflow.MlflowClient``; None: one of the environment's ``MLFLOW_TRACKING_URI``
    :raises RegistryError: there is no such version
    :raises ExternalSystemError: the registry does not answer
    """
    client = client or _client()
    found = _version(client, model, str(version))
    tags = dict(found.tags)
    if uri := tags.get(RECORD_TAG):
        return read(uri)
    return assemble(
        model,
        str(found.version),
        tags=tags,
        when={"registered": dt.datetime.fromtimestamp(found.creation_timestamp / 1000, dt.timezone.utc).isoformat()},
        gate=_gate(client, found.run_id),
    )


def versions_using(
    *, md5: str | None = None, sha256: str | None = None, uri: str | None = None, client: Any | None = None
) -> list[dict[str, str]]:
    """The versions, of all models, that were trained on a dataset.

    :param md5: DVC's hash of the raw data
    :param sha256: of the training set
    :param uri: of the training set
    :return: ``model``, ``version``, ``by`` (which of the three fits, the first if several do), in order
    :raises InvalidInputError: nothing to look for is given
    """
    wanted = {name: value for name, value in (("md5", md5), ("sha256", sha256), ("uri", uri)) if value}
    if not wanted:
        raise InvalidInputError("give md5, sha256 or uri of the dataset whose versions are looked for")
    client = client or _client()
    found: dict[tuple[str, str], str] = {}
    for name, value in wanted.items():
        if "'" in value:
            raise InvalidInputError(f"{value!r} holds a quote, which MLflow's search cannot express")
        for one in _search(client, f"tags.`{DATA_TAGS[name]}` = '{value}'"):
            found.setdefault((one.name, str(one.version)), name)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], int(item[0][1])))
    return [{"model": model, "version": version, "by": by} for (model, version), by in ordered]


def _client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient()


def _version(client: Any, model: str, version: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        if version.isdigit():
            return client.get_model_version(model, version)
        return client.get_model_version_by_alias(model, version.removeprefix("@"))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise RegistryError(f"{model} has no version or alias {version!r}; look at its page in MLflow") from error
        raise ExternalSystemError(f"MLflow answered with an error: {str(error).splitlines()[0][:500]}") from error


def _search(client: Any, where: str) -> list[Any]:
    from mlflow.exceptions import MlflowException

    found, token = [], None
    try:
        while True:
            page = client.search_model_versions(where, max_results=1000, page_token=token)
            found += page
            if not (token := page.token):
                return found
    except MlflowException as error:
        raise ExternalSystemError(f"MLflow answered with an error: {str(error).splitlines()[0][:500]}") from error


def _gate(client: Any, run_id: str | None) -> dict[str, Any] | None:
    """The verdict that the registration put into the run; None where there is none."""
    if not run_id or not any(file.path == "gate/verdict.json" for file in client.list_artifacts(run_id, "gate")):
        return None
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="gate-") as folder:
        return json.loads(Path(client.download_artifacts(run_id, "gate/verdict.json", folder)).read_text())
