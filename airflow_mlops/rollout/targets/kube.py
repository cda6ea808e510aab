"""What the targets on Kubernetes share: the kinds they touch, the client they are given, reading conditions."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, Protocol

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.kubernetes_api import Resource

Object = dict[str, Any]


ISVC = Resource("serving.kserve.io", "v1beta1", "inferenceservices", "InferenceService")
HTTPROUTE = Resource("gateway.networking.k8s.io", "v1", "httproutes", "HTTPRoute")
LEASE = Resource("coordination.k8s.io", "v1", "leases", "Lease")
JOB = Resource("batch", "v1", "jobs", "Job")
SERVICE = Resource("", "v1", "services", "Service")
ENDPOINTSLICE = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice")

#: Tries to change what others change at the same time.
RACES = 20
#: Labels of what this package makes.
MANAGED_BY = {"app.kubernetes.io/managed-by": "airflow-mlops"}
#: Label of a predictor's pods: the model version that they serve.
VERSION_LABEL = "mlops.airflow.org/version"


class KubernetesClient(Protocol):
    """The asynchronous calls that :class:`airflow_mlops.hooks.kubernetes.CustomResourceHook` offers, and no more.

    ``ConcurrentChangeError`` is a lost race (409, or the object is gone), ``InvalidInputError`` what no retry mends,
    ``ExternalSystemError`` a server that is away for too long. A call whose answer was lost is repeated by the client.
    """

    async def aget(self, resource: Any, name: str, *, namespace: str | None = None) -> Object | None:
        """The object, None if there is none."""

    async def alist(
        self, resource: Any, selector: str | Mapping[str, str] | None = None, *, namespace: str | None = None
    ) -> tuple[list[Object], str]:
        """The objects with these labels, and the version of the list."""

    async def acreate(self, resource: Any, body: Object, *, namespace: str | None = None) -> Object:
        """Create an object; unknown fields are refused."""

    async def apatch(
        self,
        resource: Any,
        name: str,
        change: Object,
        *,
        resource_version: str | None = None,
        namespace: str | None = None,
    ) -> Object:
        """Lay a JSON merge patch over that version of an object."""

    async def adelete(self, resource: Any, name: str, *, namespace: str | None = None) -> bool:
        """Delete an object and what it owns; False if it is gone."""


async def ensure(
    client: KubernetesClient,
    kind: Resource,
    body: Object,
    namespace: str | None,
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
) -> tuple[Object, bool]:
    """An object of that name, and whether this call made it; a quota that changes meanwhile is a lost race, too."""
    name = body["metadata"]["name"]
    for _ in range(RACES):
        try:
            return await client.acreate(kind, body, namespace=namespace), True
        except ConcurrentChangeError:
            if (found := await client.aget(kind, name, namespace=namespace)) is not None:
                return found, False
        await sleep(0.05)
    raise ExternalSystemError(f"{kind.kind} {name} was refused {RACES} times because others change things meanwhile")


def condition(found: Iterable[Mapping[str, Any]] | None, kind: str) -> Mapping[str, Any]:
    """The condition of that type; empty if there is none."""
    return next((each for each in found or () if each.get("type") == kind), {})


def is_true(found: Iterable[Mapping[str, Any]] | None, kind: str) -> bool:
    """Whether the condition of that type holds."""
    return condition(found, kind).get("status") == "True"


def told(found: Iterable[Mapping[str, Any]] | None) -> str:
    """The conditions that do not hold, in words."""
    return "; ".join(
        f"{each.get('type')}={each.get('status')} {each.get('reason') or ''} {each.get('message') or ''}".strip()
        for each in found or ()
        if each.get("status") != "True"
    )


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as Kubernetes' MicroTime."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def seconds_of(text: str | None) -> float:
    """Inverse of :func:`timestamp`; 0 for nothing."""
    if not text:
        return 0.0
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def last_writer(obj: Mapping[str, Any], *path: str) -> str:
    """Who changed that part of ``spec`` last, as the server recorded it."""
    entries = [each for each in obj["metadata"].get("managedFields") or () if each.get("subresource") != "status"]
    for depth in range(len(path), 0, -1):
        if owners := [each for each in entries if _owns(each, path[:depth])]:
            last = max(reversed(owners), key=lambda entry: str(entry.get("time")))
            return f"{last.get('manager') or 'somebody'} ({last.get('operation')}, {last.get('time')})"
    return "somebody (the server did not record who)"


def _owns(entry: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    fields: Any = (entry.get("fieldsV1") or {}).get("f:spec")
    for name in path:
        fields = fields.get(f"f:{name}") if isinstance(fields, Mapping) else None
    return fields is not None


def difference(old: Any, new: Any) -> Any:
    """The JSON merge patch that makes ``new`` of ``old``; empty if they are the same."""
    change: Object = {key: None for key in old if key not in new}
    for key, value in new.items():
        if key not in old or not (isinstance(value, Mapping) and isinstance(old[key], Mapping)):
            if key not in old or old[key] != value:
                change[key] = copy.deepcopy(value)
        elif inner := difference(old[key], value):
            change[key] = inner
    return change


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Object:
    """``base`` with ``over`` laid over it, objects inside objects."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def name_part(version: str, allowed: Callable[[str], bool] = str.isalnum) -> str:
    """A version as part of an object's name: ``3`` is ``v3``.

    :raises InvalidInputError: it does not lend itself to one
    """
    text = version.lower()
    part = text if text[:1].isalpha() else f"v{text}"
    if not text or len(part) > 20 or not all(char.isascii() and (allowed(char) or char == "-") for char in part):
        raise InvalidInputError(
            f"the model version {version!r} cannot be part of a Kubernetes name; expected at most 19 letters, digits "
            "and dashes, as MLflow's versions are"
        )
    if part.endswith("-"):
        raise InvalidInputError(f"the model version {version!r} ends with a dash, which no Kubernetes name may")
    return part


def fits(name: str, what: str) -> str:
    """``name``, if a Service may be called so.

    :raises InvalidInputError: it is too long or has other characters
    """
    plain = name.replace("-", "")
    good = 0 < len(name) <= 63 and plain.isascii() and plain.isalnum() and plain == plain.lower()
    if not good or not name[0].isalpha() or name.endswith("-"):
        raise InvalidInputError(
            f"{what} is {name!r} ({len(name)} characters); expected at most 63 lower-case letters, digits and dashes, "
            "a letter first"
        )
    return name
