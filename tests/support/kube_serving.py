"""What serves models in a cluster, for tests: KServe's controllers in both modes, Knative, a Gateway.

One :meth:`Serving.step` reconciles everything once, so that a test's own waiting is what lets time pass. The rules are
those of KServe's sources: ``createKnativeService`` and ``PropagateStatus``, with what they do when a revision shares
traffic with itself, ``applyCanaryWeights``, and that an InferenceService's annotations go into the pods.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from support.kube_api import KubeApi
from support.kube_objects import ApiError, timestamp

from airflow_mlops.rollout.targets.kube import VERSION_LABEL

Object = dict[str, Any]
GATEWAY = "infra/gateway"
MODE = "serving.kserve.io/deploymentMode"


class FakeTime:
    """A clock that only waiting moves.

    :param each: called at each wait, with its seconds
    """

    def __init__(self, each: Callable[[], None] = lambda: None, now: float = 1_800_000_000.0) -> None:
        self.now, self.each = now, each
        self.waits = 0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits += 1
        self.each()


@dataclasses.dataclass
class Pods:
    """A revision or a Deployment.

    :param template: what its pods are made of
    :param born: step at which that was set
    :param restarts: how often it changed
    """

    name: str
    template: str
    uri: str
    version: str
    born: int
    replicas: int = 1
    restarts: int = 0


class Serving:
    """The controllers.

    :param api: the stand-in API server
    :param weights: whether KServe's release gives canaries weights in Standard mode
    :param gateway_api: whether KServe makes HTTPRoutes
    :param startup: steps until pods are ready
    :param lag: steps until a gateway has seen a route
    :ivar broken: storage URIs of models that fail to load
    :ivar refusal: why gateways refuse routes, empty: they do not
    """

    def __init__(
        self, api: KubeApi, *, weights: bool = True, gateway_api: bool = True, startup: int = 2, lag: int = 1
    ) -> None:
        self.api, self.weights, self.gateway_api, self.startup, self.lag = api, weights, gateway_api, startup, lag
        self.broken: set[str] = set()
        self.refusal = ""
        self.steps = 0
        self.revisions: dict[str, list[Pods]] = {}
        self.deployments: dict[str, dict[str, Pods]] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._accepted: dict[str, Object] = {}

    def step(self) -> None:
        """Every controller looks once."""
        self.steps += 1
        for isvc in self.api.list("InferenceService"):
            mode = (isvc["metadata"].get("annotations") or {}).get(MODE, "Standard")
            with contextlib.suppress(ApiError):
                if mode in ("Knative", "Serverless"):
                    self._knative(isvc)
                else:
                    self._standard(isvc)
        alive = {isvc["metadata"]["uid"] for isvc in self.api.list("InferenceService")}
        for uid in set(self.deployments) - alive:
            del self.deployments[uid]
        for route in self.api.list("HTTPRoute"):
            with contextlib.suppress(ApiError):
                self._gateway(route)

    def settle(self, steps: int = 12) -> None:
        """Let them all finish."""
        for _ in range(steps):
            self.step()

    # What tests ask

    def split(self, name: str) -> dict[str, float]:
        """Where traffic really goes: model version to percent, of a route or of an InferenceService in Knative mode."""
        found: dict[str, float] = {}
        isvc = self.api.get("InferenceService", "default", name)
        if isvc is not None and isvc["metadata"]["uid"] in self.revisions:
            versions = {pods.name: pods.version for pods in self.revisions[isvc["metadata"]["uid"]]}
            for each in isvc["status"]["components"]["predictor"]["traffic"]:
                version = versions[each["revisionName"]]
                found[version] = found.get(version, 0) + each["percent"]
        elif route := self._accepted.get(name):
            refs = route["rules"][0]["backendRefs"]
            total = sum(ref.get("weight", 1) for ref in refs)
            for ref in refs:
                version = self.serves(ref["name"])
                found[version] = found.get(version, 0) + 100 * ref.get("weight", 1) / total
        return {version: percent for version, percent in found.items() if percent}

    def copies(self, name: str) -> list[str]:
        """Which versions get copies of a route's requests."""
        filters = self._accepted[name]["rules"][0].get("filters") or ()
        mirrored = [each["requestMirror"]["backendRef"]["name"] for each in filters if each["type"] == "RequestMirror"]
        return [self.serves(service) for service in mirrored]

    def serves(self, service: str) -> str:
        """The version behind a Service."""
        for deployments in self.deployments.values():
            if service in deployments:
                return deployments[service].version
        found = self.api.get("Service", "default", service)
        return found["metadata"]["labels"][VERSION_LABEL] if found else f"nothing behind {service}"

    def restarts(self) -> int:
        """How often pods of Deployments had to start anew."""
        return sum(pods.restarts for found in self.deployments.values() for pods in found.values())

    # Pods

    def _ready(self, pods: Pods) -> bool:
        return pods.replicas > 0 and pods.uri not in self.broken and self.steps - pods.born >= self.startup

    def _failed(self, pods: Pods) -> bool:
        return pods.uri in self.broken and self.steps - pods.born >= self.startup

    def _model_status(self, pods: Pods) -> Object:
        if self._failed(pods):
            info = {"reason": "ModelLoadFailed", "message": f"cannot read {pods.uri}"}
            states = {"activeModelState": "Loaded", "targetModelState": "FailedToLoad"}
            return {"transitionStatus": "BlockedByFailedLoad", "lastFailureInfo": info, "states": states}
        if self._ready(pods):
            return {"transitionStatus": "UpToDate", "states": {"activeModelState": "Loaded"}}
        return {"transitionStatus": "InProgress", "states": {"activeModelState": "Loaded"}}

    def _pods(self, isvc: Object, predictor: Mapping[str, Any], name: str) -> Pods:
        template = {
            key: value for key, value in predictor.items() if key not in ("canaryTrafficPercent", "minReplicas")
        }
        template["model"] = {key: value for key, value in predictor["model"].items() if value != ""}
        text = json.dumps([template, isvc["metadata"].get("annotations")], sort_keys=True)
        version = (predictor.get("labels") or {}).get(VERSION_LABEL, "")
        return Pods(name, text, predictor["model"]["storageUri"], version, self.steps)

    # Knative mode

    def _knative(self, isvc: Object) -> None:
        predictor, name = isvc["spec"]["predictor"], isvc["metadata"]["name"]
        revisions = self.revisions.setdefault(isvc["metadata"]["uid"], [])
        wanted = self._pods(isvc, predictor, f"{name}-predictor-{len(revisions) + 1:05d}")
        if not revisions or revisions[-1].template != wanted.template:
            revisions.append(wanted)
        old = ((isvc.get("status") or {}).get("components") or {}).get("predictor") or {}
        created, ready = revisions[-1], [pods for pods in revisions if self._ready(pods)]
        percent, rolled = predictor.get("canaryTrafficPercent"), old.get("latestRolledoutRevision", "")
        targets: list[Object] = [{"latestRevision": True, "percent": 100}]
        if percent is not None and rolled:
            targets = [{"latestRevision": True, "percent": percent}]
            if percent < 100:
                rest = {"revisionName": rolled, "latestRevision": False, "percent": 100 - percent, "tag": "prev"}
                targets.append(rest)
        status: Object = {"latestCreatedRevision": created.name}
        traffic: list[Object] = old.get("traffic") or []
        if ready:
            newest = ready[-1].name
            traffic = [{**each, "revisionName": each.get("revisionName") or newest} for each in targets]
            status |= {"latestReadyRevision": newest, "traffic": traffic}
            status |= self._rolled_out(old, newest, created.name, traffic)
        up = bool(ready) and ready[-1] is created
        self._put(
            isvc,
            {
                "deploymentMode": "Knative",
                "components": {"predictor": status},
                "conditions": self._conditions(up, self._failed(created)),
                "modelStatus": self._model_status(created),
            },
        )

    @staticmethod
    def _rolled_out(old: Mapping[str, Any], newest: str, created: str, traffic: list[Object]) -> Object:
        now = {key: old[key] for key in ("latestRolledoutRevision", "previousRolledoutRevision") if old.get(key)}
        total = sum(each["percent"] for each in traffic if each["revisionName"] == newest)
        for each in traffic:
            if each["revisionName"] != newest or not each["latestRevision"]:
                continue
            if now.get("latestRolledoutRevision") != newest:
                if each["percent"] == 100:
                    before = now.get("latestRolledoutRevision")
                    now = {
                        "latestRolledoutRevision": newest,
                        **({"previousRolledoutRevision": before} if before else {}),
                    }
            elif newest == created and each["percent"] < 100 and total == 100 and "previousRolledoutRevision" in now:
                now["latestRolledoutRevision"] = now["previousRolledoutRevision"]
        return now

    def _conditions(self, up: bool, failed: bool, routed: bool = True) -> list[Object]:
        state = "True" if up else "False" if failed else "Unknown"
        reason = {} if up else {"reason": "RevisionFailed" if failed else "Deploying", "message": "pods are not ready"}
        ingress = {"status": "True"} if routed else {"status": "False", "reason": "HttpRouteNotReady"}
        return [
            {"type": "PredictorReady", "status": state, **reason},
            {"type": "IngressReady", **ingress},
            {"type": "Ready", **({"status": state, **reason} if routed else ingress)},
        ]

    def _routed(self, name: str) -> bool:
        return not self.gateway_api or name in self._accepted

    def _put(self, isvc: Object, status: Object) -> None:
        now = self.api.get("InferenceService", isvc["metadata"]["namespace"], isvc["metadata"]["name"])
        if now is None or now.get("status") == status:
            return
        if self.api.crds is not None:
            wrong = self.api.crds.errors({**now, "status": status})
            assert not wrong, wrong
        self.api.put_status("InferenceService", now["metadata"]["namespace"], now["metadata"]["name"], status)

    # Standard mode

    def _standard(self, isvc: Object) -> None:
        spec, name = isvc["spec"], isvc["metadata"]["name"]
        there = self.deployments.setdefault(isvc["metadata"]["uid"], {})
        wanted: dict[str, Pods] = {}
        stable = self._deployment(isvc, spec["predictor"], 100)
        wanted[stable.name] = stable
        canaries = []
        for each in spec.get("canary") or ():
            pods = self._deployment(isvc, each["predictor"], each["trafficPercent"])
            wanted[pods.name] = pods
            canaries.append((each, pods.name))
        for service in set(there) - set(wanted):
            del there[service]
        for service, pods in wanted.items():
            old = there.get(service)
            if old is None:
                there[service] = pods
            elif old.template != pods.template:
                there[service] = dataclasses.replace(pods, restarts=old.restarts + 1)
            else:
                old.replicas = pods.replicas
        up = self._ready(there[stable.name])
        statuses = [
            {
                "name": each["predictor"]["name"],
                "ready": self._ready(there[service]),
                # It echoes the request, whatever gets traffic.
                "trafficPercent": each["trafficPercent"],
                "modelStatus": self._model_status(there[service]),
            }
            for each, service in canaries
        ]
        status = {
            "deploymentMode": "Standard",
            "components": {"predictor": {}},
            "conditions": self._conditions(up, self._failed(there[stable.name]), self._routed(name)),
            "modelStatus": self._model_status(there[stable.name]),
            **({"canaryStatuses": statuses} if statuses else {}),
        }
        self._put(isvc, status)
        labels = isvc["metadata"].get("labels") or {}
        outside = labels.get("networking.kserve.io/visibility") != "cluster-local"
        if up and self.gateway_api and outside:
            for route in (name, f"{name}-predictor"):
                self._kserve_route(isvc, route, stable.name, [(e, s) for e, s in canaries if self._ready(there[s])])

    def _deployment(self, isvc: Object, predictor: Mapping[str, Any], percent: int) -> Pods:
        parts = (isvc["metadata"]["name"], predictor.get("name"), "predictor")
        pods = self._pods(isvc, predictor, "-".join(part for part in parts if part))
        pods.replicas = predictor.get("minReplicas", 1 if percent else 0)
        return pods

    def _kserve_route(self, isvc: Object, name: str, stable: str, canaries: list[tuple[Object, str]]) -> None:
        refs = [{"group": "", "kind": "Service", "name": stable, "port": 80, "weight": 1}]
        if canaries and self.weights:
            refs[0]["weight"] = 100 - sum(each["trafficPercent"] for each, _ in canaries)
            refs += [{**refs[0], "name": service, "weight": each["trafficPercent"]} for each, service in canaries]
        match = {"path": {"type": "RegularExpression", "value": "^/.*$"}}
        namespace, gateway = GATEWAY.split("/")
        spec = {
            "hostnames": [f"{name}-default.example.com"],
            "parentRefs": [{"name": gateway, "namespace": namespace}],
            "rules": [{"matches": [match], "backendRefs": refs}],
        }
        found = self.api.get("HTTPRoute", "default", name)
        if found is None:
            self.api.create(
                {
                    "kind": "HTTPRoute",
                    "apiVersion": "gateway.networking.k8s.io/v1",
                    "metadata": {"name": name},
                    "spec": spec,
                }
            )
        elif found["spec"] != spec:
            self.api.patch("HTTPRoute", "default", name, {"spec": spec})

    # Gateway

    def _gateway(self, route: Object) -> None:
        meta = route["metadata"]
        generation, since = self._seen.get(meta["uid"], (0, 0))
        if generation != meta["generation"]:
            self._seen[meta["uid"]] = meta["generation"], self.steps
            since = self.steps
        if self.steps - since < self.lag:
            return
        missing = [
            ref["name"]
            for rule in route["spec"]["rules"]
            for ref in rule.get("backendRefs") or ()
            if self.serves(ref["name"]).startswith("nothing")
        ]
        accepted = {"status": "False", "reason": "NoMatchingParent", "message": self.refusal} if self.refusal else {}
        resolved = {"status": "False", "reason": "BackendNotFound", "message": f"{missing}"} if missing else {}
        usual = {"status": "True", "reason": "Accepted", "message": "", "observedGeneration": meta["generation"]}
        usual["lastTransitionTime"] = timestamp(self.api.store.now())
        conditions = [
            {"type": "Accepted", **usual, **accepted},
            {"type": "ResolvedRefs", **usual, "reason": "ResolvedRefs", **resolved},
        ]
        for condition, old in zip(conditions, _old_conditions(route)):
            if {**old, "lastTransitionTime": ""} == {**condition, "lastTransitionTime": ""}:
                condition["lastTransitionTime"] = old["lastTransitionTime"]
        parent = {
            "parentRef": route["spec"]["parentRefs"][0],
            "controllerName": "example.com/gateway",
            "conditions": conditions,
        }
        if not self.refusal:
            self._accepted[meta["name"]] = copy.deepcopy(route["spec"])
        status = {"parents": [parent]}
        if route.get("status") != status:
            if self.api.crds is not None:
                assert not (wrong := self.api.crds.errors({**route, "status": status})), wrong
            self.api.put_status("HTTPRoute", meta["namespace"], meta["name"], status)


