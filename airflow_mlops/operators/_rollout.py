"""What the arguments of operators that move traffic have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks._rollout import RAY_SERVE
from airflow_mlops.shell import is_blank


def text(value: Any) -> str:
    """A templated value as text; what Jinja renders for nothing is nothing."""
    return "" if value in (None, "None", "null") else str(value).strip()


def structure(value: Any, name: str) -> Any:
    """A templated dictionary or list, which Jinja may have rendered as JSON text; blank is ``None``."""
    if not isinstance(value, str):
        return value or None
    try:
        return json.loads(value) if text(value) else None
    except ValueError:
        raise InvalidInputError(
            f"{name} is the text {value!r}; expected a dictionary or list, or one as JSON"
        ) from None


def evidence(value: Any) -> Any:
    """A source's configuration, or the name of a query set."""
    text = value.strip() if isinstance(value, str) else ""
    return text if text and text[0] not in "{[" and not is_blank(text) else structure(value, "evidence")


def ray_serve_target(
    name: str,
    serve_url: str | None,
    *,
    runtime_env: Mapping[str, Any] | None = None,
    tracking_uri: str | None = None,
    options: Mapping[str, Any] | None = None,
    startup_timeout: float = 180.0,
    load_timeout: float = 120.0,
) -> dict[str, Any]:
    """The configuration of a route on Ray Serve; see :class:`airflow_mlops.rollout.targets.client.Route`.

    :param tracking_uri: of the MLflow that the slots ask for ``models:/`` URIs
    """
    if not name or not all(part.isalnum() for part in name.replace("-", "_").split("_") if part):
        raise InvalidInputError(f"the route is {name!r}; expected letters, digits, - and _")
    environment = dict(runtime_env or {})
    if not is_blank(tracking_uri):
        environment["env_vars"] = {"MLFLOW_TRACKING_URI": tracking_uri, **environment.get("env_vars", {})}
    return {
        "kind": RAY_SERVE,
        "name": name,
        "serve_url": None if is_blank(serve_url) else serve_url,
        "runtime_env": environment,
        "options": dict(options or {}),
        "startup_timeout": startup_timeout,
        "load_timeout": load_timeout,
    }
