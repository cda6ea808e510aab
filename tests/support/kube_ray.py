"""The objects that belong to a RayJob, as KubeRay makes, names and labels them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from support.kube_api import KubeApi
from support.kube_http import ProxyRequest
from support.kube_objects import ApiError, merge_patch, timestamp
from support.kube_pods import Driver
from support.kube_store import Object


class GoneError(Exception):
    """The RayJob was removed."""


class Job:
    """One RayJob and what belongs to it."""

    def __init__(self, api: KubeApi, rayjob: Object) -> None:
        self.api, self.first = api, rayjob
        meta = rayjob["metadata"]
        self.name, self.namespace, self.uid = meta["name"], meta["namespace"], meta["uid"]
        self.key = f"{self.namespace}/{self.name}"
        self.labels: Mapping[str, str] = meta.get("labels") or {}
        self.annotations: Mapping[str, str] = meta.get("annotations") or {}
        self.spec: Mapping[str, Any] = rayjob.get("spec") or {}
        self._resource = api.store.named("RayJob")

    def get(self) -> Object:
        """The RayJob as it is now."""
        found = self.api.store.find(self._resource, self.namespace, self.name)
        if found is None or found["metadata"]["uid"] != self.uid:
            raise GoneError
        return found

    def deployment(self) -> str:
        return (self.get().get("status") or {}).get("jobDeploymentStatus", "")

    def suspended(self) -> bool:
        return bool(self.get()["spec"].get("suspend"))

    def status(self, **values: Any) -> None:
        """Change fields of the status."""
        with self.api.store.lock:
            self.replace_status({**(self.get().get("status") or {}), **values})

    def replace_status(self, status: Mapping[str, Any]) -> None:
        with self.api.store.lock:
            self.get()
            self.api.store.put(self._resource, self.namespace, self.name, {"status": dict(status)})

    def fail(self, reason: str, message: str) -> None:
        end = timestamp(self.api.store.now())
        self.status(jobDeploymentStatus="Failed", reason=reason, message=message, failed=1, endTime=end)

    def edit(self, patch: Mapping[str, Any]) -> None:
        """Merge-patch the RayJob with the rules of the API."""
        with self.api.store.lock:
            self.get()
            self.api.store.update(self._resource, self.namespace, self.name, lambda old: merge_patch(old, patch))

    def owner(self) -> dict[str, Any]:
        return _reference(self.first)

    def event(self, reason: str, message: str, kind: str = "Normal", cluster: str = "") -> None:
        about, name = ("RayCluster", cluster) if cluster else ("RayJob", self.name)
        self.api.add_event(about, name, reason, message, namespace=self.namespace, type=kind)

    def cluster_spec(self) -> Mapping[str, Any]:
        return self.spec.get("rayClusterSpec") or {"headGroupSpec": {}}

    def groups(self) -> list[Mapping[str, Any]]:
        return list(self.cluster_spec().get("workerGroupSpecs") or ())

    def create_cluster(self, cluster: str) -> None:
        labels = {
            **self.labels,
            "ray.io/job-submission-mode": self.spec.get("submissionMode", "K8sJobMode"),
            "ray.io/originated-from-cr-name": self.name,
            "ray.io/originated-from-crd": "RayJob",
        }
        meta: Object = {"name": cluster, "labels": labels, "annotations": dict(self.annotations)}
        meta["ownerReferences"] = [self.owner()]
        self.api.create({"kind": "RayCluster", "metadata": meta, "spec": dict(self.cluster_spec())}, self.namespace)
        self.event("CreatedRayCluster", f"Created RayCluster {self.namespace}/{cluster}")

    def cluster_ready(self, cluster: str) -> None:
        with contextlib.suppress(ApiError):
            self.api.put_status("RayCluster", self.namespace, cluster, {"state": "ready"})

    def create_pod(self, cluster: str, role: str, group: str, spec: Mapping[str, Any], scheduler: str) -> Object:
        owner = self.api.get("RayCluster", self.namespace, cluster)
        if owner is None:
            raise GoneError
        template = spec.get("template") or {}
        labels = {
            **((template.get("metadata") or {}).get("labels") or {}),
            "app.kubernetes.io/created-by": "kuberay-operator",
            "app.kubernetes.io/name": "kuberay",
            "ray.io/cluster": cluster,
            "ray.io/group": group,
            "ray.io/identifier": f"{cluster}-{role}",
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": role,
        }
        infix = "head" if role == "head" else f"{group}-worker"
        meta = {"generateName": f"{cluster}-{infix}-", "labels": labels, "ownerReferences": [_reference(owner)]}
        meta["annotations"] = dict((template.get("metadata") or {}).get("annotations") or {})
        pod_spec = {"containers": [{"name": f"ray-{role}", "image": "ray"}], **(template.get("spec") or {})}
        if scheduler:
            pod_spec["schedulerName"] = scheduler
        pod = {"kind": "Pod", "metadata": meta, "spec": pod_spec, "status": {"phase": "Pending"}}
        created = self.api.create(pod, self.namespace)
        what = "CreatedHeadPod" if role == "head" else "CreatedWorkerPod"
        self.event(what, f"Created {role} Pod {self.namespace}/{created['metadata']['name']}", cluster=cluster)
        return created

    def create_submitter(self) -> Object:
        labels = {"ray.io/originated-from-cr-name": self.name, "ray.io/originated-from-crd": "RayJob"}
        template = self.spec.get("submitterPodTemplate") or {}
        labels = {**((template.get("metadata") or {}).get("labels") or {}), **labels}
        meta = {"name": self.name, "labels": labels, "ownerReferences": [self.owner()]}
        limit = (self.spec.get("submitterConfig") or {}).get("backoffLimit", 2)
        made = self.api.create({"kind": "Job", "metadata": meta, "spec": {"backoffLimit": limit}}, self.namespace)
        self.event("CreatedRayJobSubmitter", f"Created Kubernetes Job {self.namespace}/{self.name}")
        return self.create_submitter_pod(made)

    def create_submitter_pod(self, made: Object) -> Object:
        """The first pod of the submitting Job, or one in place of one that failed."""
        template, labels = self.spec.get("submitterPodTemplate") or {}, made["metadata"]["labels"]
        labels = {**labels, "job-name": self.name, "batch.kubernetes.io/job-name": self.name}
        meta = {"generateName": f"{self.name}-", "labels": labels, "ownerReferences": [_reference(made)]}
        spec = {"containers": [{"name": "ray-job-submitter", "image": "ray"}], **(template.get("spec") or {})}
        pod = {"kind": "Pod", "metadata": meta, "spec": spec, "status": {"phase": "Pending"}}
        return self.api.create(pod, self.namespace)

    def drop_cluster(self) -> None:
        for cluster in self.api.list("RayCluster", self.namespace, f"ray.io/originated-from-cr-name={self.name}"):
            if any(owner["uid"] == self.uid for owner in cluster["metadata"].get("ownerReferences", ())):
                self.drop("RayCluster", cluster["metadata"]["name"])
                self.event("DeletedRayCluster", f"Deleted cluster {self.namespace}/{cluster['metadata']['name']}")

    def drop(self, kind: str, name: str) -> None:
        with contextlib.suppress(ApiError):
            self.api.delete(kind, self.namespace, name)


def _reference(obj: Object) -> dict[str, Any]:
    meta = obj["metadata"]
    return {
        "apiVersion": obj["apiVersion"],
        "kind": obj["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def answer_jobs_api(
    request: ProxyRequest, rayjob: Object, driver: Driver | None, output: Sequence[str]
) -> tuple[int, Any]:
    """What a cluster's dashboard says about its one job."""
    status = rayjob.get("status") or {}
    job_id, path = status.get("jobId", ""), request.path.rstrip("/")
    info = {
        "type": "SUBMISSION",
        "submission_id": job_id,
        "job_id": "01000000",
        "status": driver.status if driver else "PENDING",
        "entrypoint": rayjob["spec"].get("entrypoint"),
        "message": status.get("message", ""),
        "metadata": {},
        "runtime_env": {},
        "driver_exit_code": driver.exit_code if driver else None,
    }
    match request.method, path.split("/")[2:]:
        case "GET", ["version"]:
            return 200, {"version": "4", "ray_version": "2.60.0", "ray_commit": ""}
        case "GET", ["jobs"]:
            return 200, [info] if driver else []
        case _, ["jobs", wanted, *_] if wanted != job_id or driver is None:
            return 404, f"Job {wanted} does not exist"
        case "GET", ["jobs", _]:
            return 200, info
        case "GET", ["jobs", _, "logs"]:
            return 200, {"logs": "".join(f"{line}\n" for line in output)}
        case "POST", ["jobs", _, "stop"]:
            stopped = driver is not None and driver.running and not driver.stop.is_set()
            if stopped and driver is not None:
                driver.stop.set()
            return 200, {"stopped": stopped}
    return 404, "404: Not Found"


def owner_name(pod: Object) -> str:
    """The RayJob that a pod belongs to."""
    labels = pod["metadata"].get("labels") or {}
    if "ray.io/originated-from-cr-name" in labels:
        return labels["ray.io/originated-from-cr-name"]
    return labels.get("ray.io/cluster", "").rpartition("-")[0]


def invalid(rayjob: Object) -> str:
    """Why KubeRay refuses a RayJob that the API server has accepted."""
    spec, name = rayjob.get("spec") or {}, rayjob["metadata"]["name"]
    if len(name) > 47:
        return "RayJob name should be no more than 47 characters"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        return "a RayJob with shutdownAfterJobFinishes set to false is not allowed to be suspended"
    if not spec.get("shutdownAfterJobFinishes") and spec.get("ttlSecondsAfterFinished"):
        return "a RayJob with shutdownAfterJobFinishes set to false cannot have TTLSecondsAfterFinished"
    if spec.get("backoffLimit") and spec.get("clusterSelector"):
        return "BackoffLimit is incompatible with ClusterSelector"
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        return "one of RayClusterSpec or ClusterSelector must be set"
    return ""
