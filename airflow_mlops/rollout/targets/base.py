"""The part of a rollout that is the same for every target on Kubernetes: claims, order of steps, what a kill leaves.

Each step writes what it is about to do into the books, does it, reads back whether traffic follows, and then closes
the books. So whoever repeats it after a kill finds out how far it came, and a split that is in neither the books nor
the step before was made by somebody else.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.targets.kube import RACES, KubernetesClient, Object
from airflow_mlops.rollout.targets.lease import Arm, Books, Claim, RolloutLease
from airflow_mlops.rollout.targets.protocol import TargetState
from airflow_mlops.rollout.targets.watch import Watchdog

#: Seconds for which a failure must be told before it counts: a status may still speak of the model before.
FAILURE_GRACE = 5.0


@dataclass(frozen=True)
class Reading:
    """What a target's own objects say.

    :param weight: where traffic really goes, percent to the canary
    :param asked: the split (weight, shadow) that the object's spec asks for; None when it has none of ours
    :param shadow: whether the canary gets copies
    :param stable: version that the object says is stable, for a target without books
    :param ready: arms that can serve
    :param epoch: changes with the object
    :param problem: why traffic is not split as asked
    :param writer: who changed the split last
    :param foreign: what somebody else has changed besides the split
    """

    weight: float
    asked: tuple[float, bool] | None
    stable: str | None
    shadow: bool = False
    ready: frozenset[str] = field(default_factory=frozenset)
    epoch: str = ""
    problem: str | None = None
    writer: str = "somebody"
    foreign: str | None = None


class KubernetesTarget(ABC):
    """One model's traffic in a cluster; see :class:`airflow_mlops.rollout.targets.protocol.Target`.

    :param client: of the cluster, within its connection
    :param name: of the target; its Lease is called after it
    :param namespace: where it is; None: the client's
    :param watchdog: what ends a canary when nothing else is left to; None: nothing does
    :param ready_timeout: seconds for a version to come up
    :param weight_timeout: seconds for traffic to follow a change
    :param poll: seconds between two looks while waiting
    """

    kind = ""
    #: What the Lease is called after: all ways to roll out on one object share it.
    lease_kind = ""
    shadows = False
    #: Whether only whole percents can be had.
    whole = False

    def __init__(
        self,
        client: KubernetesClient,
        name: str,
        namespace: str | None = None,
        *,
        watchdog: Watchdog | None = None,
        ready_timeout: float = 900.0,
        weight_timeout: float = 120.0,
        poll: float = 1.0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self.client, self.name, self.namespace = client, name, namespace
        self.watchdog = watchdog
        self.ready_timeout, self.weight_timeout, self.poll = ready_timeout, weight_timeout, poll
        self._clock, self._sleep = clock, sleep
        self.lease = RolloutLease(client, f"rollout-{self.lease_kind}-{name}", namespace, clock=clock, sleep=sleep)

    # What each target does its own way

    @abstractmethod
    async def _read(self, books: Books) -> Reading | None:
        """The target's objects; None when nothing is deployed."""

    @abstractmethod
    async def _first(self, version: str, uri: str) -> Arm:
        """Deploy the first version and return when it has all traffic."""

    @abstractmethod
    async def _bring_up(self, claim: Claim, version: str, uri: str) -> None:
        """Deploy a version without traffic and enter it as canary; returns when it could serve."""

    @abstractmethod
    async def _shift(self, claim: Claim, *, force: bool = False) -> None:
        """Ask for the split in the books.

        :param force: also when somebody else has changed it
        """

    def _workload(self, arm: Arm) -> str | None:
        """The name by which metrics know what serves a version."""
        return None

    async def _crown(self, claim: Claim) -> Books:
        """The canary has all traffic; make it the stable one and return the books of that."""
        return replace(claim.books, stable=claim.books.canary, canary=None, leftover=claim.books.stable)

    async def _withdraw(self, claim: Claim) -> None:
        """The canary has no traffic; take it back as far as nothing would serve it by accident."""
        return

    @abstractmethod
    async def _release(self, claim: Claim) -> None:
        """Take away what is left over."""

    # The protocol

    @property
    def unattended(self) -> str | None:
        """What happens to nobody's canary, for the log; None when the cluster ends it by itself."""
        if self.watchdog is not None:
            return None
        return (
            f"nothing takes traffic from the canary of {self.name} when Airflow is gone for good: no watchdog was given"
        )

    async def state(self) -> TargetState | None:
        """Where traffic goes now; None when nothing is deployed."""
        claim = await self.lease.read()
        books = claim.books
        reading = await self._read(books)
        if reading is None:
            return None
        now = self._clock()
        # One that is still coming up has to be loaded again by whoever continues.
        canary = str(books.canary["version"]) if books.canary and books.canary.get("up") else None
        stable = str(books.stable["version"]) if books.stable else reading.stable
        arms = {"stable": books.stable, "canary": books.canary}
        known = {side: self._workload(arm) for side, arm in arms.items() if arm}
        return TargetState(
            time=now,
            epoch=f"{claim.number}:{stable}:{canary}:{reading.epoch}",
            weight=reading.weight,
            configured=books.weight,
            stable=stable,
            canary=canary,
            shadow=reading.shadow,
            ready=reading.ready,
            rollout=claim.rollout,
            owner=claim.holder if claim.alive(now) else None,
            workloads={arm: name for arm, name in known.items() if name},
            problem=self._foreign(books, reading) or reading.problem,
        )

    async def deploy(self, version: str, uri: str) -> None:
        """Deploy the first version, with all traffic; returns when it serves."""
        books = (await self.lease.read()).books
        there = await self._read(books) is not None
        if there and books.canary:
            raise ConcurrentChangeError(
                f"{self.name} serves version {(books.stable or {}).get('version')} and has the canary "
                f"{books.canary['version']}: nothing to deploy first"
            )
        # What the books say of a deployment that is gone is of no use.
        kept = books if there else Books()
        arm = await self._first(version, uri)
        await self.lease.change(lambda claim: replace(claim, books=replace(kept, stable=arm)))

    async def claim(self, owner: str, ttl: float) -> None:
        """Take the target for one rollout, for ``ttl`` seconds from now; by the same owner again: prolong it."""
        await self.lease.claim(owner, ttl)

    async def renew(self, owner: str, ttl: float, annotation: Mapping[str, Any]) -> None:
        """Prolong the claim and keep ``annotation`` on the target; not when another owner or attempt has it."""
        claim = await self.lease.renew(owner, ttl, annotation)
        reading = await self._read(claim.books)
        if reading is not None and (foreign := self._foreign(claim.books, reading)):
            raise ConcurrentChangeError(foreign)

    async def load(self, version: str, uri: str) -> None:
        """Bring a version up without traffic; returns when it could serve."""
        claim = await self.lease.read()
        if claim.books.stable and claim.books.stable["version"] == version:
            raise InvalidInputError(f"version {version} of {self.name} is the stable one already: nothing to compare")
        if claim.books.canary and claim.books.canary["version"] != version:
            # Left behind by a rollout that was lost: it must not get traffic under this claim.
            claim = await self._set_aside(claim)
        if claim.books.leftover and claim.books.leftover["version"] != version:
            await self._release(claim)
            claim = await self._change_books(claim, lambda books: replace(books, leftover=None))
        await self._bring_up(claim, version, uri)
        await self._change_books(claim, lambda books: replace(books, canary={**(books.canary or {}), "up": True}))

    async def restore(self, version: str, uri: str) -> None:
        """Make a version the stable one with all traffic, because the registry's champion moved since."""
        claim = await self.lease.read()
        if claim.books.stable and claim.books.stable["version"] == version:
            await self._set_aside(claim)
            return
        if await self._adopt(claim, version, uri):
            return
        await self.load(version, uri)
        claim = await self._move(await self.lease.read(), 100.0, False)
        books = await self._crown(claim)
        await self.lease.change(lambda claim: replace(claim, books=_settled(books)))

    async def split(self, version: str, weight: float, annotation: Mapping[str, Any], *, shadow: bool = False) -> None:
        """Give the loaded ``version`` that share of traffic, percent, or with ``shadow`` copies of requests."""
        self._refuse_weight(weight, shadow)

        def make(claim: Claim) -> Claim:
            self._refuse(claim, annotation)
            canary = claim.books.canary
            if canary is None or canary["version"] != version or not canary.get("up"):
                there = canary and canary.get("up") and canary["version"]
                raise ConcurrentChangeError(
                    f"{self.name} has {f'version {there}' if there else 'no version'} as canary, not {version}: load "
                    "it first"
                )
            return replace(claim, rollout=dict(annotation) or claim.rollout)

        claim = await self.lease.change(make)
        if self.watchdog is not None and weight > 0:
            await self.watchdog.watch(claim)
        await self._move(claim, float(weight), shadow)

    async def promote(self, annotation: Mapping[str, Any]) -> None:
        """Make the canary stable with all traffic and free the claim; the old version stays warm until the next one."""
        claim = await self.lease.read()
        if claim.holder is None and claim.rollout == annotation and claim.books.canary is None:
            # The answer to an earlier call was lost.
            return
        self._refuse(claim, annotation)
        claim = await self._only(claim, annotation.get("version"))
        if claim.books.canary is not None:
            if self.watchdog is not None and claim.books.weight < 100:
                await self.watchdog.watch(claim)
            claim = await self._move(claim, 100.0, False)
            books = await self._crown(claim)
        else:
            books = claim.books
        await self._free(claim, _settled(books), annotation)

    async def roll_back(self, owner: str, annotation: Mapping[str, Any]) -> None:
        """Give all traffic to stable, free the claim; returns when the canary has none, as read back."""
        claim = await self.lease.read()
        claim.refuse_others(owner, self._clock())
        claim.refuse_earlier(owner, annotation or claim.rollout)
        if claim.finished:
            return
        claim = await self._to_nothing(claim)
        books = _settled(claim.books)
        if claim.books.canary is not None:
            books = replace(books, canary=None, leftover=books.canary)
        await self._free(claim, books, annotation)

    async def expire(self, number: int, grace: float) -> bool:
        """What the watchdog does: give all traffic to stable when the claim ``number`` ran out ``grace`` seconds ago.

        :return: whether there is nothing left to watch
        """

        def make(claim: Claim) -> Claim | None:
            now = self._clock()
            if claim.number != number or claim.holder is None or now < claim.renewed + claim.ttl + grace:
                return None
            return replace(claim, holder=None, books=claim.books.moving(0.0, False))

        claim = await self.lease.change(make)
        if claim.number != number or claim.books.canary is None:
            return True
        if claim.holder is not None:
            return False
        # A kill may have come between the books and the route. The canary stays: its owner may come back.
        await self._to_nothing(claim, withdraw=False)
        return True

    async def clean_up(self) -> None:
        """Release what only stayed warm."""
        claim = await self.lease.read()
        if claim.books.leftover is None:
            return
        await self._release(claim)
        await self._change_books(claim, lambda books: replace(books, leftover=None))

    # Steps

    async def _only(self, claim: Claim, version: Any) -> Claim:
        """Have no other version than the one to promote as canary."""
        canary, stable = claim.books.canary, claim.books.stable
        if canary is None or version in (None, canary["version"]):
            return claim
        if stable is not None and stable["version"] == version:
            # It serves already; what another rollout left behind is not what is meant.
            return await self._set_aside(claim)
        raise ConcurrentChangeError(f"{self.name} has version {canary['version']} as canary, not {version}")

    def _refuse_weight(self, weight: float, shadow: bool) -> None:
        if not 0 <= weight <= 100 or (self.whole and weight != int(weight)):
            kind = "a whole number of percents" if self.whole else "a number"
            raise InvalidInputError(f"the weight for {self.name} is {weight!r}; expected {kind} from 0 to 100")
        if shadow and not self.shadows:
            raise InvalidInputError(
                f"{self.name} cannot copy requests to a canary: {self.kind} has no mirroring. Leave the shadow step "
                "out, or roll out on a Gateway API route"
            )
        if shadow and weight:
            raise InvalidInputError(f"a canary that gets copies has no weight of its own, not {weight!r}")

    def _refuse(self, claim: Claim, annotation: Mapping[str, Any]) -> None:
        owner = str(annotation.get("owner") or claim.holder or "")
        claim.refuse_others(owner, self._clock())
        claim.refuse_ended(owner)
        claim.refuse_earlier(owner, annotation)

    def _foreign(self, books: Books, reading: Reading) -> str | None:
        if reading.foreign:
            return reading.foreign
        if books.canary is None or reading.asked is None or reading.asked in books.allowed:
            return None
        weight, shadow = reading.asked
        return (
            f"{self.name} was changed by {reading.writer}: {weight:g} %{' and copies' if shadow else ''} for the "
            f"canary, where this rollout asked for {books.weight:g} %. Let one of them change the route"
        )

    async def _move(self, claim: Claim, weight: float, shadow: bool) -> Claim:
        """Books, object, reading, books."""
        claim = await self._change_books(claim, lambda books: books.moving(weight, shadow))
        await self._shift(claim)
        await self._until_split(claim)
        return await self._change_books(claim, _settled)

    async def _to_nothing(self, claim: Claim, *, withdraw: bool = True) -> Claim:
        """Take all traffic from the canary, whoever gave it to it."""
        if claim.books.canary is None:
            return claim
        claim = await self._change_books(claim, lambda books: books.moving(0.0, False))
        await self._shift(claim, force=True)
        await self._until_split(claim)
        if withdraw:
            await self._withdraw(claim)
        return await self._change_books(claim, _settled)

    async def _set_aside(self, claim: Claim) -> Claim:
        """Make a leftover of the canary."""
        if claim.books.canary is None:
            return claim
        claim = await self._to_nothing(claim)
        return await self._change_books(claim, lambda books: replace(books, canary=None, leftover=books.canary))

    async def _change_books(self, claim: Claim, change: Callable[[Books], Books]) -> Claim:
        """Change the books unless the claim was lost meanwhile."""

        def make(now: Claim) -> Claim:
            if (now.number, now.holder) != (claim.number, claim.holder):
                taker = now.holder or "the watchdog, or the end of the rollout"
                raise ConcurrentChangeError(f"{self.name} was taken over meanwhile, by {taker}")
            now.refuse_earlier(str(claim.rollout.get("owner")), claim.rollout)
            return replace(now, books=change(now.books))

        return await self.lease.change(make)

    async def _free(self, claim: Claim, books: Books, annotation: Mapping[str, Any]) -> None:
        def make(now: Claim) -> Claim:
            if now.holder not in (None, claim.holder) and now.alive(self._clock()):
                now.refuse_others(str(claim.holder), self._clock())
            now.refuse_earlier(str(claim.rollout.get("owner")), claim.rollout)
            return replace(now, holder=None, books=books, rollout=dict(annotation))

        await self.lease.change(make)

    async def _adopt(self, claim: Claim, version: str, uri: str) -> bool:
        """Enter what already serves that version as stable; False when it does not."""
        return False

    async def _change(
        self, claim: Claim, kind: Any, name: str, make: Callable[[Object], Object | None], what: str
    ) -> Object:
        """Patch an object from the very version that ``make`` was shown, while the claim holds.

        :param make: the merge patch; None or empty: it is as it should be
        """
        for _ in range(RACES):
            found = await self.client.aget(kind, name, namespace=self.namespace)
            if found is None:
                raise ConcurrentChangeError(f"{kind.kind} {name} is gone: somebody deleted it, and with it {what}")
            if not (change := make(found)):
                return found
            await self.lease.check(claim)
            version = found["metadata"]["resourceVersion"]
            try:
                return await self.client.apatch(kind, name, change, resource_version=version, namespace=self.namespace)
            except ConcurrentChangeError:
                # A controller wrote its status, our first try got through, or somebody else: the next look tells.
                await self._sleep(0.05)
        raise ExternalSystemError(f"{kind.kind} {name} changes too fast for {what}")

    async def _until_split(self, claim: Claim) -> None:
        wanted = (claim.books.weight, claim.books.shadow)
        deadline = self._clock() + self.weight_timeout
        while True:
            reading = await self._read(claim.books)
            if reading is None:
                raise ExternalSystemError(f"{self.name} is gone: nothing is deployed there any more")
            if reading.asked == wanted and reading.weight == wanted[0] and not self._waits(reading):
                return
            if foreign := self._foreign(claim.books, reading):
                raise ConcurrentChangeError(foreign)
            await self.lease.check(claim)
            if self._clock() >= deadline:
                raise self._not_split(claim, reading)
            await self._sleep(self.poll)

    def _waits(self, reading: Reading) -> bool:
        """Whether a split that reads as asked is not yet one."""
        return reading.problem is not None

    def _not_split(self, claim: Claim, reading: Reading) -> Exception:
        return ExternalSystemError(
            f"{self.name} was asked for {claim.books.weight:g} % to the canary {self.weight_timeout:g} s ago and gives "
            f"it {reading.weight:g} %: {reading.problem or 'no reason is told'}"
        )

    async def _until_up(
        self, what: str, look: Callable[[], Awaitable[tuple[bool, str, str | None]]], claim: Claim | None = None
    ) -> None:
        """Wait until ``look`` says (ready, what it looks like, why it never will be), while the claim holds."""
        began = self._clock()
        failing: float | None = None
        while True:
            ready, seen, failure = await look()
            if ready:
                return
            if claim is not None:
                await self.lease.check(claim)
            now = self._clock()
            failing = None if failure is None else failing if failing is not None else now
            if failing is not None and now - failing >= min(FAILURE_GRACE, self.ready_timeout / 2):
                raise InvalidInputError(f"{what} cannot be served: {failure}")
            if now - began >= self.ready_timeout:
                raise ExternalSystemError(f"{what} was not ready within {self.ready_timeout:g} s: {seen}")
            await self._sleep(self.poll)


def _settled(books: Books) -> Books:
    """Traffic follows the books."""
    if books.canary is None:
        return replace(books, weight=0.0, shadow=False, was=())
    return replace(books, was=())
