"""Ray Serve over HTTP: the dashboard's REST API to deploy, the application's own endpoints to steer and to observe.

Needs aiohttp and no Ray. Serve keeps one declarative configuration for all applications, and one that is left out of
a ``PUT`` is deleted; every change here reads what is deployed and puts it back with one application changed.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.targets.book import SLOTS
from airflow_mlops.rollout.targets.protocol import TargetState

IMPORT_PATH = "airflow_mlops.rollout.targets.ray_serve:build"
APPLICATIONS = "/api/serve/applications/"
log = logging.getLogger(__name__)
_EMPTY = {"version": None, "uri": None, "digest": None}


def _reason(text: str) -> str:
    """The router's ``error``, or the answer as it is."""
    try:
        return str(json.loads(text)["error"])[:1000]
    except (ValueError, KeyError, TypeError):
        return text[:1000]


class RayServeClient:
    """One Ray cluster's Serve, as an asynchronous context manager.

    :param dashboard_url: ``http://host:port`` of the Ray dashboard
    :param serve_url: ``http://host:port`` of Serve's HTTP proxy; also where the proxy is put when Serve is not
        running yet
    :param token: token of a Ray cluster with token authentication
    :param timeout: seconds for one call
    :param ssl: how certificates are checked, as aiohttp takes it: True, False or an ``ssl.SSLContext``
    """

    def __init__(
        self, dashboard_url: str, serve_url: str, token: str | None = None, timeout: float = 15.0, ssl: Any = True
    ) -> None:
        self.dashboard_url = dashboard_url.rstrip("/")
        self.serve_url = serve_url.rstrip("/")
        self.token = token
        self._timeout = timeout
        self._ssl = ssl
        self._session: Any = None

    async def __aenter__(self) -> RayServeClient:
        import aiohttp

        # The second one passes proxies that take the first for themselves.
        names = ("Authorization", "X-Ray-Authorization") if self.token else ()
        headers = {name: f"Bearer {self.token}" for name in names}
        self._session = aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=self._ssl))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def _call(self, method: str, url: str, body: Any = None, timeout: float | None = None) -> Any:
        import aiohttp

        limit = aiohttp.ClientTimeout(total=self._timeout if timeout is None else timeout)
        try:
            async with self._session.request(method, url, json=body, timeout=limit) as response:
                text = await response.text()
                status = response.status
                if status == 200:
                    return await response.json(content_type=None) if text else None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ExternalSystemError(
                f"{method} {url} failed: {type(error).__name__}: {error}. Is Ray running there? Check host and port of "
                "the Ray connection and its extra serve_url."
            ) from error
        if status in (401, 403):
            raise InvalidInputError(
                f"{method} {url} answered {status}: {text[:200]}. Set the cluster's token as password of the Ray "
                "connection."
            )
        if status == 409:
            raise ConcurrentChangeError(_reason(text))
        if status in (400, 422):
            raise InvalidInputError(f"{method} {url} answered {status}: {_reason(text)}")
        raise ExternalSystemError(f"{method} {url} answered {status}: {text[:500]}")

    async def serve(self) -> dict[str, Any]:
        """All of Serve: applications by name, with status, message and deployed configuration."""
        return await self._call("GET", self.dashboard_url + APPLICATIONS)

    async def application(self, name: str) -> dict[str, Any] | None:
        """One application as Serve sees it, or ``None``.

        :raises InvalidInputError: the name belongs to an application that is not ours
        """
        found = (await self.serve()).get("applications", {}).get(name)
        config = (found or {}).get("deployed_app_config")
        if found and (config or {}).get("import_path") != IMPORT_PATH:
            raise InvalidInputError(
                f"Serve already runs an application {name!r} that is not a rollout route; give the operator another "
                "route, or remove that application"
            )
        return found

    async def put_application(self, config: Mapping[str, Any], timeout: float | None = None) -> None:
        """Create or change one application, the others staying as they are.

        :param timeout: seconds; the first application of a cluster also waits until Serve itself has started
        """
        from urllib.parse import urlsplit

        current = await self.serve()
        others = [
            app["deployed_app_config"]
            for name, app in current.get("applications", {}).items()
            if name != config["name"] and app.get("deployed_app_config") and app.get("status") != "DELETING"
        ]
        address = urlsplit(self.serve_url)
        body: dict[str, Any] = {
            "proxy_location": current.get("proxy_location") or "HeadOnly",
            "http_options": current.get("http_options")
            or {"host": address.hostname or "127.0.0.1", "port": address.port or 8000},
            "applications": [*others, dict(config)],
        }
        if current.get("grpc_options"):
            body["grpc_options"] = current["grpc_options"]
        await self._call("PUT", self.dashboard_url + APPLICATIONS, body, timeout)

    async def state(self, route: str) -> dict[str, Any]:
        """What the route's router reports: weights, slots, counters, rollout."""
        return await self._call("GET", f"{self.serve_url}/{route}/state")

    async def change(self, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Claim, renew or stop a rollout on the route."""
        return await self._call("POST", f"{self.serve_url}/{route}/rollout", dict(body))


class Route:
    """One model's route on Ray Serve: two slots, of which one is stable. A :class:`Target` that counts itself.

    :param client: the cluster
    :param name: application and route name
    :param runtime_env: Ray runtime environment of the application when it is first deployed
    :param options: arguments of :func:`airflow_mlops.rollout.targets.ray_serve.build` at that time
    :param startup_timeout: seconds for the first deployment
    :param load_timeout: seconds to load a model into a slot or to change weights
    :param digests: version to the digest of its files, see :mod:`airflow_mlops.model_files.digest`; a slot that finds
        another one does not serve it
    :param require_digest: refuse slots that do not report what they found, as those of an older package do not
    """

    shadows = True
    whole = False
    #: The router itself ends a canary whose lease has run out.
    unattended: str | None = None

    def __init__(
        self,
        client: RayServeClient,
        name: str,
        runtime_env: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        startup_timeout: float = 180.0,
        load_timeout: float = 120.0,
        digests: Mapping[str, str] | None = None,
        require_digest: bool = False,
    ) -> None:
        self.client = client
        self.name = name
        self.runtime_env = dict(runtime_env or {})
        self.options = dict(options or {})
        self.startup_timeout = startup_timeout
        self.load_timeout = load_timeout
        self.digests = dict(digests or {})
        self.require_digest = require_digest

    async def state(self) -> TargetState | None:
        """Where the router sends requests now; None when the route is not deployed."""
        try:
            return _state_of(await self.report())
        except ExternalSystemError:
            if await self.config() is None:
                return None
            raise

    async def report(self) -> dict[str, Any]:
        """What the router says of itself: slots, weights, counters, the rollout."""
        return await self.client.state(self.name)

    async def claim(self, owner: str, ttl: float) -> None:
        """Take the route for one rollout; :class:`ConcurrentChangeError` when another one holds it."""
        await self.client.change(self.name, {"action": "claim", "owner": owner, "ttl": ttl})

    async def renew(self, owner: str, ttl: float, annotation: Mapping[str, Any]) -> None:
        """Prolong the lease and keep the rollout's state on the route."""
        body = {"action": "renew", "owner": owner, "ttl": ttl, "annotation": dict(annotation)}
        await self.client.change(self.name, body)

    async def deploy(self, version: str, uri: str) -> None:
        """Deploy the route with one version at 100 % in slot ``a``; returns when it serves."""
        router: dict[str, Any] = {"stable": "a", "canary": None, "weight": 0.0, "versions": {"a": version, "b": None}}
        if self.client.token:
            router["token_sha256"] = hashlib.sha256(self.client.token.encode()).hexdigest()
        environment = copy.deepcopy(self.runtime_env)
        environment["env_vars"] = {"OMP_NUM_THREADS": "1", **environment.get("env_vars", {})}
        first = {**self._wanted(version, uri), "revision": 0}
        await self.client.put_application(
            {
                "name": self.name,
                "route_prefix": f"/{self.name}",
                "import_path": IMPORT_PATH,
                "runtime_env": environment,
                "args": {"route": self.name, **self.options},
                "logging_config": {"enable_access_log": False},
                "deployments": [
                    {"name": "router", "user_config": router},
                    {"name": "slot_a", "user_config": first},
                    {"name": "slot_b", "user_config": {**_EMPTY, "revision": 0}},
                ],
            },
            self.startup_timeout,
        )
        await self._until(lambda report: self._loaded(report, "a", first), self.startup_timeout, "deployed")

    async def load(self, version: str, uri: str) -> None:
        """Load a version into the idle slot, after taking its traffic from whatever an earlier rollout left there.

        :raises InvalidInputError: the model cannot be loaded
        """
        report = await self._without_canary()
        await self._load(_other(report["stable"]), version, uri)

    async def restore(self, version: str, uri: str) -> None:
        """Make a version stable, as somebody moved the champion since the route was last used."""
        report = await self._without_canary()
        slot = _other(report["stable"])
        await self._load(slot, version, uri)
        await self._set_router(stable=slot, canary=None, weight=0.0, versions={**report["versions"], slot: version})

    async def split(self, version: str, weight: float, annotation: Mapping[str, Any], *, shadow: bool = False) -> None:
        """Give the version that is loaded beside stable that share of traffic, or copies."""
        report = await self.report()
        slot = _other(report["stable"])
        if report["slots"][slot]["version"] != version:
            raise ExternalSystemError(f"the route {self.name} has not loaded version {version}; a retry loads it again")
        versions = {**report["versions"], slot: version}
        note = dict(annotation)
        await self._set_router(canary=slot, weight=float(weight), shadow=shadow, versions=versions, rollout=note)

    async def promote(self, annotation: Mapping[str, Any]) -> None:
        """The canary becomes stable; the old version stays loaded. Without a canary only ``annotation`` is kept."""
        canary = (await self.report())["canary"]
        stable = {"stable": canary} if canary else {}
        await self._set_router(**stable, canary=None, weight=0.0, shadow=False, rollout=dict(annotation))

    async def roll_back(self, owner: str, annotation: Mapping[str, Any]) -> None:
        """All traffic to stable: at once by the router itself, then in its configuration."""
        await self.client.change(self.name, {"action": "stop", "owner": owner})
        await self._set_router(canary=None, weight=0.0, shadow=False, rollout=dict(annotation) or None)

    async def clean_up(self) -> None:
        """Unload the version that does not serve."""
        slot = _other((await self.report())["stable"])
        await self._update({f"slot_{slot}": _EMPTY})

    async def config(self) -> dict[str, dict[str, Any]] | None:
        """User configuration by deployment (``router``, ``slot_a``, ``slot_b``); ``None`` when not deployed."""
        application = await self.client.application(self.name)
        if application is None or application.get("status") in ("DELETING", "NOT_STARTED"):
            return None
        config = application["deployed_app_config"]
        return {item["name"]: copy.deepcopy(item.get("user_config") or {}) for item in config["deployments"]}

    def _wanted(self, version: str, uri: str) -> dict[str, Any]:
        return {"version": version, "uri": uri, "digest": self.digests.get(version)}

    async def _without_canary(self) -> dict[str, Any]:
        report = await self.report()
        if report["canary"]:
            return await self._set_router(canary=None, weight=0.0, shadow=False, rollout=None)
        return report

    async def _load(self, slot: str, version: str, uri: str) -> None:
        name = f"slot_{slot}"
        wanted = (await self._update({name: self._wanted(version, uri)}))[name]
        await self._until(lambda report: self._loaded(report, slot, wanted), self.load_timeout, "loaded")

    async def _set_router(self, **changes: Any) -> dict[str, Any]:
        """Change the router's configuration; returns its report once it has it.

        Serve passes a configuration on some time after it has taken it.
        """
        router = (await self._update({"router": changes}))["router"]
        return await self._until(lambda report: report["revision"] >= router["revision"], self.load_timeout, "changed")

    async def _update(self, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Merge changes into the deployments' user configurations; returns the new ones."""
        application = await self.client.application(self.name)
        if application is None:
            raise ExternalSystemError(f"the route {self.name} is gone from Ray Serve; a retry deploys it again")
        config = copy.deepcopy(application["deployed_app_config"])
        for item in config["deployments"]:
            if item["name"] in changes:
                old = item.get("user_config") or {}
                item["user_config"] = {**old, **changes[item["name"]], "revision": old.get("revision", 0) + 1}
        await self.client.put_application(config)
        return {item["name"]: item["user_config"] for item in config["deployments"] if item["name"] in changes}

    def _loaded(self, report: Mapping[str, Any], slot: str, wanted: Mapping[str, Any]) -> bool:
        held = report["slots"][slot]
        if held["revision"] < wanted["revision"] or held["version"] != wanted["version"]:
            return False
        if held["error"] and not held["ready"]:
            raise InvalidInputError(f"version {held['version']} cannot be loaded from {held['uri']}: {held['error']}")
        if held["ready"] and wanted.get("digest") and "digest" not in held and not self.require_digest:
            log.warning(
                "slot %s of the route %s does not say what files it serves: it runs an older airflow-mlops. Delete the "
                "application from Ray Serve, and the next rollout deploys it anew",
                slot,
                self.name,
            )
        elif held["ready"] and wanted.get("digest") and held.get("digest") != wanted["digest"]:
            raise InvalidInputError(
                f"slot {slot} serves version {held['version']} with the digest {held.get('digest')}, but "
                f"{wanted['digest']} was recorded when it was registered; if the slot says none, the route runs an "
                "older airflow-mlops: delete it from Ray Serve, and the next rollout deploys it anew"
            )
        return bool(held["ready"])

    async def _until(self, reached: Any, timeout: float, what: str) -> dict[str, Any]:
        """Poll the route until ``reached(report)``; returns that report."""
        loop = asyncio.get_running_loop()
        deadline, problem = loop.time() + timeout, "it never answered"
        while True:
            try:
                report = await self.report()
                if reached(report):
                    return report
                problem = f"it says { ({k: v for k, v in report.items() if k not in ('counters', 'rollout')}) }"
            except ExternalSystemError as error:
                problem = str(error)
            if loop.time() > deadline:
                status = await self.client.application(self.name) or {}
                raise ExternalSystemError(
                    f"the route {self.name} was not {what} within {timeout:g} s: Serve says "
                    f"{status.get('status')} {status.get('message', '')!r}; {problem}"
                )
            await asyncio.sleep(0.1)


def _other(slot: str) -> str:
    return SLOTS[1 - SLOTS.index(slot)]


def _state_of(report: Mapping[str, Any]) -> TargetState:
    """The router's report as every target gives it."""
    try:
        slots = {arm: report[arm] for arm in ("stable", "canary")}
        versions = {arm: report["versions"][slot] if slot else None for arm, slot in slots.items()}
        routed = [int(report["routed"][slot]) if slot else 0 for slot in slots.values()]
        return TargetState(
            time=float(report["time"]),
            epoch=str(report["epoch"]),
            weight=float(report["weight"]),
            configured=float(report["configured_weight"]),
            stable=versions["stable"],
            canary=versions["canary"],
            shadow=bool(report["shadow"]),
            ready=frozenset(arm for arm, slot in slots.items() if slot and report["slots"][slot]["ready"]),
            rollout=report["rollout"] or {},
            owner=report["owner"],
            counters={arm: report["counters"][version] for arm, version in versions.items() if version},
            routed=(routed[0], routed[1]),
            boot=str(report["boot"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ExternalSystemError(f"the route's state is unreadable ({type(error).__name__}: {error})") from error
