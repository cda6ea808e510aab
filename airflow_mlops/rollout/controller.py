"""One rollout from start to end: prepare the target, look, judge, act, again.

Worker and triggerer run this same function; whichever process runs it can die and another continue, because what
matters is kept on the target itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.rollout.history import History
from airflow_mlops.rollout.judge import APPROVE, PROMOTE, PROMOTE_STEP, ROLLBACK, Judge, Verdict
from airflow_mlops.rollout.observation import Observation
from airflow_mlops.rollout.sources import EvidenceSource
from airflow_mlops.rollout.spec import RolloutSpec, result_of
from airflow_mlops.rollout.targets.protocol import ENDED, Target, TargetState

#: Seconds for which a target waits at least for a promotion that is decided.
PROMOTION = 300.0
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What a person said of a step that waits for one.

    :param step: index of the step; None for whichever waits
    :param approved: whether the rollout may leave it upwards
    :param by: who said so
    """

    step: int | None
    approved: bool
    by: str


async def _nobody(verdict: Verdict) -> Answer | None:
    return None


@dataclass(frozen=True)
class Hands:
    """What the process that runs a rollout does for it.

    :param on_look: told every verdict, for the log
    :param ask: asked for a person's answer at every look of a step that waits for one; None while there is none. It
        may raise to leave the rollout as it is, to be continued by another process
    :param answer: what somebody has said already, also of a step that does not wait at the moment: a refusal acts at
        once
    :param keep: told the rollout's state after every look
    :param clock: seconds
    :param sleep: waits for seconds
    """

    on_look: Callable[[Verdict], None] = lambda verdict: None
    ask: Callable[[Verdict], Awaitable[Answer | None]] = _nobody
    answer: Answer | None = None
    keep: Callable[[Mapping[str, Any]], None] = lambda annotation: None
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep


@dataclass
class _Progress:
    """A rollout under way: what its judge has seen, and what is kept of it on the target."""

    judge: Judge
    annotation: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    history: History = field(default_factory=History)
    since: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, judge: Judge, annotation: Mapping[str, Any]) -> _Progress:
        kept = dict(annotation)
        history = History.from_json(kept.get("history"))
        return cls(judge, kept, list(kept.get("steps", [])), history, dict(kept.get("since") or {}))

    def saved(self) -> dict[str, Any]:
        """The annotation with everything that another process needs to go on."""
        return {
            **self.annotation,
            "judge": self.judge.state(),
            "steps": self.steps,
            "history": self.history.to_json(),
            "since": self.since,
        }

    def begin_step(self, now: float) -> None:
        self.since = {"time": now, "look": self.judge.looks, "requests": list(self.judge.requests)}

    def end_step(self, verdict: Verdict, weight: float, now: float) -> None:
        """Put the step that this verdict ends on record."""
        since = self.since
        self.steps.append(
            {
                "weight": weight,
                "seconds": round(now - since["time"], 2),
                "looks": self.judge.looks - since["look"],
                "requests": [a - b for a, b in zip(self.judge.requests, since["requests"])],
                "decision": verdict.decision,
            }
        )
        self.begin_step(now)


async def run_rollout(
    target: Target,
    source: EvidenceSource,
    spec: RolloutSpec,
    hands: Hands = Hands(),
    *,
    before: Mapping[str, Any] | None = None,
    finishing: bool = True,
) -> dict[str, Any]:
    """Roll out ``spec`` on ``target`` and return the result, small JSON; its ``verdict`` is PROMOTE, ROLLBACK or, of an
    A/B test, CONCLUDE.

    A rollout that the same owner began is continued; one it finished returns its result again.

    :param before: what an earlier process last knew of this rollout, for a target that has lost it
    :param finishing: whether a promotion is made to last; otherwise the caller does so by :func:`finish`, and the
        target goes back to stable when nobody does within the rollout's ``ttl``
    :raises ConcurrentChangeError: another rollout holds the target
    :raises ExternalSystemError: the target is unreachable, or vanished
    """
    clock = hands.clock
    began = clock()
    begun = await prepare(target, source, spec, before or {}, hands)
    if isinstance(begun, dict):
        return begun if begun.pop("done", False) else await _conclude(target, spec, begun, finishing)
    progress, judge = begun, begun.judge
    if not progress.since:
        progress.begin_step(clock())
    _take_in(judge, hands.answer, clock())
    asked: int | None = None
    while True:
        state = await _look(target)
        if isinstance(state, TargetState) and not _holds(state, spec):
            raise ConcurrentChangeError(ENDED.format(spec.owner))
        observation = (
            Observation(clock(), problem=state) if isinstance(state, str) else await source.observe(state, clock())
        )
        weight = judge.weight
        verdict = judge.observe(observation)
        asked = verdict.step if verdict.decision == APPROVE else asked
        # Once asked, somebody may answer while the numbers have come to be open again.
        if asked == verdict.step and not verdict.final:
            _take_in(judge, await hands.ask(verdict), clock())
        hands.on_look(verdict)
        progress.history.add(clock(), verdict)
        if verdict.final or verdict.decision == PROMOTE_STEP:
            progress.end_step(verdict, weight, clock())
        if verdict.final:
            result = result_of(
                spec,
                verdict,
                progress.steps,
                progress.annotation.get("previous"),
                clock() - progress.annotation.get("began", began),
            )
            result["approvals"] = dict(judge.approvals)
            result["history"] = progress.history.to_json()
            # First what is to be done, so that whoever continues does that and nothing else.
            decided = {**progress.saved(), "decided": result}
            hands.keep(decided)
            # A promotion may take longer to be seen than a look does.
            ttl = max(spec.ttl, PROMOTION) if verdict.decision == PROMOTE else spec.ttl
            with suppress(ExternalSystemError):
                await target.renew(spec.owner, ttl, decided)
            return await _conclude(target, spec, result, finishing)
        annotation = progress.saved()
        hands.keep(annotation)
        try:
            await target.renew(spec.owner, spec.ttl, annotation)
            if isinstance(state, TargetState) and not _is_split(state, judge):
                await _keeping(target, spec, _split(target, spec, judge, annotation))
        except ExternalSystemError:
            # The next look sees the same trouble and holds; the target's own lease ends the canary meanwhile.
            if await _vanished(target):
                raise
        if verdict.decision != PROMOTE_STEP:
            await hands.sleep(spec.poll_interval)


