"""The optional parts of a cluster inside Kubernetes: GPUs, gang scheduling, spot nodes, autoscaling, RDMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.checks import (
    LABEL_KEY,
    LABEL_VALUE,
    check_labels,
    count,
    known_fields,
    list_of_dicts,
    mapping_of,
    name_of,
    one_of,
    plain_values,
    text_of,
)
from airflow_mlops.training.spec import whole

SCHEDULERS = ("volcano", "yunikorn", "kueue", "kai")
_REFUSED_SCHEDULERS = {
    "scheduler-plugins": "KubeRay's integration of it accepts RayClusters only, a RayJob would stay Initializing",
    "coscheduling": "it is part of scheduler-plugins, whose KubeRay integration accepts RayClusters only",
    "kubernetes": "Kubernetes' own workload-aware scheduling is alpha",
}

#: MIG profiles by memory slice, from the NVIDIA MIG User Guide's tables of supported profiles (A30 to B300).
_MIG = {
    "A30": "1g.6gb 1g.6gb+me 2g.12gb 2g.12gb+me 4g.24gb",
    "A100-40GB": "1g.5gb 1g.5gb+me 1g.10gb 2g.10gb 3g.20gb 4g.20gb 7g.40gb",
    "A100/H100-80GB": "1g.10gb 1g.10gb+me 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb",
    "H100-94/96GB": "1g.12gb 1g.12gb+me 1g.24gb 2g.24gb 3g.47gb 4g.47gb 7g.94gb 3g.48gb 4g.48gb 7g.96gb",
    "H200": "1g.18gb 1g.18gb+me 1g.35gb 2g.35gb 3g.71gb 4g.71gb 7g.141gb",
    "B200": "1g.23gb 1g.23gb+me 1g.45gb 2g.45gb 3g.90gb 4g.90gb 7g.180gb",
    "GB200": "1g.24gb 1g.24gb+me 1g.47gb 2g.47gb 3g.95gb 4g.95gb 7g.189gb",
    "B300": "1g.34gb 1g.34gb+me 1g.67gb 2g.67gb 3g.135gb 4g.135gb 7g.269gb",
    "RTX PRO 6000": "1g.24gb 1g.24gb+me 2g.48gb 4g.96gb",
}
MIG_PROFILES = frozenset(profile for profiles in _MIG.values() for profile in profiles.split())

#: Spot nodes by provider: label, toleration of their taint, seconds of notice.
SPOT: Mapping[str, tuple[dict[str, str], tuple[dict[str, str], ...], int]] = {
    "gke": (
        {"cloud.google.com/gke-spot": "true"},
        ({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},),
        30,
    ),
    "eks": ({"eks.amazonaws.com/capacityType": "SPOT"}, (), 120),
    "karpenter": ({"karpenter.sh/capacity-type": "spot"}, (), 120),
    "aks": (
        {"kubernetes.azure.com/scalesetpriority": "spot"},
        (
            {
                "key": "kubernetes.azure.com/scalesetpriority",
                "operator": "Equal",
                "value": "spot",
                "effect": "NoSchedule",
            },
        ),
        30,
    ),
}

_Part = TypeVar("_Part", "Gpu", "Gang", "Spot", "Autoscale", "Rdma")


@dataclass(frozen=True)
class Gpu:
    """The GPUs of one Ray Train worker.

    :param kind: ``"full"``; ``"mig"``: a slice of a GPU; ``"shared"``: a GPU shared by time-slicing or MPS;
        ``"dra"``: by a ResourceClaimTemplate
    :param count: GPUs per Ray Train worker; 1 for MIG and shared, where a process can use one only
    :param profile: MIG profile such as ``"1g.10gb"``
    :param resource: name of the extended resource where it is not NVIDIA's usual one, for example ``"amd.com/gpu"``
    :param claim_template: name of the ResourceClaimTemplate (dra), which must give the GPUs of one pod
    """

    kind: str = "full"
    count: int = 1
    profile: str | None = None
    resource: str | None = None
    claim_template: str | None = None

    @property
    def resource_name(self) -> str | None:
        """The extended resource asked for; None for DRA."""
        if self.kind == "dra":
            return None
        if self.resource:
            return self.resource
        if self.kind == "mig":
            return f"nvidia.com/mig-{str(self.profile).replace('+', '.')}"
        return "nvidia.com/gpu.shared" if self.kind == "shared" else "nvidia.com/gpu"

    def validate(self) -> None:
        """:raises InvalidInputError: names the field, what it must be and what to change"""
        one_of("gpu.kind", self.kind, ("full", "mig", "shared", "dra"))
        count("gpu.count", self.count, at_least=1)
        for name, example in (("profile", "1g.10gb"), ("resource", "nvidia.com/gpu"), ("claim_template", "one-gpu")):
            if getattr(self, name) not in (None, ""):
                text_of(f"gpu.{name}", getattr(self, name), example)
        if self.claim_template:
            name_of("gpu.claim_template", self.claim_template, "ResourceClaimTemplate")
        if self.kind in ("mig", "shared") and self.count != 1:
            raise InvalidInputError(
                f"gpu.count is {self.count} with kind {self.kind!r}; a process can use one such device only: set it to "
                "1 and raise num_workers"
            )
        for name, kind in (("profile", "mig"), ("claim_template", "dra")):
            if getattr(self, name) and self.kind != kind:
                raise InvalidInputError(f"gpu.{name} is for kind {kind!r}, not for {self.kind!r}")
        if self.kind == "mig" and not (self.resource and self.profile is None):
            profile = str(self.profile).replace(".me", "+me")
            if profile not in MIG_PROFILES:
                known = "; ".join(f"{gpu}: {profiles}" for gpu, profiles in _MIG.items())
                raise InvalidInputError(
                    f"gpu.profile is {self.profile!r}; expected a MIG profile ({known}); for another one give the "
                    "device plugin's name of it as gpu.resource and no profile"
                )
        if self.kind == "dra" and (not self.claim_template or self.resource):
            raise InvalidInputError(
                "gpu of kind 'dra' needs claim_template, a ResourceClaimTemplate's name, no resource"
            )
        if self.resource and not ("/" in self.resource and LABEL_KEY.match(self.resource)):
            raise InvalidInputError(f"gpu.resource is {self.resource!r}; expected a name such as nvidia.com/gpu")


@dataclass(frozen=True)
class Gang:
    """All pods or none, by a scheduler or queue that the cluster has.

    :param scheduler: ``"volcano"``, ``"yunikorn"``, ``"kueue"`` or ``"kai"``
    :param queue: name of the queue
    :param priority: priority class
    """

    scheduler: str
    queue: str
    priority: str | None = None

    def validate(self) -> None:
        """:raises InvalidInputError: the scheduler is unknown or cannot schedule RayJobs, or no queue is named"""
        text_of("gang.scheduler", self.scheduler, "volcano")
        if self.scheduler in _REFUSED_SCHEDULERS:
            raise InvalidInputError(
                f"gang.scheduler {self.scheduler!r} cannot run a RayJob ({_REFUSED_SCHEDULERS[self.scheduler]}); "
                f"use one of {', '.join(SCHEDULERS)}"
            )
        one_of("gang.scheduler", self.scheduler, SCHEDULERS)
        for name in ("queue", "priority"):
            value = getattr(self, name)
            if value in (None, "") and name == "priority":
                continue
            if not (isinstance(value, str) and value and LABEL_VALUE.match(value)):
                raise InvalidInputError(f"gang.{name} is {value!r}; expected the name of one, at most 63 characters")


@dataclass(frozen=True)
class Spot:
    """Workers on nodes that may be taken away; the head, with the driver, stays off them.

    :param provider: ``"gke"``, ``"eks"``, ``"karpenter"`` or ``"aks"``: their labels, taints and notice
    :param selector: labels of the spot nodes, instead of the provider's
    :param tolerations: of the spot nodes' taints, instead of the provider's
    :param grace_seconds: the pods' termination grace period, not longer than the notice
    :param drain_seconds: of it for a last checkpoint; default: grace_seconds - 10
    """

    provider: str | None = None
    selector: Mapping[str, str] | None = None
    tolerations: Sequence[Mapping[str, Any]] | None = None
    grace_seconds: int = 30
    drain_seconds: int | None = None

    @property
    def nodes(self) -> dict[str, str]:
        """Labels of the spot nodes."""
        return dict(SPOT[self.provider][0] if self.selector is None and self.provider else self.selector or {})

    @property
    def tolerated(self) -> list[dict[str, Any]]:
        """Tolerations that let a pod onto the spot nodes."""
        given = SPOT[self.provider][1] if self.tolerations is None and self.provider else self.tolerations or ()
        return [dict(toleration) for toleration in given]

    @property
    def drain(self) -> int:
        """Seconds that Ray drains a node; less than the grace period, or the node dies in the middle of it."""
        return self.grace_seconds - 10 if self.drain_seconds is None else self.drain_seconds

    def validate(self) -> None:
        """:raises InvalidInputError: names the field, what it must be and what to change"""
        if self.provider is not None:
            one_of("spot.provider", self.provider, SPOT)
        if self.selector is not None:
            mapping_of("spot.selector", self.selector)
        if not self.nodes:
            raise InvalidInputError(f"spot needs a provider ({', '.join(SPOT)}) or the selector of its nodes")
        check_labels("spot.selector", self.nodes)
        if self.tolerations is not None:
            list_of_dicts("spot.tolerations", self.tolerations)
        if self.drain_seconds is not None:
            count("spot.drain_seconds", self.drain_seconds, at_least=0)
        count("spot.grace_seconds", self.grace_seconds, at_least=11 if self.drain_seconds is None else 2)
        notice = SPOT[self.provider][2] if self.provider else self.grace_seconds
        if self.grace_seconds > notice:
            raise InvalidInputError(
                f"spot.grace_seconds is {self.grace_seconds}; {self.provider} takes a node {notice} s after the notice"
            )
        if not 0 < self.drain < self.grace_seconds:
            raise InvalidInputError(
                f"spot.drain_seconds is {self.drain_seconds}; expected less than grace_seconds ({self.grace_seconds}) "
                "and more than 0: the last checkpoint is written in that time"
            )


@dataclass(frozen=True)
class Autoscale:
    """Workers come and go with the demand (Ray's autoscaler v2).

    :param min_workers: Ray Train workers that there is always room for
    :param max_workers: Ray Train workers that there is room for at most
    :param idle_timeout: seconds after which an idle pod goes
    """

    min_workers: int
    max_workers: int
    idle_timeout: int = 60

    def validate(self) -> None:
        """:raises InvalidInputError: names the field and what it must be"""
        count("autoscale.min_workers", self.min_workers, at_least=0)
        count("autoscale.max_workers", self.max_workers, at_least=max(1, self.min_workers))
        count("autoscale.idle_timeout", self.idle_timeout, at_least=1)


@dataclass(frozen=True)
class Rdma:
    """InfiniBand or RoCE for the workers, as the cluster's device plugin and network offer it.

    :param resources: extended resources per pod, for example ``{"rdma/hca_shared_devices_a": 1}``
    :param host_network: use the node's network
    :param annotations: of the worker pods, for example ``{"k8s.v1.cni.cncf.io/networks": "rdma-net"}``
    """

    resources: Mapping[str, int] = field(default_factory=dict)
    host_network: bool = False
    annotations: Mapping[str, str] = field(default_factory=dict)

    def validate(self) -> None:
        """:raises InvalidInputError: names the field and what it must be"""
        for name, number in mapping_of("rdma.resources", self.resources).items():
            if not isinstance(name, str) or "/" not in name or not LABEL_KEY.match(name):
                raise InvalidInputError(f"rdma resource {name!r}: expected a name such as rdma/hca_shared_devices_a")
            whole(f"rdma[{name!r}]", number, at_least=1)
        if not isinstance(self.host_network, bool):
            raise InvalidInputError(f"rdma.host_network is {self.host_network!r}; expected True or False")
        plain_values("rdma.annotations", self.annotations)
        if not (self.resources or self.host_network or self.annotations):
            raise InvalidInputError('rdma is empty; expected for example {"rdma/ib": 1} or {"host_network": True}')


def _part(what: str, kind: type[_Part], value: Any) -> _Part:
    if isinstance(value, kind):
        return value
    values = known_fields(what, kind, value)
    for entry in fields(kind):
        given = values.get(entry.name)
        if str(entry.type).startswith("int") and isinstance(given, str):
            values[entry.name] = whole(f"{what}.{entry.name}", given, at_least=0)
    try:
        return kind(**values)
    except TypeError as error:
        raise InvalidInputError(f"{what} is incomplete: {error}") from None


def _rdma(value: Any) -> Rdma:
    if isinstance(value, Mapping) and "resources" not in value:
        # {"rdma/ib": 1} is short for {"resources": {"rdma/ib": 1}}.
        direct = {name: whole(f"rdma[{name!r}]", number, 1) for name, number in value.items() if "/" in str(name)}
        value = {**{name: item for name, item in value.items() if name not in direct}, "resources": direct}
    return _part("rdma", Rdma, value)


PARTS = {
    "gpu": lambda value: _part("gpu", Gpu, value),
    "gang": lambda value: _part("gang", Gang, value),
    "spot": lambda value: _part("spot", Spot, {} if value is True else value),
    "autoscale": lambda value: _part("autoscale", Autoscale, value),
    "rdma": _rdma,
}
