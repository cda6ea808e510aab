"""KServe in Standard mode.

``canaryTrafficPercent`` means nothing there. ``spec.canary`` is taken from 0.20 on, but only later releases give it
traffic; and one that is not ready gets none, whatever its status repeats of the request. The route tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.targets.base import Reading
from airflow_mlops.rollout.targets.deployers import load_failure
from airflow_mlops.rollout.targets.gateway import route_problem
from airflow_mlops.rollout.targets.kserve import PERCENT, KServe, predicting
from airflow_mlops.rollout.targets.kube import (
    HTTPROUTE,
    ISVC,
    Object,
    difference,
    fits,
    is_true,
    last_writer,
    name_part,
    told,
)
from airflow_mlops.rollout.targets.lease import Arm, Books, Claim
from airflow_mlops.rollout.targets.servable import STABLE_ONLY, version_of

UPGRADE = (
    "KServe release without canary weights in Standard mode: InferenceService {name} has a canary that is ready, and "
    "HTTPRoute {name} does not lead to it {seconds:g} s after it was given {weight:g} %. The weights came with "
    "https://github.com/kserve/kserve/pull/5912 and https://github.com/kserve/kserve/pull/5984 (after 0.20). Upgrade "
    "KServe, or give this target fallback='http_route' with a gateway: two InferenceServices behind a route of its own"
)


class KServeStandard(KServe):
    """An InferenceService in Standard mode with ``spec.canary``; KServe's HTTPRoute tells where traffic goes.

    Each version's predictor has a name of its own from the first day, so that the canary becomes the stable one
    without a restart, and the old one stays as a canary without traffic until the clean-up.
    """

    kind = "kserve-standard"
    mode = "Standard"
    modes = ("Standard", "RawDeployment")

    def _named(self, wanted: Object, version: str) -> Object:
        return {**wanted, "name": name_part(version)}

    def _canary_there(self, isvc: Object) -> bool:
        return bool(isvc["spec"].get("canary"))

    def _remembered(self, isvc: Object) -> Object:
        return {"name": isvc["spec"]["predictor"].get("name") or ""}

    def _workload(self, arm: Arm) -> str | None:
        return (self._service(arm) or "").removesuffix("-predictor")

    def _service(self, arm: Mapping[str, Any] | None) -> str | None:
        if arm is None:
            return None
        return fits(
            "-".join(part for part in (self.name, arm.get("name") or "", "predictor") if part),
            "the name of the predictor's Service",
        )

    async def _serves_all(self, isvc: Object) -> tuple[bool, str, str | None]:
        route = await self._route()
        if route is None:
            raise self._no_route()
        problem = route_problem(route)
        return problem is None, problem or "", None

    def _no_route(self) -> InvalidInputError:
        return InvalidInputError(
            f"there is no HTTPRoute {self.name}, so KServe does not use the Gateway API for InferenceService "
            f"{self.name} and cannot split traffic in Standard mode; set enableGatewayApi in KServe's "
            "inferenceservice-config, or give this target fallback='http_route' with a gateway"
        )

    async def _route(self) -> Object | None:
        return await self.client.aget(HTTPROUTE, self.name, namespace=self.namespace)

    async def _read(self, books: Books) -> Reading | None:
        isvc = await self._get()
        if isvc is None:
            return None
        spec, route = isvc["spec"], await self._route()
        epoch = f"{isvc['metadata'].get('generation')}:{route['metadata'].get('generation') if route else ''}"
        writer = last_writer(isvc, "canary")
        if books.stable is None:
            there = version_of(spec["predictor"])
            return Reading(0.0, None, there, ready=predicting(isvc), epoch=epoch, writer=writer)
        problem = route_problem(route) if route else f"there is no HTTPRoute {self.name}"
        weight = self._routed(route, books)
        asked, foreign = self._asked(isvc, books)
        status = isvc.get("status") or {}
        ready = set()
        for side, arm in (("stable", books.stable), ("canary", books.canary)):
            if arm is not None and self._is_ready(isvc, arm):
                ready.add(side)
        if books.canary is not None and books.weight and not weight and "canary" not in ready:
            problem = f"the canary is not ready: {told(status.get('conditions'))}"
        return Reading(weight, (asked, False), None, False, frozenset(ready), epoch, problem, writer, foreign)

    def _routed(self, route: Mapping[str, Any] | None, books: Books) -> float:
        """Percent that goes to the canary, by the rules that lead to a predictor."""
        if route is None:
            return 0.0
        stable, canary = self._service(books.stable), self._service(books.canary)
        found = []
        for rule in route["spec"].get("rules") or ():
            weights = {ref["name"]: ref.get("weight", 1) for ref in rule.get("backendRefs") or ()}
            if not ({stable, canary} - {None}) & set(weights) or not sum(weights.values()):
                continue
            found.append(100.0 * weights.get(canary or "", 0) / sum(weights.values()))
        # Rules that differ are not in force yet; the one farthest from stable tells.
        return round(max(found), 6) if found else 0.0

    def _asked(self, isvc: Mapping[str, Any], books: Books) -> tuple[float, str | None]:
        """The canary's share in the spec, and what somebody else has changed there."""
        spec = isvc["spec"]
        listed = {each["predictor"].get("name"): each for each in spec.get("canary") or ()}
        names = {arm.get("name") for arm in (books.stable, books.canary, books.leftover) if arm}
        strangers = [name for name in [*listed, spec["predictor"].get("name") or ""] if name not in names]
        foreign = None
        if strangers:
            foreign = (
                f"InferenceService {self.name} was changed by {last_writer(isvc, 'canary')}, "
                f"{last_writer(isvc, 'predictor')}: it has a predictor {strangers[0]!r} that this rollout did not make"
            )
        if books.canary is None:
            return 0.0, foreign
        if spec["predictor"].get("name") == books.canary["name"]:
            return 100.0 - sum(each["trafficPercent"] for each in listed.values()), foreign
        found = listed.get(books.canary["name"])
        return float(found["trafficPercent"]) if found else 0.0, foreign

    @staticmethod
    def _is_ready(isvc: Mapping[str, Any], arm: Mapping[str, Any]) -> bool:
        status = isvc.get("status") or {}
        if (isvc["spec"]["predictor"].get("name") or "") == arm.get("name"):
            return is_true(status.get("conditions"), "PredictorReady")
        return any(each["name"] == arm.get("name") and each["ready"] for each in status.get("canaryStatuses") or ())

    async def _bring_up(self, claim: Claim, version: str, uri: str) -> None:
        isvc = await self._there()
        stable = claim.books.stable
        if stable is None:
            if self._canary_there(isvc):
                raise self._stranger(isvc)
            await self._until_up(f"the stable version of {self.name}", self._look_at_stable, claim)
            there = isvc["spec"]["predictor"]
            stable = {"version": version_of(there), "uri": "", "name": there.get("name") or ""}
        if await self._route() is None:
            raise self._no_route()
        name = name_part(version)
        arm: Arm = {"version": version, "uri": uri, "name": name}
        entered = stable
        self._service(arm)
        claim = await self._change_books(
            claim, lambda books: replace(books, stable=entered, canary=books.canary or arm, leftover=None)
        )
        wanted = self._named(await self._predictor(version, uri), version)

        def make(isvc: Object) -> Object | None:
            listed = isvc["spec"].get("canary") or []
            others = [each for each in listed if each["predictor"].get("name") != name]
            if others or (isvc["spec"]["predictor"].get("name") or "") not in (entered.get("name"), name):
                raise ConcurrentChangeError(self._asked(isvc, claim.books)[1] or f"{self.name} was changed meanwhile")
            if listed or isvc["spec"]["predictor"].get("name") == name:
                return None
            return {"spec": {"canary": [{"predictor": _as_canary(wanted), "trafficPercent": 0}]}}

        await self._change(claim, ISVC, self.name, make, f"version {version}")

        async def look() -> tuple[bool, str, str | None]:
            found = await self._there()
            if self._is_ready(found, arm):
                return True, "", None
            statuses = (found.get("status") or {}).get("canaryStatuses") or ()
            mine: Mapping[str, Any] = next((each for each in statuses if each["name"] == name), {})
            return False, f"KServe says {mine or 'nothing of it'}", load_failure(mine.get("modelStatus"))

        await self._until_up(f"version {version} of {self.name}", look, claim)

    async def _shift(self, claim: Claim, *, force: bool = False) -> None:
        books = claim.books
        canary = books.canary or {}

        def make(isvc: Object) -> Object | None:
            now, foreign = self._asked(isvc, books)
            if foreign and not force:
                raise ConcurrentChangeError(foreign)
            if now == books.weight:
                return None
            if (now, False) not in books.allowed and not force:
                raise ConcurrentChangeError(
                    f"InferenceService {self.name} was changed by {last_writer(isvc, 'canary')}: {now:g} % for the "
                    f"canary, where this rollout asked for {books.weight:g} %"
                )
            listed = isvc["spec"].get("canary") or []
            if isvc["spec"]["predictor"].get("name") == canary.get("name"):
                # A promotion was under way: the old version, which stayed as a canary, gets its traffic back.
                stable = (books.stable or {}).get("name")
                return {"spec": {"canary": [_with(each, stable, 100 - int(books.weight)) for each in listed]}}
            if not any(each["predictor"].get("name") == canary.get("name") for each in listed):
                raise ConcurrentChangeError(
                    f"InferenceService {self.name} has lost its canary; changed by {last_writer(isvc, 'canary')}"
                )
            return {"spec": {"canary": [_with(each, canary.get("name"), int(books.weight)) for each in listed]}}

        await self._change(claim, ISVC, self.name, make, f"trafficPercent {books.weight:g}")

    def _not_split(self, claim: Claim, reading: Reading) -> Exception:
        if "canary" in reading.ready and reading.weight == 0 < claim.books.weight:
            return InvalidInputError(
                UPGRADE.format(name=self.name, seconds=self.weight_timeout, weight=claim.books.weight)
            )
        return super()._not_split(claim, reading)

    async def _crown(self, claim: Claim) -> Books:
        """Exchange the two predictors in one change; both go on as they are."""
        books = claim.books
        stable, canary = books.stable or {}, books.canary or {}

        def make(isvc: Object) -> Object | None:
            spec = isvc["spec"]
            if spec["predictor"].get("name") == canary["name"]:
                return None
            listed = [each for each in spec.get("canary") or () if each["predictor"].get("name") == canary["name"]]
            if not listed:
                raise ConcurrentChangeError(
                    f"InferenceService {self.name} has lost its canary; changed by {last_writer(isvc, 'canary')}"
                )
            old = spec["predictor"]
            kept = {key: old[key] for key in STABLE_ONLY if key in old}
            # One without a name of its own cannot be a canary: KServe takes its pods away.
            warm = [{"predictor": _as_canary(old), "trafficPercent": 0}] if old.get("name") else None
            new = {**listed[0]["predictor"], **kept}
            return {"spec": {"predictor": difference(old, new), "canary": warm}}

        await self._change(claim, ISVC, self.name, make, "the promotion")
        crowned = replace(books, stable=canary, canary=None, leftover=stable if stable.get("name") else None, was=())
        await self._until_routed(crowned)
        return crowned

    async def _until_routed(self, books: Books) -> None:
        """Until KServe's route leads to the stable predictor alone, under its new role."""
        deadline = self._clock() + self.weight_timeout
        service = self._service(books.stable)
        while True:
            route = await self._route()
            if route is not None and self._alone(route, service) and route_problem(route) is None:
                return
            if self._clock() >= deadline:
                raise ExternalSystemError(
                    f"HTTPRoute {self.name} does not lead to {service} alone, {self.weight_timeout:g} s after the "
                    "promotion"
                )
            await self._sleep(self.poll)

    @staticmethod
    def _alone(route: Mapping[str, Any], service: str | None) -> bool:
        weights = [
            {ref["name"]: ref.get("weight", 1) for ref in rule.get("backendRefs") or ()}
            for rule in route["spec"].get("rules") or ()
        ]
        ours = [found for found in weights if service in found]
        return bool(ours) and all(found[service] > 0 and sum(found.values()) == found[service] for found in ours)

    async def _release(self, claim: Claim) -> None:
        leftover = (claim.books.leftover or {}).get("name")

        def make(isvc: Object) -> Object | None:
            listed = isvc["spec"].get("canary") or []
            kept = [each for each in listed if each["predictor"].get("name") != leftover]
            if any(each["trafficPercent"] for each in listed if each not in kept):
                raise ConcurrentChangeError(
                    f"InferenceService {self.name} gives traffic to {leftover}, which was to be released; changed by "
                    f"{last_writer(isvc, 'canary')}"
                )
            return {"spec": {"canary": kept or None}} if kept != listed else None

        await self._change(claim, ISVC, self.name, make, "the end of what stayed warm")


def _as_canary(found: Mapping[str, Any]) -> Object:
    """A predictor without what only a stable one may have, and with a replica."""
    plain = {key: value for key, value in found.items() if key not in (*STABLE_ONLY, PERCENT)}
    # The CRD wants a name of the container there, and KServe's webhook none: an empty one suits both.
    model = {**(plain.get("model") or {}), "name": ""}
    return {**plain, "model": model, "minReplicas": max(1, plain.get("minReplicas") or 1)}


def _with(entry: Object, name: str | None, percent: int) -> Object:
    return {**entry, "trafficPercent": percent} if entry["predictor"].get("name") == name else entry
