"""What a training run's cluster inside Kubernetes looks like, in the user's words; every field is checked here."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.checks import (
    DNS_LABEL,
    ENV_NAME,
    LABEL_KEY,
    check_labels,
    check_python_version,
    check_ray_version,
    count,
    json_of,
    known_fields,
    list_of_dicts,
    mapping_of,
    name_of,
    names_of,
    one_of,
    plain_values,
    quantity,
    text_of,
)
from airflow_mlops.training.overrides import (
    check_pod_override,
    env_values,
    refuse_misspelt,
    refuse_plain_secrets,
)
from airflow_mlops.training.parts import PARTS, Autoscale, Gang, Gpu, Rdma, Spot
from airflow_mlops.training.search import Search
from airflow_mlops.training.spec import PICKLED, TrainingSpec, whole

HEAD, WORKER, SUBMITTER = "ray-head", "ray-worker", "ray-job-submitter"
CONTAINERS = {"head": HEAD, "worker": WORKER, "submitter": SUBMITTER}
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode")

_REFUSED_MODES = {
    "SidecarMode": "a lost head would look like an error of the training code",
    "InteractiveMode": "it waits for a job that somebody else submits",
}


@dataclass(frozen=True)
class KubeCluster:
    """An ephemeral Ray cluster for one attempt: a head that runs the driver, and one group of equal workers.

    ``node_selector``, ``tolerations``, ``affinity``, ``gpu``, ``spot`` and ``rdma`` are the workers'; the head gets its
    own by ``pod_template_overrides``. Resources are both requests and limits, in Kubernetes' units.

    :param image: image of head and workers, with Ray and this package
    :param ray_version: Ray's version in the image; default: read from the image's tag
    :param namespace: where to create it; default: the connection's
    :param gpu: :class:`Gpu`, None for CPUs only
    :param gang: :class:`Gang`
    :param spot: :class:`Spot`
    :param autoscale: :class:`Autoscale`
    :param workers_per_pod: Ray Train workers in one pod, for example 8 for nodes with 8 GPUs
    :param head_resources: of the head's container
    :param worker_resources: of a worker pod's container, GPUs excepted
    :param pod_template_overrides: ``{"head" | "worker" | "submitter": pod template}``, merged strategically; Ray's
        containers are called ray-head, ray-worker and ray-job-submitter
    :param job_overrides: merged into the RayJob's spec, for what this class has no field for
    :param env: environment of head and workers; secrets are refused
    :param env_from: names of Secrets whose keys become environment variables of head and workers
    :param service_account: of all pods
    :param image_pull_secrets: names of Secrets
    :param image_pull_policy: ``Always``, ``IfNotPresent`` or ``Never``
    :param node_selector: of the workers
    :param tolerations: of the workers
    :param affinity: of the workers
    :param rdma: :class:`Rdma`
    :param submission_mode: ``"K8sJobMode"``: a pod submits the driver; ``"HTTPMode"``: KubeRay does, for many at once
    :param submitter_backoff: times that the submitting pod is started again when it loses the log stream
    :param ttl_after_finished: seconds that a finished attempt's pods stay
    :param runtime_env: Ray runtime environment of the driver
    :param entrypoint_resources: ``{"cpu", "gpu", "resources": {...}}`` that the driver needs: it may leave the head
    :param ray_start_params: ``{"head" | "worker": {name: value}}`` of ``ray start``
    :param cost_tags: labels of RayJob, RayCluster and pods, and metadata in Ray's dashboard
    :param labels: further labels of all of them
    :param annotations: of the RayJob and RayCluster
    :param auth_secret: name of the Secret with Ray's token (key ``auth_token``)
    :param suspend: create it suspended
    """

    image: str
    ray_version: str | None = None
    namespace: str | None = None
    gpu: Gpu | None = None
    gang: Gang | None = None
    spot: Spot | None = None
    autoscale: Autoscale | None = None
    workers_per_pod: int = 1
    head_resources: Mapping[str, Any] = field(default_factory=lambda: {"cpu": "1", "memory": "4Gi"})
    worker_resources: Mapping[str, Any] = field(default_factory=lambda: {"cpu": "2", "memory": "8Gi"})
    pod_template_overrides: Mapping[str, Any] = field(default_factory=dict)
    job_overrides: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    env_from: Sequence[str] = ()
    service_account: str | None = None
    image_pull_secrets: Sequence[str] = ()
    image_pull_policy: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[Mapping[str, Any]] = ()
    affinity: Mapping[str, Any] = field(default_factory=dict)
    rdma: Rdma | None = None
    submission_mode: str = "K8sJobMode"
    submitter_backoff: int = 10
    ttl_after_finished: int = 300
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    entrypoint_resources: Mapping[str, Any] = field(default_factory=dict)
    ray_start_params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cost_tags: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    auth_secret: str | None = None
    suspend: bool = False

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any]) -> KubeCluster:
        """The cluster that plain (templated) values describe, validated; ``to_json()`` gives such values.

        :raises InvalidInputError: a field is unknown, missing or wrong
        """
        for name in ("startup_timeout", "attempt_timeout"):
            if name in mapping_of("cluster", value):
                raise InvalidInputError(f"cluster has {name}; give {name} to the operator, which also names the cause")
        values = {name: item for name, item in known_fields("cluster", cls, value).items() if item is not None}
        for name in ("gpu", "gang", "spot", "autoscale", "rdma"):
            if values.get(name) is False:
                del values[name]
            elif name in values:
                values[name] = PARTS[name](values[name])
        for name in ("submitter_backoff", "ttl_after_finished", "workers_per_pod"):
            if name in values:
                values[name] = whole(name, values[name], at_least=0)
        if not values.get("image"):
            raise InvalidInputError("image is missing; give the image of head and workers, with Ray and airflow-mlops")
        cluster = cls(**values)
        cluster.validate()
        return cluster

    def to_json(self) -> dict[str, Any]:
        """Plain types, for :meth:`from_mapping`."""
        return asdict(self)

    def validate(self) -> None:
        """Check everything that can be checked without the cluster.

        :raises InvalidInputError: names the field, what it must be and what to change
        """
        self._check_basics()
        for name, kind in (("gpu", Gpu), ("gang", Gang), ("spot", Spot), ("autoscale", Autoscale), ("rdma", Rdma)):
            part = getattr(self, name)
            if part is not None and not isinstance(part, kind):
                raise InvalidInputError(
                    f"{name} is {part!r}; expected {kind.__name__}(...), or give the whole cluster as a dict"
                )
            if part is not None:
                part.validate()
        self._check_pods()
        self._check_resources()
        self._check_environment()
        self._check_overrides()
        self._check_gang()
        if self.spot and self.entrypoint_resources:
            raise InvalidInputError(
                "entrypoint_resources let the driver leave the head for a spot worker; leave them out with spot"
            )

    def _check_basics(self) -> None:
        if not isinstance(self.image, str) or not self.image or re.search(r"\s", self.image):
            raise InvalidInputError(f"image is {self.image!r}; expected the image of head and workers")
        if self.ray_version not in (None, ""):
            # 2.60 without quotes would be the number 2.6.
            text_of("ray_version", self.ray_version, "2.60.0")
        text_of("submission_mode", self.submission_mode, "K8sJobMode")
        if self.submission_mode in _REFUSED_MODES:
            raise InvalidInputError(
                f"submission_mode {self.submission_mode!r} is not supported: {_REFUSED_MODES[self.submission_mode]}; "
                f"use {' or '.join(SUBMISSION_MODES)}"
            )
        one_of("submission_mode", self.submission_mode, SUBMISSION_MODES)
        if self.image_pull_policy is not None:
            one_of("image_pull_policy", self.image_pull_policy, ("Always", "IfNotPresent", "Never"))
        if self.namespace is not None and not (isinstance(self.namespace, str) and DNS_LABEL.match(self.namespace)):
            raise InvalidInputError(f"namespace is {self.namespace!r}; expected a DNS label of at most 63 characters")
        count("workers_per_pod", self.workers_per_pod, at_least=1)
        count("submitter_backoff", self.submitter_backoff, at_least=0)
        count("ttl_after_finished", self.ttl_after_finished, at_least=0)
        for name in ("labels", "cost_tags", "node_selector"):
            check_labels(name, getattr(self, name))
        if not isinstance(self.suspend, bool):
            raise InvalidInputError(f"suspend is {self.suspend!r}; expected True or False")

    def _check_pods(self) -> None:
        for name, kind in (("service_account", "ServiceAccount"), ("auth_secret", "Secret")):
            if getattr(self, name) not in (None, ""):
                name_of(name, getattr(self, name), kind)
        list_of_dicts("tolerations", self.tolerations)
        mapping_of("affinity", self.affinity)
        plain_values("annotations", self.annotations)
        for name in ("tolerations", "affinity", "runtime_env", "pod_template_overrides", "job_overrides"):
            json_of(name, getattr(self, name))

    def _check_resources(self) -> None:
        for what, resources in (("head_resources", self.head_resources), ("worker_resources", self.worker_resources)):
            mapping_of(what, resources)
            if {"requests", "limits"} & set(resources):
                raise InvalidInputError(
                    f'{what} are both requests and limits; expected for example {{"cpu": 2, "memory": "8Gi"}}; set '
                    "them apart by pod_template_overrides"
                )
            for name, amount in resources.items():
                quantity(f"{what}[{name!r}]", amount)
            refuse_misspelt(what, resources, ("cpu", "memory", "ephemeral-storage"))
            if self.gpu and self.gpu.resource_name in resources:
                raise InvalidInputError(f"{what} has {self.gpu.resource_name}, which gpu asks for already")
        mapping_of("entrypoint_resources", self.entrypoint_resources)
        refuse_misspelt("entrypoint_resources", self.entrypoint_resources, ("cpu", "gpu", "resources"))
        if unknown := sorted(str(name) for name in set(self.entrypoint_resources) - {"cpu", "gpu", "resources"}):
            raise InvalidInputError(f"entrypoint_resources has {', '.join(unknown)}; expected cpu, gpu, resources")
        for name in {"cpu", "gpu"} & set(self.entrypoint_resources):
            amount = self.entrypoint_resources[name]
            if not isinstance(amount, int | float) or isinstance(amount, bool) or not 0 <= amount < math.inf:
                raise InvalidInputError(f"entrypoint_resources[{name!r}] is {amount!r}; expected a number, 0 or more")
        plain_values("entrypoint_resources['resources']", self.entrypoint_resources.get("resources") or {})

    def _check_environment(self) -> None:
        mapping_of("runtime_env", self.runtime_env)
        driver_env = dict(env_values(self.runtime_env))
        for what, env in (("env", self.env), ("runtime_env['env_vars']", driver_env)):
            if wrong := [name for name in plain_values(what, env) if not ENV_NAME.match(name)]:
                raise InvalidInputError(f"{what} has {wrong[0]!r}; expected names of letters, digits and '_'")
        refuse_plain_secrets("env", self.env)
        refuse_plain_secrets("runtime_env", driver_env)
        for name in ("env_from", "image_pull_secrets"):
            for secret in names_of(name, getattr(self, name)):
                if not isinstance(secret, str) or not LABEL_KEY.match(secret):
                    raise InvalidInputError(f"{name} has {secret!r}; expected names of Kubernetes Secrets")
        for role, parameters in mapping_of("ray_start_params", self.ray_start_params).items():
            one_of("ray_start_params", role, ("head", "worker"))
            if "redis-password" in plain_values(f"ray_start_params[{role!r}]", parameters):
                raise InvalidInputError(
                    "ray_start_params has redis-password in plain text; give gcsFaultToleranceOptions.redisPassword a "
                    "valueFrom by job_overrides['rayClusterSpec']"
                )

    def _check_overrides(self) -> None:
        for role, override in mapping_of("pod_template_overrides", self.pod_template_overrides).items():
            one_of("pod_template_overrides", role, CONTAINERS)
            _check_template(f"pod_template_overrides[{role!r}]", override, CONTAINERS[role])
        if "submitter" in self.pod_template_overrides and self.submission_mode == "HTTPMode":
            raise InvalidInputError("pod_template_overrides['submitter'] needs submission_mode 'K8sJobMode'")
        mapping_of("job_overrides", self.job_overrides)
        if owned := sorted(set(self.job_overrides) & OWN_JOB_FIELDS):
            raise InvalidInputError(f"job_overrides must leave {', '.join(owned)} alone: crash safety rests on them")
        refuse_misspelt("job_overrides", self.job_overrides, JOB_FIELDS)
        mapping_of("job_overrides['deletionStrategy']", self.job_overrides.get("deletionStrategy") or {})
        what = "job_overrides['rayClusterSpec']"
        ray = mapping_of(what, self.job_overrides.get("rayClusterSpec", {}))
        refuse_misspelt(what, ray, CLUSTER_FIELDS)
        head = mapping_of(f"{what}.headGroupSpec", ray.get("headGroupSpec", {}))
        template = f"{what}.headGroupSpec.template"
        _check_template(template, mapping_of(template, head.get("template", {})), HEAD)
        for index, group in enumerate(list_of_dicts(f"{what}.workerGroupSpecs", ray.get("workerGroupSpecs", []))):
            path = f"{what}.workerGroupSpecs[{index}]"
            if not group.get("groupName"):
                raise InvalidInputError(f"{path} has no groupName; this package's own group is {WORKER_GROUP!r}")
            template = f"{path}.template"
            _check_template(template, mapping_of(template, group.get("template", {})), WORKER)

    @property
    def deletion_rules(self) -> bool:
        """Whether KubeRay's deletion rules take the place of ``ttl_after_finished``."""
        return bool((self.job_overrides.get("deletionStrategy") or {}).get("deletionRules"))

    def _check_gang(self) -> None:
        scheduler = self.gang.scheduler if self.gang else None
        if scheduler == "kai" and self.submission_mode == "K8sJobMode":
            raise InvalidInputError("gang.scheduler 'kai' rejects submission_mode 'K8sJobMode'; set 'HTTPMode'")
        if scheduler == "kueue" and self.deletion_rules:
            raise InvalidInputError(
                "Kueue cannot run a RayJob with deletionStrategy.deletionRules (it needs shutdownAfterJobFinishes); "
                "remove them from job_overrides, ttl_after_finished removes the pods"
            )
        groups = (self.job_overrides.get("rayClusterSpec") or {}).get("workerGroupSpecs") or ()
        names = {group.get("groupName") for group in groups} | {WORKER_GROUP}
        if scheduler == "kueue" and len(names) > KUEUE_GROUPS:
            raise InvalidInputError(f"{len(names)} worker groups; Kueue takes at most {KUEUE_GROUPS} of one RayJob")
        if self.suspend and self.deletion_rules:
            raise InvalidInputError("suspend needs shutdownAfterJobFinishes; remove the deletionRules of job_overrides")


