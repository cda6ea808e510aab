"""Training sets: entity rows with the features of a Feast registry, as they stood at each row's time.

The definitions (sources, join keys, TTLs, aliases, on-demand views) come from Feast and the on-demand code runs in
Feast; only the join is :mod:`airflow_mlops.features.asof`. It differs from Feast's file store on purpose in that
every entity row is kept: one whose features are all too old, or that shares key and time with another, is not lost.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError, InvalidInputError
from airflow_mlops.features.asof import Match, instants, join_codes, match_asof
from airflow_mlops.features.parquet import between, open_dataset
from airflow_mlops.windows import Window

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore, FeatureView, OnDemandFeatureView

TIMESTAMP = "event_timestamp"
ROW_GROUP = 128 * 1024


@dataclass(frozen=True)
class ViewJoin:
    """How one feature view joined.

    :param view: name, or the alias it is requested by
    :param source: path or URI of its Parquet files
    :param source_rows: feature rows read, after the filter on time
    :param matched: entity rows that found a feature row
    :param leaks: matches newer than their entity row; always 0 in a set that was written
    :param late_rows: matches created after their entity row's time
    :param ttl_seconds: age at which a feature value no longer counts; None for no limit
    """

    view: str
    source: str
    source_rows: int
    matched: int
    leaks: int
    late_rows: int
    ttl_seconds: float | None


@dataclass(frozen=True)
class TrainingSet:
    """What was written, and the evidence on it.

    :param features: names of the feature columns, in the order of the request
    :param sha256: of the Parquet file; the same window of the same data gives the same
    :param late_rows: rows with a value created after the row's time, over all views the largest count
    :param missing_rows: rows none of whose joined features has a value
    :param unlabelled_rows: rows of the window left out because they have no label
    :param missing_share: share of rows without a value, for each feature
    """

    uri: str
    manifest_uri: str
    rows: int
    features: tuple[str, ...]
    label: str | None
    window: Window
    sha256: str
    leaks: int
    late_rows: int
    missing_rows: int
    unlabelled_rows: int
    missing_share: dict[str, float] = field(default_factory=dict)
    views: tuple[ViewJoin, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain Python values, without the evidence by view and feature that the manifest holds."""
        return {
            "uri": self.uri,
            "manifest_uri": self.manifest_uri,
            "rows": self.rows,
            "features": list(self.features),
            "label": self.label,
            "window": self.window.to_json(),
            "sha256": self.sha256,
            "leaks": self.leaks,
            "late_rows": self.late_rows,
            "missing_rows": self.missing_rows,
            "unlabelled_rows": self.unlabelled_rows,
        }

    def manifest(self) -> dict[str, Any]:
        """Everything, for the file beside the data."""
        views = [asdict(view) for view in self.views]
        return {**self.to_json(), "missing_share": self.missing_share, "views": views}


def read_entities(
    uri: str, window: Window | None = None, label: str | None = None, columns: Sequence[str] = ()
) -> pa.Table:
    """The entity rows of ``window``, in order of their time.

    :param uri: Parquet file or folder with join keys, ``event_timestamp`` (UTC), label and extra columns
    :param label: a column that must be there
    :param columns: further columns that must be there, for example join keys
    :raises DataError: nothing there, a column missing, timestamps without a zone, or no row in the window
    """
    dataset = open_dataset(uri, "entity rows")
    wanted = [TIMESTAMP, *([label] if label else []), *columns]
    if missing := [name for name in wanted if name not in dataset.schema.names]:
        raise DataError(
            f"the entity rows at {uri} lack the columns {missing}; the feature views need them as join keys or "
            f"request data, or as time and label. There are: {dataset.schema.names}"
        )
    kind = dataset.schema.field(TIMESTAMP).type
    instants(pa.chunked_array([], type=kind), TIMESTAMP, naive_is_utc=False)
    condition = between(TIMESTAMP, kind, window.start, window.end, closed=False) if window else None
    table = dataset.to_table(filter=condition)
    if not table.num_rows:
        raise DataError(f"no entity row at {uri} lies in the window {window}; land that period first, or correct it")
    if table[TIMESTAMP].null_count:
        raise DataError(f"{table[TIMESTAMP].null_count} entity rows at {uri} have no {TIMESTAMP}; every row needs one")
    times = instants(table[TIMESTAMP], TIMESTAMP, naive_is_utc=False)
    return table.take(pa.array(np.argsort(times, kind="stable"))).replace_schema_metadata(None)


