"""A person's decision after the fact: back to the version that served before."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import ConcurrentChangeError
from airflow_mlops.hooks._rollout import RolloutPlace, servables_of, verify_signatures, with_digests
from airflow_mlops.hooks.ray_serve import RayServeHook
from airflow_mlops.operators._mlflow import task_key
from airflow_mlops.operators._rollout import ray_serve_target, structure, text
from airflow_mlops.operators.mlflow import ROLLED_BACK, MlflowRollbackOperator
from airflow_mlops.shell import is_blank, permanent_errors_fail

if TYPE_CHECKING:
    from airflow.sdk import Context


class RollbackOperator(MlflowRollbackOperator):
    """Give all traffic, and then the alias, back to the previous champion; mark the one it replaces.

    Traffic first: it is what does harm. Repeating it, as a retry does, changes nothing more. A rollout of the model
    that is under way refuses it: end that rollout's task, which gives the traffic back by itself.

    :param model_name: registered model (templated)
    :param version: champion to roll back from; empty for whichever it is now (templated)
    :param reason: why, kept as the tag ``mlops.rolled_back_reason`` of the version (templated)
    :param target: where traffic is split, as for :class:`~airflow_mlops.operators.canary.CanaryPromoteOperator`; None
        for Ray Serve (templated)
    :param route: name of the Serve application, ``model_name`` if blank (templated)
    :param ray_conn_id: connection of type ``ray``
    :param kubernetes_conn_id: connection of type ``kuberay`` or ``kubernetes``
    :param serve_url: address of Serve's HTTP proxy, instead of the connection's extra ``serve_url`` (templated)
    :param timeout: seconds that bringing the previous version up may take; the old one is warm until the next rollout
    :param alias: the champion's (templated)
    :param previous_alias: of the version to go back to; removed afterwards (templated)
    :param mlflow_conn_id: connection of type ``mlflow``
    :param tracking_uri: overrides the connection's (templated)
    :param signing_conn_id: connection of type ``model_signing``; the version to go back to then needs a signature
    :return: ``name``, ``version`` (champion now), ``rolled_back``, ``alias``, ``changed``, ``traffic_moved``
    :raises AirflowFailException: there is no previous champion, ``version`` is not the champion, or a rollout is under
        way
    """

    template_fields: Sequence[str] = (
        *MlflowRollbackOperator.template_fields,
        "reason",
        "target",
        "route",
        "serve_url",
    )

    def __init__(
        self,
        *,
        reason: str = "",
        target: Mapping[str, Any] | None = None,
        route: str | None = None,
        ray_conn_id: str = RayServeHook.default_conn_name,
        kubernetes_conn_id: str = "kuberay_default",
        serve_url: str | None = None,
        timeout: float = 300.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.reason = reason
        self.target = target
        self.route = route
        self.ray_conn_id = ray_conn_id
        self.kubernetes_conn_id = kubernetes_conn_id
        self.serve_url = serve_url
        self.timeout = timeout

    def execute(self, context: Context) -> dict[str, Any]:
        """Traffic, then the alias."""
        with permanent_errors_fail():
            key = task_key(context)
            # Before the champion is marked as bad, and outside the lease, which a download may outlast.
            aim, digests = self._aim(key), None
            if not is_blank(self.signing_conn_id):
                digests = verify_signatures(self.hook, self.model_name, {aim: ""})
            with self.hook.lease(self.model_name):
                if (now := self._aim(key)) != aim:
                    raise ConcurrentChangeError(
                        f"version {now} of {self.model_name} became the one to go back to while {aim} was checked; "
                        "nothing was changed, clear this task to go back to it"
                    )
                bad, good = self._decided(key)
            if not is_blank(self.reason):
                client = self.hook.client
                client.set_model_version_tag(self.model_name, bad, "mlops.rolled_back_reason", str(self.reason))
            moved = asyncio.run(self._move_traffic(good, f"rollback/{key}", digests))
            self.log.info("all traffic of %s goes to version %s", self.model_name, good)
        return {**super().execute(context), "traffic_moved": moved}

    def _aim(self, key: str) -> str:
        """The version to return to, without a word on record."""
        begun = self.hook.versions_tagged(self.model_name, ROLLED_BACK, key)
        return begun[0].tags["mlops.rolled_back_to"] if begun else self._plan()[1]

    async def _move_traffic(self, version: str, owner: str, digests: Mapping[str, str] | None) -> bool:
        from airflow_mlops.rollout.controller import go_back

        uri = f"models:/{self.model_name}/{version}"
        target = structure(self.target, "target") or ray_serve_target(
            text(self.route) or text(self.model_name),
            self.serve_url,
            tracking_uri=self.hook.tracking_uri,
            load_timeout=self.timeout,
        )
        servables = servables_of(self.hook, target, {version: uri})
        place = RolloutPlace(
            with_digests(self.hook, target, {version: uri}, digests),
            servables,
            ray_conn_id=self.ray_conn_id,
            kubernetes_conn_id=self.kubernetes_conn_id,
        )
        async with place.open(worker=True) as (opened, _):
            return await go_back(opened, version, uri, owner, self.timeout)