#: The name of the workers' group.
WORKER_GROUP = "workers"
#: Kueue allows 20 pod sets: the head's, the submitter's, and a spare.
KUEUE_GROUPS = 17
#: Fields of a RayJob's spec that only this package sets.
OWN_JOB_FIELDS = frozenset(
    (
        *("entrypoint", "jobId", "backoffLimit", "submissionMode", "shutdownAfterJobFinishes", "clusterSelector"),
        *("activeDeadlineSeconds", "preRunningDeadlineSeconds", "submitterConfig", "suspend", "runtimeEnvYAML"),
        *("ttlSecondsAfterFinished", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources"),
        "submitterPodTemplate",
    )
)
JOB_FIELDS = frozenset(("deletionStrategy", "managedBy", "metadata", "rayClusterSpec"))
CLUSTER_FIELDS = frozenset(
    (
        *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
        *("headServiceAnnotations", "historyServerOptions", "managedBy", "networkPolicy", "rayVersion", "suspend"),
        *("tlsOptions", "upgradeStrategy", "workerGroupSpecs"),
    )
)


def room(spec: TrainingSpec) -> tuple[int, int]:
    """Least and greatest number of Ray Train workers that the cluster has room for; a search runs several trials."""
    trials = (Search.of(spec.config).max_concurrent or 1) if spec.trainer == "tune" else 1
    return spec.min_workers, spec.max_workers * trials


def fitted(spec: TrainingSpec, cluster: KubeCluster) -> TrainingSpec:
    """The spec as the driver on that cluster needs it: its GPUs asked for, and the cluster's Ray joined.

    :raises InvalidInputError: the pods cannot give what the spec asks for, which Ray would wait for without end
    """
    spec = replace(spec, preemptible=cluster.spot is not None)
    spec.validate()
    wanted = dict(spec.resources_per_worker or {})
    if cluster.gpu is None and (spec.use_gpu or wanted.get("GPU")):
        raise InvalidInputError(
            "the workers want GPUs (use_gpu) and gpu is None; say which, for example {'kind': 'full'}"
        )
    if cluster.gpu is not None:
        wanted.setdefault("GPU", cluster.gpu.count)
        wanted.setdefault("CPU", 1)
        if wanted["GPU"] != cluster.gpu.count:
            raise InvalidInputError(
                f"resources_per_worker has {wanted['GPU']} GPUs and gpu.count is {cluster.gpu.count}; make them equal"
            )
    _check_room(spec, cluster)
    _check_pod(wanted, cluster)
    if (spec.train_fn or "").startswith(PICKLED):
        check_python_version(cluster.image, sys.version_info[:2])
    return replace(
        spec,
        use_gpu=cluster.gpu is not None,
        resources_per_worker=wanted or None,
        ray_address="auto",
        ray_version=check_ray_version(cluster.image, cluster.ray_version, spec.ray_version),
    )


def _check_room(spec: TrainingSpec, cluster: KubeCluster) -> None:
    low, high = room(spec)
    per_pod, scale, gang = cluster.workers_per_pod, cluster.autoscale, cluster.gang
    if low % per_pod or high % per_pod:
        raise InvalidInputError(f"num_workers is {spec.num_workers}; expected multiples of workers_per_pod ({per_pod})")
    if scale is not None and not scale.min_workers <= high <= scale.max_workers:
        raise InvalidInputError(
            f"there must be room for {high} workers at a time; expected that within autoscale's {scale.min_workers} to "
            f"{scale.max_workers} workers"
        )
    if scale is not None and gang and gang.scheduler != "kueue" and scale.min_workers < high:
        raise InvalidInputError(
            f"gang scheduling by {gang.scheduler} counts autoscale.min_workers ({scale.min_workers}) of {high} "
            "workers; set autoscale.min_workers to num_workers, or leave autoscale out"
        )


def _check_pod(wanted: Mapping[str, Any], cluster: KubeCluster) -> None:
    for name, key in (("CPU", "cpu"), ("memory", "memory")):
        if key not in cluster.worker_resources:
            continue
        offered = math.ceil(quantity(f"worker_resources[{key!r}]", cluster.worker_resources[key]))  # as Ray rounds
        if (wanted.get(name) or 0) * cluster.workers_per_pod > offered:
            raise InvalidInputError(
                f"{cluster.workers_per_pod} worker(s) with {name} {wanted[name]} do not fit into a pod with {key} "
                f"{cluster.worker_resources[key]}; raise worker_resources or lower resources_per_worker"
            )
    custom = str((cluster.ray_start_params.get("worker") or {}).get("resources", ""))
    for name in set(wanted) - {"CPU", "GPU", "memory"}:
        if name not in custom and not name.startswith("accelerator_type:"):
            raise InvalidInputError(
                f"resources_per_worker has {name!r}, which no pod offers; add it to ray_start_params['worker']"
                "['resources'], or remove it"
            )


def check_storage(spec: TrainingSpec, cluster: KubeCluster) -> None:
    """Check that pods and Airflow can share the run directory, and that its URI passes through a shell unchanged.

    :raises InvalidInputError: storage_path is missing, local (and no volume of head and workers is mounted there), or
        has characters that a shell would change
    """
    uri = spec.storage_path
    if not uri:
        raise InvalidInputError("storage_path is missing; give a URI that pods and Airflow share: s3://bucket/runs")
    refuse_plain_secrets("the run", {"storage_path": uri})
    if storage.is_local(uri) or uri.startswith(("memory://", "local://")):
        path = re.sub(r"^\w+://", "", uri).rstrip("/") + "/"
        if not all(_mounted(path, cluster.pod_template_overrides.get(role) or {}) for role in ("head", "worker")):
            raise InvalidInputError(
                f"storage_path is {uri!r}, which is local to one machine; in kuberay mode give a URI such as "
                "s3://bucket/runs, or mount a shared volume there in head and workers by pod_template_overrides"
            )
    if re.search(r"[^\w@%+=:,./-]", uri):
        raise InvalidInputError(f"storage_path is {uri!r}; expected letters, digits and @%+=:,./-_ only")


def warnings(spec: TrainingSpec, cluster: KubeCluster) -> list[str]:
    """What will run, but perhaps not as expected; for the log."""
    gpu, several = cluster.gpu, room(spec)[1] > 1
    found = []
    if gpu and gpu.kind == "mig" and several:
        found.append("MIG devices have neither NVLink nor CUDA IPC: several workers exchange gradients slowly")
    if gpu and gpu.kind == "dra" and cluster.gang:
        found.append(f"{cluster.gang.scheduler} does not count DRA claims: pods of a gang may wait for GPUs")
    if cluster.rdma and cluster.rdma.host_network:
        found.append("host_network: two Ray pods on one node want the same ports; give each worker a node of its own")
    if cluster.deletion_rules:
        found.append("deletionRules do not cover stopped jobs: their pods stay until the RayJob is deleted")
    return found


def _check_template(what: str, template: Any, container: str) -> None:
    check_pod_override(what, template, container)
    check_labels(f"{what}.metadata.labels", ((template or {}).get("metadata") or {}).get("labels") or {})


def _mounted(path: str, override: Mapping[str, Any]) -> bool:
    containers = (override.get("spec") or {}).get("containers") or ()
    mounts = (mount.get("mountPath") for item in containers for mount in item.get("volumeMounts") or ())
    return any(mount and path.startswith(mount.rstrip("/") + "/") for mount in mounts)