@dataclass(frozen=True)
class Request:
    """The features to join, resolved against a registry.

    :param columns: requested features by the name their column gets, in the order of the request
    :param views: feature views and, for each, the features to fetch (also those only on-demand views read)
    :param on_demand: on-demand views that compute requested features
    """

    columns: tuple[str, ...]
    refs: tuple[str, ...]
    views: tuple[tuple[FeatureView, tuple[str, ...]], ...]
    on_demand: tuple[OnDemandFeatureView, ...]

    @property
    def entity_columns(self) -> list[str]:
        """Columns the entity rows must have: join keys under the names of the request, and request data."""
        keys = [key for view, _ in self.views for key in _join_keys(view)]
        data = [name for view in self.on_demand for name in view.get_request_data_schema()]
        return list(dict.fromkeys([*keys, *data]))


def resolve_request(
    store: FeatureStore, features: FeatureService | Sequence[str], *, full_feature_names: bool = False
) -> Request:
    """What to join for a feature service or a list of ``view:feature`` references.

    :raises InvalidInputError: two requested features would have the same column name
    """
    from feast import utils
    from feast.on_demand_feature_view import OnDemandFeatureView

    registry: Any = _OfflineRegistry(store.registry)
    wanted_by: Any = features if not isinstance(features, Sequence) else list(features)
    refs = list(utils._get_features(registry, store.project, wanted_by))
    views, on_demand = utils._get_feature_views_to_use(registry, store.project, wanted_by)
    names: dict[str, Any] = {view.projection.name_to_use(): view for view in [*views, *on_demand]}
    fetch: dict[str, list[str]] = {}
    for ref in refs:
        name, feature = ref.split(":")
        if not isinstance(names[name], OnDemandFeatureView):
            fetch.setdefault(name, []).append(feature)
    for view in on_demand:
        for source in view.source_feature_view_projections.values():
            fetch.setdefault(source.name_to_use(), []).extend(one.name for one in source.features)
    columns = [ref.replace(":", "__") if full_feature_names else ref.split(":")[1] for ref in refs]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise InvalidInputError(f"several feature views have features named {twice}; set full_feature_names=True")
    return Request(
        columns=tuple(columns),
        refs=tuple(refs),
        views=tuple((names[name], tuple(dict.fromkeys(wanted))) for name, wanted in fetch.items()),
        on_demand=tuple(on_demand),
    )


class _OfflineRegistry:
    """A registry that hides the state of the online store.

    Feast refuses a view that is being materialized, or whose materialization was killed; a join over its source files
    does not care.
    """

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    def get_any_feature_view(self, *args: Any, **kwargs: Any) -> Any:
        view = self._registry.get_any_feature_view(*args, **kwargs)
        if hasattr(view, "state"):
            view.state = type(view.state).STATE_UNSPECIFIED
        return view


def _join_keys(view: FeatureView) -> list[str]:
    return [view.projection.join_key_map.get(column.name, column.name) for column in view.entity_columns]


