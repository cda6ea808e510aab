"""One InferenceService of KServe, whose own controller splits the traffic: by Knative revisions, or by ``spec.canary``.

Read from KServe's controllers (github.com/kserve/kserve, ksvc_reconciler.go, inference_service_status.go,
httproute_reconciler.go). What they do that one does not expect:

- Knative mode splits between the latest ready revision and the last one that had all traffic. Without
  ``canaryTrafficPercent`` the latest gets everything, so that field is never taken away here.
- After a rollback the latest revision is still the bad one; so the stable model is put back as the latest, but only
  when traffic has left: a new revision before that keeps KServe from going back behind the bad one.
- Standard mode ignores ``canaryTrafficPercent``. It takes ``spec.canary`` from 0.20 on, but only later releases give it
  traffic; and one that is not ready gets none, whatever its status repeats of the request. The route tells.
- Annotations of an InferenceService go into the pods: changing one restarts them. None is changed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.targets.base import KubernetesTarget, Reading
from airflow_mlops.rollout.targets.deployers import MODE_ANNOTATION, load_failure
from airflow_mlops.rollout.targets.gateway import route_problem
from airflow_mlops.rollout.targets.kube import (
    HTTPROUTE,
    ISVC,
    MANAGED_BY,
    Object,
    difference,
    ensure,
    fits,
    is_true,
    last_writer,
    merged,
    name_part,
    told,
)
from airflow_mlops.rollout.targets.lease import Arm, Books, Claim
from airflow_mlops.rollout.targets.servable import (
    FRAMEWORKS,
    STABLE_ONLY,
    Resolver,
    fixed_resolver,
    predictor,
    version_of,
)

PERCENT = "canaryTrafficPercent"
NOTHING = {(0.0, False)}
UPGRADE = (
    "KServe release without canary weights in Standard mode: InferenceService {name} has a canary that is ready, and "
    "HTTPRoute {name} does not lead to it {seconds:g} s after it was given {weight:g} %. The weights came with "
    "https://github.com/kserve/kserve/pull/5912 and https://github.com/kserve/kserve/pull/5984 (after 0.20). Upgrade "
    "KServe, or give this target fallback='http_route' with a gateway: two InferenceServices behind a route of its own"
)


class _KServe(KubernetesTarget):
    """One InferenceService.

    :param template: fields of the predictor: resources, runtime, environment, replicas, service account
    :param resolver: where a version lies and what it is
    """

    mode = ""
    modes: tuple[str, ...] = ()
    whole = True

    def __init__(
        self,
        client: Any,
        name: str,
        namespace: str | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        resolver: Resolver | None = None,
        **options: Any,
    ) -> None:
        super().__init__(client, name, namespace, **options)
        fits(f"{name}-predictor", "the name of the InferenceService's predictor")
        self.template, self.resolver = dict(template or {}), resolver or fixed_resolver()

    async def _get(self) -> Object | None:
        return await self.client.aget(ISVC, self.name, namespace=self.namespace)

    async def _there(self) -> Object:
        found = await self._get()
        if found is None:
            raise InvalidInputError(f"there is no InferenceService {self.name}; deploy the stable version first")
        mode = (found.get("status") or {}).get("deploymentMode") or (found["metadata"].get("annotations") or {}).get(
            MODE_ANNOTATION
        )
        if mode and mode not in self.modes:
            raise InvalidInputError(
                f"InferenceService {self.name} runs in KServe's {mode} mode, and this target is for {self.mode} mode; "
                f"give it mode={'standard' if self.mode == 'Knative' else 'knative'!r}"
            )
        if not found["spec"]["predictor"].get("model"):
            framework = next((key for key in FRAMEWORKS if found["spec"]["predictor"].get(key)), "containers")
            raise InvalidInputError(
                f"InferenceService {self.name} names its model in spec.predictor.{framework}; expected "
                "spec.predictor.model with modelFormat and storageUri, which says the same"
            )
        return found

    async def _predictor(self, version: str, uri: str) -> Object:
        return predictor(await self.resolver(version, uri), version, self.template)

    async def _first(self, version: str, uri: str) -> Arm:
        wanted = self._named(await self._predictor(version, uri), version)
        body = {
            "apiVersion": ISVC.api_version,
            "kind": ISVC.kind,
            "metadata": {
                "name": self.name,
                "labels": dict(MANAGED_BY),
                "annotations": {MODE_ANNOTATION: self.modes[-1] if self.mode == "Knative" else self.mode},
            },
            "spec": {"predictor": wanted},
        }
        if await self._get() is None:
            await ensure(self.client, ISVC, body, self.namespace, self._sleep)
        there = (await self._there())["spec"]["predictor"]
        if not self._serves(there, version, wanted):
            raise ConcurrentChangeError(
                f"InferenceService {self.name} is there and serves {version_of(there)}, not version {version}; "
                "restore the version instead of deploying it, or delete the InferenceService"
            )
        await self._until_up(f"version {version} of {self.name}", self._look_at_stable)
        return {"version": version, "uri": uri, **self._remembered(await self._there())}

    def _named(self, wanted: Object, version: str) -> Object:
        return wanted

    def _remembered(self, isvc: Object) -> Object:
        return {}

    @staticmethod
    def _serves(there: Mapping[str, Any], version: str, wanted: Mapping[str, Any]) -> bool:
        """Whether that is the version, by its label or, where it was deployed by others, by where its model lies."""
        return version_of(there) in (version, wanted["model"]["storageUri"])

    async def _look_at_stable(self) -> tuple[bool, str, str | None]:
        isvc = await self._there()
        status = isvc.get("status") or {}
        if is_true(status.get("conditions"), "Ready"):
            return await self._serves_all(isvc)
        return False, told(status.get("conditions")) or "no condition yet", load_failure(status.get("modelStatus"))

    async def _serves_all(self, isvc: Object) -> tuple[bool, str, str | None]:
        return True, "", None

    async def _adopt(self, claim: Claim, version: str, uri: str) -> bool:
        if claim.books.stable is not None or claim.books.canary is not None:
            return False
        isvc = await self._there()
        wanted = await self._predictor(version, uri)
        if self._canary_there(isvc) or not self._serves(isvc["spec"]["predictor"], version, wanted):
            return False
        await self._until_up(f"version {version} of {self.name}", self._look_at_stable)
        arm = {"version": version, "uri": uri, **self._remembered(await self._there())}
        await self._change_books(claim, lambda books: replace(books, stable=arm))
        return True

    def _canary_there(self, isvc: Object) -> bool:
        raise NotImplementedError

    def _stranger(self, isvc: Object) -> ConcurrentChangeError:
        return ConcurrentChangeError(
            f"InferenceService {self.name} has a canary that no rollout of this package made, changed by "
            f"{last_writer(isvc, 'predictor')}; finish or remove it first"
        )


def _predicting(isvc: Mapping[str, Any]) -> frozenset[str]:
    ready = is_true((isvc.get("status") or {}).get("conditions"), "PredictorReady")
    return frozenset({"stable"} if ready else ())


def _percents(isvc: Mapping[str, Any]) -> dict[str, int]:
    """Where Knative sends traffic: revision to percent."""
    found: dict[str, int] = {}
    for each in _component(isvc).get("traffic") or ():
        name = each.get("revisionName") or ""
        found[name] = found.get(name, 0) + int(each.get("percent") or 0)
    return found


def _component(isvc: Mapping[str, Any]) -> Mapping[str, Any]:
    return ((isvc.get("status") or {}).get("components") or {}).get("predictor") or {}


class KServeKnative(_KServe):
    """An InferenceService in Knative (serverless) mode.

    A version that has lost its last percent of traffic is not kept warm there: KServe names no revision without
    traffic, and Knative scales those to zero. So end the steps with a long bake below 100 %.
    """

    kind = "kserve-knative"
    mode = "Knative"
    modes = ("Knative", "Serverless")

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
            return Reading(0.0, None, version_of(spec), ready=_predicting(isvc), epoch=epoch, writer=writer)
        stable = str(books.stable.get("revision"))
        weight = float(sum(percent for name, percent in percents.items() if name != stable))
        ready = {"stable"} if percents.get(stable, 0) else set()
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
            claim, lambda now: replace(now, canary={**canary, "revision": revision}, leftover=None)
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


class KServeStandard(_KServe):
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
            return Reading(0.0, None, there, ready=_predicting(isvc), epoch=epoch, writer=writer)
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
        claim = await self._change_books(claim, lambda books: replace(books, stable=entered, canary=arm, leftover=None))
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


def _without_runtime(spec: Mapping[str, Any], wanted: Mapping[str, Any]) -> Object:
    """Without the runtime that KServe has chosen for a model of another format."""
    model = spec.get("model") or {}
    if (model.get("modelFormat") or {}).get("name") == wanted["model"]["modelFormat"]["name"]:
        return dict(spec)
    return {**spec, "model": {key: value for key, value in model.items() if key != "runtime"}}


def _with(entry: Object, name: str | None, percent: int) -> Object:
    return {**entry, "trafficPercent": percent} if entry["predictor"].get("name") == name else entry
