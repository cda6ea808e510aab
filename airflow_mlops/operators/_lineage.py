"""What a training read and wrote, for OpenLineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

#: Keys of a training loop's config that name what it reads: a URI, an absolute path, or a list of them.
DATA_KEYS = ("data", "train_uri", "validation")
#: Keys of a training task's result that name what it wrote.
OUTPUT_KEYS = ("model_uri", "checkpoint_uri")
#: Name of the run facet.
FACET = "mlops_training"
_TOLD = ("run_key", "run_dir", "attempts", "metrics", "params", "wall_seconds", "cpu_seconds", "gpu_seconds", "cost")


def lineage_of(config: Mapping[str, Any] | None, outcome: Mapping[str, Any] | None) -> OperatorLineage:
    """Datasets and run facet of a training; called by the OpenLineage provider alone, which need not be installed.

    :param config: of the training loop, rendered; of a search the loop's own config lies under ``config``
    :param outcome: what the task returned, None if it did not come so far
    """
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import InputDataset, OutputDataset
    from openlineage.client.facet_v2 import RunFacet

    told = {name: value for name in _TOLD if (value := (outcome or {}).get(name)) is not None}
    return OperatorLineage(
        inputs=[InputDataset(*dataset) for dataset in inputs_of(config)],
        outputs=[OutputDataset(*dataset) for dataset in outputs_of(outcome)],
        run_facets={FACET: RunFacet().with_additional_properties(**told)} if told else {},
    )


def inputs_of(config: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The datasets that a config names, as (namespace, name)."""
    return _datasets(_uris(config or {}))


def outputs_of(outcome: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The datasets that a training wrote, as (namespace, name)."""
    return _datasets((outcome or {}).get(key) for key in OUTPUT_KEYS)


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


def _uris(config: Mapping[str, Any]) -> Iterator[Any]:
    for key in DATA_KEYS:
        value = config.get(key)
        yield from value if isinstance(value, list | tuple) else [value]
    if isinstance(inner := config.get("config"), Mapping):
        yield from _uris(inner)


def _datasets(uris: Iterator[Any]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(found for uri in uris if (found := dataset(uri)) is not None))
