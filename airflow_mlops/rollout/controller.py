"""One rollout from start to end: prepare the route, look, judge, act, again.

Worker and triggerer run this same function; whichever process runs it can die and another continue, because what
matters is kept on the route itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.judge import PROMOTE, PROMOTE_STEP, ROLLBACK, Judge, Verdict
from airflow_mlops.rollout.observation import Observation, counters_from_totals
from airflow_mlops.rollout.policy import Guardrail, RolloutPolicy, parse_guardrails
from airflow_mlops.rollout.targets.book import ENDED, SLOTS
from airflow_mlops.rollout.targets.client import Route

OnLook = Callable[[Verdict], None]


@dataclass(frozen=True)
class RolloutSpec:
    """What to roll out, against what, and under which rules.

    :param model: registered model
    :param version: challenger's version
    :param uri: its MLflow model directory or ``models:/`` URI
    :param stable_version: champion's version; blank when there is none
    :param stable_uri: its model directory or URI
    :param owner: who rolls out, the same for every attempt of one task
    :param attempt: of the task; a later one takes the rollout over from an earlier one
    :param policy: steps, error rates, deadline
    :param guardrails: what must not get worse
    :param poll_interval: seconds between looks
    :param ttl: seconds without a look after which the route itself goes back to stable
    """

    model: str
    version: str
    uri: str
    stable_version: str
    stable_uri: str
    owner: str
    policy: RolloutPolicy = field(default_factory=RolloutPolicy)
    guardrails: tuple[Guardrail, ...] = ()
    poll_interval: float = 5.0
    ttl: float = 60.0
    attempt: int = 1

    def __post_init__(self) -> None:
        for name in ("model", "version", "uri", "owner"):
            if not getattr(self, name):
                raise InvalidInputError(f"{name} of the rollout is empty; expected the challenger's {name}")
        if bool(self.stable_version) != bool(self.stable_uri):
            raise InvalidInputError(
                f"stable_version is {self.stable_version!r} and stable_uri {self.stable_uri!r}; give both, or neither "
                "when there is no champion"
            )
        if not 0 < self.poll_interval <= 3600 or self.ttl < 3 * self.poll_interval:
            raise InvalidInputError(
                f"poll_interval is {self.poll_interval} s and ttl {self.ttl} s; expected 0 < poll_interval and a ttl "
                "of at least three looks, so that one late look does not end the rollout"
            )

    @property
    def rules(self) -> dict[str, Any]:
        """What the judge's state belongs to: under other rules it says nothing."""
        return {"policy": self.policy.to_json(), "guardrails": [guard.to_json() for guard in self.guardrails]}

    def to_json(self) -> dict[str, Any]:
        """Plain Python types."""
        value = asdict(self)
        return value | self.rules

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RolloutSpec:
        """Inverse of :meth:`to_json`; ``guardrails=None`` means the defaults."""
        guardrails = parse_guardrails(value.get("guardrails"))
        return cls(**{**value, "policy": RolloutPolicy.from_json(value.get("policy")), "guardrails": guardrails})


def observation_of(state: Mapping[str, Any]) -> Observation:
    """A route's state as the judge sees it."""
    try:
        versions, counters = state["versions"], state["counters"]
        arms = {
            arm: {"": counters_from_totals(counters[str(versions[state[arm]])])} if state[arm] else None
            for arm in ("stable", "canary")
        }
        routed = tuple(int(state["routed"][state[arm]]) if state[arm] else 0 for arm in ("stable", "canary"))
        return Observation(
            float(state["time"]),
            str(state["boot"]),
            str(state["epoch"]),
            float(state["weight"]),
            arms["stable"],
            arms["canary"],
            (routed[0], routed[1]),
        )
    except (KeyError, TypeError, ValueError) as error:
        return Observation(time.time(), problem=f"the route's state is unreadable ({type(error).__name__}: {error})")


