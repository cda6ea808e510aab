"""The RayJob that runs one attempt on a cluster of its own, for KubeRay 1.6 and newer."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.checks import check_ray_version
from airflow_mlops.training.cluster import (
    HEAD,
    SUBMITTER,
    WORKER,
    WORKER_GROUP,
    KubeCluster,
    check_storage,
    fitted,
    room,
)
from airflow_mlops.training.launch import driver_command, driver_env
from airflow_mlops.training.overrides import env_values, merged
from airflow_mlops.training.parts import Gang
from airflow_mlops.training.rayjob import ATTEMPT_LABEL, KUEUE_QUEUE_LABEL, OWNER_ANNOTATION, OWNER_TRY_ANNOTATION
from airflow_mlops.training.spec import TrainingSpec

API_VERSION, KIND = "ray.io/v1", "RayJob"
#: On RayJob, RayCluster and pods: which run (:func:`run_label`) of whom; ATTEMPT_LABEL says which attempt.
RUN_LABEL = "mlops.airflow.org/run"
DAG_LABEL = "mlops.airflow.org/dag"
TASK_LABEL = "mlops.airflow.org/task"
DAG_RUN_LABEL = "mlops.airflow.org/dag-run"
MAP_INDEX_LABEL = "mlops.airflow.org/map-index"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "airflow-mlops"
#: On RayJob and RayCluster: the run directory; OWNER_ANNOTATION and OWNER_TRY_ANNOTATION say which task and which try
#: of it follow the attempt.
RUN_DIR_ANNOTATION = "mlops.airflow.org/run-dir"

KUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
KUEUE_MAX_EXEC_LABEL = "kueue.x-k8s.io/max-exec-time-seconds"
KUEUE_ELASTIC_ANNOTATION = "kueue.x-k8s.io/elastic-job"

#: KubeRay appends suffixes to the name, and Kubernetes' limit is 63.
NAME_LENGTH = 47

_NAME = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
_CLAIM = "gpu"


@dataclass(frozen=True)
class Owner:
    """The task that an attempt belongs to.

    :param dag_id: Dag
    :param task_id: task
    :param run_id: Dag run
    :param map_index: of a mapped task, -1 otherwise
    :param try_number: the try that follows the attempt
    """

    dag_id: str
    task_id: str
    run_id: str
    map_index: int = -1
    try_number: int = 1

    @property
    def name(self) -> str:
        """The same for every try of the task, and different from every other task's."""
        return f"{self.dag_id}/{self.task_id}/{self.run_id}/{self.map_index}"

    @property
    def labels(self) -> dict[str, str]:
        """Labels that name it; shortened where a label cannot hold it."""
        labels = {
            DAG_LABEL: label_value(self.dag_id),
            TASK_LABEL: label_value(self.task_id),
            DAG_RUN_LABEL: label_value(self.run_id),
        }
        return labels if self.map_index < 0 else {**labels, MAP_INDEX_LABEL: str(self.map_index)}


