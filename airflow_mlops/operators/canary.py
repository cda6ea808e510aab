"""Progressive rollout of a model version, with a verdict that has stated error rates."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.hooks.ray_serve import RayServeHook
from airflow_mlops.shell import permanent_errors_fail, push_result
from airflow_mlops.triggers.canary import CanaryTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_mlops.rollout.controller import RolloutSpec
    from airflow_mlops.rollout.targets.client import Route

ON_ROLLBACK = ("fail", "skip", "return")


class CanaryPromoteOperator(BaseOperator):
    """Shift traffic to a challenger step by step, judge it at every look, then promote it or roll it back.

    The route (one Ray Serve application per model) is deployed if it is not there. The champion serves in one slot,
    the challenger is loaded into the other and gets the policy's shares of the real traffic in turn. It is promoted
    only when every guardrail has shown that it is not worse, rolled back as soon as one shows harm, and at the
    deadline otherwise. After a promotion the old version stays loaded. Registry aliases are not touched.

    The rollout's state lives on the route: a retry, a new worker or a new triggerer continues it, a second rollout of
    the same model is refused, a run repeated after the verdict returns the same verdict, and when nobody looks for
    ``ttl`` seconds the route itself gives all traffic back to the champion.

    :param model_name: registered model (templated)
    :param version: challenger's version (templated)
    :param model_uri: challenger's MLflow model directory, or ``models:/name/version`` (templated)
    :param stable_version: champion's version; blank when there is none: the challenger is then deployed at 100 %
        without a comparison, unless the route already serves some version, which is then compared with (templated)
    :param stable_uri: champion's model directory or URI (templated)
    :param route: name of the Serve application and first part of the path, ``model_name`` if blank (templated)
    :param policy: :class:`airflow_mlops.rollout.RolloutPolicy` or a dictionary of its fields (templated)
    :param guardrails: list of :class:`airflow_mlops.rollout.Guardrail`, dictionaries or names (``errors``,
        ``latency``, ``log_loss``, ``brier``, ``score``); errors and latency by default (templated)
    :param ray_conn_id: connection of type ``ray``
    :param serve_url: address of Serve's HTTP proxy, instead of the connection's extra ``serve_url`` (templated)
    :param poll_interval: seconds between looks
    :param ttl: seconds without a look after which the route goes back to the champion, at least three looks
    :param on_rollback: ``fail`` the task without retry, ``skip`` what comes after it, or ``return`` the verdict
    :param mlflow_tracking_uri: for ``models:/`` URIs, where the slots find the registry; used when the route is first
        deployed (templated)
    :param runtime_env: Ray runtime environment of the route when it is first deployed (templated)
    :param serve_options: ``slot_cpus``, ``router_cpus``, ``slot_replicas``, ``max_remembered`` for the same
    :param startup_timeout: seconds for the first deployment
    :param load_timeout: seconds to load a model
    :param deferrable: wait in the triggerer
    """

    template_fields: Sequence[str] = (
        "model_name",
        "version",
        "model_uri",
        "stable_version",
        "stable_uri",
        "route",
        "policy",
        "guardrails",
        "serve_url",
        "mlflow_tracking_uri",
        "runtime_env",
    )
    ui_color = "#f7e2c4"

    def __init__(
        self,
        *,
        model_name: str,
        version: str,
        model_uri: str,
        stable_version: str | None = None,
        stable_uri: str | None = None,
        route: str | None = None,
        policy: Any = None,
        guardrails: Any = None,
        ray_conn_id: str = RayServeHook.default_conn_name,
        serve_url: str | None = None,
        poll_interval: float = 5.0,
        ttl: float = 60.0,
        on_rollback: str = "fail",
        mlflow_tracking_uri: str | None = None,
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
        self.route = route
        self.policy = policy
        self.guardrails = guardrails
        self.ray_conn_id = ray_conn_id
        self.serve_url = serve_url
        self.poll_interval = poll_interval
        self.ttl = ttl
        self.on_rollback = on_rollback
        self.mlflow_tracking_uri = mlflow_tracking_uri
        self.runtime_env = runtime_env
        self.serve_options = serve_options
        self.startup_timeout = startup_timeout
        self.load_timeout = load_timeout
        self.deferrable = deferrable
        self._running: tuple[dict[str, Any], RolloutSpec] | None = None

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the rollout and return its result; see the class."""
        with permanent_errors_fail():
            spec, route = self._spec(context), self._route_options()
            if self.deferrable:
                self.defer(
                    trigger=CanaryTrigger(
                        spec=spec.to_json(), route=route, ray_conn_id=self.ray_conn_id, serve_url=self.serve_url
                    ),
                    method_name="execute_complete",
                )
            self._running = (route, spec)
            result = asyncio.run(self._roll_out(route, spec))
            self._running = None
            return self._conclude(context, result)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Take over from the trigger."""
        if event["status"] == "error":
            if event["retryable"]:
                raise ExternalSystemError(event["error"])
            raise AirflowFailException(event["error"])
        return self._conclude(context, event["result"])

    def on_kill(self) -> None:
        """Give all traffic back to the champion; also called on timeout."""
        if self._running is None:
            return
        # The signal may arrive inside the rollout's own event loop, so the call gets a thread and a loop of its own.
        with ThreadPoolExecutor(max_workers=1) as pool:
            pool.submit(asyncio.run, self._abort(*self._running)).result()

    async def _roll_out(self, options: dict[str, Any], spec: RolloutSpec) -> dict[str, Any]:
        from airflow_mlops.rollout.controller import run_rollout
        from airflow_mlops.rollout.reporting import LookLog

        async with self.hook.get_conn() as client:
            return await run_rollout(self._route(client, options), spec, LookLog(self.log.info))

    async def _abort(self, options: dict[str, Any], spec: RolloutSpec) -> None:
        from airflow_mlops.rollout.controller import abort

        async with self.hook.get_conn() as client:
            await abort(self._route(client, options), spec)

    @property
    def hook(self) -> RayServeHook:
        """The hook of this operator's connection."""
        return RayServeHook(self.ray_conn_id, self.serve_url or None)

    @staticmethod
    def _route(client: Any, options: dict[str, Any]) -> Route:
        from airflow_mlops.rollout.targets.client import Route

        return Route(client, **options)

    def _route_options(self) -> dict[str, Any]:
        name = self.route or self.model_name
        if not name or not all(part.isalnum() for part in name.replace("-", "_").split("_") if part):
            raise InvalidInputError(f"the route is {name!r}; expected letters, digits, - and _")
        environment = dict(self.runtime_env or {})
        if self.mlflow_tracking_uri:
            variables = {"MLFLOW_TRACKING_URI": self.mlflow_tracking_uri, **environment.get("env_vars", {})}
            environment["env_vars"] = variables
        return {
            "name": name,
            "runtime_env": environment,
            "options": dict(self.serve_options or {}),
            "startup_timeout": self.startup_timeout,
            "load_timeout": self.load_timeout,
        }

    def _spec(self, context: Context) -> RolloutSpec:
        from airflow_mlops.rollout.controller import RolloutSpec
        from airflow_mlops.rollout.policy import RolloutPolicy, parse_guardrails

        if self.on_rollback not in ON_ROLLBACK:
            raise InvalidInputError(f"on_rollback is {self.on_rollback!r}; expected one of {', '.join(ON_ROLLBACK)}")
        ti = context["ti"]
        return RolloutSpec(
            model=_text(self.model_name),
            version=_text(self.version),
            uri=_text(self.model_uri),
            stable_version=_text(self.stable_version),
            stable_uri=_text(self.stable_uri),
            owner="/".join(str(part) for part in (ti.dag_id, ti.task_id, ti.run_id, getattr(ti, "map_index", -1))),
            policy=RolloutPolicy.from_json(_structure(self.policy, "policy")),
            guardrails=parse_guardrails(_structure(self.guardrails, "guardrails")),
            poll_interval=float(self.poll_interval),
            ttl=float(self.ttl),
            attempt=int(getattr(ti, "try_number", 1)),
        )

    def _conclude(self, context: Context, result: dict[str, Any]) -> dict[str, Any]:
        """Return a promotion; on a rollback do as ``on_rollback`` says, the verdict pushed in any case."""
        reasons = "; ".join(result["reasons"])
        self.log.info("version %s of %s: %s (%s)", result["version"], result["model"], result["verdict"], reasons)
        if result["verdict"] == "PROMOTE" or self.on_rollback == "return":
            return result
        push_result(self, context, result)
        message = f"version {result['version']} of {result['model']} was rolled back: {reasons}"
        if self.on_rollback == "skip":
            raise AirflowSkipException(message)
        raise AirflowFailException(message)


def _text(value: Any) -> str:
    """A templated value as text; what Jinja renders for nothing is nothing."""
    return "" if value in (None, "None", "null") else str(value).strip()


def _structure(value: Any, name: str) -> Any:
    """A templated dictionary or list, which Jinja may have rendered as JSON text; blank is ``None``."""
    if not isinstance(value, str):
        return value or None
    try:
        return json.loads(value) if _text(value) else None
    except ValueError:
        raise InvalidInputError(
            f"{name} is the text {value!r}; expected a dictionary or list, or one as JSON"
        ) from None
