"""Functions that are named by text: what can be told of them without importing anything."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.spec import PICKLED, TrainingSpec

#: By these a module can get names that its text does not show.
_DYNAMIC = {"exec", "globals", "setattr", "vars"}


def check_callables(spec: TrainingSpec, runtime_env: Mapping[str, Any] | None = None) -> None:
    """Find ``train_fn`` and ``exporter`` where their package is installed here, too, and in no other version.

    A package that is not here, or whose code travels with the job, is left to the driver.

    :raises InvalidInputError: the package has no such module, or the module no such function
    """
    if runtime_env and (runtime_env.get("working_dir") or runtime_env.get("py_modules")):
        return
    for what, reference in (("train_fn", spec.train_fn), ("exporter", spec.exporter)):
        if reference and not reference.startswith(PICKLED):
            _check(what, reference)


def _check(what: str, reference: str) -> None:
    module, _, name = reference.partition(":")
    try:
        found = _find(module)
    except (ImportError, ValueError, KeyError, OSError):
        return
    if found is None:
        raise InvalidInputError(
            f"{what} is {reference!r}, and package {module.partition('.')[0]!r} is installed here without a module "
            f"{module!r}; correct the name, or install the version that the cluster has"
        )
    source = found.loader.get_source(module) if isinstance(found.loader, SourceFileLoader) else None
    if source is None:
        return
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise InvalidInputError(f"{what} is {reference!r}, and {found.origin} cannot be read: {error}") from None
    if name not in (names := set(_names(tree))) and not names & {"*", "__getattr__"} and not _dynamic(tree):
        raise InvalidInputError(
            f"{what} is {reference!r}, and {found.origin} has no {name!r}; correct the name, or install the version "
            "that the cluster has"
        )


def _find(module: str) -> ModuleSpec | None:
    """Where a module is, None if its package has none of that name.

    :raises ImportError: its package is not here
    """
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    if found is None:
        raise ImportError(top)
    name = top
    for part in rest:
        name = f"{name}.{part}"
        found = PathFinder.find_spec(name, list(found.submodule_search_locations or ()))
        if found is None:
            return None
    return found


def _names(tree: ast.AST) -> Iterator[str]:
    """What the top of a module defines."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case _:
                yield from _names(node)


def _dynamic(tree: ast.AST) -> bool:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id in _DYNAMIC for function in calls)
