"""Who may change a target in the cluster, until when, and what is deployed there: one Lease per target.

All of it stands on a ``coordination.k8s.io`` Lease, which every change takes from one version to the next. It does not
stand on the InferenceService, because KServe copies an InferenceService's annotations into the pod template: each
note would restart the pods, and in Knative mode make a new revision. Nor on the route: each note would have its
gateway work it out anew.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.targets.kube import LEASE, MANAGED_BY, RACES, KubernetesClient, seconds_of, timestamp
from airflow_mlops.rollout.targets.protocol import ENDED

ROLLOUT_ANNOTATION = "mlops.airflow.org/rollout"
TARGET_ANNOTATION = "mlops.airflow.org/target"
#: An object's annotations may have 256 KiB together.
MOST_BYTES = 200_000

Arm = dict[str, Any]


@dataclass(frozen=True)
class Books:
    """What is deployed, and how traffic is to be split.

    :param stable: ``version`` and ``uri`` of the stable arm, and what else its target remembers
    :param canary: the same of the canary, and ``up`` once it could serve
    :param leftover: the same of an arm that has no traffic and waits for the clean-up
    :param weight: share for the canary, percent
    :param shadow: whether it gets copies
    :param was: weight and shadow before the changes that are under way; empty when none is
    """

    stable: Arm | None = None
    canary: Arm | None = None
    leftover: Arm | None = None
    weight: float = 0.0
    shadow: bool = False
    was: tuple[tuple[float, bool], ...] = ()

    def moving(self, weight: float, shadow: bool) -> Books:
        """About to change the split."""
        if (weight, shadow) == (self.weight, self.shadow):
            return self
        return replace(self, weight=weight, shadow=shadow, was=(*self.was, (self.weight, self.shadow)))

    @property
    def allowed(self) -> set[tuple[float, bool]]:
        """The splits that this package may have left behind."""
        return {(self.weight, self.shadow), *self.was}

    def to_json(self) -> dict[str, Any]:
        """Plain Python types."""
        return {key: value for key, value in asdict(self).items() if value not in (None, False, 0.0, ())}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Books:
        """Inverse of :meth:`to_json`."""
        return cls(**{**value, "was": tuple((float(each[0]), bool(each[1])) for each in value.get("was") or ())})


@dataclass(frozen=True)
class Claim:
    """A Lease as it was read.

    :param holder: whose it is, expired or not; None when it was freed
    :param renewed: when, seconds since the epoch
    :param ttl: seconds for which it is good
    :param number: of the claims of this target so far
    :param rollout: the controller's annotation
    :param version: resourceVersion; empty before there is a Lease
    """

    holder: str | None = None
    renewed: float = 0.0
    ttl: float = 0.0
    number: int = 0
    books: Books = field(default_factory=Books)
    rollout: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    def alive(self, now: float) -> bool:
        """Whether somebody holds the target."""
        return self.holder is not None and now < self.renewed + self.ttl

    @property
    def finished(self) -> bool:
        """Whether the last rollout came to its end, and no other has begun."""
        return self.holder is None and self.books.canary is None and "finished" in self.rollout

    def refuse_others(self, owner: str, now: float) -> None:
        """Raise if another rollout holds the target."""
        if self.alive(now) and self.holder != owner:
            raise ConcurrentChangeError(
                f"the rollout {self.holder} holds this target for another {self.renewed + self.ttl - now:.0f} s at "
                "most; two rollouts of one model cannot run at once: wait for it, or end its task"
            )

    def refuse_ended(self, owner: str) -> None:
        """Raise if the rollout of ``owner`` was ended."""
        theirs = self.holder if self.holder is not None else self.rollout.get("owner")
        if theirs != owner or self.finished:
            raise ConcurrentChangeError(ENDED.format(owner))

    def refuse_earlier(self, owner: str, annotation: Mapping[str, Any]) -> None:
        """Raise if a later attempt of the same task has taken the rollout over; who names none is not asked."""
        if "attempt" not in annotation:
            return
        attempts = [int(each.get("attempt", 1)) for each in (annotation, self.rollout)]
        if self.rollout.get("owner") == owner and attempts[0] < attempts[1]:
            raise ConcurrentChangeError(f"attempt {attempts[1]} of {owner} has taken the rollout over")


class RolloutLease:
    """The Lease of one target.

    :param client: of the cluster
    :param name: of the Lease
    :param clock: seconds since the epoch; workers' clocks may differ by much less than a claim lasts
    """

    def __init__(
        self,
        client: KubernetesClient,
        name: str,
        namespace: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self.client, self.name, self.namespace = client, name, namespace
        self._clock, self._sleep = clock, sleep

    async def read(self) -> Claim:
        """The Lease as it is now; an empty claim when there is none yet."""
        found = await self.client.aget(LEASE, self.name, namespace=self.namespace)
        return Claim() if found is None else _claim_of(found)

    async def change(self, make: Callable[[Claim], Claim | None]) -> Claim:
        """Store what ``make`` returns for the claim as it is; read again and ask again when another was faster.

        :param make: the new claim; None to leave it as it is; raises what keeps it from changing
        :raises InvalidInputError: the rollout's state is too large to keep
        """
        for _ in range(RACES):
            old = await self.read()
            new = make(old)
            if new is None or new == old:
                return old
            body = _body(new)
            try:
                if not old.version:
                    metadata = {"name": self.name, "labels": MANAGED_BY, **body["metadata"]}
                    manifest = {"apiVersion": LEASE.api_version, "kind": LEASE.kind, **body, "metadata": metadata}
                    return _claim_of(await self.client.acreate(LEASE, _filled(manifest), namespace=self.namespace))
                changed = await self.client.apatch(
                    LEASE, self.name, body, resource_version=old.version, namespace=self.namespace
                )
                return _claim_of(changed)
            except ConcurrentChangeError:
                await self._sleep(0.05)
        raise ExternalSystemError(f"the Lease {self.name} changes too fast to be taken; is a task started many times?")

    async def claim(self, owner: str, ttl: float) -> Claim:
        """Take it, or prolong it."""

        def make(claim: Claim) -> Claim:
            now = self._clock()
            claim.refuse_others(owner, now)
            mine = claim.alive(now) and claim.holder == owner
            return replace(
                claim, holder=owner, renewed=now, ttl=math.ceil(ttl), number=claim.number + (0 if mine else 1)
            )

        return await self.change(make)

    async def renew(self, owner: str, ttl: float, annotation: Mapping[str, Any]) -> Claim:
        """Prolong it and keep ``annotation``."""

        def make(claim: Claim) -> Claim:
            now = self._clock()
            claim.refuse_others(owner, now)
            claim.refuse_ended(owner)
            claim.refuse_earlier(owner, annotation)
            number = claim.number + (0 if claim.holder == owner else 1)
            rollout = dict(annotation)
            return replace(claim, holder=owner, renewed=now, ttl=math.ceil(ttl), number=number, rollout=rollout)

        return await self.change(make)

    async def check(self, claim: Claim) -> None:
        """Raise if ``claim`` is not the one that holds any more."""
        now = await self.read()
        if now.holder != claim.holder or now.number != claim.number:
            raise ConcurrentChangeError(
                f"the claim of {claim.holder} was lost to {now.holder or 'the watchdog, or the end of the rollout'}"
            )
        now.refuse_earlier(str(claim.rollout.get("owner")), claim.rollout)


def _claim_of(lease: Mapping[str, Any]) -> Claim:
    spec, metadata = lease.get("spec") or {}, lease["metadata"]
    notes = metadata.get("annotations") or {}
    return Claim(
        holder=spec.get("holderIdentity") or None,
        renewed=seconds_of(spec.get("renewTime")),
        ttl=float(spec.get("leaseDurationSeconds") or 0),
        number=int(spec.get("leaseTransitions") or 0),
        books=Books.from_json(json.loads(notes.get(TARGET_ANNOTATION) or "{}")),
        rollout=json.loads(notes.get(ROLLOUT_ANNOTATION) or "{}"),
        version=metadata["resourceVersion"],
    )


def _body(claim: Claim) -> dict[str, Any]:
    rollout = json.dumps(claim.rollout, sort_keys=True) if claim.rollout else None
    if rollout and len(rollout.encode()) > MOST_BYTES:
        raise InvalidInputError(
            f"the rollout's state has {len(rollout.encode())} bytes as JSON; at most {MOST_BYTES} can be kept in the "
            "cluster: fewer guardrails or steps make it smaller"
        )
    notes = {TARGET_ANNOTATION: json.dumps(claim.books.to_json(), sort_keys=True), ROLLOUT_ANNOTATION: rollout}
    spec = {
        "holderIdentity": claim.holder,
        "renewTime": timestamp(claim.renewed) if claim.renewed else None,
        "leaseDurationSeconds": int(claim.ttl) or None,
        "leaseTransitions": claim.number,
    }
    return {"metadata": {"annotations": notes}, "spec": spec}


def _filled(value: Any) -> Any:
    """Without the nulls that only a patch may have."""
    if not isinstance(value, Mapping):
        return value
    return {key: _filled(each) for key, each in value.items() if each is not None}
