"""One InferenceService of KServe, whose own controller splits the traffic.

Read from KServe's controllers (github.com/kserve/kserve, ksvc_reconciler.go, inference_service_status.go,
httproute_reconciler.go). Annotations of an InferenceService go into the pods: changing one restarts them, and in
Knative mode makes a revision. None is changed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError
from airflow_mlops.rollout.targets.base import KubernetesTarget
from airflow_mlops.rollout.targets.deployers import MODE_ANNOTATION, load_failure
from airflow_mlops.rollout.targets.kube import ISVC, MANAGED_BY, Object, ensure, fits, is_true, last_writer, told
from airflow_mlops.rollout.targets.lease import Arm, Claim
from airflow_mlops.rollout.targets.servable import FRAMEWORKS, Resolver, fixed_resolver, predictor, version_of

#: In Knative mode, the latest revision's share of traffic.
PERCENT = "canaryTrafficPercent"


class KServe(KubernetesTarget):
    """One InferenceService; what both modes have in common.

    :param template: fields of the predictor: resources, runtime, environment, replicas, service account
    :param resolver: where a version lies and what it is
    """

    lease_kind = "kserve"
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


def predicting(isvc: Mapping[str, Any]) -> frozenset[str]:
    """The stable arm, if its predictor is ready."""
    ready = is_true((isvc.get("status") or {}).get("conditions"), "PredictorReady")
    return frozenset({"stable"} if ready else ())
