"""Traffic split by an HTTPRoute of the Gateway API, whatever serves behind it.

Written to: https://gateway-api.sigs.k8s.io/reference/spec/ (HTTPRoute v1, standard channel). The route's spec alone
says little: its gateway says in ``status.parents`` whether it took up this very version of it, and whether every
backend could be found; only then does traffic follow the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.targets.base import KubernetesTarget, Reading
from airflow_mlops.rollout.targets.deployers import Deployer
from airflow_mlops.rollout.targets.kube import HTTPROUTE, MANAGED_BY, Object, condition, ensure, fits, last_writer
from airflow_mlops.rollout.targets.lease import Arm, Books, Claim

MIRROR = "RequestMirror"
#: Weights are relative and at most a million: parts of a hundredth of a percent can be had.
FINEST = 100


def weights_of(weight: float) -> tuple[int, int]:
    """Weights of stable and canary, as small as they can be."""
    if weight == int(weight):
        return 100 - int(weight), int(weight)
    part = round(weight * FINEST)
    return 100 * FINEST - part, part


def share(rule: Mapping[str, Any], service: str | None) -> float:
    """Percent of a rule's traffic that goes to a service."""
    found = {ref["name"]: ref.get("weight", 1) for ref in rule.get("backendRefs") or ()}
    total = sum(found.values())
    return 100.0 * found.get(service, 0) / total if total and service else 0.0


def mirrors(rule: Mapping[str, Any], service: str | None) -> bool:
    """Whether a rule sends copies of its requests to a service."""
    return any(_mirrored(each) == service for each in rule.get("filters") or ()) if service else False


def _mirrored(found: Mapping[str, Any]) -> str | None:
    if found.get("type") != MIRROR:
        return None
    return ((found.get("requestMirror") or {}).get("backendRef") or {}).get("name")


def route_problem(route: Mapping[str, Any]) -> str | None:
    """Why traffic does not follow the route as it is written, None if it does."""
    name, generation = route["metadata"]["name"], route["metadata"].get("generation", 0)
    parents = (route.get("status") or {}).get("parents") or []
    if not parents:
        return f"no gateway has taken HTTPRoute {name} up yet; does the gateway of its parentRefs exist and allow it?"
    for parent in parents:
        who = (parent.get("parentRef") or {}).get("name")
        for kind in ("Accepted", "ResolvedRefs"):
            found = condition(parent.get("conditions"), kind)
            if found and found.get("observedGeneration", generation) < generation:
                return f"gateway {who} has not seen the newest version of HTTPRoute {name} yet"
            if found.get("status") != "True":
                why = f"{found.get('reason') or 'no reason'}: {found.get('message') or 'not told'}"
                return f"gateway {who} does not take HTTPRoute {name} ({kind}={found.get('status')}, {why})"
    return None


