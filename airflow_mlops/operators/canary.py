"""Progressive rollout of a model version, with a verdict that has stated error rates."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mlops.approval import ask, said
from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.hooks._rollout import RolloutPlace, servables_of, verify_signatures, with_digests
from airflow_mlops.hooks.mlflow import MlflowHook
from airflow_mlops.hooks.ray_serve import RayServeHook
from airflow_mlops.links import MlflowRunLink, RolloutReportLink
from airflow_mlops.operators._audit import audited
from airflow_mlops.operators._canary import (
    Asker,
    ChampionAlias,
    question,
    to_mlflow,
    undone,
    write_report,
)
from airflow_mlops.operators._mlflow import task_key
from airflow_mlops.operators._rollout import evidence, ray_serve_target, structure, text
from airflow_mlops.shell import is_blank, permanent_errors_fail, push_result
from airflow_mlops.storage import join
from airflow_mlops.triggers.canary import CanaryTrigger

if TYPE_CHECKING:
    from airflow.sdk import BaseNotifier, Context

    from airflow_mlops.rollout.spec import RolloutSpec
    from airflow_mlops.rollout.targets.protocol import Target

ON_ROLLBACK = ("fail", "skip", "return")
PROMOTED = "PROMOTE"
#: Key of the rollout in the task's state store.
STATE = "rollout"


class CanaryPromoteOperator(BaseOperator):
    """Shift traffic to a challenger step by step, judge it at every look, then promote it or roll it back.

    The champion serves as *stable*; the challenger is brought up beside it and gets the policy's shares of the real
    traffic in turn, or at a step of 0 % copies of it. It is promoted only when every guardrail has shown that it is not
    worse, rolled back as soon as one shows harm, and at the deadline otherwise. Missing, stale or contradictory numbers
    hold; they never pass. After a promotion the old version stays warm.

    The rollout's state lives on the target, and in the task's state store: a retry, a new worker or a new triggerer
    continues it, a second rollout of the same model is refused, a run repeated after the verdict returns the same
    verdict, and when nobody looks for ``ttl`` seconds the target itself gives all traffic back to the champion.

    With ``alias`` the registry follows: the alias has to name the champion that is compared with when the rollout
    begins, and moves to the challenger by compare-and-set before the promotion is made to last. Where somebody has
    moved it meanwhile, the challenger is rolled back.

    :param model_name: registered model (templated)
    :param version: challenger's version (templated)
    :param model_uri: challenger's MLflow model directory, or ``models:/name/version`` (templated)
    :param stable_version: champion's version; blank when there is none: the challenger is then deployed at 100 %
        without a comparison, unless the target already serves some version, which is then compared with (templated)
    :param stable_uri: champion's model directory or URI (templated)
    :param policy: :class:`airflow_mlops.rollout.RolloutPolicy` or a dictionary of its fields: steps, error rates,
        bake, deadline (templated)
    :param guardrails: list of :class:`airflow_mlops.rollout.Guardrail`, dictionaries or names (``errors``,
        ``latency``, ``log_loss``, ``brier``, ``score``); errors and latency by default (templated)
    :param target: where traffic is split: ``{"kind": "kserve" | "gateway", ...}``, see
        :mod:`airflow_mlops.rollout.targets.factory`; None for Ray Serve with the arguments below (templated)
    :param evidence: where the numbers come from: ``{"type": "prometheus" | "prediction_log", ...}`` or the name of a
        query set such as ``knative``, see :func:`airflow_mlops.rollout.sources.source_of`; None for what the target
        itself counts (templated)
    :param route: name of the Serve application and first part of the path, ``model_name`` if blank (templated)
    :param ray_conn_id: connection of type ``ray``
    :param kubernetes_conn_id: connection of type ``kuberay`` or ``kubernetes``
    :param serve_url: address of Serve's HTTP proxy, instead of the connection's extra ``serve_url`` (templated)
    :param poll_interval: seconds between looks
    :param ttl: seconds without a look after which the target goes back to the champion, at least three looks
    :param on_rollback: ``fail`` the task without retry, ``skip`` what comes after it, or ``return`` the verdict
    :param alias: the champion's, moved by a promotion; None leaves the registry alone (templated)
    :param previous_alias: given to the champion that is replaced (templated)
    :param mlflow_conn_id: connection of type ``mlflow``, for ``alias`` and ``experiment``
    :param mlflow_tracking_uri: of that MLflow, instead of the connection's; for ``models:/`` URIs also where Ray
        Serve's slots find the registry, if the route is first deployed by this task (templated)
    :param signing_conn_id: connection of type ``model_signing``: both versions need a signature that it vouches for,
        checked before any traffic moves; None: only the digest of the registration is checked, by the slots of Ray
        Serve
    :param report_dir: folder for a page, a picture and the result, below it one folder a rollout (templated)
    :param experiment: MLflow experiment that gets the same; None for none (templated)
    :param assigned_users: who may answer where a step of the policy has ``approval``, as Airflow's human-in-the-loop
        operators take them; None for anybody who may see the task
    :param approval_notifiers: told when somebody is asked
    :param runtime_env: Ray runtime environment of the route when it is first deployed (templated)
    :param serve_options: ``slot_cpus``, ``router_cpus``, ``slot_replicas``, ``max_remembered``, ``request_timeout``
        for the same
    :param startup_timeout: seconds for the first deployment
    :param load_timeout: seconds to load a model
    :param deferrable: wait in the triggerer
    :return: ``verdict`` (``PROMOTE``, ``ROLLBACK``, ``CONCLUDE``), ``model``, ``version``, ``previous``, ``compared``,
        ``requests``, ``looks``, ``steps``, ``guardrails``, ``reasons``, ``seconds``, and the places of the report
    """

    template_fields: Sequence[str] = (
        "model_name",
        "version",
        "model_uri",
        "stable_version",
        "stable_uri",
        "policy",
        "guardrails",
        "target",
        "evidence",
        "route",
        "serve_url",
        "alias",
        "previous_alias",
        "mlflow_tracking_uri",
        "report_dir",
        "experiment",
        "runtime_env",
    )
    operator_extra_links = (RolloutReportLink(), MlflowRunLink())
    ui_color = "#f7e2c4"

    def __init__(
        self,
        *,
        model_name: str,
        version: str,
        model_uri: str,
        stable_version: str | None = None,
        stable_uri: str | None = None,
        policy: Any = None,
        guardrails: Any = None,
        target: Mapping[str, Any] | None = None,
        evidence: Mapping[str, Any] | str | None = None,
        route: str | None = None,
        ray_conn_id: str = RayServeHook.default_conn_name,
        kubernetes_conn_id: str = "kuberay_default",
        serve_url: str | None = None,
        poll_interval: float = 5.0,
        ttl: float = 60.0,
        on_rollback: str = "fail",
        alias: str | None = None,
        previous_alias: str = "previous_champion",
        mlflow_conn_id: str = MlflowHook.default_conn_name,
        mlflow_tracking_uri: str | None = None,
        signing_conn_id: str | None = None,
        report_dir: str | None = None,
        experiment: str | None = None,
        assigned_users: Any = None,
        approval_notifiers: Sequence[BaseNotifier] = (),
        runtime_env: dict[str, Any] | None = None,
        serve_options: dict[str, Any] | None = None,
        startup_timeout: float = 180.0,
        load_timeout: float = 120.0,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"multiple_outputs": True, **kwargs})
        self.model_name = model_name
        self.version = version
        self.model_uri = model_uri
        self.stable_version = stable_version
        self.stable_uri = stable_uri
        self.policy = policy
        self.guardrails = guardrails
        self.target = target
        self.evidence = evidence
        self.route = route
        self.ray_conn_id = ray_conn_id
        self.kubernetes_conn_id = kubernetes_conn_id
        self.serve_url = serve_url
        self.poll_interval = poll_interval
        self.ttl = ttl
        self.on_rollback = on_rollback
        self.alias = alias
        self.previous_alias = previous_alias
        self.mlflow_conn_id = mlflow_conn_id
        self.mlflow_tracking_uri = mlflow_tracking_uri
        self.signing_conn_id = signing_conn_id
        self.report_dir = report_dir
        self.experiment = experiment
        self.assigned_users = assigned_users
        self.approval_notifiers = approval_notifiers
        self.runtime_env = runtime_env
        self.serve_options = serve_options
        self.startup_timeout = startup_timeout
        self.load_timeout = load_timeout
        self.deferrable = deferrable
        self._running: tuple[RolloutPlace, RolloutSpec] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the rollout and return its result; see the class."""
        with permanent_errors_fail():
            spec, place, champion = self._spec(context), self._place(), self._champion()
            if champion:
                champion.check()
            before = _stored(context)
            if self.deferrable:
                self._defer(spec, place, before=before)
            self._running = (place, spec)
            result = asyncio.run(self._roll_out(context, place, spec, before))
            self._running = None
            return self._conclude(context, result)

    def execute_complete(
        self,
        context: Context,
        event: dict[str, Any],
        asked: int | None = None,
        target: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Take over from the trigger, or from the person who was asked about step ``asked``.

        :param target: as it was before, with the digests that were verified then
        """
        with permanent_errors_fail():
            if event.get("status") == "error":
                # First of all: what is asked of a registry below may fail, too, and hide it.
                _store(context, event.get("kept"))
                if event["retryable"]:
                    raise ExternalSystemError(event["error"])
                raise AirflowFailException(event["error"])
            spec, place = self._spec(context), self._place(target)
            if "chosen_options" in event:
                answer = said(event)
                self.log.info("%s by %s", "approved" if answer.approved else "rejected", answer.by)
                known = {"asked": asked, "answer": {"step": asked, "approved": answer.approved, "by": answer.by}}
                self._defer(spec, place, before=_stored(context), **known)
            if event["status"] == "approval":
                self._ask(context)
                # Somebody may answer before Airflow knows that the task waits, so the trigger looks for it, too.
                ti_id = str(context["ti"].id)
                self._defer(spec, place, before=_stored(context), asked=event["step"], ti_id=ti_id)
            result = event["result"]
            if self._champion():
                result = asyncio.run(self._settle_on(place, spec, result))
            return self._conclude(context, result)

    def on_kill(self) -> None:
        """Give all traffic back to the champion; also called on timeout."""
        if self._running is None:
            return
        # The signal may arrive inside the rollout's own event loop, so the call gets a thread and a loop of its own.
        with ThreadPoolExecutor(max_workers=1) as pool:
            pool.submit(asyncio.run, self._abort(*self._running)).result()

    def _defer(self, spec: RolloutSpec, place: RolloutPlace, **known: Any) -> NoReturn:
        trigger = CanaryTrigger(spec=spec.to_json(), place=place.to_json(), finishing=self._champion() is None, **known)
        kept = {"asked": known.get("asked"), "target": dict(place.target)}
        self.defer(trigger=trigger, method_name="execute_complete", kwargs=kept)

    async def _roll_out(
        self, context: Context, place: RolloutPlace, spec: RolloutSpec, before: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        from airflow_mlops.rollout.controller import Hands, run_rollout
        from airflow_mlops.rollout.reporting import LookLog

        asker = Asker(context["ti"].id, lambda: self._ask(context))
        hands = Hands(
            on_look=LookLog(self.log.info), ask=asker.answer, keep=lambda annotation: _store(context, annotation)
        )
        async with place.open(spec.metrics, worker=True) as (target, source):
            if target.unattended:
                self.log.warning(target.unattended)
            champion = self._champion()
            result = await run_rollout(target, source, spec, hands, before=before, finishing=champion is None)
            return await self._settle(target, spec, result) if champion else result

    async def _settle_on(self, place: RolloutPlace, spec: RolloutSpec, result: dict[str, Any]) -> dict[str, Any]:
        async with place.open(worker=True) as (target, _):
            return await self._settle(target, spec, result)

    async def _settle(self, target: Target, spec: RolloutSpec, result: dict[str, Any]) -> dict[str, Any]:
        """Let the registry follow, and make a promotion last; a champion that was moved meanwhile undoes it."""
        from airflow_mlops.rollout.controller import finish

        champion = self._champion()
        assert champion is not None
        if result["verdict"] != PROMOTED:
            champion.take_back()
            return result
        if not result.pop("pending", False):
            return result
        try:
            champion.move()
        except ConcurrentChangeError as error:
            result = undone(result, error)
        await finish(target, spec, result)
        return result

    async def _abort(self, place: RolloutPlace, spec: RolloutSpec) -> None:
        from airflow_mlops.rollout.controller import abort

        async with place.open(worker=True) as (target, _):
            await abort(target, spec)

    def _ask(self, context: Context) -> None:
        """Put the question to Airflow's required actions, and tell who wants to be told."""
        ask(context["ti"].id, *question(str(self.model_name), str(self.version)), self.assigned_users)
        for notifier in self.approval_notifiers:
            notifier(context)

    def _mlflow(self) -> MlflowHook:
        uri = None if is_blank(self.mlflow_tracking_uri) else self.mlflow_tracking_uri
        return MlflowHook(self.mlflow_conn_id, tracking_uri=uri, signing_conn_id=self.signing_conn_id)

    def _models(self) -> dict[str, str]:
        """The versions that may get traffic, and where they lie."""
        return {text(self.version): text(self.model_uri), text(self.stable_version): text(self.stable_uri)}

    def _champion(self) -> ChampionAlias | None:
        if is_blank(self.alias):
            return None
        return ChampionAlias(
            self._mlflow(),
            text(self.model_name),
            str(self.alias),
            text(self.previous_alias),
            text(self.version),
            text(self.stable_version) or None,
        )

    def _place(self, known: Mapping[str, Any] | None = None) -> RolloutPlace:
        """Where traffic is split, once the versions are verified; ``known`` if they were before the task waited."""
        target = (
            known
            or structure(self.target, "target")
            or ray_serve_target(
                text(self.route) or text(self.model_name),
                self.serve_url,
                runtime_env=self.runtime_env,
                tracking_uri=self.mlflow_tracking_uri,
                options=self.serve_options,
                startup_timeout=self.startup_timeout,
                load_timeout=self.load_timeout,
            )
        )
        mlflow, models = self._mlflow(), self._models()
        if known is None:
            signed = not is_blank(self.signing_conn_id)
            verified = verify_signatures(mlflow, text(self.model_name), models) if signed else None
            target = with_digests(mlflow, target, models, verified)
        return RolloutPlace(
            target=target,
            servables=servables_of(mlflow, target, models),
            evidence=evidence(self.evidence),
            ray_conn_id=self.ray_conn_id,
            kubernetes_conn_id=self.kubernetes_conn_id,
        )

    def _spec(self, context: Context) -> RolloutSpec:
        from airflow_mlops.rollout.policy import RolloutPolicy, parse_guardrails
        from airflow_mlops.rollout.spec import RolloutSpec

        if self.on_rollback not in ON_ROLLBACK:
            raise InvalidInputError(f"on_rollback is {self.on_rollback!r}; expected one of {', '.join(ON_ROLLBACK)}")
        ti = context["ti"]
        return RolloutSpec(
            model=text(self.model_name),
            version=text(self.version),
            uri=text(self.model_uri),
            stable_version=text(self.stable_version),
            stable_uri=text(self.stable_uri),
            owner="/".join(str(part) for part in (ti.dag_id, ti.task_id, ti.run_id, getattr(ti, "map_index", -1))),
            policy=RolloutPolicy.from_json(structure(self.policy, "policy")),
            guardrails=parse_guardrails(structure(self.guardrails, "guardrails")),
            poll_interval=float(self.poll_interval),
            ttl=float(self.ttl),
            attempt=int(getattr(ti, "try_number", 1)),
            startup_timeout=float(self.startup_timeout),
        )

    def _conclude(self, context: Context, result: dict[str, Any]) -> dict[str, Any]:
        """Report; return a promotion; on a rollback do as ``on_rollback`` says, the verdict pushed in any case."""
        reasons = "; ".join(result["reasons"])
        self.log.info("version %s of %s: %s (%s)", result["version"], result["model"], result["verdict"], reasons)
        result = audited(context, "canary", self._report(context, result))
        if result["verdict"] != "ROLLBACK" or self.on_rollback == "return":
            return result
        push_result(self, context, result)
        message = f"version {result['version']} of {result['model']} was rolled back: {reasons}"
        if self.on_rollback == "skip":
            raise AirflowSkipException(message)
        raise AirflowFailException(message)

    def _report(self, context: Context, result: dict[str, Any]) -> dict[str, Any]:
        """The small result with the places of its report; what cannot be written does not change the verdict."""
        spec = self._spec(context)
        small = {key: value for key, value in result.items() if key != "history"}
        key = f"rollout/{task_key(context)}"
        try:
            if not is_blank(self.report_dir):
                folder = join(str(self.report_dir), re.sub(r"[^A-Za-z0-9._-]+", "-", key))
                small |= write_report(folder, result, spec)
            if not is_blank(self.experiment):
                small |= to_mlflow(self._mlflow(), str(self.experiment), key, result, spec)
        except Exception:
            self.log.warning("the rollout's report could not be written", exc_info=True)
        return small


def _stored(context: Context) -> dict[str, Any] | None:
    """What an earlier process of this task last knew of its rollout."""
    store = context.get("task_state_store")
    kept = store.get(STATE) if store is not None else None
    return kept if isinstance(kept, dict) else None


def _store(context: Context, annotation: Mapping[str, Any] | None) -> None:
    store = context.get("task_state_store")
    if store is not None and annotation:
        # The history stays on the target: the store is for small values.
        store.set(STATE, {key: value for key, value in annotation.items() if key != "history"})