def render_rayjob(
    spec: TrainingSpec,
    cluster: KubeCluster,
    *,
    name: str,
    owner: Owner,
    spec_uri: str | None = None,
    entrypoint: str | None = None,
    deadline_seconds: float | None = None,
    startup_seconds: float | None = None,
) -> dict[str, Any]:
    """The RayJob of attempt ``spec.attempt``, ready to be created with strict field validation.

    KubeRay itself retries nothing (``backoffLimit`` 0) and removes the pods ``ttl_after_finished`` seconds after the
    end; the driver runs on the head, which offers Ray no CPUs, so that no worker ends up there.

    :param spec: the attempt
    :param cluster: where to run it
    :param name: of the RayJob and of Ray's job: DNS-1035, at most 47 characters
    :param owner: the task
    :param spec_uri: where the driver finds its spec
    :param entrypoint: command to run instead of the driver
    :param deadline_seconds: KubeRay ends the attempt after that many; None: never
    :param startup_seconds: KubeRay ends the attempt if the driver does not run after that many; None: never
    :raises InvalidInputError: something in it cannot work; the message says what to change
    """
    if len(name) > NAME_LENGTH or not _NAME.match(name):
        raise InvalidInputError(
            f"the RayJob's name is {name!r} ({len(name)} characters); expected at most {NAME_LENGTH} lower-case "
            "letters, digits and dashes, a letter first"
        )
    cluster.validate()
    spec = fitted(spec, cluster)
    check_storage(spec, cluster)
    identity = _identity(spec, owner)
    labels = {**cluster.labels, **cluster.cost_tags, **identity}
    job: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": name,
            **({"namespace": cluster.namespace} if cluster.namespace else {}),
            "labels": labels,
            "annotations": {
                **{key: str(value) for key, value in cluster.annotations.items()},
                OWNER_ANNOTATION: owner.name,
                OWNER_TRY_ANNOTATION: str(owner.try_number),
                RUN_DIR_ANNOTATION: spec.run_dir,
            },
        },
        "spec": {
            "entrypoint": _command(spec_uri, entrypoint),
            "jobId": name,
            "submissionMode": cluster.submission_mode,
            "backoffLimit": 0,
            "runtimeEnvYAML": json.dumps(_runtime_env(spec, cluster), sort_keys=True),
            "metadata": {
                **{key.rpartition("/")[2]: value for key, value in owner.labels.items()},
                **cluster.cost_tags,
                "run_key": spec.run_key,
                "attempt": str(spec.attempt),
            },
            **_lifetime(cluster, deadline_seconds, startup_seconds),
            **_entrypoint_resources(cluster),
            "rayClusterSpec": _cluster_spec(spec, cluster, labels),
        },
    }
    if cluster.submission_mode == "K8sJobMode":
        job["spec"]["submitterConfig"] = {"backoffLimit": cluster.submitter_backoff}
        job["spec"]["submitterPodTemplate"] = _submitter(cluster, labels)
    if cluster.gang is not None:
        _add_gang(job, cluster, cluster.gang)
    job["spec"] = merged(job["spec"], cluster.job_overrides)
    _identify(job["spec"], {**cluster.labels, **cluster.cost_tags}, identity)
    return job


def run_label(spec: TrainingSpec) -> str:
    """Value of :data:`RUN_LABEL`: the same for all attempts of one run directory, another for every other one."""
    return hashlib.sha256(spec.run_dir.encode()).hexdigest()[:32]


def run_selector(spec: TrainingSpec, attempt: int | None = None) -> str:
    """Label selector of what belongs to the run, or to one of its attempts."""
    selector = f"{RUN_LABEL}={run_label(spec)}"
    return selector if attempt is None else f"{selector},{ATTEMPT_LABEL}={attempt}"


def label_value(text: str) -> str:
    """``text`` as a label value: at most 63 characters; a hash is added where something had to be left out."""
    cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-_.")
    if cleaned == text and len(cleaned) <= 63:
        return cleaned
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{cleaned[:54].rstrip('-_.')}-{digest}".lstrip("-")


def _command(spec_uri: str | None, entrypoint: str | None) -> str:
    if (spec_uri is None) == (entrypoint is None):
        raise InvalidInputError("give either spec_uri or entrypoint")
    return entrypoint or driver_command(str(spec_uri))


def _identity(spec: TrainingSpec, owner: Owner) -> dict[str, str]:
    return {
        **owner.labels,
        MANAGED_BY_LABEL: MANAGED_BY,
        RUN_LABEL: run_label(spec),
        ATTEMPT_LABEL: str(spec.attempt),
    }


def _identify(job: dict[str, Any], given: Mapping[str, str], identity: Mapping[str, str]) -> None:
    """Label every pod template, whatever was merged into it: an attempt is over when no pod with its labels is left."""
    ray = job["rayClusterSpec"]
    templates = [group.setdefault("template", {}) for group in (ray["headGroupSpec"], *ray["workerGroupSpecs"])]
    if "submitterPodTemplate" in job:
        templates.append(job["submitterPodTemplate"])
    for template in templates:
        metadata = template.setdefault("metadata", {})
        metadata["labels"] = {**given, **metadata.get("labels", {}), **identity}


