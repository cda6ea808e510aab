"""The trigger that looks at a canary, judges and acts while no worker is held."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowRuntimeError
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_mlops.approval import stored
from airflow_mlops.exceptions import MlopsError
from airflow_mlops.hooks._rollout import RolloutPlace

if TYPE_CHECKING:
    from airflow_mlops.rollout.controller import Answer
    from airflow_mlops.rollout.judge import Verdict


class _PersonWantedError(Exception):
    """A step waits for somebody who has not been asked yet."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self.verdict = verdict


class CanaryTrigger(BaseTrigger):
    """Runs one rollout to its verdict.

    Its event is ``{"status": "done", "result": ...}``, ``{"status": "approval", "step": ..., "weight": ...}`` where a
    worker has to ask somebody, or ``{"status": "error", "error": ..., "retryable": ..., "kept": ...}``. A triggerer
    that dies leaves the rollout's state on the target, from where the next one continues; when none does, the lease on
    the target runs out and stable has all traffic.

    :param spec: :meth:`airflow_mlops.rollout.spec.RolloutSpec.to_json`
    :param place: :meth:`airflow_mlops.hooks._rollout.RolloutPlace.to_json`
    :param finishing: whether a promotion is made to last here, or by the worker that takes over
    :param before: what was last known of the rollout, for a target that has lost it
    :param asked: index of the step somebody has been asked about
    :param ti_id: of the task instance whose question it is; None where its answer is known
    :param answer: what they said, :class:`airflow_mlops.rollout.controller.Answer` as a dictionary
    """

    def __init__(
        self,
        *,
        spec: dict[str, Any],
        place: dict[str, Any],
        finishing: bool = True,
        before: dict[str, Any] | None = None,
        asked: int | None = None,
        ti_id: str | None = None,
        answer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.place = place
        self.finishing = finishing
        self.before = before
        self.asked = asked
        self.ti_id = ti_id
        self.answer = answer

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and arguments."""
        names = ("spec", "place", "finishing", "before", "asked", "ti_id", "answer")
        arguments = {name: getattr(self, name) for name in names}
        return f"{type(self).__module__}.{type(self).__qualname__}", arguments

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look, judge and act until the verdict is final, or somebody has to be asked."""
        from airflow_mlops.rollout.controller import Answer, Hands, run_rollout
        from airflow_mlops.rollout.reporting import LookLog
        from airflow_mlops.rollout.spec import RolloutSpec

        kept: dict[str, Any] = dict(self.before or {})
        answer = Answer(**self.answer) if self.answer else None
        hands = Hands(on_look=LookLog(self.log.info), ask=self._ask, answer=answer, keep=kept.update)
        try:
            spec = RolloutSpec.from_json(self.spec)
            async with RolloutPlace(**self.place).open(spec.metrics, worker=False) as (target, source):
                if target.unattended:
                    self.log.warning(target.unattended)
                result = await run_rollout(target, source, spec, hands, before=self.before, finishing=self.finishing)
        except _PersonWantedError as wanted:
            verdict = wanted.verdict
            yield TriggerEvent({"status": "approval", "step": verdict.step, "verdict": verdict.to_json()})
        except MlopsError as error:
            event = {"status": "error", "error": str(error), "retryable": error.retryable, "kept": kept}
            yield TriggerEvent(event)
        else:
            yield TriggerEvent({"status": "done", "result": result})

    async def _ask(self, verdict: Verdict) -> Answer | None:
        """Have a worker ask, once a step; the answer comes with the trigger that follows.

        One that came before Airflow knew that the task waits wakes nobody: it is found here.
        """
        from airflow_mlops.rollout.controller import Answer

        answered = self.answer is not None and self.answer["step"] in (None, verdict.step)
        if not answered and self.asked != verdict.step:
            raise _PersonWantedError(verdict)
        if answered or self.ti_id is None:
            return None
        try:
            said = await asyncio.to_thread(stored, self.ti_id)
        except AirflowRuntimeError as error:
            # The rollout goes on without the API server, and the next look asks again.
            self.log.warning("whether somebody has answered cannot be told: %s", error)
            return None
        return Answer(verdict.step, said.approved, said.by) if said else None

    async def on_kill(self) -> None:
        """A person ended the task: stable gets its traffic back."""
        from airflow_mlops.rollout.controller import abort
        from airflow_mlops.rollout.spec import RolloutSpec

        with contextlib.suppress(MlopsError):
            async with RolloutPlace(**self.place).open(worker=False) as (target, _):
                await abort(target, RolloutSpec.from_json(self.spec))
