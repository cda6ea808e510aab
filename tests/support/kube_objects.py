"""Rules of the Kubernetes API that need no server: errors, selectors, patches, printer columns."""

from __future__ import annotations

import copy
import datetime as dt
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

#: HTTP status -> reason in the Status body.
REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class ApiError(Exception):
    """A refusal, as the server's Status object tells it.

    :param status: HTTP status
    :param message: what went wrong
    :param reason: machine-readable reason; by default that of the HTTP status
    :param details: name, group, kind, uid, causes
    :param retry_after: seconds, also sent as the header ``Retry-After``
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        reason: str | None = None,
        details: Mapping[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
        self.reason, self.details = reason or REASONS.get(status, "Unknown"), dict(details or {})

    def body(self) -> dict[str, Any]:
        """The Status object."""
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message}
        details = self.details
        if self.retry_after is not None:
            details = {**details, "retryAfterSeconds": max(1, round(self.retry_after))}
        return {**body, "reason": self.reason, **({"details": details} if details else {}), "code": self.status}


def timestamp(seconds: float, *, micro: bool = False) -> str:
    """Seconds since the epoch as RFC 3339 in UTC."""
    moment = dt.datetime.fromtimestamp(seconds, dt.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")


def seconds_of(text: str) -> float:
    """The inverse of :func:`timestamp`."""
    return dt.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


# Selectors


def label_selector(text: str) -> Callable[[Mapping[str, Any]], bool]:
    """A predicate on objects from ``a=b,c!=d,e in (f,g),h notin (i),j,!k``."""
    tests = [_requirement(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()]

    def matches(obj: Mapping[str, Any]) -> bool:
        labels = obj["metadata"].get("labels") or {}
        return all(test(labels) for test in tests)

    return matches


def _requirement(text: str) -> Callable[[Mapping[str, str]], bool]:
    key = r"[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?"
    if found := re.fullmatch(rf"(?P<key>{key})\s+(?P<verb>in|notin)\s*\((?P<values>[^()]*)\)", text):
        name, values = found["key"], {value.strip() for value in found["values"].split(",")}
        wanted = found["verb"] == "in"
        return lambda labels: (labels[name] in values) == wanted if name in labels else not wanted
    if found := re.fullmatch(rf"(?P<key>{key})\s*(?P<verb>==|=|!=)\s*(?P<value>[-A-Za-z0-9_.]*)", text):
        name, value = found["key"], found["value"]
        if found["verb"] == "!=":
            return lambda labels: labels.get(name) != value
        return lambda labels: labels.get(name) == value
    if found := re.fullmatch(rf"(?P<absent>!?)\s*(?P<key>{key})", text):
        name, present = found["key"], not found["absent"]
        return lambda labels: (name in labels) == present
    raise ApiError(400, f"unable to parse requirement: found '{text}', expected: a label selector")


def field_selector(text: str, supported: Sequence[str]) -> Callable[[Mapping[str, Any]], bool]:
    """A predicate on objects from ``metadata.name=x,status.phase!=y``; fields not in ``supported`` are refused."""
    tests: list[tuple[str, bool, str]] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"([^=!]+)(==|=|!=)(.*)", part)
        if not found:
            raise ApiError(400, f"invalid selector: '{part}'; can't understand '{part}'")
        if found[1] not in supported:
            raise ApiError(400, f"field label not supported: {found[1]}")
        tests.append((found[1], found[2] != "!=", found[3]))
    return lambda obj: all((str(dig(obj, field) or "") == value) == equal for field, equal, value in tests)


def dig(obj: Any, path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for part in path.split("."):
        obj = obj.get(part) if isinstance(obj, Mapping) else None
    return obj


# Patches


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def json_patch(target: Any, operations: Any) -> Any:
    """RFC 6902; an operation that cannot be done is a 422."""
    if not isinstance(operations, list):
        raise ApiError(400, "error decoding patch: json: cannot unmarshal object into Go value of type jsonpatch.Patch")
    document = {"": copy.deepcopy(target)}
    for operation in operations:
        try:
            _operate(document, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            message = f"the server rejected our request due to an error in our request: {operation}: {error}"
            raise ApiError(422, message) from error
    return document[""]


def _operate(document: dict[str, Any], operation: Mapping[str, Any]) -> None:
    kind, (parent, key) = operation["op"], _locate(document, operation["path"])
    if kind == "test":
        if parent[key] != operation["value"]:
            raise ValueError("testing value failed")
    elif kind == "remove":
        del parent[key]
    elif kind == "replace":
        parent[key] = copy.deepcopy(parent[key] and operation["value"])
    elif kind == "add":
        _add(parent, key, copy.deepcopy(operation["value"]))
    elif kind in ("move", "copy"):
        source, source_key = _locate(document, operation["from"])
        value = copy.deepcopy(source[source_key])
        if kind == "move":
            del source[source_key]
        _add(parent, key, value)
    else:
        raise ValueError(f"unexpected kind: {kind}")


def _locate(document: dict[str, Any], pointer: str) -> tuple[Any, Any]:
    parts = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")]
    parent: Any = document
    for part in parts[:-1]:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    key: Any = parts[-1]
    if isinstance(parent, list):
        key = len(parent) if key == "-" else int(key)
    return parent, key


def _add(parent: Any, key: Any, value: Any) -> None:
    if not isinstance(parent, list):
        parent[key] = value
    elif key > len(parent):
        raise IndexError(f"index {key} out of bounds")
    else:
        parent.insert(key, value)


# Printer columns (Table)


def column_value(obj: Mapping[str, Any], path: str) -> Any:
    """The first value that a JSONPath such as ``.status.conditions[?(@.type=="Ready")].status`` finds, or None."""
    return next(iter(_walk(obj, _steps(path))), None)


def _steps(path: str) -> list[tuple[str, str]]:
    pattern = re.compile(r"\.(?P<name>(?:[^.\[\\]|\\.)+)|\[(?P<index>\d+|\*)\]|\[\?\(@\.(?P<filter>[^)]*)\)\]")
    steps = []
    for found in pattern.finditer(path):
        kind = found.lastgroup or ""
        steps.append((kind, re.sub(r"\\(.)", r"\1", found[kind]) if kind == "name" else found[kind]))
    return steps


def _walk(value: Any, steps: list[tuple[str, str]]) -> Iterator[Any]:
    if not steps:
        yield value
        return
    (kind, text), rest = steps[0], steps[1:]
    if kind == "name":
        if isinstance(value, Mapping) and text in value:
            yield from _walk(value[text], rest)
    elif isinstance(value, list) and kind == "index":
        for item in value if text == "*" else value[int(text) : int(text) + 1]:
            yield from _walk(item, rest)
    elif isinstance(value, list):
        field, _, wanted = (part.strip() for part in text.partition("=="))
        expected = json.loads(wanted.replace("'", '"'))
        for item in value:
            if dig(item, field) == expected:
                yield from _walk(item, rest)


def cells(obj: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], now: float) -> list[Any]:
    """A row's cells: name first, then one per printer column; what is not there is null."""
    row = [obj["metadata"].get("name", "")]
    for column in columns:
        value = column_value(obj, column["jsonPath"])
        if value is None:
            row.append(None)
        elif column["type"] == "date":
            row.append(human_duration(now - seconds_of(value)))
        elif column["type"] == "string":
            row.append(value if isinstance(value, str) else json.dumps(value))
        else:
            row.append(value)
    return row


def human_duration(seconds: float) -> str:
    """An age as kubectl shows it: 38s, 5m12s, 3h, 2d4h."""
    total = int(seconds)
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if total < 120:
        return f"{max(total, 0)}s"
    if minutes < 10:
        return f"{minutes}m{total % 60}s" if total % 60 else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    return f"{days}d"


def definitions_of(columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``columnDefinitions`` of a Table."""
    name = {"name": "Name", "type": "string", "format": "name", "description": "Name of the object", "priority": 0}
    defaults = {"format": "", "description": "", "priority": 0}
    return [name, *({**defaults, **{k: v for k, v in column.items() if k != "jsonPath"}} for column in columns)]
