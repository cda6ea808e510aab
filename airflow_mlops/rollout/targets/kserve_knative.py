"""KServe in Knative (serverless) mode.

- Traffic is split between the latest ready revision and the last one that had all traffic. Without
  ``canaryTrafficPercent`` the latest gets everything, so that field is never taken away here.
- After a rollback the latest revision is still the bad one; so the stable model is put back as the latest, but only
  when traffic has left: a new revision before that keeps KServe from going back behind the bad one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError
from airflow_mlops.rollout.targets.base import Reading
from airflow_mlops.rollout.targets.deployers import load_failure
from airflow_mlops.rollout.targets.kserve import PERCENT, KServe, predicting
from airflow_mlops.rollout.targets.kube import ISVC, Object, difference, last_writer, merged, told
from airflow_mlops.rollout.targets.lease import Arm, Books, Claim
from airflow_mlops.rollout.targets.servable import version_of

NOTHING = {(0.0, False)}


def _percents(isvc: Mapping[str, Any]) -> dict[str, int]:
    """Where Knative sends traffic: revision to percent."""
    found: dict[str, int] = {}
    for each in _component(isvc).get("traffic") or ():
        name = each.get("revisionName") or ""
        found[name] = found.get(name, 0) + int(each.get("percent") or 0)
    return found


def _component(isvc: Mapping[str, Any]) -> Mapping[str, Any]:
    return ((isvc.get("status") or {}).get("components") or {}).get("predictor") or {}


class KServeKnative(KServe):
    """An InferenceService in Knative (serverless) mode.

    A version that has lost its last percent of traffic is not kept warm there: KServe names no revision without
    traffic, and Knative scales those to zero. So end the steps with a long bake below 100 %.
    """

    kind = "kserve-knative"
    mode = "Knative"
    modes = ("Knative", "Serverless")

    def _workload(self, arm: Arm) -> str | None:
        return arm.get("revision")

    def _remembered(self, isvc: Object) -> Object:
        spec = {key: value for key, value in isvc["spec"]["predictor"].items() if key != PERCENT}
        return {"revision": _component(isvc).get("latestRolledoutRevision"), "predictor": spec}

    def _canary_there(self, isvc: Object) -> bool:
        return isvc["spec"]["predictor"].get(PERCENT, 100) < 100

    async def _serves_all(self, isvc: Object) -> tuple[bool, str, str | None]:
        component = _component(isvc)
        newest = str(component.get("latestCreatedRevision"))
        rolled = component.get("latestRolledoutRevision") == newest and _percents(isvc).get(newest) == 100
        return rolled, f"Knative sends {_percents(isvc)}, revision {newest} is the newest", None

    async def _read(self, books: Books) -> Reading | None:
        isvc = await self._get()
        if isvc is None:
            return None
        spec, component = isvc["spec"]["predictor"], _component(isvc)
        percents = _percents(isvc)
        epoch = f"{isvc['metadata'].get('generation')}:{sorted(percents.items())}"
        writer = last_writer(isvc, "predictor", PERCENT)
        if books.stable is None:
            return Reading(0.0, None, version_of(spec), ready=predicting(isvc), epoch=epoch, writer=writer)
        stable = str(books.stable.get("revision"))
        weight = float(sum(percent for name, percent in percents.items() if name != stable))
        # With all traffic at the canary the stable revision is asleep, and woken by the first percent.
        ready = {"stable"} if percents.get(stable, 0) or books.weight == 100 else set()
        problem, foreign = None, None
        if books.canary is not None:
            newest = component.get("latestReadyRevision")
            if newest and newest == books.canary.get("revision"):
                ready.add("canary")
            elif not weight and books.weight:
                problem = f"the canary's revision is not ready: {told((isvc.get('status') or {}).get('conditions'))}"
        elif weight:
            problem = f"revision {stable} is stable and has {percents.get(stable, 0)} % of the traffic: {percents}"
        ours = {str(arm["version"]) for arm in (books.stable, books.canary, books.leftover) if arm}
        if version_of(spec) not in ours | {(books.stable.get("predictor") or {}).get("model", {}).get("storageUri")}:
            foreign = f"InferenceService {self.name} was changed by {writer}: it now serves {version_of(spec)}"
        asked: float = spec.get(PERCENT, 100) if books.canary is not None else 0
        if books.canary is not None and version_of(spec) != str(books.canary["version"]):
            # Its revision is not the latest one yet, or not any more.
            asked = 0 if PERCENT in spec else books.weight
        return Reading(weight, (float(asked), False), None, False, frozenset(ready), epoch, problem, writer, foreign)

    async def _bring_up(self, claim: Claim, version: str, uri: str) -> None:
        if claim.books.canary is None:
            claim = await self._enter(claim, version, uri)
        wanted = await self._predictor(version, uri)
        books = claim.books
        stable, canary = books.stable or {}, books.canary or {}

        def make(isvc: Object) -> Object | None:
            spec = isvc["spec"]["predictor"]
            if version_of(spec) == version and PERCENT in spec:
                return None
            known = {str(stable["version"]), stable["predictor"]["model"].get("storageUri")}
            if version_of(spec) not in known:
                raise ConcurrentChangeError(
                    f"InferenceService {self.name} was changed by {last_writer(isvc, 'predictor')}: it now serves "
                    f"{version_of(spec)}, not version {stable['version']}"
                )
            # Together in one change: without the field the new revision would get all traffic.
            change = difference(spec, {**merged(_without_runtime(spec, wanted), wanted), PERCENT: 0})
            return {"spec": {"predictor": change}} if change else None

        await self._change(claim, ISVC, self.name, make, f"version {version}")

        async def look() -> tuple[bool, str, str | None]:
            isvc = await self._there()
            component, status = _component(isvc), isvc.get("status") or {}
            newest = component.get("latestCreatedRevision")
            if newest in (None, canary["before"], stable["revision"]):
                return False, "Knative has not made its revision yet", None
            if component.get("latestReadyRevision") == newest:
                weight = sum(each for name, each in _percents(isvc).items() if name != stable["revision"])
                # Loaded again in mid-rollout, it has what it was given.
                return not weight or books.allowed != NOTHING, f"it has {weight} % of the traffic already", None
            return False, told(status.get("conditions")), load_failure(status.get("modelStatus"))

        await self._until_up(f"version {version} of {self.name}", look, claim)
        revision = _component(await self._there()).get("latestReadyRevision")
        await self._change_books(
            claim, lambda now: replace(now, canary={**(now.canary or {}), "revision": revision}, leftover=None)
        )

    async def _enter(self, claim: Claim, version: str, uri: str) -> Claim:
        """Note what serves and what is about to, once KServe names one revision that has all traffic."""
        stable = claim.books.stable
        deadline = self._clock() + self.weight_timeout
        while True:
            isvc = await self._there()
            spec, component = isvc["spec"]["predictor"], _component(isvc)
            if stable is None and self._canary_there(isvc):
                raise self._stranger(isvc)
            rolled = component.get("latestRolledoutRevision")
            if rolled and _percents(isvc).get(rolled) == 100:
                break
            if self._clock() >= deadline:
                raise ExternalSystemError(
                    f"InferenceService {self.name} has no revision with all traffic to go back to: KServe's last one "
                    f"is {rolled}, and Knative sends {_percents(isvc)}; "
                    f"{told((isvc.get('status') or {}).get('conditions'))}"
                )
            await self._sleep(self.poll)
        plain = {key: value for key, value in spec.items() if key != PERCENT}
        if stable is None:
            stable = {"version": version_of(spec), "uri": "", "predictor": plain}
        if stable.get("revision") not in (None, rolled) and version_of(spec) != str(stable["version"]):
            raise ConcurrentChangeError(
                f"InferenceService {self.name} was changed by {last_writer(isvc, 'predictor')}: revision {rolled} has "
                f"all traffic, and not {stable['revision']} of version {stable['version']}"
            )
        if version_of(spec) == str(stable["version"]):
            stable = {**stable, "predictor": plain}
        arm = {"version": version, "uri": uri, "before": component.get("latestCreatedRevision")}
        entered = {**stable, "revision": rolled}
        return await self._change_books(claim, lambda books: replace(books, stable=entered, canary=arm))

    async def _shift(self, claim: Claim, *, force: bool = False) -> None:
        books = claim.books
        canary = books.canary or {}

        def make(isvc: Object) -> Object | None:
            spec = isvc["spec"]["predictor"]
            if version_of(spec) != str(canary.get("version")):
                if not books.weight:
                    return None
                raise ConcurrentChangeError(
                    f"InferenceService {self.name} was changed by {last_writer(isvc, 'predictor')}: it now serves "
                    f"{version_of(spec)}, not version {canary.get('version')}"
                )
            now = (float(spec.get(PERCENT, 100)), False)
            if now == (books.weight, False):
                return None
            if now not in books.allowed and not force:
                raise ConcurrentChangeError(
                    f"InferenceService {self.name} was changed by {last_writer(isvc, 'predictor')}: "
                    f"{PERCENT} is {now[0]:g}, where this rollout asked for {books.weight:g} %"
                )
            return {"spec": {"predictor": {PERCENT: int(books.weight)}}}

        await self._change(claim, ISVC, self.name, make, f"{PERCENT} {books.weight:g}")

    async def _withdraw(self, claim: Claim) -> None:
        """Make the stable model the latest again, still without traffic: it goes to the revision that has it."""
        canary, stable = claim.books.canary or {}, claim.books.stable or {}

        def make(isvc: Object) -> Object | None:
            spec = isvc["spec"]["predictor"]
            if version_of(spec) != str(canary.get("version")) or not stable.get("predictor"):
                return None
            change = difference(spec, {**stable["predictor"], PERCENT: 0})
            return {"spec": {"predictor": change}} if change else None

        await self._change(claim, ISVC, self.name, make, "the return of the stable model")

    async def _crown(self, claim: Claim) -> Books:
        isvc = await self._there()
        arm = {**(claim.books.canary or {}), **self._remembered(isvc)}
        arm["revision"] = arm.get("revision") or _component(isvc).get("latestReadyRevision")
        arm.pop("before", None)
        return replace(claim.books, stable=arm, canary=None, leftover=None)

    async def _release(self, claim: Claim) -> None:
        """After a rollback two revisions serve the stable model; leave it with the latest."""
        stable, withdrawn = claim.books.stable or {}, (claim.books.leftover or {}).get("revision")
        spec = (await self._there())["spec"]["predictor"]
        plain = {key: value for key, value in spec.items() if key != PERCENT}
        if difference(plain, stable.get("predictor") or {}):
            return

        async def put_back() -> tuple[bool, str, str | None]:
            component = _component(await self._there())
            newest = component.get("latestCreatedRevision")
            back = newest == component.get("latestReadyRevision") and newest not in (withdrawn, stable.get("revision"))
            return back, f"KServe's newest revision is {newest}", None

        if spec.get(PERCENT) == 0:
            await self._until_up(f"the newest revision of {self.name}", put_back, claim)

        def make(found: Object) -> Object | None:
            now = {key: value for key, value in found["spec"]["predictor"].items() if key != PERCENT}
            if found["spec"]["predictor"].get(PERCENT) != 0 or difference(now, stable["predictor"]):
                return None
            return {"spec": {"predictor": {PERCENT: 100}}}

        await self._change(claim, ISVC, self.name, make, "the stable model as the latest revision")

        async def look() -> tuple[bool, str, str | None]:
            return await self._serves_all(await self._there())

        await self._until_up(f"the stable version of {self.name}", look)
        rolled = _component(await self._there()).get("latestRolledoutRevision")
        await self._change_books(
            claim, lambda books: replace(books, stable={**(books.stable or {}), "revision": rolled})
        )


def _without_runtime(spec: Mapping[str, Any], wanted: Mapping[str, Any]) -> Object:
    """Without the runtime that KServe has chosen for a model of another format."""
    model = spec.get("model") or {}
    if (model.get("modelFormat") or {}).get("name") == wanted["model"]["modelFormat"]["name"]:
        return dict(spec)
    return {**spec, "model": {key: value for key, value in model.items() if key != "runtime"}}
