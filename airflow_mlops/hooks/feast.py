"""A Feast feature repository: its definitions, registry and stores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore

CONFIG_FILE = "feature_store.yaml"
WRITE_BATCH_SIZE = 10_000


class FeastHook(BaseHook):
    """A folder with ``feature_store.yaml`` and Python definitions, on the worker.

    The folder is ``repo_path``, else the connection's extra ``repo_path``. ``${VARIABLES}`` in the file are taken
    from the environment. The connection's extra ``feature_store`` (a JSON object) is laid over the file's content, key
    by key at every depth: secrets of a registry or an online store live there.

    :param feast_conn_id: the Airflow connection; ``feast_default`` need not exist
    :param repo_path: overrides the connection's folder
    :param overrides: laid over file and connection, for example ``{"online_store": {"type": "redis"}}``
    """

    conn_name_attr = "feast_conn_id"
    default_conn_name = "feast_default"
    conn_type = "feast"
    hook_name = "Feast repository"

    def __init__(
        self,
        feast_conn_id: str = default_conn_name,
        repo_path: str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.feast_conn_id = feast_conn_id
        self._repo_path = repo_path
        self._overrides = overrides

    @cached_property
    def _extra(self) -> dict[str, Any]:
        try:
            return self.get_connection(self.feast_conn_id).extra_dejson
        except AirflowNotFoundException:
            if self.feast_conn_id == self.default_conn_name:
                return {}
            raise InvalidInputError(
                f"there is no connection {self.feast_conn_id!r}; create it with type feast, or give repo_path"
            ) from None

    @cached_property
    def repo_path(self) -> Path:
        """The repository's folder.

        :raises InvalidInputError: nothing names one, or it has no ``feature_store.yaml``
        """
        given = self._repo_path or self._extra.get("repo_path")
        if not given:
            raise InvalidInputError(
                f"no Feast repository: give repo_path, or set it in the connection {self.feast_conn_id!r}"
            )
        path = Path(given).expanduser().resolve()
        if not (path / CONFIG_FILE).is_file():
            raise InvalidInputError(
                f"{path} has no {CONFIG_FILE}; repo_path must be the folder of a Feast repository on this worker"
            )
        return path

    @cached_property
    def config(self) -> Any:
        """Feast's ``RepoConfig``: the file with environment variables filled in, and the overrides on it.

        :raises InvalidInputError: an environment variable is not set, or Feast refuses the content
        """
        # Before Feast is loaded, which takes seconds.
        text = os.path.expandvars((self.repo_path / CONFIG_FILE).read_text())
        import yaml
        from feast.repo_config import RepoConfig
        from pydantic import ValidationError

        try:
            raw = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidInputError(f"{self.repo_path / CONFIG_FILE} is not YAML: {error}") from error
        if unset := sorted(_unset_variables(raw)):
            raise InvalidInputError(
                f"{self.repo_path / CONFIG_FILE} uses the environment variables {unset}, not set on this worker"
            )
        for layer in (self._extra.get("feature_store"), self._overrides):
            raw = _merged(raw, layer or {})
        try:
            config = RepoConfig(**raw)
        except (ValidationError, TypeError) as error:
            raise InvalidInputError(f"Feast refuses {self.repo_path / CONFIG_FILE}: {error}") from error
        config.repo_path = self.repo_path
        if config.materialization_config.online_write_batch_size is None:
            # Without a batch size Feast holds all rows twice, 5 GB for a million.
            config.materialization_config.online_write_batch_size = WRITE_BATCH_SIZE
        return config

    @cached_property
    def store(self) -> FeatureStore:
        """The feature store of this repository; Feast is imported here."""
        config = self.config
        from feast import FeatureStore

        return FeatureStore(config=config)

    def service(self, name: str) -> FeatureService:
        """The feature service called ``name``.

        :raises InvalidInputError: the registry has none of that name; the message lists those it has
        """
        known = {service.name: service for service in self.store.list_feature_services()}
        if name not in known:
            raise InvalidInputError(self._unknown("feature service", [name], known))
        return known[name]

    def features(self, refs: Sequence[str]) -> list[str]:
        """``view:feature`` references, checked against the registry.

        :raises InvalidInputError: a reference has another form, or its view or feature is unknown
        """
        views = {view.name: view for view in self.store.list_all_feature_views()}
        for ref in refs:
            view, _, feature = str(ref).partition(":")
            if not feature:
                raise InvalidInputError(f"feature reference {ref!r} must have the form 'view:feature'")
            if view not in views:
                raise InvalidInputError(self._unknown("feature view", [view], views))
            names = [one.name for one in views[view].features]
            if feature not in names:
                raise InvalidInputError(self._unknown(f"feature of view {view!r}", [feature], names))
        return list(refs)

    def online_views(self, names: Sequence[str] | None = None) -> list[str]:
        """Feature views to materialize: ``names``, else all that are enabled and online.

        :raises InvalidInputError: a name is unknown, or the registry has no such view
        """
        views = [*self.store.list_batch_feature_views(), *self.store.list_stream_feature_views()]
        known = list(dict.fromkeys(view.name for view in views if view.online and view.enabled))
        if unknown := [name for name in names or () if name not in known]:
            raise InvalidInputError(self._unknown("online feature view", unknown, known))
        if not known:
            raise InvalidInputError(f"project {self.store.project!r} has no online feature view; apply the repository")
        return list(names) if names else known

    def _unknown(self, what: str, names: Sequence[str], known: Any) -> str:
        return (
            f"unknown {what} {', '.join(map(repr, names))} in project {self.store.project!r}; the registry has "
            f"{sorted(known) or 'none'}. Correct the name, or apply the repository first."
        )

    def test_connection(self) -> tuple[bool, str]:
        """Whether the repository's registry can be read."""
        try:
            views = self.store.list_all_feature_views()
            return True, f"project {self.store.project}: {len(views)} feature views in the registry"
        except Exception as error:
            return False, str(error)


def _unset_variables(value: Any) -> set[str]:
    import re

    if isinstance(value, Mapping):
        return set().union(*(_unset_variables(one) for one in value.values()))
    if isinstance(value, list):
        return set().union(*(_unset_variables(one) for one in value))
    return set(re.findall(r"\$\{(\w+)\}", value)) if isinstance(value, str) else set()


def _merged(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in layer.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def registry_error(error: Exception, doing: str) -> ExternalSystemError:
    """An error of Feast's registry or stores as one that a retry may mend."""
    return ExternalSystemError(f"Feast failed while {doing}: {type(error).__name__}: {error}")