def join_features(
    store: FeatureStore,
    request: Request,
    entities: pa.Table,
    *,
    full_feature_names: bool = False,
    known_only: bool = False,
) -> tuple[pa.Table, list[ViewJoin]]:
    """``entities`` with the requested features, one row for each entity row, in the same order.

    :param known_only: a value created after an entity row's time is not used for it (Feast's
        ``filter_by_created_timestamp``)
    :raises DataError: a source is missing, has no such column, or types cannot be compared
    """
    if clash := sorted(set(request.columns) & set(entities.column_names)):
        raise DataError(
            f"the entity rows already have columns named like requested features: {clash}; rename them there, or set "
            "full_feature_names=True"
        )
    times = instants(entities[TIMESTAMP], TIMESTAMP, naive_is_utc=False)
    joined, reports = entities, []
    for view, wanted in request.views:
        values, report = _join_view(store, view, wanted, entities, times, known_only=known_only)
        reports.append(report)
        prefix = f"{view.projection.name_to_use()}__" if full_feature_names else ""
        for name in wanted:
            joined = joined.append_column(prefix + name, values[name])
    if request.on_demand:
        joined = _on_demand(joined, request, full_feature_names)
    return joined.select([*entities.column_names, *request.columns]), reports


def _join_view(
    store: FeatureStore,
    view: FeatureView,
    wanted: tuple[str, ...],
    entities: pa.Table,
    times: np.ndarray,
    *,
    known_only: bool,
) -> tuple[pa.Table, ViewJoin]:
    name, keys, batch = view.projection.name_to_use(), _join_keys(view), cast(Any, view.batch_source)
    ttl = view.ttl or None
    source, uri = _read_source(store, view, keys, wanted, _instant(times.min()) - (ttl or dt.timedelta()), times, ttl)
    stamps = instants(source["__time"], batch.timestamp_field, naive_is_utc=True)
    created = None
    if "__created" in source.column_names:
        created = instants(source["__created"], batch.created_timestamp_column, naive_is_utc=True)
    left, right = join_codes(
        [entities[key] for key in keys],
        [source[f"__key{i}"] for i in range(len(keys))],
        keys,
        (entities.num_rows, source.num_rows),
    )
    match: Match = match_asof(left, times, right, stamps, ttl=ttl, created=created, known_only=known_only)
    rows = pa.array(match.position, mask=match.position < 0)
    report = ViewJoin(
        view=name,
        source=uri,
        source_rows=source.num_rows,
        matched=int((match.position >= 0).sum()),
        leaks=match.leaks,
        late_rows=match.late,
        ttl_seconds=ttl.total_seconds() if ttl else None,
    )
    return source.select(list(wanted)).take(rows), report


