"""A Kubernetes API server for tests: HTTP as a real one speaks it, faults on demand, hands that act as controllers.

It stores any object of the CRDs it is given, and pods (with logs), events, secrets, services, namespaces and Jobs.
Differences from a real server: objects are not converted between versions, lists are atomic in server-side apply,
there is no admission, no CEL.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from support import kube_objects as rules
from support.crd import CrdSchemas
from support.kube_http import Fault, KubeServer, Request
from support.kube_objects import timestamp
from support.kube_store import Object, Resource
from support.kube_verbs import containers, is_watch

__all__ = ["Fault", "KubeApi", "Request"]


class KubeApi(KubeServer):
    """The server; a context manager that starts and stops it.

    :param crds: schemas of the CRDs; None serves the names known here without any check of objects
    :param clock: monotonic seconds, for timestamps
    :param bookmark_seconds: how often a watch that asked for bookmarks gets one
    :ivar faults: :class:`Fault` objects, the first that matches is used
    :ivar requests: all requests so far
    :ivar token: what clients have to send, None: nothing
    :ivar role: rules of a Role (apiGroups, resources, verbs) that is all the client may do; None: everything
    :ivar proxied: answers what is sent to services through the server's proxy
    :ivar used: (group, resource, verb) of all requests so far: what a Role has to allow
    """

    def __init__(
        self,
        crds: CrdSchemas | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        bookmark_seconds: float = 60.0,
    ) -> None:
        super().__init__(crds, clock=clock, bookmark_seconds=bookmark_seconds)
        self.create_namespace("default")

    def kubeconfig(self, path: Path | str, *, namespace: str = "default") -> Path:
        """Write a kubeconfig with one context, ``stand-in``, and return its path."""
        path = Path(path)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stand-in",
            "clusters": [{"name": "stand-in", "cluster": {"server": self.url}}],
            "users": [{"name": "tests", "user": {"token": self.token}}],
            "contexts": [
                {"name": "stand-in", "context": {"cluster": "stand-in", "user": "tests", "namespace": namespace}}
            ],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # What tests look at and cause

    def count(self, *, method: str | None = None, path_contains: str = "", watch: bool | None = None) -> int:
        """How many requests came in."""
        return sum(
            (method is None or request.method == method)
            and path_contains in request.path
            and (watch is None or is_watch(request.query) == watch)
            for request in list(self.requests)
        )

    def fault(self, **values: Any) -> Fault:
        """Add a :class:`Fault`."""
        self.faults.append(Fault(**values))
        return self.faults[-1]

    def forbid(self, verb: str, resource: str, namespace: str | None = None) -> None:
        """Answer 403 to a verb (``*``: all) on a resource such as ``rayjobs``, ``rayjobs/status``, ``pods/log``."""
        self._forbidden.append((verb, resource, namespace))

    def allow_all(self) -> None:
        """Take back all :meth:`forbid`."""
        self._forbidden.clear()

    def compact(self) -> None:
        """Forget the history: new watches from older versions and old continue tokens get 410."""
        self.store.compact()
        self._pages.clear()

    # Hands: what controllers, kubelets and other people do

    def create(self, obj: Mapping[str, Any], namespace: str = "default") -> Object:
        """Create an object, with its status where it has one."""
        resource = self._of(obj)
        namespace = (obj.get("metadata") or {}).get("namespace") or namespace
        created = self.store.create(resource, namespace if resource.namespaced else "", copy.deepcopy(dict(obj)))
        if obj.get("status") and resource.custom and resource.status:
            return self.put_status(resource.kind, namespace, created["metadata"]["name"], obj["status"])
        return copy.deepcopy(created)

    def create_namespace(self, name: str) -> None:
        resource = self.store.named("namespaces")
        namespace = {"metadata": {"name": name}, "status": {"phase": "Active"}}
        self.store.create(resource, "", namespace)

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """An object, None where there is none."""
        resource = self.store.named(kind)
        return copy.deepcopy(self.store.find(resource, namespace if resource.namespaced else "", name))

    def list(self, kind: str, namespace: str | None = None, selector: str = "") -> list[Object]:
        """Objects of a kind, by default in all namespaces."""
        items, _ = self.store.items(self.store.named(kind), namespace)
        return copy.deepcopy([item for item in items if rules.label_selector(selector)(item)])

    def put_status(self, kind: str, namespace: str, name: str, status: Mapping[str, Any]) -> Object:
        """Replace an object's status."""
        return copy.deepcopy(self.store.put(self.store.named(kind), namespace, name, {"status": status}))

    def patch(self, kind: str, namespace: str, name: str, patch: Mapping[str, Any]) -> Object:
        """Merge-patch anything of an object, as somebody else would."""
        resource = self.store.named(kind)
        with self.store.lock:
            old = self.store.get(resource, namespace, name)
            new = rules.merge_patch(old, patch)
            if {**new, "metadata": 0, "status": 0} != {**old, "metadata": 0, "status": 0}:
                new["metadata"] = {**new["metadata"], "generation": old["metadata"].get("generation", 1) + 1}
            return copy.deepcopy(self.store.put(resource, namespace, name, new))

    def delete(self, kind: str, namespace: str, name: str, **options: Any) -> None:
        """Delete an object as a client would: finalizers, grace periods and owners are heeded."""
        self.store.delete(self.store.named(kind), namespace, name, **options)

    def delete_now(self, kind: str, namespace: str, name: str) -> None:
        """Remove an object at once, whatever its finalizers; what it owned is collected."""
        self.store.remove(self.store.named(kind), namespace, name)

    def add_pod_log(
        self, name: str, lines: Iterable[str] | str, *, namespace: str = "default", container: str = ""
    ) -> None:
        """Append lines to a container's log (default: the pod's first)."""
        texts = lines.splitlines() if isinstance(lines, str) else list(lines)
        with self.store.lock:
            pod = self.store.get(self.store.named("pods"), namespace, name)
            container = container or containers(pod)[0]
            log = self.store.logs.setdefault((namespace, name), [])
            # As exact as it is shown, or a line would be shown in a second that a filter does not find it in.
            log.extend((round(self.store.now(), 6), container, text) for text in texts)
        self._notify()

    def add_event(
        self,
        kind: str,
        name: str,
        reason: str,
        message: str,
        *,
        namespace: str = "default",
        type: str = "Normal",
        count: int = 1,
    ) -> Object:
        """Record an event about an object."""
        resource, now = self.store.named(kind), timestamp(self.store.now())
        about = self.store.find(resource, namespace if resource.namespaced else "", name)
        meta = about["metadata"] if about else {}
        event = {
            "metadata": {"name": f"{name}.{uuid.uuid4().hex[:16]}"},
            "involvedObject": {
                "apiVersion": resource.api_version(),
                "kind": resource.kind,
                "namespace": namespace,
                "name": name,
                "uid": meta.get("uid", ""),
                "resourceVersion": meta.get("resourceVersion", ""),
            },
            "reason": reason,
            "message": message,
            "type": type,
            "count": count,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "eventTime": None,
            "source": {"component": "stand-in"},
            "reportingComponent": "stand-in",
            "reportingInstance": "",
        }
        return copy.deepcopy(self.store.create(self.store.named("events"), namespace, event))

    def _of(self, obj: Mapping[str, Any]) -> Resource:
        if obj.get("apiVersion"):
            group = str(obj["apiVersion"]).rpartition("/")[0]
            if found := self.store.resource(group, str(obj["kind"])):
                return found
        return self.store.named(str(obj["kind"]))
