"""Applying a folder of Feast definitions to its registry."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import InvalidInputError

if TYPE_CHECKING:
    from feast import FeatureStore

KINDS = {
    "entities": "list_entities",
    "feature_views": "list_batch_feature_views",
    "stream_feature_views": "list_stream_feature_views",
    "on_demand_feature_views": "list_on_demand_feature_views",
    "feature_services": "list_feature_services",
}


def apply_repository(store: FeatureStore, repo_path: Path) -> dict[str, Any]:
    """Register what the Python files below ``repo_path`` define; what they no longer define is removed.

    :returns: ``{"project", "registered": {kind: [names]}, "changes": [{"action", "kind", "name"}]}``; applying the
        same definitions again changes nothing
    :raises InvalidInputError: a file cannot be imported, or Feast refuses a definition
    """
    from feast import Project, repo_operations

    with _imports_from(repo_path):
        try:
            contents = repo_operations.parse_repo(repo_path)
        except Exception as error:
            raise InvalidInputError(
                f"the feature repository {repo_path} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not contents.projects:
            contents.projects.append(Project(name=store.project))
        if [project.name for project in contents.projects] != [store.project]:
            raise InvalidInputError(
                f"{repo_path} defines the projects {[project.name for project in contents.projects]}; its "
                f"feature_store.yaml names {store.project!r}, and they must be the same one"
            )
        try:
            difference, _, _ = store.plan(contents)
            changes = _changes(difference)
            repo_operations.apply_total_with_repo_instance(
                store, store.project, store.registry, contents, skip_source_validation=False
            )
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInputError(f"Feast refuses a definition in {repo_path}: {error}") from error
    store.refresh_registry()
    registered = {kind: sorted(one.name for one in getattr(store, method)()) for kind, method in KINDS.items()}
    return {"project": store.project, "registered": registered, "changes": changes}


def _changes(difference: Any) -> list[dict[str, str]]:
    return [
        {"action": one.transition_type.name.lower(), "kind": one.feast_object_type.value, "name": one.name}
        for one in difference.feast_object_diffs
        if one.transition_type.name != "UNCHANGED" and one.name != "__dummy"
    ]


@contextmanager
def _imports_from(repo_path: Path) -> Iterator[None]:
    """Import from the repository as Feast's command line does, and leave the interpreter as it was.

    Modules of the same name from elsewhere step aside, and the repository's own are forgotten afterwards, so that
    the next apply in this process reads the files again.
    """
    names = {path.relative_to(repo_path).with_suffix("").as_posix().split("/")[0] for path in repo_path.glob("**/*.py")}
    mine = [name for name in sys.modules if name.split(".")[0] in names]
    aside = {name: sys.modules.pop(name) for name in mine}
    folder, search, bytecode = os.getcwd(), list(sys.path), sys.dont_write_bytecode
    os.chdir(repo_path)
    sys.path.insert(0, str(repo_path))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        os.chdir(folder)
        sys.path[:], sys.dont_write_bytecode = search, bytecode
        for name in [name for name in sys.modules if name.split(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(aside)