def _instant(nanoseconds: np.int64) -> dt.datetime:
    return dt.datetime.fromtimestamp(int(nanoseconds) // 10**9, dt.timezone.utc)


def _read_source(
    store: FeatureStore,
    view: FeatureView,
    keys: list[str],
    wanted: tuple[str, ...],
    start: dt.datetime,
    times: np.ndarray,
    ttl: dt.timedelta | None,
) -> tuple[pa.Table, str]:
    """The feature rows that an entity row can match: features by name, ``__time``, ``__created``, ``__key0``..."""
    from feast import FileSource

    source, name = view.batch_source, view.projection.name_to_use()
    if not isinstance(source, FileSource):
        raise InvalidInputError(
            f"feature view {name!r} reads from {type(source).__name__}; this join reads Parquet files (FileSource). "
            "Use the warehouse's own engine through store.get_historical_features for it."
        )
    uri = source.get_uri_for_file_path(store.config.repo_path, source.path)
    options = {"endpoint_url": source.s3_endpoint_override} if source.s3_endpoint_override else None
    dataset = open_dataset(str(uri), f"source of feature view {name!r}", options)
    column = {new: old for old, new in (source.field_mapping or {}).items()}
    read = {feature: column.get(feature, feature) for feature in wanted}
    read["__time"] = source.timestamp_field
    if source.created_timestamp_column:
        read["__created"] = source.created_timestamp_column
    for i, entity in enumerate(view.entity_columns):
        read[f"__key{i}"] = column.get(entity.name, entity.name)
    if missing := sorted(set(read.values()) - set(dataset.schema.names)):
        raise DataError(
            f"the source of feature view {name!r} at {uri} lacks the columns {missing}; there are "
            f"{dataset.schema.names}. Write them, or correct the view and apply the repository."
        )
    stop = _instant(times.max()) + dt.timedelta(seconds=1)
    kind = dataset.schema.field(source.timestamp_field).type
    condition = between(source.timestamp_field, kind, start if ttl else None, stop, closed=True)
    fields = {new: pc.field(old) for new, old in read.items()}
    return dataset.to_table(columns=fields, filter=condition), str(uri)


def _on_demand(joined: pa.Table, request: Request, full_feature_names: bool) -> pa.Table:
    for view in request.on_demand:
        computed = view.transform_arrow(joined, full_feature_names)
        for name in computed.column_names:
            if name in request.columns and name not in joined.column_names:
                joined = joined.append_column(name, computed[name])
    return joined


def build_training_set(
    store: FeatureStore,
    features: FeatureService | Sequence[str],
    *,
    entity_uri: str,
    output_uri: str,
    window: Window,
    label: str | None = None,
    full_feature_names: bool = False,
    known_only: bool = False,
) -> TrainingSet:
    """Join, check for leaks, write the Parquet file at once and its manifest beside it.

    :param output_uri: of the Parquet file; ``<output_uri>.manifest.json`` is written too
    :raises DataError: see :func:`read_entities` and :func:`join_features`; a leak; no row with a label
    """
    request = resolve_request(store, features, full_feature_names=full_feature_names)
    entities = read_entities(entity_uri, window, label, request.entity_columns)
    seen = entities.num_rows
    if label:
        entities = entities.filter(pc.is_valid(entities[label]))
        if not entities.num_rows:
            raise DataError(
                f"none of the {seen} entity rows of {window} has a value in {label!r}; land the labels first"
            )
    table, views = join_features(store, request, entities, full_feature_names=full_feature_names, known_only=known_only)
    refuse_leaks(views)
    content = parquet_bytes(table)
    joined = [name for name, ref in zip(request.columns, request.refs) if ref.split(":")[0] in {v.view for v in views}]
    result = TrainingSet(
        uri=output_uri,
        manifest_uri=f"{output_uri}.manifest.json",
        rows=table.num_rows,
        features=request.columns,
        label=label,
        window=window,
        sha256=hashlib.sha256(content).hexdigest(),
        leaks=sum(view.leaks for view in views),
        late_rows=max((view.late_rows for view in views), default=0),
        missing_rows=_all_missing(table, joined),
        unlabelled_rows=seen - table.num_rows,
        missing_share={name: int(_missing(table[name]).sum()) / table.num_rows for name in request.columns},
        views=tuple(views),
    )
    storage.write_bytes(output_uri, content)
    storage.write_json(result.manifest_uri, result.manifest())
    return result


def refuse_leaks(views: Sequence[ViewJoin]) -> None:
    """:raises DataError: a feature value is newer than the entity row it was joined to."""
    if leaking := {view.view: view.leaks for view in views if view.leaks}:
        raise DataError(
            f"feature values newer than their entity rows: {leaking}. A model trained on this set would know the "
            "future, so it was not written. This is a defect of the join; please report it with the manifest's data."
        )


def _missing(column: pa.ChunkedArray) -> np.ndarray:
    return pc.is_null(column, nan_is_null=pa.types.is_floating(column.type)).to_numpy()


def _all_missing(table: pa.Table, columns: list[str]) -> int:
    if not columns:
        return 0
    return int(np.logical_and.reduce([_missing(table[name]) for name in columns]).sum())


def parquet_bytes(table: pa.Table) -> bytes:
    """``table`` as a Parquet file; equal tables give equal bytes with one version of Arrow."""
    sink = pa.BufferOutputStream()
    # Chunk borders depend on the source files and would show in the row groups' pages.
    pq.write_table(table.combine_chunks(), sink, row_group_size=ROW_GROUP, compression="zstd")
    return sink.getvalue().to_pybytes()