async def run_rollout(
    route: Route,
    spec: RolloutSpec,
    on_look: OnLook = lambda verdict: None,
    *,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
) -> dict[str, Any]:
    """Roll out ``spec`` on ``route`` and return the result, small JSON with ``verdict`` PROMOTE or ROLLBACK.

    A rollout that the same owner began is continued; one it finished returns its result again.

    :param on_look: told every verdict, for the log
    :raises ConcurrentChangeError: another rollout holds the route
    :raises ExternalSystemError: Ray is unreachable, or the route vanished
    """
    began = clock()
    judge, saved = await prepare(route, spec)
    if judge is None:
        return saved
    steps: list[dict[str, Any]] = saved.get("steps", [])
    since: dict[str, Any] = {"time": clock(), "look": judge.looks, "requests": list(judge.requests)}
    while True:
        state = await _look(route)
        if not isinstance(state, str) and not _holds(state, spec):
            raise ConcurrentChangeError(ENDED.format(spec.owner))
        observation = Observation(clock(), problem=state) if isinstance(state, str) else observation_of(state)
        verdict = judge.observe(observation)
        on_look(verdict)
        if verdict.final or verdict.decision == PROMOTE_STEP:
            steps.append(
                {
                    "weight": spec.policy.weights[verdict.step],
                    "seconds": round(clock() - since["time"], 2),
                    "looks": judge.looks - since["look"],
                    "requests": [a - b for a, b in zip(judge.requests, since["requests"])],
                    "decision": verdict.decision,
                }
            )
            since = {"time": clock(), "look": judge.looks, "requests": list(judge.requests)}
        if verdict.final:
            result = result_of(spec, verdict, steps, saved.get("previous"), clock() - began)
            await finish(route, spec, result)
            return result
        annotation = {**saved, "judge": judge.state(), "steps": steps}
        try:
            await route.renew(spec.owner, spec.ttl, annotation)
            if not isinstance(state, str) and state["configured_weight"] != judge.weight:
                await route.set_router(weight=float(judge.weight), rollout=annotation)
                await route.renew(spec.owner, spec.ttl, annotation)
        except ExternalSystemError:
            # The next look sees the same trouble and holds; the route's own lease ends the canary meanwhile.
            if await _vanished(route):
                raise
        if verdict.decision != PROMOTE_STEP:
            await sleep(spec.poll_interval)


def _holds(state: Mapping[str, Any], spec: RolloutSpec) -> bool:
    """Whether the route's rollout is that of ``spec``, and no later attempt has taken it over."""
    annotation = state.get("rollout") or {}
    return annotation.get("owner") == spec.owner and int(annotation.get("attempt", 1)) <= spec.attempt


async def _look(route: Route) -> dict[str, Any] | str:
    try:
        return await route.state()
    except ExternalSystemError as error:
        return str(error)


async def _vanished(route: Route) -> bool:
    """Whether Serve answers and no longer knows the route: then only a new start helps."""
    try:
        return await route.config() is None
    except ExternalSystemError:
        return False


def result_of(
    spec: RolloutSpec, verdict: Verdict, steps: list[dict[str, Any]], previous: str | None, seconds: float
) -> dict[str, Any]:
    """The rollout's small result: verdict, numbers, reasons."""
    return {
        "verdict": verdict.decision,
        "model": spec.model,
        "version": spec.version,
        "previous": previous,
        "compared": verdict.look > 0,
        "requests": verdict.requests,
        "looks": verdict.look,
        "steps": steps,
        "guardrails": verdict.guardrails,
        "reasons": verdict.reasons,
        "seconds": round(seconds, 2),
    }