def _take_in(judge: Judge, answer: Answer | None, now: float) -> None:
    """Let the next look act on what somebody said, if the step they spoke of waits for it."""
    if answer is None:
        return
    step = judge.step if answer.step is None else answer.step
    if judge.policy.steps[step].approval:
        judge.approve(step, answer.approved, answer.by, now)


async def _conclude(target: Target, spec: RolloutSpec, result: dict[str, Any], finishing: bool) -> dict[str, Any]:
    """Make the verdict last, or leave that to the caller: the result then says that it is ``pending``."""
    if result["verdict"] == PROMOTE and not finishing:
        return {**result, "pending": True}
    await finish(target, spec, result)
    return result


def _holds(state: TargetState, spec: RolloutSpec) -> bool:
    """Whether the target's rollout is that of ``spec``, and no later attempt has taken it over."""
    return spec.owns(state.rollout) and int(state.rollout.get("attempt", 1)) <= spec.attempt


def _is_split(state: TargetState, judge: Judge) -> bool:
    return state.configured == judge.weight and state.shadow == (judge.weight == 0)


async def _split(target: Target, spec: RolloutSpec, judge: Judge, annotation: Mapping[str, Any]) -> None:
    """Give the canary the current step's share; at a step of 0 % copies."""
    await target.split(spec.version, float(judge.weight), annotation, shadow=judge.weight == 0)
    await target.renew(spec.owner, spec.ttl, annotation)


async def _look(target: Target) -> TargetState | str:
    """The target's state, or why there is none."""
    try:
        state = await target.state()
    except ExternalSystemError as error:
        return str(error)
    return f"{target.name} is not deployed any more" if state is None else state


async def _vanished(target: Target) -> bool:
    """Whether the platform answers and no longer knows the target: then only a new start helps."""
    try:
        return await target.state() is None
    except ExternalSystemError:
        return False


async def prepare(
    target: Target, source: EvidenceSource, spec: RolloutSpec, before: Mapping[str, Any], hands: Hands
) -> _Progress | dict[str, Any]:
    """Bring the target to the rollout's current step.

    :return: the rollout under way; or its result, marked as ``done`` when nothing at all is left to do
    """
    _check_steps(target, spec)
    state = await target.state()
    if state is None and not spec.stable_version:
        await target.deploy(spec.version, spec.uri)
        await target.claim(spec.owner, spec.ttl)
        return _uncompared(spec, None, "there is no champion to compare with: deployed at 100 %")
    if state is None:
        await target.deploy(spec.stable_version, spec.stable_uri)
    state = await _serving(target, spec, hands)
    kept = state.rollout or before
    if spec.owns(kept) and kept.get("finished"):
        return {**kept["finished"], "done": True}
    await target.claim(spec.owner, spec.ttl)
    if spec.continues(kept) and kept.get("decided"):
        return dict(kept["decided"])
    await source.check(state, hands.clock())
    if state.stable == spec.version:
        reason = "this version already serves all traffic; nothing to compare"
        return _uncompared(spec, spec.stable_version or None, reason)
    if spec.stable_version and state.stable != spec.stable_version:
        await _keeping(target, spec, target.restore(spec.stable_version, spec.stable_uri))
    progress = _progress(spec, kept, state, hands)
    # Whoever loaded it may have died before it was up.
    if state.canary != spec.version or "canary" not in state.ready:
        try:
            await _keeping(target, spec, target.load(spec.version, spec.uri))
        except InvalidInputError as error:
            verdict = Verdict(ROLLBACK, 0, 0, 0, [f"the challenger could not be loaded: {error}"])
            return result_of(spec, verdict, [], progress.annotation["previous"], 0.0)
    await _keeping(target, spec, _split(target, spec, progress.judge, progress.saved()))
    return progress


