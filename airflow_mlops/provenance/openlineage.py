"""A record as an OpenLineage event: the training as a run, its data as inputs, the version as output.

Events are plain JSON by the specification 2-0-2 (openlineage.io/spec), so no client is needed to make them; any client
or an HTTP POST to ``/api/v1/lineage`` sends them. The operators' own lineage goes through Airflow's OpenLineage
provider.
"""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import urlsplit

from airflow_mlops.provenance.record import ModelRecord

PRODUCER = "https://pypi.org/project/airflow-mlops"
SCHEMA_URL = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
_FACETS = "https://openlineage.io/spec/facets"
_NAMESPACE = uuid.UUID("0f0d2d0a-38a5-5a44-b7ae-3a4a6f6a9a11")


def event_of(record: ModelRecord, *, namespace: str = "airflow") -> dict[str, Any]:
    """The completed training as a ``RunEvent``; the same record gives the same event.

    :param namespace: of the job, for example that of Airflow's OpenLineage provider
    """
    run_id = uuid.uuid5(_NAMESPACE, f"{record.model}/{record.version}/{record.run_key}")
    time = record.get("when.registered") or "1970-01-01T00:00:00+00:00"
    raw, rows = record.get("data.snapshot") or {}, record.get("data.training_set") or {}
    inputs = [_input(raw.get("uri"), version=raw.get("md5"))]
    inputs.append(
        _input(rows.get("uri"), version=rows.get("sha256"), rows=rows.get("rows"), columns=rows.get("features"))
    )
    return {
        "eventType": "COMPLETE",
        "eventTime": time,
        "producer": PRODUCER,
        "schemaURL": SCHEMA_URL,
        "run": {"runId": str(run_id), "facets": {"mlops_model": _facet("mlops_model", **_model(record))}},
        "job": {
            "namespace": namespace,
            "name": f"{record.get('who.dag_id') or record.model}.train",
            "facets": _source(record),
        },
        "inputs": [given for given in inputs if given],
        "outputs": [
            {
                "namespace": "mlflow",
                "name": f"models:/{record.model}",
                "facets": {"version": _standard("DatasetVersionDataset", "1-0-1", datasetVersion=record.version)},
            }
        ],
    }


def dataset(uri: Any) -> tuple[str, str] | None:
    """A URI in OpenLineage's naming: ``("s3://bucket", "key")``, ``("file", "/path")``; None if it is not one.

    What could be a secret, a password or a query, is left out.
    """
    if not isinstance(uri, str):
        return None
    if uri.startswith("/"):
        return "file", uri.rstrip("/") or "/"
    try:
        url = urlsplit(uri)
    except ValueError:
        return None
    if "://" not in uri or not url.scheme:
        return None
    if url.scheme in ("file", "local"):
        return "file", url.path.rstrip("/") or "/"
    user, _, place = url.netloc.rpartition("@")
    # A user alone is part of the name: Azure's container@account.
    place = f"{user}@{place}" if user and ":" not in user else place
    return f"{url.scheme}://{place}", url.path.strip("/") or "/"


def _input(
    uri: Any, *, version: str | None = None, rows: int | None = None, columns: list[str] | None = None
) -> dict[str, Any] | None:
    place = dataset(uri)
    if place is None:
        return None
    facets: dict[str, Any] = {}
    if version:
        facets["version"] = _standard("DatasetVersionDataset", "1-0-1", datasetVersion=version)
    if columns:
        facets["schema"] = _standard("SchemaDataset", "1-1-1", fields=[{"name": name} for name in columns])
    found: dict[str, Any] = {"namespace": place[0], "name": place[1], "facets": facets}
    if rows is not None:
        quality = _standard("DataQualityMetricsInputDataset", "1-0-2", rowCount=rows, columnMetrics={})
        found["inputFacets"] = {"dataQualityMetrics": quality}
    return found


def _source(record: ModelRecord) -> dict[str, Any]:
    repository, revision = record.get("code.repository"), record.get("code.revision")
    if not repository or not revision:
        return {}
    place = {"type": "git", "url": repository, "repoUrl": repository, "version": revision}
    return {"sourceCodeLocation": _standard("SourceCodeLocationJob", "1-0-1", **place)}


def _model(record: ModelRecord) -> dict[str, Any]:
    """What the run facet of this project tells; everything else is in the record."""
    told = {
        "model": record.model,
        "version": record.version,
        "run_key": record.run_key,
        "user": record.get("who.user"),
        "dag_run_id": record.get("who.run_id"),
        "git_revision": record.get("code.revision"),
        "git_dirty": record.get("code.dirty"),
        "lock_sha256": record.get("environment.lock.sha256"),
        "image_digest": record.get("environment.image_digest"),
        "seeds": record.seeds,
        "metrics": record.metrics,
        "cpu_hours": record.get("cost.cpu_hours"),
        "gpu_hours": record.get("cost.gpu_hours"),
        "gate_passed": record.get("gate.passed"),
        "canary_verdict": record.get("canary.verdict"),
        "unknown": record.unknown,
    }
    return {name: value for name, value in told.items() if value is not None}


def _facet(name: str, /, **values: Any) -> dict[str, Any]:
    return {"_producer": PRODUCER, "_schemaURL": f"{PRODUCER}#{name}", **values}


def _standard(name: str, version: str, /, **values: Any) -> dict[str, Any]:
    """A facet of the specification, under its own schema."""
    url = f"{_FACETS}/{version}/{name}Facet.json#/$defs/{name}Facet"
    return {"_producer": PRODUCER, "_schemaURL": url, **values}