class GatewayRoute(KubernetesTarget):
    """An HTTPRoute with two backends, its own or one that is there.

    Of a route that is there, only the rules that lead to the stable service are changed, and in those only the
    backends' weights and the copies.

    :param deployer: brings versions up behind the route
    :param route: name of the HTTPRoute, ``name`` if blank
    :param gateway: ``name`` or ``namespace/name`` of the Gateway, for a route to be created
    :param hostnames: of a route to be created
    :param path: prefix of a route to be created
    """

    kind = "gateway"
    lease_kind = "gateway"
    shadows = True

    def __init__(
        self,
        client: Any,
        name: str,
        namespace: str | None = None,
        *,
        deployer: Deployer,
        route: str | None = None,
        gateway: str | None = None,
        hostnames: Sequence[str] = (),
        path: str = "/",
        **options: Any,
    ) -> None:
        super().__init__(client, name, namespace, **options)
        self.deployer = deployer
        self.route = fits(route or name, "the name of the HTTPRoute")
        self.gateway, self.hostnames, self.path = gateway, list(hostnames), path
        if isinstance(hostnames, str):
            raise InvalidInputError(f"hostnames is the text {hostnames!r}; expected a list of host names")

    def _refuse_weight(self, weight: float, shadow: bool) -> None:
        super()._refuse_weight(weight, shadow)
        if abs(weight * FINEST - round(weight * FINEST)) > 1e-9:
            raise InvalidInputError(f"the weight for {self.name} is {weight!r}; expected at most two decimals")

    def _workload(self, arm: Arm) -> str | None:
        # KServe's pods are called after the InferenceService, whose Service this is.
        return self.deployer.service(str(arm["version"])).removesuffix("-predictor")

    def _service(self, arm: Arm | None) -> str | None:
        return None if arm is None else self.deployer.service(str(arm["version"]))

    def _rules(self, route: Mapping[str, Any], books: Books) -> list[int]:
        """Which rules lead to an arm."""
        ours = {self._service(arm) for arm in (books.stable, books.canary, books.leftover)} - {None}
        found = []
        for index, rule in enumerate(route["spec"].get("rules") or ()):
            names = {ref["name"] for ref in rule.get("backendRefs") or ()}
            if names & ours:
                found.append(index)
                if others := names - ours:
                    raise InvalidInputError(
                        f"rule {index} of HTTPRoute {self.route} also leads to {', '.join(sorted(others))}; expected "
                        "no backends besides those of the versions: split them off into a rule of their own"
                    )
        return found

    async def _read(self, books: Books) -> Reading | None:
        route = await self.client.aget(HTTPROUTE, self.route, namespace=self.namespace)
        if route is None:
            return None
        if books.stable is None:
            served = self._served(route)
            up = served is not None and (await self.deployer.look(served))[0]
            ready = frozenset({"stable"} if up else ())
            return Reading(0.0, None, served, ready=ready, epoch=str(route["metadata"].get("generation")))
        try:
            rules = [route["spec"]["rules"][index] for index in self._rules(route, books)]
        except InvalidInputError as error:
            return Reading(0.0, None, None, problem=str(error), foreign=str(error))
        canary = self._service(books.canary)
        splits = sorted({(round(share(rule, canary), 6), mirrors(rule, canary)) for rule in rules})
        serving = {
            name
            for name, arm in (("stable", books.stable), ("canary", books.canary))
            if arm is not None and (await self.deployer.look(str(arm["version"])))[0]
        }
        problem = route_problem(route)
        foreign = None
        if not splits:
            splits = [(0.0, False)]
            foreign = (
                f"no rule of HTTPRoute {self.route} leads to {self._service(books.stable)} any more; changed by "
                f"{last_writer(route, 'rules')}"
            )
        elif len(splits) > 1:
            problem = f"the rules of HTTPRoute {self.route} split differently: {splits}"
        elif canary is None and (lost := min(share(rule, self._service(books.stable)) for rule in rules)) < 100:
            problem = f"only {lost:g} % of the traffic of HTTPRoute {self.route} goes to the stable version"
        weight, shadow = splits[-1]
        return Reading(
            weight=weight,
            asked=(weight, shadow),
            stable=None,
            shadow=shadow,
            ready=frozenset(serving),
            epoch=str(route["metadata"].get("generation")),
            problem=problem,
            writer=last_writer(route, "rules"),
            foreign=foreign,
        )

    def _served(self, route: Mapping[str, Any]) -> str | None:
        """The version that a route without books leads to: that of its only backend, by its name."""
        names = {
            ref["name"]
            for rule in route["spec"].get("rules") or ()
            for ref in rule.get("backendRefs") or ()
            if ref.get("weight", 1)
        }
        versions = [version for name in names if (version := self.deployer.version(name))]
        return versions[0] if len(versions) == 1 else None

    async def _first(self, version: str, uri: str) -> Arm:
        await self._serving(version, uri)
        arm: Arm = {"version": version, "uri": uri}
        route = await self.client.aget(HTTPROUTE, self.route, namespace=self.namespace)
        if route is None:
            await ensure(self.client, HTTPROUTE, self.manifest(version), self.namespace, self._sleep)
        await self._taken_up(Books(stable=arm))
        return arm

    async def _taken_up(self, books: Books) -> None:
        deadline = self._clock() + self.weight_timeout
        while True:
            reading = await self._read(books)
            trouble = "it is gone" if reading is None else reading.foreign or reading.problem
            if trouble is None:
                return
            if self._clock() >= deadline:
                raise ExternalSystemError(f"HTTPRoute {self.route} carries no traffic: {trouble}")
            await self._sleep(self.poll)

    def manifest(self, version: str) -> Object:
        """A route that leads to one version.

        :raises InvalidInputError: no gateway was named
        """
        if not self.gateway:
            raise InvalidInputError(
                f"there is no HTTPRoute {self.route} and no gateway to attach one to; create the route, or name the "
                "Gateway: gateway='namespace/name'"
            )
        namespace, _, name = self.gateway.rpartition("/")
        parent = {"name": name, **({"namespace": namespace} if namespace else {})}
        rule = {
            "matches": [{"path": {"type": "PathPrefix", "value": self.path}}],
            "backendRefs": [{**self.deployer.backend(version), "weight": 100}],
        }
        spec: Object = {"parentRefs": [parent], "rules": [rule]}
        if self.hostnames:
            spec["hostnames"] = self.hostnames
        metadata = {"name": self.route, "labels": dict(MANAGED_BY)}
        return {"apiVersion": HTTPROUTE.api_version, "kind": HTTPROUTE.kind, "metadata": metadata, "spec": spec}

    async def _bring_up(self, claim: Claim, version: str, uri: str) -> None:
        books = claim.books
        if books.stable is None:
            route = await self.client.aget(HTTPROUTE, self.route, namespace=self.namespace)
            served = None if route is None else self._served(route)
            if served is None:
                raise InvalidInputError(
                    f"which version HTTPRoute {self.route} leads to is not known; expected one backend that is called "
                    f"like {self.deployer.service('1')!r}. Deploy the stable version with this target first"
                )
            books = replace(books, stable={"version": served, "uri": ""})
        await self._serving(version, uri, claim)
        arm: Arm = {"version": version, "uri": uri}
        stable = books.stable

        def enter(now: Books) -> Books:
            return replace(now, stable=now.stable or stable, canary=now.canary or arm, leftover=None)

        await self._change_books(claim, enter)

    async def _serving(self, version: str, uri: str, claim: Claim | None = None) -> None:
        await self.deployer.deploy(version, uri)
        await self._until_up(f"version {version} of {self.name}", lambda: self.deployer.look(version), claim)

    async def _shift(self, claim: Claim, *, force: bool = False) -> None:
        books = claim.books
        stable, canary = self._arm(books.stable), self._arm(books.canary)

        def make(route: Object) -> Object | None:
            touched = self._rules(route, books)
            if not touched:
                raise ConcurrentChangeError(
                    f"no rule of HTTPRoute {self.route} leads to version {stable['version']} any more; changed by "
                    f"{last_writer(route, 'rules')}"
                )
            rules = copy.deepcopy(route["spec"]["rules"])
            for index in touched:
                rule = rules[index]
                now = (
                    round(share(rule, self._service(canary)), 6),
                    mirrors(rule, self._service(canary)),
                )
                if now == (books.weight, books.shadow):
                    continue
                if now not in books.allowed and not force:
                    raise ConcurrentChangeError(
                        f"HTTPRoute {self.route} was changed by {last_writer(route, 'rules')}: {now[0]:g} % for the "
                        f"canary, where this rollout asked for {books.weight:g} %"
                    )
                self._set(rule, str(stable["version"]), str(canary["version"]), books)
            return {"spec": {"rules": rules}} if rules != route["spec"]["rules"] else None

        await self._change(claim, HTTPROUTE, self.route, make, f"a weight of {books.weight:g} %")

    def _arm(self, arm: Arm | None) -> Arm:
        if arm is None:
            raise InvalidInputError(f"{self.name} has no canary to give traffic to: load one first")
        return arm

    def _set(self, rule: Object, stable: str, canary: str, books: Books) -> None:
        refs = {ref["name"]: ref for ref in rule.get("backendRefs") or ()}
        parts = weights_of(books.weight)
        wanted = [(stable, parts[0]), *([(canary, parts[1])] if books.weight else [])]
        rule["backendRefs"] = [
            {**refs.get(self.deployer.service(version), self.deployer.backend(version)), "weight": part}
            for version, part in wanted
        ]
        filters = [each for each in rule.get("filters") or () if _mirrored(each) != self.deployer.service(canary)]
        if books.shadow:
            filters.append({"type": MIRROR, "requestMirror": {"backendRef": self.deployer.backend(canary)}})
        if filters or "filters" in rule:
            rule["filters"] = filters

    async def _release(self, claim: Claim) -> None:
        books = claim.books
        leftover, keep = self._service(books.leftover), {self._service(books.stable), self._service(books.canary)}
        if leftover in keep:
            return

        def make(route: Object) -> Object | None:
            rules = copy.deepcopy(route["spec"].get("rules") or [])
            for rule in rules:
                refs = rule.get("backendRefs") or []
                if share(rule, leftover):
                    raise ConcurrentChangeError(
                        f"HTTPRoute {self.route} gives traffic to {leftover}, which was to be released; changed by "
                        f"{last_writer(route, 'rules')}"
                    )
                if any(ref["name"] == leftover for ref in refs):
                    rule["backendRefs"] = [ref for ref in refs if ref["name"] != leftover]
            return {"spec": {"rules": rules}} if rules != (route["spec"].get("rules") or []) else None

        await self._change(claim, HTTPROUTE, self.route, make, "the end of what stayed warm")
        await self.deployer.release(str((books.leftover or {})["version"]))
