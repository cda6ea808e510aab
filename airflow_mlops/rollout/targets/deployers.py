"""What serves a version behind a Gateway API route: Services that are there, or an InferenceService per version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError
from airflow_mlops.rollout.targets.kube import (
    ENDPOINTSLICE,
    ISVC,
    MANAGED_BY,
    SERVICE,
    VERSION_LABEL,
    KubernetesClient,
    Object,
    ensure,
    fits,
    is_true,
    name_part,
    told,
)
from airflow_mlops.rollout.targets.servable import Resolver, fixed_resolver, predictor, version_of

#: What ``look`` says: whether it can serve, what it looks like, why it never will.
Look = tuple[bool, str, str | None]
#: Of an InferenceService: how KServe runs it.
MODE_ANNOTATION = "serving.kserve.io/deploymentMode"


class Deployer(Protocol):
    """Brings versions up and takes them away; each has a Service of its own."""

    def service(self, version: str) -> str:
        """Name of the version's Service."""

    def version(self, service: str) -> str | None:
        """The version that a Service serves, None if it is not one of these."""

    def backend(self, version: str) -> Object:
        """The version as a route's ``backendRef``."""

    async def deploy(self, version: str, uri: str) -> None:
        """Start the version unless it is there."""

    async def look(self, version: str) -> Look:
        """Whether it can serve."""

    async def release(self, version: str) -> None:
        """Take it away, if this made it."""


class _Named:
    """Services called by a template."""

    def __init__(self, template: str, port: int) -> None:
        before, found, after = template.partition("{version}")
        if not found or "{" in before + after:
            raise InvalidInputError(
                f"the name of the services is {template!r}; expected one with {{version}} in it, for example "
                "'fraud-{version}'"
            )
        if not isinstance(port, int) or not 0 < port < 65536:
            raise InvalidInputError(f"the port of the services is {port!r}; expected a number from 1 to 65535")
        self.template, self.port = template, port
        self._pattern = re.compile(f"^{re.escape(before)}(.+){re.escape(after)}$")

    def service(self, version: str) -> str:
        return fits(self.template.replace("{version}", name_part(version)), "the name of the service")

    def version(self, service: str) -> str | None:
        found = self._pattern.match(service)
        if not found:
            return None
        part = found[1]
        return part[1:] if re.fullmatch(r"v\d[a-z0-9-]*", part) else part

    def backend(self, version: str) -> Object:
        return {"name": self.service(version), "port": self.port}


class GivenServices(_Named):
    """Services that somebody else deploys, one per version: of ``"fraud-{version}"``, version 3 is ``fraud-v3``.

    :param names: names by version, where the template does not give them
    """

    def __init__(
        self,
        client: KubernetesClient,
        namespace: str | None = None,
        *,
        service: str = "",
        names: Mapping[str, str] | None = None,
        port: int = 80,
    ) -> None:
        super().__init__(service or "{version}", port)
        if not service and not names:
            raise InvalidInputError("the services behind the route are not named; expected service='name-{version}'")
        self.client, self.namespace, self.names = client, namespace, dict(names or {})

    def service(self, version: str) -> str:
        """Name of the version's Service."""
        return self.names.get(version) or super().service(version)

    def version(self, service: str) -> str | None:
        """The version that a Service serves."""
        given = {name: version for version, name in self.names.items()}
        return given.get(service) or super().version(service)

    async def deploy(self, version: str, uri: str) -> None:
        """Nothing: it is there, or it is not."""

    async def look(self, version: str) -> Look:
        """By the Service and the addresses behind it."""
        name = self.service(version)
        if await self.client.aget(SERVICE, name, namespace=self.namespace) is None:
            missing = f"there is no Service {name}; deploy version {version} behind a Service of that name first"
            return False, missing, missing
        selector = {"kubernetes.io/service-name": name}
        slices, _ = await self.client.alist(ENDPOINTSLICE, selector, namespace=self.namespace)
        # Without conditions an address counts as ready.
        ready = [
            each
            for found in slices
            for each in found.get("endpoints") or ()
            if (each.get("conditions") or {}).get("ready") is not False
        ]
        return bool(ready), f"Service {name} has no address that is ready", None

    async def release(self, version: str) -> None:
        """Nothing: it is not ours."""


class InferenceServices(_Named):
    """One InferenceService of KServe per version, in Standard mode and without a route of its own to the outside.

    :param name: of the model; version 3 is ``<name>-v3``
    :param template: fields of the predictor: resources, runtime, replicas, service account
    :param resolver: where a version lies and what it is
    """

    def __init__(
        self,
        client: KubernetesClient,
        name: str,
        namespace: str | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        resolver: Resolver | None = None,
        port: int = 80,
    ) -> None:
        super().__init__(f"{name}-{{version}}-predictor", port)
        self.client, self.name, self.namespace = client, name, namespace
        self.template_predictor, self.resolver = dict(template or {}), resolver or fixed_resolver()

    def _object(self, version: str) -> str:
        return self.service(version).removesuffix("-predictor")

    async def deploy(self, version: str, uri: str) -> None:
        """Create its InferenceService, unless it is there.

        :raises ConcurrentChangeError: one of that name serves something else
        """
        name = self._object(version)
        servable = await self.resolver(version, uri)
        body: Object = {
            "apiVersion": ISVC.api_version,
            "kind": ISVC.kind,
            "metadata": {
                "name": name,
                "labels": {**MANAGED_BY, "networking.kserve.io/visibility": "cluster-local", VERSION_LABEL: version},
                # The name that old and new releases know.
                "annotations": {MODE_ANNOTATION: "RawDeployment"},
            },
            "spec": {"predictor": predictor(servable, version, self.template_predictor)},
        }
        found = await self.client.aget(ISVC, name, namespace=self.namespace)
        if found is None:
            found, _ = await ensure(self.client, ISVC, body, self.namespace)
        there: Object = found["spec"]["predictor"]
        if version_of(there) != version or (there.get("model") or {}).get("storageUri") != servable.storage_uri:
            raise ConcurrentChangeError(
                f"InferenceService {name} is there and serves {version_of(there)} from "
                f"{(there.get('model') or {}).get('storageUri')}, not version {version} from {servable.storage_uri}; "
                "delete it, or give this target another name"
            )

    async def look(self, version: str) -> Look:
        """By its predictor's condition."""
        found = await self.client.aget(ISVC, self._object(version), namespace=self.namespace)
        if found is None:
            return False, f"InferenceService {self._object(version)} is gone", None
        status = found.get("status") or {}
        if is_true(status.get("conditions"), "PredictorReady"):
            return True, "", None
        return False, told(status.get("conditions")) or "no condition yet", load_failure(status.get("modelStatus"))

    async def release(self, version: str) -> None:
        """Delete its InferenceService."""
        await self.client.adelete(ISVC, self._object(version), namespace=self.namespace)


def load_failure(model_status: Mapping[str, Any] | None) -> str | None:
    """Why KServe has given a model up, None if it has not."""
    status = model_status or {}
    transition, info = status.get("transitionStatus"), status.get("lastFailureInfo") or {}
    if transition not in ("BlockedByFailedLoad", "InvalidSpec"):
        return None
    told = " ".join(str(info[key]) for key in ("reason", "message", "location") if info.get(key))
    return f"{transition}: {told or 'KServe does not say why; see the log of its pods'}"