def _check_steps(target: Target, spec: RolloutSpec) -> None:
    """Refuse a plan that the target cannot follow, before anything is loaded."""
    weights = spec.policy.weights
    if 0 in weights and not target.shadows:
        raise InvalidInputError(
            f"the steps are {list(weights)}, and {target.name} cannot copy requests to a canary that answers nobody; "
            "begin above 0 %, or roll out on Ray Serve or a Gateway API route"
        )
    if target.whole and any(weight != int(weight) for weight in weights):
        raise InvalidInputError(f"the steps are {list(weights)}, and {target.name} takes whole percents only")


def _progress(spec: RolloutSpec, kept: Mapping[str, Any], state: TargetState, hands: Hands) -> _Progress:
    """The rollout as an earlier process left it, or a new one."""
    if spec.continues(kept):
        return _Progress.of(Judge(spec.policy, spec.guardrails, kept["judge"]), {**kept, "attempt": spec.attempt})
    annotation = {
        "owner": spec.owner,
        "attempt": spec.attempt,
        "model": spec.model,
        "version": spec.version,
        "previous": spec.stable_version or state.stable,
        "rules": spec.rules,
        "began": hands.clock(),
    }
    return _Progress.of(Judge(spec.policy, spec.guardrails), annotation)


def _uncompared(spec: RolloutSpec, previous: str | None, reason: str) -> dict[str, Any]:
    """The result of a version that has all traffic without a comparison."""
    return result_of(spec, Verdict(PROMOTE, 100, 0, 0, [reason]), [], previous, 0.0)


async def _serving(target: Target, spec: RolloutSpec, hands: Hands) -> TargetState:
    """The target's state once it serves: after a deployment or a restart that takes a moment.

    A kill in the middle of a promotion may have left all traffic with the canary.
    """
    deadline = hands.clock() + spec.startup_timeout
    while True:
        state = await _look(target)
        if isinstance(state, TargetState) and ("stable" in state.ready or (state.weight and "canary" in state.ready)):
            return state
        if hands.clock() > deadline:
            problem = state if isinstance(state, str) else state.problem or "its stable version is not ready"
            raise ExternalSystemError(f"{target.name} did not serve within {spec.startup_timeout:g} s: {problem}")
        await hands.sleep(min(0.2, spec.poll_interval))


async def _keeping(target: Target, spec: RolloutSpec, work: Awaitable[T]) -> T:
    """Wait for ``work`` while renewing the claim: loading a large model may outlast the lease."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=spec.ttl / 3)
            if done:
                return task.result()
            await target.claim(spec.owner, spec.ttl)
    finally:
        task.cancel()


async def finish(target: Target, spec: RolloutSpec, result: Mapping[str, Any]) -> None:
    """Make the verdict last: the promoted version becomes stable, any other loses its traffic at once."""
    note = {
        "owner": spec.owner,
        "attempt": spec.attempt,
        "model": spec.model,
        "version": spec.version,
        "finished": dict(result),
    }
    if result["verdict"] == PROMOTE:
        await target.promote(note)
    else:
        await target.roll_back(spec.owner, note)


async def abort(target: Target, spec: RolloutSpec) -> bool:
    """Give all traffic back to stable because the task was killed; ``False`` when this attempt has nothing running.

    A later start of the same task begins a new rollout; one that has taken this one over already is left alone.
    """
    state = await target.state()
    if state is None or not _holds(state, spec) or state.rollout.get("finished"):
        return False
    await target.roll_back(spec.owner, {})
    return True


async def go_back(target: Target, version: str, uri: str, owner: str, ttl: float) -> bool:
    """Give all traffic to a version that served before; ``False`` when it has it already.

    :param owner: who does so; a rollout that is under way refuses it
    :param ttl: seconds that it may take before others may act
    :raises ConcurrentChangeError: a rollout holds the target
    """
    state = await target.state()
    if state is not None and (state.stable, state.weight) == (version, 0):
        return False
    if state is None:
        await target.deploy(version, uri)
        return True
    await target.claim(owner, ttl)
    if state.stable != version:
        await target.restore(version, uri)
    await target.roll_back(owner, {})
    return True
