"""The judge of a rollout: observations in, verdicts out, nothing else.

It has no clock, no network and no randomness. Its state is small JSON, so that another process continues where one
died, and the same observations always give the same verdicts in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.groupseq import Plan
from airflow_mlops.rollout.guards import evidence_for
from airflow_mlops.rollout.intake import ARMS, Intake, Look
from airflow_mlops.rollout.observation import Observation
from airflow_mlops.rollout.policy import Guardrail, RolloutPolicy, parse_guardrails
from airflow_mlops.rollout.sequential import UNBALANCED, log_mean_exp, sample_ratio_logs
from airflow_mlops.rollout.terms import HARM, NO_DATA, OK, Terms
from airflow_mlops.rollout.verdict import APPROVE, CONCLUDE, HOLD, PROMOTE, PROMOTE_STEP, ROLLBACK, Verdict


class Judge:
    """Judges the looks of one rollout in their order.

    One replica per arm cannot tell a bad replica from a bad model: with two or more in either arm their spread is
    estimated and held against every difference, with three or more in the canary a single bad one is named and not
    taken for the model. Where the route does not tell its replicas apart, ``policy.replica_sd`` is all there is.

    :param policy: steps, error rates, deadline
    :param guardrails: what must not be worse; errors and latency by default
    :param state: :meth:`state` of an earlier judge of the same rollout
    """

    NAMES = ("step", "looks", "started", "step_started", "requests", "step_requests", "ratio", "approvals", "now")

    def __init__(
        self,
        policy: RolloutPolicy,
        guardrails: Sequence[Guardrail | Mapping[str, Any] | str] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy = policy
        self.guardrails = parse_guardrails(guardrails)
        state = state or {}
        self.step = int(state.get("step", 0))
        self.looks = int(state.get("looks", 0))
        self.now: float = state.get("now", 0.0)
        self.started: float | None = state.get("started")
        self.step_started: float | None = state.get("step_started")
        self.requests = list(state.get("requests", [0, 0]))
        self.step_requests = list(state.get("step_requests", [0, 0]))
        self.ratio = list(state.get("ratio", [0.0] * len(UNBALANCED)))
        self.approvals: dict[str, Any] = dict(state.get("approvals", {}))
        saved = state.get("evidence", {})
        self.evidence = {guard.name: evidence_for(guard, saved.get(guard.name)) for guard in self.guardrails}
        self.intake = Intake(self.evidence, state.get("intake"))

    def state(self) -> dict[str, Any]:
        """Everything a later judge needs, as small JSON."""
        return {
            **{name: getattr(self, name) for name in self.NAMES},
            "evidence": {name: evidence.state() for name, evidence in self.evidence.items()},
            "intake": self.intake.state(),
        }

    @property
    def weight(self) -> float:
        """Canary share in percent that the current step asks for."""
        return self.policy.weights[self.step]

    @property
    def _last_step(self) -> bool:
        return self.step == len(self.policy.steps) - 1

    @property
    def _baking(self) -> bool:
        return self._last_step and self.policy.mode == "progressive"

    def approve(self, step: int, approved: bool, by: str, now: float) -> bool:
        """Record a person's answer for a step; the next look acts on it.

        :param step: index of the step that waits
        :return: whether the answer counts; not when that step is over or has an answer already
        :raises InvalidInputError: the step does not ask for one
        """
        if not 0 <= step < len(self.policy.steps) or not self.policy.steps[step].approval:
            raise InvalidInputError(f"step {step} of the rollout does not wait for an approval")
        if step != self.step or str(step) in self.approvals:
            return False
        self.approvals[str(step)] = {"approved": bool(approved), "by": str(by), "time": now}
        return True

    def observe(self, observation: Observation) -> Verdict:
        """Judge one more look; observations must come in time order."""
        self.looks += 1
        # A reading without a time of its own counts as one at the last known time.
        now = self.now = observation.time if math.isfinite(observation.time) else self.now
        self.started = now if self.started is None else self.started
        self.step_started = now if self.step_started is None else self.step_started
        look = self.intake.take(observation, self.weight, self._baking)
        problem = look if isinstance(look, str) else self._add(look)
        accounts = self._accounts()
        decision, reasons = self._decide(now, problem, accounts, {} if isinstance(look, str) else look.missing)
        if decision in (HOLD, APPROVE) and now - self.started >= self.policy.deadline_seconds:
            decision = ROLLBACK
            reasons = [f"not decided within the deadline of {self.policy.deadline_seconds:g} s", *reasons]
        if not isinstance(look, str):
            reasons = reasons + look.notes
        judged_step = self.step
        if decision == PROMOTE_STEP:
            self.step, self.step_started, self.step_requests = self.step + 1, now, [0, 0]
            self.intake.restart()
        weight = {PROMOTE: 100.0, ROLLBACK: 0.0, CONCLUDE: 0.0}.get(decision, self.weight)
        verdict = Verdict(decision, weight, judged_step, self.looks, reasons, accounts, dict(zip(ARMS, self.requests)))
        if verdict.final:
            terms = self._terms()
            verdict.report.update({name: evidence.report(terms) for name, evidence in self.evidence.items()})
        return verdict

    def _add(self, look: Look) -> str | None:
        """Add a look to the evidence; says what keeps it from being enough."""
        self.requests = [a + b for a, b in zip(self.requests, look.requests)]
        self.step_requests = [a + b for a, b in zip(self.step_requests, look.requests)]
        if self._baking:
            for evidence, (_, canary) in zip(self.evidence.values(), look.parts):
                evidence.add_bake(canary)
            return None if look.requests[1] else "no requests since the last look"
        if look.routed is not None and self.weight > 0:
            self.ratio = sample_ratio_logs(self.ratio, self.weight / 100, look.routed)
        for evidence, (stable, canary) in zip(self.evidence.values(), look.parts):
            # Labels come after their request, so a look without requests can still add evidence.
            if stable and canary:
                evidence.add(stable, canary)
        silent = [name for name, count in zip(ARMS, look.requests) if count == 0]
        if len(silent) == 2:
            return "no requests since the last look"
        return f"no requests in the {silent[0]} arm since the last look" if silent else None

    def _terms(self) -> Terms:
        plan = None
        if self.policy.evidence == "group_sequential":
            assert self.policy.max_requests is not None and self.policy.planned_looks is not None
            plan = Plan(self.requests[1] / self.policy.max_requests, self.policy.planned_looks)
        alpha = self.policy.alpha / len(self.guardrails)
        return Terms(alpha, self.policy.beta, self.policy.replica_sd, plan)

    def _accounts(self) -> dict[str, dict[str, Any]]:
        terms, accounts = self._terms(), {}
        for name, evidence in self.evidence.items():
            account = evidence.account(terms)
            if "culprit" in account:
                account["culprit"] = self.intake.names[1][account["culprit"]]
            accounts[name] = account
        return accounts

    def _decide(
        self,
        now: float,
        problem: str | None,
        accounts: Mapping[str, Mapping[str, Any]],
        missing: Mapping[str, Sequence[str]],
    ) -> tuple[str, list[str]]:
        if log_mean_exp(self.ratio) >= math.log(1 / self.policy.srm_alpha):
            return HOLD, [
                f"sample ratio mismatch: the arms' requests do not follow the weight of {self.weight:g} % "
                f"(error rate {self.policy.srm_alpha:g}); no comparison of the arms is valid"
            ]
        harmful = [name for name, account in accounts.items() if account["status"] == HARM]
        if harmful:
            return ROLLBACK, [f"{name}: the canary is worse ({numbers(accounts[name])})" for name in harmful]
        if self._baking:
            alpha = self.policy.alpha / len(self.guardrails)
            bad = [name for name, evidence in self.evidence.items() if evidence.baked_badly(alpha)]
            if bad:
                return ROLLBACK, [f"{name}: worse at 100 % than was acceptable beside stable" for name in bad]
        answer = self.approvals.get(str(self.step))
        if answer and not answer["approved"]:
            return ROLLBACK, [f"refused by {answer['by']} at {self.weight:g} %"]
        if problem:
            return HOLD, [problem]
        waiting = self._waiting(now, accounts, missing)
        ended = self._sample_used_up(accounts)
        if ended:
            return ROLLBACK, [ended, *waiting]
        if waiting:
            return HOLD, waiting
        return self._next(answer)

    def _next(self, answer: Mapping[str, Any] | None) -> tuple[str, list[str]]:
        """What follows when the current step has all it waits for."""
        if self._last_step and self.policy.mode == "ab":
            return CONCLUDE, ["the test has run its time; see the report of effects"]
        if self.policy.steps[self.step].approval and answer is None:
            return APPROVE, [f"everything asked for at {self.weight:g} % is shown; waiting for a person's approval"]
        agreed = [f"approved by {answer['by']}"] if answer else []
        last = self.policy.steps[-1]
        watched = self.policy.bake_of(-1) > 0 or last.approval or last.min_requests is not None
        if self._baking or (self.policy.weights[self.step + 1] == 100 and not watched):
            return PROMOTE, ["every guardrail shows that the canary is not worse", *agreed]
        return PROMOTE_STEP, [f"no harm at {self.weight:g} %; next {self.policy.weights[self.step + 1]:g} %", *agreed]

    def _sample_used_up(self, accounts: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Why a group-sequential rollout can no longer be promoted."""
        plan = self._terms().plan
        if plan is None or plan.fraction < 1 or self._baking or self.policy.mode == "ab":
            return None
        open_ = [name for name, account in accounts.items() if account["status"] != OK]
        if not open_:
            return None
        return f"the planned {self.policy.max_requests} requests are used up and {', '.join(open_)} not shown"

    def _waiting(
        self, now: float, accounts: Mapping[str, Mapping[str, Any]], missing: Mapping[str, Sequence[str]]
    ) -> list[str]:
        """What the current step still waits for."""
        reasons, least = [], self.policy.min_requests_of(self.step)
        for index, name in enumerate(ARMS):
            if self.step_requests[index] < least and not (self._baking and name == "stable"):
                reasons.append(f"{self.step_requests[index]} of {least} requests in the {name} arm")
        reasons += self._baked(now - (self.step_started or now))
        concluding = self._last_step and self.policy.mode == "ab"
        decisive = not self._last_step and self.policy.weights[self.step + 1] == 100
        for name, account in accounts.items():
            if name in missing:
                reasons.append(f"{name}: {self._silence(name, missing[name])}")
            elif account["status"] == NO_DATA:
                reasons.append(f"{name}: not enough data of both arms")
            elif "culprit" in account and not concluding:
                reasons.append(
                    f"{name}: worse only with the canary's replica {account['culprit']}; without it the others are "
                    f"as good as stable, so a bad replica is likelier than a bad model ({numbers(account)})"
                )
            elif decisive and account["status"] != OK:
                reasons.append(f"{name}: not yet shown to be no worse ({numbers(account)})")
        return reasons

    def _baked(self, seconds: float) -> list[str]:
        bake, most = self.policy.bake_of(self.step), self.policy.max_requests
        if self._last_step and self.policy.mode == "ab" and most is not None and self.requests[1] >= most:
            return []
        if seconds < bake:
            return [f"baking: {seconds:.0f} of {bake:g} s"]
        if self._last_step and self.policy.mode == "ab" and not bake:
            return [f"{self.requests[1]} of {most} requests of the test"]
        return []

    def _silence(self, name: str, arms: Sequence[str]) -> str:
        guard = next(guard for guard in self.guardrails if guard.name == name)
        if guard.kind in ("latency", "drift") and getattr(self.evidence[name], "threshold", 0.0) is None:
            return f"stable has not yet enough values of {guard.metric!r} to choose a threshold"
        return f"no data: {guard.metric!r} is not reported by the {' or the '.join(arms)} arm"


def numbers(account: Mapping[str, Any]) -> str:
    """The numbers of a guardrail's account in words."""
    text = f"stable {account['stable']:.4g}, canary {account['canary']:.4g}"
    if "e_ok" in account:
        return f"{text}, evidence of harm {account['e_harm']:.3g}, of no harm {account['e_ok']:.3g}"
    if "z_harm" in account:
        return f"{text}, z of harm {account['z_harm']:.3g} of {account['z_harm_needed']:.3g}"
    if "worse_by_at_least" not in account:
        return f"{text}, no planned look yet"
    return f"{text}, worse by {account['worse_by_at_least']:.4g} to {account['worse_by_at_most']:.4g}"


__all__ = [
    "APPROVE",
    "CONCLUDE",
    "HOLD",
    "PROMOTE",
    "PROMOTE_STEP",
    "ROLLBACK",
    "Judge",
    "Verdict",
]
