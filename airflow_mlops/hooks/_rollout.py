"""Where a rollout's traffic is split and where its evidence comes from, opened with the connections they need."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks.prometheus import aevidence_source, evidence_source
from airflow_mlops.hooks.ray_serve import RayServeHook

if TYPE_CHECKING:
    from airflow_mlops.hooks.mlflow import MlflowHook
    from airflow_mlops.rollout.sources import EvidenceSource
    from airflow_mlops.rollout.targets.protocol import Target

RAY_SERVE = "ray_serve"


@dataclass(frozen=True)
class RolloutPlace:
    """A target and a source of evidence as small JSON, for a trigger.

    :param target: ``kind`` (``ray_serve``, ``kserve``, ``gateway``) and the arguments of that target
    :param servables: model version to the fields of a :class:`~airflow_mlops.rollout.targets.servable.Servable`, read
        from MLflow by :func:`servables_of` on a worker, as no triggerer should have to
    :param evidence: see :func:`airflow_mlops.rollout.sources.source_of`; None: what the target itself counts
    :param ray_conn_id: connection of type ``ray``, for Ray Serve
    :param kubernetes_conn_id: connection of type ``kuberay`` or ``kubernetes``, for KServe and the Gateway API
    """

    target: Mapping[str, Any]
    servables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evidence: Mapping[str, Any] | str | None = None
    ray_conn_id: str = RayServeHook.default_conn_name
    kubernetes_conn_id: str = "kuberay_default"

    def to_json(self) -> dict[str, Any]:
        """Plain Python types."""
        return asdict(self)

    @asynccontextmanager
    async def open(
        self, metrics: Iterable[str] | None = None, *, worker: bool
    ) -> AsyncIterator[tuple[Target, EvidenceSource]]:
        """Both, for as long as the context lasts.

        :param metrics: names that the guardrails read; None: all there are
        :param worker: whether a task's process asks, where connections are read as ever; a triggerer's event loop
            must not wait for them
        """
        async with AsyncExitStack() as stack:
            target = await self._target(stack, worker)
            yield target, await self._source(metrics, worker)

    async def _target(self, stack: AsyncExitStack, worker: bool) -> Target:
        arguments = dict(self.target)
        if arguments.pop("kind", None) == RAY_SERVE:
            from airflow_mlops.rollout.targets.client import Route

            hook = RayServeHook(self.ray_conn_id, arguments.pop("serve_url", None))
            client = hook.get_conn() if worker else await hook.aget_conn()
            return Route(await stack.enter_async_context(client), **arguments)
        from airflow_mlops.hooks.kubernetes import CustomResourceHook
        from airflow_mlops.rollout.targets.factory import target_of
        from airflow_mlops.rollout.targets.servable import Servable

        known = {version: Servable(**fields) for version, fields in self.servables.items()}

        async def resolve(version: str, uri: str) -> Servable:
            return known[version]

        cluster = await stack.enter_async_context(CustomResourceHook(self.kubernetes_conn_id))
        return target_of(self.target, cluster, resolver=resolve if known else None)

    async def _source(self, metrics: Iterable[str] | None, worker: bool) -> EvidenceSource:
        context = {
            "name": str(self.target.get("name") or ""),
            "namespace": self.target.get("namespace"),
            "metrics": metrics,
        }
        if worker:
            return evidence_source(self.evidence, **context)
        return await aevidence_source(self.evidence, **context)


def servables_of(mlflow: MlflowHook, target: Mapping[str, Any], models: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What a target in a cluster has to know of the versions it may deploy.

    Nothing, where Ray Serve loads them itself, the Services are given, or the configuration names the format.

    :param models: version to its folder or URI; blank ones are left out
    :raises InvalidInputError: a version without a servable flavour, or where no pod can fetch it
    """
    if target.get("kind") == RAY_SERVE or any(target.get(key) for key in ("service", "services", "model_format")):
        return {}
    from airflow_mlops.rollout.targets.servable import servable_of

    return {
        version: asdict(servable_of(mlflow.mlmodel(uri), mlflow.artifact_location(uri)))
        for version, uri in models.items()
        if version and uri
    }


def with_digests(
    mlflow: MlflowHook,
    target: Mapping[str, Any],
    models: Mapping[str, str],
    verified: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """``target`` with the digests that its slots are to find, where they check them: on Ray Serve.

    :param models: version to its folder or URI; blank ones are left out, and so is what is no version of a registered
        model
    :param verified: of :func:`verify_signatures`; None where no signatures are asked for: what was recorded when the
        versions that the URIs name were registered
    :raises RegistryError: there is no such version
    """
    if target.get("kind") != RAY_SERVE:
        return dict(target)
    digests = dict(verified or {})
    if verified is None:
        for version, uri in models.items():
            if not version or not _registered(mlflow, uri):
                continue
            # What the rollout calls the version may be a label of its own.
            name, number = mlflow.resolve(uri)
            if number is not None and (digest := mlflow.models.digest_of(name, number)):
                digests[version] = digest
    return {**target, "digests": digests, "require_digest": verified is not None}


def _registered(mlflow: MlflowHook, uri: str) -> bool:
    """Whether ``uri`` is that of a registered version, in a registry that this process knows."""
    if not uri.startswith("models:/"):
        return False
    try:
        return bool(mlflow.tracking_uri)
    except InvalidInputError:
        # Then only Ray Serve knows where it is, and there is nobody to ask for the digest.
        return False


def verify_signatures(mlflow: MlflowHook, model: str, models: Mapping[str, str]) -> dict[str, str]:
    """Check digest, signature and formats of the versions that traffic may go to, before any does.

    :param models: version to its folder or URI; blank ones are left out
    :return: version to the digest that was signed
    :raises InvalidInputError: one is unsigned, or not what was signed
    """
    return {
        version: mlflow.models.open_version(model, version, uri or f"models:/{model}/{version}").digest
        for version, uri in models.items()
        if version
    }