async def prepare(route: Route, spec: RolloutSpec) -> tuple[Judge | None, dict[str, Any]]:
    """Bring the route to the rollout's current step.

    :return: the judge and the rollout's annotation, or ``None`` and the result when nothing is left to do
    """
    judge = Judge(spec.policy, spec.guardrails)
    configs = await route.config()
    if configs is None:
        if not spec.stable_version:
            return None, await _only_version(route, spec)
        await route.deploy(spec.stable_version, spec.stable_uri)
    state = await _ready(route)
    annotation = state.get("rollout") or {}
    mine = annotation.get("owner") == spec.owner and str(annotation.get("version")) == spec.version
    if mine and annotation.get("finished"):
        return None, annotation["finished"]
    await route.claim(spec.owner, spec.ttl)
    if mine and annotation.get("judge") and annotation.get("rules") == spec.rules and state["canary"]:
        judge = Judge(spec.policy, spec.guardrails, annotation["judge"])
        annotation = {**annotation, "attempt": spec.attempt}
        await route.set_router(weight=float(judge.weight), rollout=annotation)
        await route.renew(spec.owner, spec.ttl, annotation)
        return judge, annotation
    if state["canary"]:
        # Left behind by a rollout that was lost: its version must not get traffic under the new claim.
        state = await route.set_router(canary=None, weight=0.0, rollout=None)
    versions, stable = state["versions"], state["stable"]
    if versions[stable] == spec.version:
        reason = "this version already serves all traffic of the route; nothing to compare"
        verdict = Verdict(PROMOTE, 100, 0, 0, [reason])
        result = result_of(spec, verdict, [], spec.stable_version or None, 0.0)
        await finish(route, spec, result)
        return None, result
    if spec.stable_version and versions[stable] != spec.stable_version:
        stable = await _restore_stable(route, spec, state)
        versions = (await route.state())["versions"]
    saved = {
        "owner": spec.owner,
        "attempt": spec.attempt,
        "model": spec.model,
        "version": spec.version,
        "previous": versions[stable],
        "rules": spec.rules,
    }
    idle = SLOTS[1 - SLOTS.index(stable)]
    try:
        await _keeping(route, spec, route.load(idle, spec.version, spec.uri))
    except InvalidInputError as error:
        verdict = Verdict(ROLLBACK, 0, 0, 0, [f"the challenger could not be loaded: {error}"])
        result = result_of(spec, verdict, [], versions[stable], 0.0)
        await finish(route, spec, result)
        return None, result
    saved["judge"] = judge.state()
    await route.set_router(
        canary=idle,
        weight=float(judge.weight),
        versions={**versions, idle: spec.version},
        rollout=saved,
    )
    await route.renew(spec.owner, spec.ttl, saved)
    return judge, saved


async def _ready(route: Route) -> dict[str, Any]:
    """The route's state once its stable slot serves: after a deployment or a restart that takes a moment."""
    return await route.until(
        lambda state: bool(state["stable"]) and state["slots"][state["stable"]]["ready"], route.startup_timeout, "ready"
    )


async def _keeping(route: Route, spec: RolloutSpec, work: Awaitable[Any]) -> Any:
    """Wait for ``work`` while renewing the claim: loading a large model may outlast the lease."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=spec.ttl / 3)
            if done:
                return task.result()
            await route.claim(spec.owner, spec.ttl)
    finally:
        task.cancel()


async def _only_version(route: Route, spec: RolloutSpec) -> dict[str, Any]:
    """No champion and no route: the challenger gets all traffic, without a comparison."""
    await route.deploy(spec.version, spec.uri)
    await route.claim(spec.owner, spec.ttl)
    reason = "there is no champion to compare with: deployed at 100 %"
    result = result_of(spec, Verdict(PROMOTE, 100, 0, 0, [reason]), [], None, 0.0)
    await finish(route, spec, result)
    return result


async def _restore_stable(route: Route, spec: RolloutSpec, state: Mapping[str, Any]) -> str:
    """Make the champion the stable version, as somebody moved it since the route was last used; returns its slot."""
    slot = SLOTS[1 - SLOTS.index(state["stable"])]
    await _keeping(route, spec, route.load(slot, spec.stable_version, spec.stable_uri))
    versions = {**state["versions"], slot: spec.stable_version}
    await route.set_router(stable=slot, canary=None, weight=0.0, versions=versions)
    return slot


async def finish(route: Route, spec: RolloutSpec, result: Mapping[str, Any]) -> None:
    """Make the verdict last: the promoted version becomes stable, a bad one loses its traffic at once."""
    note = {"owner": spec.owner, "model": spec.model, "version": spec.version, "finished": dict(result)}
    state = await route.state()
    canary = state["canary"]
    if result["verdict"] == PROMOTE and canary:
        await route.set_router(stable=canary, canary=None, weight=0.0, rollout=note)
        return
    if result["verdict"] == ROLLBACK:
        await route.stop(spec.owner)
    await route.set_router(canary=None, weight=0.0, rollout=note)


async def abort(route: Route, spec: RolloutSpec) -> bool:
    """Give all traffic back to stable because the task was killed; ``False`` when this attempt has nothing running.

    A later start of the same task begins a new rollout; one that has taken this one over already is left alone.
    """
    state = await route.state()
    if not _holds(state, spec) or state["rollout"].get("finished"):
        return False
    await route.stop(spec.owner)
    await route.set_router(canary=None, weight=0.0, rollout=None)
    return True
