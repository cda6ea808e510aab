"""Feast: register definitions, bring the online store up to date, build training sets."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from airflow.sdk import BaseOperator, Context

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, MlopsError
from airflow_mlops.hooks.feast import FeastHook, registry_error
from airflow_mlops.shell import as_mapping, as_names, is_blank, log_table, permanent_errors_fail, require
from airflow_mlops.windows import resolve_window


class _FeastOperator(BaseOperator):
    """What the Feast operators share: which repository.

    :param repo_path: folder with ``feature_store.yaml``, on the worker; wins over the connection (templated)
    :param feast_conn_id: connection of type ``feast``; need not exist where ``repo_path`` is given (templated)
    :param feature_store: laid over the content of ``feature_store.yaml``, key by key at every depth (templated)
    """

    template_fields: Sequence[str] = ("repo_path", "feast_conn_id", "feature_store")

    def __init__(
        self,
        *,
        repo_path: str | None = None,
        feast_conn_id: str = FeastHook.default_conn_name,
        feature_store: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"multiple_outputs": True, **kwargs})
        self.repo_path = repo_path
        self.feast_conn_id = feast_conn_id
        self.feature_store = feature_store

    @cached_property
    def hook(self) -> FeastHook:
        repo_path = None if is_blank(self.repo_path) else self.repo_path
        return FeastHook(self.feast_conn_id, repo_path, as_mapping(self.feature_store, "feature_store"))


class FeastApplyOperator(_FeastOperator):
    """Registers what a feature repository defines, as ``feast apply`` does; running it again changes nothing.

    A SQL registry is recommended: with a registry file, tasks that apply and materialize at once lose each other's
    changes. Takes the parameters ``repo_path``, ``feast_conn_id`` and ``feature_store``.

    Returns ``{"project", "registered": {kind: [names]}, "changes": [{"action", "kind", "name"}]}``.
    """

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail():
            from airflow_mlops.features.repository import apply_repository

            try:
                result = apply_repository(self.hook.store, self.hook.repo_path)
            except MlopsError:
                raise
            except Exception as error:
                raise registry_error(error, f"applying {self.hook.repo_path}") from error
            rows = [[one["action"], one["kind"], one["name"]] for one in result["changes"]]
            self.log.info("changes\n%s", log_table(["action", "kind", "name"], rows) if rows else "none")
            return result


class FeastMaterializeOperator(_FeastOperator):
    """Writes a window of features to the online store, one feature view after the other.

    The window is ``window_start`` to ``window_end``, else the data interval; its end is exclusive. No state is kept
    beside Feast's own record of written windows: the same window again leaves the store as it is, and a window older
    than the newest one written is refused, because stores such as SQLite overwrite newer values with it.

    :param window_start: first instant of the window, ISO 8601 (templated)
    :param window_end: first instant after it (templated)
    :param feature_views: names; None for every online view (templated)
    :param allow_older: write an older window too; an entity that has a newer value keeps it (templated)
    :param batch_size: rows in one write to the online store; bounds the memory

    Returns ``{"window", "views": {view: {"rows", "kept_newer"}}, "seconds"}``; ``rows`` is None where a remote
    engine writes out of sight.
    """

    template_fields: Sequence[str] = (
        *_FeastOperator.template_fields,
        "window_start",
        "window_end",
        "feature_views",
        "allow_older",
    )

    def __init__(
        self,
        *,
        window_start: str | None = None,
        window_end: str | None = None,
        feature_views: Sequence[str] | None = None,
        allow_older: bool | str = False,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.window_start = window_start
        self.window_end = window_end
        self.feature_views = feature_views
        self.allow_older = allow_older
        self.batch_size = batch_size

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail():
            from airflow_mlops.features.materialize import materialize_view, refuse_older

            window = resolve_window(context, self.window_start, self.window_end)
            store = self.hook.store
            views = self.hook.online_views(as_names(self.feature_views, "feature_views"))
            if str(self.allow_older).lower() != "true":
                refuse_older(store, views, window)
            started, written = time.monotonic(), []
            for view in views:
                try:
                    written.append(materialize_view(store, view, window, batch_size=self.batch_size))
                except MlopsError:
                    raise
                except FileNotFoundError as error:
                    raise InvalidInputError(
                        f"the source of feature view {view!r} is not there: {error}. Write it before this task runs."
                    ) from error
                except Exception as error:
                    raise registry_error(error, f"materializing {view} {window}") from error
            rows = [[one.view, one.rows, one.kept] for one in written]
            self.log.info("%s\n%s", window, log_table(["view", "rows written", "newer kept"], rows))
            return {
                "window": window.to_json(),
                "views": {one.view: one.to_json() for one in written},
                "seconds": round(time.monotonic() - started, 3),
            }


class FeastTrainingSetOperator(_FeastOperator):
    """Joins entity rows with features as they stood at each row's time, to one Parquet file with a manifest.

    The rows are those with ``event_timestamp`` in the window, in order of time; the columns are those of the entity
    rows and then the features. No value is newer than its row. The same window of the same data gives the same bytes.

    :param entity_uri: Parquet file or folder: join keys, ``event_timestamp`` with a time zone, label, request data of
        on-demand views, further columns (templated)
    :param output_uri: of the Parquet file; its manifest is ``<output_uri>.manifest.json`` (templated)
    :param feature_service: name of the service whose features are joined (templated)
    :param features: instead of it, ``view:feature`` references (templated)
    :param label_column: column with the label; rows without one are left out and counted (templated)
    :param window_start: first instant of the window, ISO 8601 (templated)
    :param window_end: first instant after it (templated)
    :param full_feature_names: columns are called ``view__feature``
    :param filter_by_created_timestamp: do not use a value that was created after the row's time; needs sources with a
        ``created_timestamp_column``. Without it such rows are counted as ``late_rows``.

    Returns ``{"uri", "manifest_uri", "rows", "features", "label", "window", "sha256", "leaks", "late_rows",
    "missing_rows", "unlabelled_rows"}``.
    """

    template_fields: Sequence[str] = (
        *_FeastOperator.template_fields,
        "entity_uri",
        "output_uri",
        "feature_service",
        "features",
        "label_column",
        "window_start",
        "window_end",
    )

    def __init__(
        self,
        *,
        entity_uri: str,
        output_uri: str,
        feature_service: str | None = None,
        features: Sequence[str] | None = None,
        label_column: str | None = None,
        window_start: str | None = None,
        window_end: str | None = None,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.entity_uri = entity_uri
        self.output_uri = output_uri
        self.feature_service = feature_service
        self.features = features
        self.label_column = label_column  # Airflow owns the name label
        self.window_start = window_start
        self.window_end = window_end
        self.full_feature_names = full_feature_names
        self.filter_by_created_timestamp = filter_by_created_timestamp

    def execute(self, context: Context) -> dict[str, Any]:
        with permanent_errors_fail():
            require(entity_uri=self.entity_uri, output_uri=self.output_uri)
            features = as_names(self.features, "features")
            if is_blank(self.feature_service) != bool(features):
                raise InvalidInputError("give either feature_service or features, and not both")
            window = resolve_window(context, self.window_start, self.window_end)
            from airflow_mlops.features.training_set import build_training_set

            wanted: Any = self.hook.features(features) if features else self.hook.service(str(self.feature_service))
            try:
                result = build_training_set(
                    self.hook.store,
                    wanted,
                    entity_uri=self.entity_uri,
                    output_uri=self.output_uri,
                    window=window,
                    label=None if is_blank(self.label_column) else self.label_column,
                    full_feature_names=self.full_feature_names,
                    known_only=self.filter_by_created_timestamp,
                )
            except OSError as error:
                raise ExternalSystemError(f"cannot build {self.output_uri}: {error}") from error
            table = [[one.view, one.source_rows, one.matched, one.leaks, one.late_rows] for one in result.views]
            header = ["view", "feature rows read", "rows matched", "leaks", "late"]
            self.log.info("%d rows of %s to %s\n%s", result.rows, window, result.uri, log_table(header, table))
            if result.missing_rows or result.unlabelled_rows:
                self.log.warning(
                    "%d rows have no feature value at all, %d rows had no label and were left out",
                    result.missing_rows,
                    result.unlabelled_rows,
                )
            return result.to_json()
