"""Who set which field: managed fields and server-side apply. Lists are owned as a whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from support.kube_objects import ApiError, timestamp

FieldPath = tuple[str, ...]
_NOT_OWNED = {("apiVersion",), ("kind",), ("status",)} | {
    ("metadata", name)
    for name in (
        *("name", "namespace", "uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"),
        *("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generateName"),
    )
}


def leaves(obj: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Every field that holds a value or a list, with its path."""
    if path in _NOT_OWNED:
        return
    if isinstance(obj, Mapping) and (obj or not path):
        for key, value in obj.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, obj


def after_update(
    old: Mapping[str, Any] | None, new: Mapping[str, Any], manager: str, api_version: str, now: float
) -> list[dict[str, Any]]:
    """``managedFields`` after a create, put or patch: who changes a field takes it."""
    before, after = dict(leaves(old or {})), dict(leaves(new))
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    entries = (old or {"metadata": {}})["metadata"].get("managedFields") or ()
    owners = _owners(entries)
    for key in owners:
        owners[key] = {path for path in owners[key] - changed if path in after}
    mine = (manager, "Update")
    owners[mine] = owners.get(mine, set()) | changed
    return _entries(owners, entries, api_version, now)


def apply(
    old: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    manager: str,
    force: bool,
    api_version: str,
    now: float,
) -> dict[str, Any]:
    """The object after a server-side apply of ``config``; 409 where another manager owns a field that differs."""
    new: dict[str, Any] = copy.deepcopy(dict(old)) if old else {}
    current, wanted = dict(leaves(new)), dict(leaves(config))
    entries = (new.get("metadata") or {}).get("managedFields") or ()
    owners = _owners(entries)
    mine = (manager, "Apply")
    conflicts = sorted(
        (owner, path)
        for (owner, operation), paths in owners.items()
        for path in paths & set(wanted)
        if (owner, operation) != mine and current.get(path) != wanted[path]
    )
    if conflicts and not force:
        raise _conflict(conflicts)
    for path in owners.get(mine, set()) - set(wanted):
        if not any(path in paths for key, paths in owners.items() if key != mine):
            _remove(new, path)
    for path, value in wanted.items():
        _set(new, path, copy.deepcopy(value))
    for owner, path in conflicts:
        for key in [key for key in owners if key[0] == owner and key != mine]:
            owners[key].discard(path)
    owners[mine] = set(wanted)
    for name in ("apiVersion", "kind"):
        new.setdefault(name, config.get(name))
    given = config.get("metadata") or {}
    meta = new.setdefault("metadata", {})
    meta.update({key: given[key] for key in ("name", "uid", "resourceVersion") if key in given})
    meta["managedFields"] = _entries(owners, entries, api_version, now)
    return new


def _conflict(conflicts: Sequence[tuple[str, FieldPath]]) -> ApiError:
    causes = [
        {"reason": "FieldManagerConflict", "message": f'conflict with "{owner}"', "field": "." + ".".join(path)}
        for owner, path in conflicts
    ]
    listed = ", ".join(f"{cause['message']}: {cause['field']}" for cause in causes)
    noun = "conflict" if len(causes) == 1 else "conflicts"
    return ApiError(409, f"Apply failed with {len(causes)} {noun}: {listed}", details={"causes": causes})


def _owners(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], set[FieldPath]]:
    return {(entry["manager"], entry["operation"]): set(_decoded(entry["fieldsV1"])) for entry in entries}


def _entries(
    owners: Mapping[tuple[str, str], set[FieldPath]],
    before: Sequence[Mapping[str, Any]],
    api_version: str,
    now: float,
) -> list[dict[str, Any]]:
    times = {(entry["manager"], entry["operation"], str(entry["fieldsV1"])): entry["time"] for entry in before}
    entries = []
    for (manager, operation), paths in owners.items():
        tree = _encoded(paths)
        # An entry that stays as it was keeps its time, so that a write without effect is none.
        time = times.get((manager, operation, str(tree)), timestamp(now))
        entry = {"manager": manager, "operation": operation, "apiVersion": api_version, "time": time}
        if paths:
            entries.append({**entry, "fieldsType": "FieldsV1", "fieldsV1": tree})
    return entries


def _encoded(paths: set[FieldPath]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path in sorted(paths):
        node = tree
        for part in path:
            node = node.setdefault(f"f:{part}", {})
    return tree


def _decoded(tree: Mapping[str, Any], path: FieldPath = ()) -> Iterator[FieldPath]:
    if not tree:
        yield path
    for key, node in tree.items():
        yield from _decoded(node, (*path, key.removeprefix("f:")))


def _set(obj: dict[str, Any], path: FieldPath, value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(obj.get(part), dict):
            obj[part] = {}
        obj = obj[part]
    obj[path[-1]] = value


def _remove(obj: dict[str, Any], path: FieldPath) -> None:
    for part in path[:-1]:
        obj = obj.get(part) or {}
    obj.pop(path[-1], None)