def _old_conditions(route: Object) -> list[Object]:
    parents = (route.get("status") or {}).get("parents") or [{}]
    return parents[0].get("conditions") or []


class KilledError(BaseException):
    """The process is no more."""


class MemoryClient:
    """A client without a network, for schedules with many kills: the API's own store, no schemas.

    :param api: the stand-in; it needs not be started
    :ivar patches: what was patched: (kind, name, change)
    :ivar log: the same with the number of the call
    :ivar kill: called before and after each call with its number; raises :class:`KilledError`
    """

    def __init__(self, api: KubeApi) -> None:
        self.api = api
        self.calls = 0
        self.patches: list[tuple[str, str, Object]] = []
        self.log: list[tuple[int, tuple[str, str, Object]]] = []
        self.kill: Callable[[int, bool], None] = lambda number, after: None

    async def _do(self, work: Callable[[], Any]) -> Any:
        self.calls += 1
        number = self.calls
        self.kill(number, False)
        try:
            return work()
        except ApiError as error:
            from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError

            raise (ConcurrentChangeError if error.status in (404, 409) else InvalidInputError)(error.message) from error
        finally:
            self.kill(number, True)

    def aget(self, resource: Any, name: str, *, namespace: str | None = None) -> Awaitable[Object | None]:
        return self._do(lambda: self.api.get(resource.kind, namespace or "default", name))

    def alist(self, resource: Any, selector: Any = None, *, namespace: str | None = None) -> Awaitable[Any]:
        text = ",".join(f"{key}={value}" for key, value in (selector or {}).items())
        return self._do(lambda: (self.api.list(resource.kind, namespace or "default", text), ""))

    def acreate(self, resource: Any, body: Object, *, namespace: str | None = None) -> Awaitable[Object]:
        return self._do(lambda: self.api.create(body, namespace or "default"))

    def apatch(
        self, resource: Any, name: str, change: Object, *, resource_version: str | None = None, namespace: Any = None
    ) -> Awaitable[Object]:
        from support import kube_objects

        def work() -> Object:
            found = self.api.store.named(resource.kind)
            body = copy.deepcopy(change)
            if resource_version:
                body.setdefault("metadata", {})["resourceVersion"] = resource_version
            result = self.api.store.update(
                found, namespace or "default", name, lambda old: kube_objects.merge_patch(old, body), manager="rollout"
            )
            self.patches.append((resource.kind, name, body))
            self.log.append((self.calls, self.patches[-1]))
            return copy.deepcopy(result)

        return self._do(work)

    def adelete(self, resource: Any, name: str, *, namespace: str | None = None) -> Awaitable[bool]:
        def work() -> bool:
            if self.api.get(resource.kind, namespace or "default", name) is None:
                return False
            self.api.delete(resource.kind, namespace or "default", name)
            return True

        return self._do(work)