def _lifetime(cluster: KubeCluster, deadline_seconds: float | None, startup_seconds: float | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if not cluster.deletion_rules:
        fields |= {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": cluster.ttl_after_finished}
    if deadline_seconds is not None:
        fields["activeDeadlineSeconds"] = max(1, math.ceil(deadline_seconds))
    if startup_seconds is not None:
        fields["preRunningDeadlineSeconds"] = max(1, math.ceil(startup_seconds))
    if cluster.suspend:
        fields["suspend"] = True
    return fields


def _entrypoint_resources(cluster: KubeCluster) -> dict[str, Any]:
    wanted, fields = cluster.entrypoint_resources, {}
    for key, field in (("cpu", "entrypointNumCpus"), ("gpu", "entrypointNumGpus")):
        if key in wanted:
            fields[field] = wanted[key]
    if wanted.get("resources"):
        fields["entrypointResources"] = json.dumps(wanted["resources"])
    return fields


def _runtime_env(spec: TrainingSpec, cluster: KubeCluster) -> dict[str, Any]:
    # Ray takes strings only.
    given = {name: _text(value) for name, value in env_values(cluster.runtime_env)}
    return {**cluster.runtime_env, "env_vars": {**driver_env(spec, spec.stop_timeout), **given}}


def _cluster_spec(spec: TrainingSpec, cluster: KubeCluster, labels: Mapping[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "rayVersion": check_ray_version(cluster.image, cluster.ray_version, spec.ray_version),
        "headGroupSpec": {
            "rayStartParams": _start_params(cluster, "head", {"num-cpus": "0"}),
            "template": _head(spec, cluster, labels),
        },
        "workerGroupSpecs": [_worker_group(spec, cluster, labels)],
    }
    if cluster.autoscale is not None:
        result["enableInTreeAutoscaling"] = True
        result["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": cluster.autoscale.idle_timeout}
    if cluster.auth_secret:
        result["authOptions"] = {"mode": "token", "secretName": cluster.auth_secret}
    return result


def _worker_group(spec: TrainingSpec, cluster: KubeCluster, labels: Mapping[str, str]) -> dict[str, Any]:
    low, high = (workers // cluster.workers_per_pod for workers in room(spec))
    scale, gang = cluster.autoscale, cluster.gang
    if scale is not None:
        # An autoscaler that is told fewer would take away what a gang was promised.
        low, most = -(-scale.min_workers // cluster.workers_per_pod), scale.max_workers // cluster.workers_per_pod
    else:
        most = high
    if gang is not None and scale is None:
        low = high  # YuniKorn's gang is minReplicas, not replicas
    params = {}
    if cluster.gpu is not None:
        # KubeRay sees no GPU in gpu.shared, in MIG profiles ending in .me, and in DRA claims.
        params["num-gpus"] = str(cluster.gpu.count * cluster.workers_per_pod)
    return {
        "groupName": WORKER_GROUP,
        "replicas": high,
        "minReplicas": low,
        "maxReplicas": most,
        "rayStartParams": _start_params(cluster, "worker", params),
        "template": _worker(spec, cluster, labels),
        **({"idleTimeoutSeconds": scale.idle_timeout} if scale is not None else {}),
    }


def _start_params(cluster: KubeCluster, role: str, base: Mapping[str, str]) -> dict[str, str]:
    given = cluster.ray_start_params.get(role) or {}
    return {**base, **{name: str(value) for name, value in given.items()}}


def _pod(cluster: KubeCluster, container: dict[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    """What every pod has in common."""
    container = {"image": cluster.image, **container}
    if cluster.image_pull_policy:
        container["imagePullPolicy"] = cluster.image_pull_policy
    spec: dict[str, Any] = {"containers": [container]}
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if cluster.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in cluster.image_pull_secrets]
    return {"metadata": {"labels": dict(labels)}, "spec": spec}


def _ray_container(
    spec: TrainingSpec, cluster: KubeCluster, name: str, resources: Mapping[str, Any], env: Mapping[str, str]
) -> dict[str, Any]:
    values = {**driver_env(spec, spec.stop_timeout), **env, **{key: _text(value) for key, value in cluster.env.items()}}
    container: dict[str, Any] = {
        "name": name,
        "env": [{"name": key, "value": value} for key, value in values.items()],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
    }
    if cluster.env_from:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in cluster.env_from]
    return container


def _head(spec: TrainingSpec, cluster: KubeCluster, labels: Mapping[str, str]) -> dict[str, Any]:
    container = _ray_container(spec, cluster, HEAD, _quantities(cluster.head_resources), {})
    pod = _pod(cluster, container, labels)
    if cluster.spot is not None:
        pod["spec"]["affinity"] = _keep_off(cluster.spot.nodes)
    return merged(pod, cluster.pod_template_overrides.get("head") or {})


def _worker(spec: TrainingSpec, cluster: KubeCluster, labels: Mapping[str, str]) -> dict[str, Any]:
    gpu, spot, rdma = cluster.gpu, cluster.spot, cluster.rdma
    resources = _quantities(cluster.worker_resources)
    if gpu is not None and gpu.resource_name is not None:
        resources[gpu.resource_name] = str(gpu.count * cluster.workers_per_pod)
    for name, count in (rdma.resources if rdma else {}).items():
        resources[name] = str(count)
    env = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(spot.drain)} if spot else {}
    container = _ray_container(spec, cluster, WORKER, resources, env)
    selector = dict(cluster.node_selector)
    tolerations = [dict(toleration) for toleration in cluster.tolerations]
    annotations: dict[str, str] = {}
    added: dict[str, Any] = {}
    if gpu is not None and gpu.kind == "dra":
        added["resourceClaims"] = [{"name": _CLAIM, "resourceClaimTemplateName": gpu.claim_template}]
        container["resources"]["claims"] = [{"name": _CLAIM}]
    if spot is not None:
        selector |= spot.nodes
        tolerations += [toleration for toleration in spot.tolerated if toleration not in tolerations]
        added["terminationGracePeriodSeconds"] = spot.grace_seconds
    if rdma is not None:
        # Registering memory for RDMA means pinning it.
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
        annotations = {key: str(value) for key, value in rdma.annotations.items()}
        if rdma.host_network:
            added |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    added |= {"nodeSelector": selector, "tolerations": tolerations, "affinity": dict(cluster.affinity)}
    pod = _pod(cluster, container, labels)
    pod["spec"] |= {field: value for field, value in added.items() if value}
    if annotations:
        pod["metadata"]["annotations"] = annotations
    return merged(pod, cluster.pod_template_overrides.get("worker") or {})


def _submitter(cluster: KubeCluster, labels: Mapping[str, str]) -> dict[str, Any]:
    resources = {"requests": {"cpu": "500m", "memory": "200Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
    pod = _pod(cluster, {"name": SUBMITTER, "resources": resources}, labels)
    pod["spec"]["restartPolicy"] = "Never"
    if cluster.spot is not None:
        pod["spec"]["affinity"] = _keep_off(cluster.spot.nodes)
    return merged(pod, cluster.pod_template_overrides.get("submitter") or {})


def _keep_off(nodes: Mapping[str, str]) -> dict[str, Any]:
    # One term: its expressions must all hold, so none of the labels may be there.
    expressions = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in nodes.items()]
    terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _add_gang(job: dict[str, Any], cluster: KubeCluster, gang: Gang) -> None:
    labels, priority = job["metadata"]["labels"], gang.priority
    if gang.scheduler == "kueue":
        labels[KUEUE_QUEUE_LABEL] = gang.queue
        if priority:
            labels[KUEUE_PRIORITY_LABEL] = priority
        if "activeDeadlineSeconds" in job["spec"]:
            # KubeRay starts its deadline anew after each eviction, Kueue counts on.
            labels[KUEUE_MAX_EXEC_LABEL] = str(job["spec"]["activeDeadlineSeconds"])
        if cluster.autoscale is not None:
            job["metadata"]["annotations"][KUEUE_ELASTIC_ANNOTATION] = "true"
        return
    if gang.scheduler == "volcano":
        labels["volcano.sh/queue-name"] = gang.queue
        if priority:
            labels["ray.io/priority-class-name"] = priority
        return
    if gang.scheduler == "yunikorn":
        labels["ray.io/gang-scheduling-enabled"] = "true"
        labels["yunikorn.apache.org/app-id"] = job["metadata"]["name"]
        labels["yunikorn.apache.org/queue"] = gang.queue
    else:
        labels["kai.scheduler/queue"] = gang.queue
    if priority:
        ray = job["spec"]["rayClusterSpec"]
        for group in (ray["headGroupSpec"], *ray["workerGroupSpecs"]):
            group["template"]["spec"].setdefault("priorityClassName", priority)


def _quantities(resources: Mapping[str, Any]) -> dict[str, str]:
    # A float would be refused: quantities are integers or strings.
    return {name: str(amount) for name, amount in resources.items()}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
