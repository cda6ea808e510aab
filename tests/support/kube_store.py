"""What a Kubernetes API server keeps, and the rules by which it changes: versions, finalizers, owners, watches."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from support.crd import CrdSchemas
from support.kube_fields import after_update
from support.kube_objects import ApiError, timestamp

Object = dict[str, Any]
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Resource:
    """A kind of object and where it is served.

    :param group: API group, empty for core
    :param versions: served versions, the stored one first
    :param plural: name in paths
    :param kind: kind
    :param namespaced: whether objects live in a namespace
    :param status: whether ``/status`` is an endpoint of its own
    :param columns: ``additionalPrinterColumns``: dicts with name, type, jsonPath
    :param fields: what a fieldSelector may name, besides metadata.name and metadata.namespace
    :param custom: defined by a CRD
    """

    group: str
    versions: tuple[str, ...]
    plural: str
    kind: str
    namespaced: bool = True
    status: bool = True
    columns: tuple[Mapping[str, Any], ...] = ()
    fields: tuple[str, ...] = ()
    custom: bool = True

    @property
    def key(self) -> Key:
        return self.group, self.plural

    @property
    def title(self) -> str:
        """``rayjobs.ray.io``, ``pods``."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def api_version(self, version: str | None = None) -> str:
        version = version or self.versions[0]
        return f"{self.group}/{version}" if self.group else version


_AGE = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
_EVENT_FIELDS = tuple(f"involvedObject.{name}" for name in ("kind", "name", "namespace", "uid", "fieldPath"))
BUILT_IN = (
    Resource("", ("v1",), "namespaces", "Namespace", namespaced=False, columns=(_AGE,), custom=False),
    Resource(
        *("", ("v1",), "pods", "Pod"),
        columns=({"name": "Status", "type": "string", "jsonPath": ".status.phase"}, _AGE),
        fields=("status.phase", "spec.nodeName"),
        custom=False,
    ),
    Resource(
        "", ("v1",), "events", "Event", status=False, fields=(*_EVENT_FIELDS, "reason", "type", "source"), custom=False
    ),
    Resource("", ("v1",), "secrets", "Secret", status=False, fields=("type",), columns=(_AGE,), custom=False),
    Resource("", ("v1",), "services", "Service", columns=(_AGE,), custom=False),
    Resource("coordination.k8s.io", ("v1",), "leases", "Lease", status=False, columns=(_AGE,), custom=False),
    Resource("discovery.k8s.io", ("v1",), "endpointslices", "EndpointSlice", status=False, custom=False),
    Resource("batch", ("v1",), "jobs", "Job", fields=("status.successful",), columns=(_AGE,), custom=False),
)


def _columns(*pairs: tuple[str, str]) -> tuple[Mapping[str, Any], ...]:
    return tuple({"name": name, "type": "string", "jsonPath": path} for name, path in pairs)


_RAYJOB_COLUMNS = _columns(
    ("job status", ".status.jobStatus"),
    ("deployment status", ".status.jobDeploymentStatus"),
    ("ray cluster name", ".status.rayClusterName"),
    ("start time", ".status.startTime"),
    ("end time", ".status.endTime"),
)
#: Served when no CRDs are at hand: the same names, without schemas.
WITHOUT_SCHEMA = (
    Resource("ray.io", ("v1",), "rayjobs", "RayJob", columns=(*_RAYJOB_COLUMNS, {**_AGE, "name": "age"})),
    Resource("ray.io", ("v1",), "rayclusters", "RayCluster", columns=_columns(("status", ".status.state"))),
    Resource("ray.io", ("v1",), "rayservices", "RayService"),
    Resource("kueue.x-k8s.io", ("v1beta2", "v1beta1"), "workloads", "Workload", columns=(_AGE,)),
    Resource("kueue.x-k8s.io", ("v1beta2", "v1beta1"), "localqueues", "LocalQueue"),
    Resource("kueue.x-k8s.io", ("v1beta2", "v1beta1"), "clusterqueues", "ClusterQueue", namespaced=False),
    Resource("scheduling.volcano.sh", ("v1beta1",), "podgroups", "PodGroup", status=False),
    Resource("scheduling.volcano.sh", ("v1beta1",), "queues", "Queue", namespaced=False),
    Resource("serving.kserve.io", ("v1beta1",), "inferenceservices", "InferenceService"),
    Resource("gateway.networking.k8s.io", ("v1", "v1beta1"), "httproutes", "HTTPRoute"),
    Resource("gateway.networking.k8s.io", ("v1", "v1beta1"), "gateways", "Gateway"),
)


