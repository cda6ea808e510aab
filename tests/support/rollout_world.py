"""A cluster that serves a model, and targets on it, for the tests of every kind of target alike."""

from __future__ import annotations

from typing import Any

from support.kube_api import KubeApi
from support.kube_serving import GATEWAY, FakeTime, MemoryClient, Serving

from airflow_mlops.rollout.targets.base import KubernetesTarget
from airflow_mlops.rollout.targets.factory import cluster_target
from airflow_mlops.rollout.targets.kube import VERSION_LABEL

CONFIGS: dict[str, dict[str, Any]] = {
    "gateway": {"kind": "gateway", "name": "fraud", "service": "fraud-{version}", "gateway": GATEWAY},
    "two services": {
        "kind": "kserve",
        "mode": "standard",
        "name": "fraud",
        "fallback": "http_route",
        "gateway": GATEWAY,
    },
    "standard": {"kind": "kserve", "mode": "standard", "name": "fraud"},
    "knative": {"kind": "kserve", "mode": "knative", "name": "fraud"},
}
KINDS = tuple(CONFIGS)
OWNER = "dag/canary/run/-1"


def uri(version: str) -> str:
    """Where a version of the model lies."""
    return f"s3://models/fraud/{version}"


def note(**more: Any) -> dict[str, Any]:
    """A rollout's annotation."""
    return {"owner": OWNER, "attempt": 1, **more}


class World:
    """The stand-in API server with what serves in it.

    :param api: the server
    :param kind: of target
    :param client: of the target; None: one without a network
    """

    def __init__(self, api: KubeApi, kind: str, client: Any = None, **serving: Any) -> None:
        self.api, self.kind = api, kind
        self.client = client or MemoryClient(api)
        self.serving = Serving(api, **serving)
        self.time = FakeTime(self.serving.step)
        for version in ("1", "2", "3") if kind == "gateway" else ():
            self.service(version)

    def service(self, version: str, *, ready: bool = True) -> None:
        """A Service with an address behind it."""
        name = f"fraud-v{version}"
        if self.api.get("Service", "default", name) is None:
            self.api.create({"kind": "Service", "metadata": {"name": name, "labels": {VERSION_LABEL: version}}})
            labels = {"kubernetes.io/service-name": name}
            self.api.create({"kind": "EndpointSlice", "metadata": {"name": f"{name}-x", "labels": labels}})
        endpoints = [{"addresses": ["10.0.0.1"], "conditions": {"ready": ready}}]
        self.api.patch("EndpointSlice", "default", f"{name}-x", {"endpoints": endpoints})

    def target(self, client: Any = None, *, config: dict[str, Any] | None = None, **options: Any) -> KubernetesTarget:
        """A fresh target, as another process would make it."""
        given = {"ready_timeout": 60.0, "weight_timeout": 30.0, **CONFIGS[self.kind], **(config or {})}
        options = {"clock": self.time.clock, "sleep": self.time.sleep, **options}
        return cluster_target(given, client or self.client, **options)

    async def rolling(self, weight: float = 5, owner: str = OWNER) -> KubernetesTarget:
        """A target in the middle of a rollout from version 1 to 2."""
        target = self.target()
        await target.deploy("1", uri("1"))
        await target.claim(owner, 60)
        await target.load("2", uri("2"))
        await target.split("2", weight, note(owner=owner))
        return target

    def split(self) -> dict[str, float]:
        """Where traffic really goes, once every controller has looked."""
        self.serving.settle()
        return self.serving.split("fraud")

    def patches(self, kind: str) -> list[dict[str, Any]]:
        """What was patched of the objects of a kind, by a client without a network."""
        return [change for found, _, change in self.client.patches if found == kind]

    def meddle(self, percent: int = 50) -> None:
        """Somebody else changes the split."""
        if self.kind == "knative":
            change = {"spec": {"predictor": {"canaryTrafficPercent": percent}}}
            self._as_kubectl("InferenceService", change)
        elif self.kind == "standard":
            canary = self.api.get("InferenceService", "default", "fraud")["spec"]["canary"]
            change = {"spec": {"canary": [{**canary[0], "trafficPercent": percent}]}}
            self._as_kubectl("InferenceService", change)
        else:
            rules = self.api.get("HTTPRoute", "default", "fraud")["spec"]["rules"]
            refs = rules[0]["backendRefs"]
            weights = [100 - percent, percent]
            rules[0]["backendRefs"] = [{**ref, "weight": weight} for ref, weight in zip(refs, weights)]
            self._as_kubectl("HTTPRoute", {"spec": {"rules": rules}})

    def _as_kubectl(self, kind: str, change: dict[str, Any]) -> None:
        from support import kube_objects

        store = self.api.store
        store.update(
            store.named(kind),
            "default",
            "fraud",
            lambda old: kube_objects.merge_patch(old, change),
            manager="kubectl-edit",
        )
