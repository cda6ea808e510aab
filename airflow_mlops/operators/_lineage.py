"""What a training read and wrote, and what a check of data found, for OpenLineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from airflow_mlops.provenance.openlineage import dataset

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

    from airflow_mlops.drift import DriftReport, Profile

#: Keys of a training loop's config that name what it reads: a URI, an absolute path, or a list of them.
DATA_KEYS = ("data", "train_uri", "validation")
#: Keys of a training task's result that name what it wrote.
OUTPUT_KEYS = ("model_uri", "checkpoint_uri")
#: Name of the run facet.
FACET = "mlops_training"
#: Name of the run facet of a drift check, and the keys of its result that are told.
CHECK_FACET = "mlops_drift"
CHECKED = ("verdict", "retrain", "model", "window", "engine", "reasons", "columns", "broken_columns", "mlflow_run_id")
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


def lineage_of_check(
    current_uri: Any,
    reference_uri: Any,
    profile: Profile | None,
    report: DriftReport | None,
    result: Mapping[str, Any],
) -> OperatorLineage:
    """Datasets of a drift check, the quality of the current one, and a run facet with the verdict.

    :param profile: of the current data; None where the check did not come so far
    :param report: of the comparison
    :param result: of the task
    """
    from airflow.providers.openlineage.extractors import OperatorLineage
    from openlineage.client.event_v2 import InputDataset, OutputDataset
    from openlineage.client.facet_v2 import (
        RunFacet,
        data_quality_assertions_dataset,
        data_quality_metrics_input_dataset,
    )

    facets: dict[str, Any] = {}
    if profile is not None:
        columns = {
            name: data_quality_metrics_input_dataset.ColumnMetrics(**values)
            for name, values in metrics_of(profile).items()
        }
        facets["dataQualityMetrics"] = data_quality_metrics_input_dataset.DataQualityMetricsInputDatasetFacet(
            columnMetrics=columns, rowCount=profile.rows
        )
    if report is not None:
        facets["dataQualityAssertions"] = data_quality_assertions_dataset.DataQualityAssertionsDatasetFacet(
            assertions=[
                data_quality_assertions_dataset.Assertion(assertion=assertion, success=success, column=column)
                for assertion, success, column in assertions_of(report)
            ]
        )
    inputs = [InputDataset(*place, inputFacets=facets) for place in _datasets(iter([current_uri]))]
    inputs += [InputDataset(*place) for place in _datasets(iter([reference_uri]))]
    written = _datasets(iter([result.get("report_uri"), result.get("html_uri")]))
    told = {name: value for name in CHECKED if (value := result.get(name)) is not None}
    return OperatorLineage(
        inputs=inputs,
        outputs=[OutputDataset(*place) for place in written],
        run_facets={CHECK_FACET: RunFacet().with_additional_properties(**told)} if told else {},
    )


def metrics_of(profile: Profile) -> dict[str, dict[str, Any]]:
    """OpenLineage's metrics by column: nulls, values and, of numbers, sum, extremes and quartiles."""
    import numpy as np

    ranks = np.array([0.25, 0.5, 0.75])
    found = {}
    for name, column in profile.columns.items():
        values: dict[str, Any] = {"nullCount": column.missing, "count": float(column.count)}
        values["distinctCount"] = column.distinct
        if column.kind == "numeric" and column.count:
            low, high = float(column.minimum or 0.0), float(column.maximum or 0.0)
            values |= {"min": low, "max": high, "sum": float(column.total)}
            quartiles = column.histogram.quantiles(ranks, low, high)
            values["quantiles"] = {str(rank): float(value) for rank, value in zip(ranks, quartiles)}
        found[name] = values
    return found


def assertions_of(report: DriftReport) -> list[tuple[str, bool, str | None]]:
    """What was asserted of the dataset and of each column that could be judged, and whether it held.

    ``quality`` says that a column is not broken; ``no_drift`` that one which counts has not drifted.
    """
    found: list[tuple[str, bool, str | None]] = [
        ("quality", not any(column.status == "broken" for column in report.columns), None)
    ]
    if report.verdict != "not_enough_data":
        found.append(("no_drift", report.verdict != "drift", None))
    for column in report.columns:
        found.append(("quality", column.status != "broken", column.name))
        if column.status in ("drift", "stable"):
            found.append(("no_drift", column.status == "stable", column.name))
    return found


def inputs_of(config: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The datasets that a config names, as (namespace, name)."""
    return _datasets(_uris(config or {}))


def outputs_of(outcome: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The datasets that a training wrote, as (namespace, name)."""
    return _datasets((outcome or {}).get(key) for key in OUTPUT_KEYS)


def _uris(config: Mapping[str, Any]) -> Iterator[Any]:
    for key in DATA_KEYS:
        value = config.get(key)
        yield from value if isinstance(value, list | tuple) else [value]
    if isinstance(inner := config.get("config"), Mapping):
        yield from _uris(inner)


def _datasets(uris: Iterator[Any]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(found for uri in uris if (found := dataset(uri)) is not None))