@dataclasses.dataclass(frozen=True)
class Change:
    """One entry of a resource's history: ``old`` is None for an added object."""

    version: int
    type: str
    new: Object
    old: Object | None


class Store:
    """Objects by resource, namespace and name; every write is one version.

    Objects kept here are never changed in place, so readers need no copies. All methods may be called from any thread.

    :param crds: schemas; None leaves custom objects unchecked
    :param clock: monotonic seconds
    """

    def __init__(self, crds: CrdSchemas | None, clock: Callable[[], float]) -> None:
        self.crds, self.lock = crds, threading.RLock()
        self._clock, self._epoch = clock, time.time() - clock()
        self.version = 100
        self.objects: dict[Key, dict[tuple[str, str], Object]] = {}
        self.history: dict[Key, list[Change]] = {}
        self.compacted = 0
        self.listeners: list[Callable[[], None]] = []
        self.logs: dict[tuple[str, str], list[tuple[float, str, str]]] = {}
        self._dependents: dict[str, set[tuple[Key, str, str]]] = {}
        self._uids: dict[str, tuple[Key, str, str]] = {}
        self._resources: dict[Key, Resource] = {item.key: item for item in BUILT_IN}
        if crds is None:
            self._resources |= {item.key: item for item in WITHOUT_SCHEMA}

    # What is served

    def resources(self) -> list[Resource]:
        """Everything that is served."""
        with self.lock:
            return self._served()

    def _served(self) -> list[Resource]:
        for definition in self.crds.kinds if self.crds else ():
            self.resource(definition.group, definition.plural)
        return list(self._resources.values())

    def resource(self, group: str, name: str) -> Resource | None:
        """A resource by group and plural, or by kind."""
        with self.lock:
            return self._resource(group, name)

    def _resource(self, group: str, name: str) -> Resource | None:
        for item in self._resources.values():
            if item.group == group and name in (item.plural, item.kind):
                return item
        # A CRD's file takes half a second to parse, so each is read when it is asked for.
        for definition in self.crds.kinds if self.crds else ():
            if definition.group == group and name in (definition.plural, definition.kind):
                versions = tuple(definition.versions)
                item = Resource(
                    group,
                    versions,
                    definition.plural,
                    definition.kind,
                    definition.namespaced,
                    definition.has_status(versions[0]),
                    tuple(definition.columns(versions[0])),
                )
                return self._resources.setdefault(item.key, item)
        return None

    def named(self, name: str) -> Resource:
        """A resource by its kind or plural alone, for tests."""
        with self.lock:
            groups = [item.group for item in self._resources.values()]
        for definition in self.crds.kinds if self.crds else ():
            groups.append(definition.group)
        for group in dict.fromkeys(groups):
            if found := self.resource(group, name):
                return found
        raise KeyError(f"no resource or kind {name!r} is served")

    # Time and reading

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._epoch + self._clock()

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        with self.lock:
            found = self.objects.get(resource.key, {}).get((namespace, name))
        if found is None:
            raise ApiError(404, f'{resource.title} "{name}" not found', details=_details(resource, name))
        return found

    def find(self, resource: Resource, namespace: str, name: str) -> Object | None:
        with self.lock:
            return self.objects.get(resource.key, {}).get((namespace, name))

    def items(self, resource: Resource, namespace: str | None) -> tuple[list[Object], int]:
        """Objects in the order of their names, and the store's version."""
        with self.lock:
            found = self.objects.get(resource.key, {})
            items = [found[key] for key in sorted(found) if namespace is None or key[0] == namespace]
            return items, self.version

    def changes(self, resource: Resource, since: int) -> tuple[list[Change], int]:
        """What happened to a resource after version ``since``, and the store's version."""
        with self.lock:
            history = self.history.get(resource.key, [])
            first = bisect.bisect_right(history, since, key=lambda change: change.version)
            return history[first:], self.version

    def refuse_compacted(self, since: int) -> None:
        """A watch cannot begin where the history is forgotten."""
        if since < self.compacted:
            raise ApiError(410, f"too old resource version: {since} ({self.compacted})")

    def compact(self) -> None:
        """Forget the history: a new watch from an older version is refused with 410, open ones go on."""
        with self.lock:
            self.version += 1
            self.compacted = self.version

    # Writing

    def create(
        self, resource: Resource, namespace: str, obj: Object, *, manager: str = "", dry_run: bool = False
    ) -> Object:
        """Store a new object; the caller has checked it against its schema.

        :param manager: who is recorded in ``managedFields``; empty: what the object says
        """
        meta = dict(obj.get("metadata") or {})
        if not meta.get("name"):
            meta["name"] = meta.get("generateName", "") + uuid.uuid4().hex[:5]
        name = meta["name"]
        with self.lock:
            if (namespace, name) in self.objects.get(resource.key, {}):
                message = f'{resource.title} "{name}" already exists'
                raise ApiError(409, message, reason="AlreadyExists", details=_details(resource, name))
            if resource.namespaced and not self.find(self._resources["", "namespaces"], "", namespace):
                details = {"name": namespace, "kind": "namespaces"}
                raise ApiError(404, f'namespaces "{namespace}" not found', details=details)
            for key in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion"):
                meta.pop(key, None)
            meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": timestamp(self.now()), "generation": 1}
            if resource.namespaced:
                meta["namespace"] = namespace
            new = {"apiVersion": resource.api_version(), "kind": resource.kind, **obj, "metadata": meta}
            if resource.status and resource.custom:
                new.pop("status", None)
            if manager:
                meta["managedFields"] = after_update(None, new, manager, resource.api_version(), self.now())
            if dry_run:
                return new
            return self._write(resource, namespace, name, None, new)

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        make: Callable[[Object], Object],
        *,
        status: bool = False,
        check: Callable[[Object], Object] = lambda obj: obj,
        manager: str = "",
        dry_run: bool = False,
    ) -> Object:
        """Replace an object by what ``make`` returns for a copy of it.

        A resourceVersion in that must be the stored one. Through ``/status`` only the status changes, elsewhere
        everything but the status.
        """
        with self.lock:
            old = self.get(resource, namespace, name)
            new = make(copy.deepcopy(old))
            self._refuse_stale(resource, old, new.get("metadata") or {})
            new = self._combine(resource, old, new, status)
            new = check(new)
            if manager and not status:
                fields = after_update(old, new, manager, resource.api_version(), self.now())
                new["metadata"]["managedFields"] = fields
            if new == old:
                return old
            if dry_run:
                return new
            if not status and _content(new) != _content(old):
                new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
            return self._write(resource, namespace, name, old, new)

    def _refuse_stale(self, resource: Resource, old: Object, meta: Mapping[str, Any]) -> None:
        name, stored = old["metadata"]["name"], old["metadata"]
        if meta.get("name", name) != name:
            message = f"the name of the object ({meta['name']}) does not match the name on the URL ({name})"
            raise ApiError(400, message)
        if meta.get("uid") not in (None, "", stored["uid"]):
            raise conflict(
                resource,
                name,
                f"Precondition failed: UID in precondition: {meta['uid']}, UID in object meta: {stored['uid']}",
            )
        if meta.get("resourceVersion") not in (None, "", stored["resourceVersion"]):
            raise conflict(
                resource,
                name,
                "the object has been modified; please apply your changes to the latest version and try again",
            )
        added = set(meta.get("finalizers") or ()) - set(stored.get("finalizers") or ())
        if stored.get("deletionTimestamp") and added:
            message = (
                f'{resource.kind}.{resource.group} "{name}" is invalid: metadata.finalizers: Forbidden: '
                f"no new finalizers can be added if the object is being deleted, found new finalizers {sorted(added)}"
            )
            raise ApiError(422, message, details=_details(resource, name))

    def _combine(self, resource: Resource, old: Object, new: Object, status: bool) -> Object:
        if status:
            result = {key: value for key, value in old.items() if key != "status"}
            if "status" in new:
                result["status"] = new["status"]
            return {**result, "metadata": dict(old["metadata"])}
        meta = {key: value for key, value in (new.get("metadata") or {}).items() if value not in (None, {}, [])}
        for key in _SYSTEM_FIELDS:
            meta.pop(key, None)
            if key in old["metadata"]:
                meta[key] = old["metadata"][key]
        result = {**new, "apiVersion": old["apiVersion"], "kind": old["kind"], "metadata": meta}
        if resource.status:
            result.pop("status", None)
            if "status" in old:
                result["status"] = old["status"]
        return result

    def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        preconditions: Mapping[str, str] | None = None,
        grace: int | None = None,
        policy: str = "Background",
        dry_run: bool = False,
    ) -> tuple[Object, bool]:
        """Delete an object or mark it as being deleted; returns it and whether it is gone."""
        with self.lock:
            old = self.get(resource, namespace, name)
            meta = dict(old["metadata"])
            for field, title in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
                wanted = (preconditions or {}).get(field)
                if wanted and wanted != meta[field]:
                    found = f"does not match the {title} in record ({meta[field]}). The object might have been modified"
                    raise conflict(resource, name, f"the {title} in the precondition ({wanted}) {found}")
            grace = self._grace(resource, old, grace)
            finalizers = [*meta.get("finalizers", [])]
            if policy in ("Foreground", "Orphan") and not meta.get("deletionTimestamp"):
                finalizers.append("foregroundDeletion" if policy == "Foreground" else "orphan")
            if dry_run:
                return old, not finalizers and not grace
            if not finalizers and not grace:
                self._remove(resource, namespace, name)
                return old, True
            before = meta.get("deletionGracePeriodSeconds")
            if not meta.get("deletionTimestamp") or (grace or 0) < (before or 0):
                meta |= {"deletionTimestamp": timestamp(self.now() + grace), "deletionGracePeriodSeconds": grace}
                meta |= {"generation": meta.get("generation", 1) + 1}
                if finalizers:
                    meta["finalizers"] = finalizers
                self._write(resource, namespace, name, old, {**old, "metadata": meta})
            self._serve_finalizers(meta["uid"])
            left = self.find(resource, namespace, name)
            return left or old, left is None

    @staticmethod
    def _grace(resource: Resource, obj: Object, grace: int | None) -> int:
        # Only a pod on a node is stopped gracefully: there is someone to stop it.
        if resource.plural != "pods" or not obj.get("spec", {}).get("nodeName"):
            return 0
        if obj.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            return 0
        return obj["spec"].get("terminationGracePeriodSeconds", 30) if grace is None else grace

    def put(self, resource: Resource, namespace: str, name: str, change: Mapping[str, Any]) -> Object:
        """Replace top-level fields of an object without any rule: the hand of a controller or a kubelet."""
        with self.lock:
            old = self.get(resource, namespace, name)
            new = {**old, **copy.deepcopy(dict(change))}
            new["metadata"] = dict(new["metadata"])
            return old if new == old else self._write(resource, namespace, name, old, new)

    def remove(self, resource: Resource, namespace: str, name: str) -> None:
        """Remove an object now, whatever its finalizers."""
        with self.lock:
            self.get(resource, namespace, name)
            self._remove(resource, namespace, name)

    def _write(self, resource: Resource, namespace: str, name: str, old: Object | None, new: Object) -> Object:
        self.version += 1
        new["metadata"]["resourceVersion"] = str(self.version)
        self.objects.setdefault(resource.key, {})[namespace, name] = new
        place, uid = (resource.key, namespace, name), new["metadata"]["uid"]
        self._uids[uid] = place
        self._link(place, old, new)
        self._record(resource, "MODIFIED" if old else "ADDED", new, old)
        if new["metadata"].get("deletionTimestamp") and not new["metadata"].get("finalizers"):
            if not new["metadata"].get("deletionGracePeriodSeconds"):
                self._remove(resource, namespace, name)
        elif new["metadata"].get("ownerReferences") and not self._owners(new):
            self.delete(resource, namespace, name)
        return new

    def _link(self, place: tuple[Key, str, str], old: Object | None, new: Object | None) -> None:
        for obj, add in ((old, False), (new, True)):
            for owner in (obj or {"metadata": {}})["metadata"].get("ownerReferences") or ():
                dependents = self._dependents.setdefault(owner["uid"], set())
                dependents.add(place) if add else dependents.discard(place)

    def _owners(self, obj: Object) -> list[Any]:
        return [owner for owner in obj["metadata"].get("ownerReferences") or () if owner["uid"] in self._uids]

    def _remove(self, resource: Resource, namespace: str, name: str) -> None:
        old = self.objects[resource.key].pop((namespace, name), None)
        if old is None:
            return
        self.version += 1
        gone = {**old, "metadata": {**old["metadata"], "resourceVersion": str(self.version)}}
        uid, place = old["metadata"]["uid"], (resource.key, namespace, name)
        self._uids.pop(uid, None)
        self._link(place, old, None)
        if resource.plural == "pods":
            self.logs.pop((namespace, name), None)
        self._record(resource, "DELETED", gone, old)
        if resource.plural == "namespaces":
            for key, found in list(self.objects.items()):
                for inner_namespace, inner in [item for item in found if item[0] == name]:
                    self._remove(self._resources[key], inner_namespace, inner)
        for dependent in sorted(self._dependents.pop(uid, ())):
            self._collect(dependent)
        for owner in old["metadata"].get("ownerReferences") or ():
            self._serve_finalizers(owner["uid"])

    def _collect(self, place: tuple[Key, str, str]) -> None:
        """Garbage collection: an object whose owners are all gone goes as well."""
        key, namespace, name = place
        obj = self.objects.get(key, {}).get((namespace, name))
        if obj is not None and not self._owners(obj) and not obj["metadata"].get("deletionTimestamp"):
            self.delete(self._resources[key], namespace, name)

    def _serve_finalizers(self, uid: str) -> None:
        """The garbage collector's two finalizers: wait for the dependents, or let go of them."""
        place = self._uids.get(uid)
        if place is None:
            return
        key, namespace, name = place
        obj = self.objects[key][namespace, name]
        finalizers = obj["metadata"].get("finalizers") or []
        if "orphan" in finalizers:
            for dependent_key, dependent_namespace, dependent in sorted(self._dependents.get(uid, ())):
                found = self.objects[dependent_key][dependent_namespace, dependent]
                owners = [owner for owner in found["metadata"]["ownerReferences"] if owner["uid"] != uid]
                meta = {key: value for key, value in found["metadata"].items() if key != "ownerReferences"}
                meta |= {"ownerReferences": owners} if owners else {}
                self._write(
                    self._resources[dependent_key], dependent_namespace, dependent, found, {**found, "metadata": meta}
                )
        elif "foregroundDeletion" in finalizers:
            for dependent_key, dependent_namespace, dependent in sorted(self._dependents.get(uid, ())):
                waiting = self.objects[dependent_key].get((dependent_namespace, dependent))
                if waiting and not waiting["metadata"].get("deletionTimestamp"):
                    self.delete(self._resources[dependent_key], dependent_namespace, dependent, policy="Foreground")
            if self._dependents.get(uid):
                return
        else:
            return
        current = self.objects[key].get((namespace, name))
        if current is not None:
            kept = [item for item in finalizers if item not in ("orphan", "foregroundDeletion")]
            meta = {**current["metadata"], "finalizers": kept}
            self._write(self._resources[key], namespace, name, current, {**current, "metadata": meta})

    def _record(self, resource: Resource, kind: str, new: Object, old: Object | None) -> None:
        self.history.setdefault(resource.key, []).append(Change(self.version, kind, new, old))
        for listener in self.listeners:
            listener()


#: Fields of metadata that a client cannot change.
_SYSTEM_FIELDS: Sequence[str] = (
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "resourceVersion",
    "name",
    "namespace",
    "selfLink",
)


def _content(obj: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in obj.items() if key not in ("metadata", "status")}


def _details(resource: Resource, name: str) -> dict[str, Any]:
    return {"name": name, **({"group": resource.group} if resource.group else {}), "kind": resource.plural}


def conflict(resource: Resource, name: str, message: str) -> ApiError:
    """HTTP 409 of a write that another one overtook."""
    text = f'Operation cannot be fulfilled on {resource.title} "{name}": {message}'
    return ApiError(409, text, details=_details(resource, name))
