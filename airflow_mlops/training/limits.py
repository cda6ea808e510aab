"""How long and how expensive a training may be: time limits and a budget over all attempts.

Everything is reckoned from Unix times that the caller keeps in :class:`Times`; nothing here looks at a clock.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any, NamedTuple

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.decide import Action, restart_or_fail
from airflow_mlops.training.fence import read_owner
from airflow_mlops.training.result import TrainingResult, Usage
from airflow_mlops.training.runs import began_at, last_progress, told_before
from airflow_mlops.training.spec import TrainingSpec

log = logging.getLogger(__name__)

HOUR = 3600.0
_KEPT = "What was committed is kept: raise the limit and clear the task to go on from there."


@dataclass(frozen=True)
class Budget:
    """What all attempts of a run together may consume; GPUs count from the start of training, idle or not.

    :param max_gpu_hours: GPUs reserved times hours
    :param max_cost: in the currency of the price
    :param price_per_gpu_hour: alone it limits nothing, and the result says what the training cost
    """

    max_gpu_hours: float | None = None
    max_cost: float | None = None
    price_per_gpu_hour: float | None = None

    def validate(self) -> None:
        """:raises InvalidInputError: a cost without a price, nothing at all, or a number that is not positive."""
        for entry in fields(self):
            _positive(f"budget[{entry.name!r}]", getattr(self, entry.name))
        if self.max_cost is not None and self.price_per_gpu_hour is None:
            raise InvalidInputError(
                "budget has max_cost and no price_per_gpu_hour, so cost cannot be reckoned; add what one GPU costs per "
                "hour, or give max_gpu_hours instead"
            )
        if self == Budget():
            raise InvalidInputError("budget is empty; give max_gpu_hours, or max_cost with price_per_gpu_hour")

    @property
    def gpu_seconds(self) -> float | None:
        """The smaller of the two limits in GPU-seconds, None without one."""
        hours = [self.max_gpu_hours]
        if self.max_cost is not None and self.price_per_gpu_hour:
            hours.append(self.max_cost / self.price_per_gpu_hour)
        return min((number * HOUR for number in hours if number is not None), default=None)


@dataclass(frozen=True)
class Limits:
    """Seconds after which a training is ended; None: never.

    :param startup_timeout: from the attempt's begin, or from its admission by a queue, until it runs
    :param queue_timeout: waiting in a queue, over the attempt
    :param attempt_timeout: one attempt, without its time in a queue
    :param total_timeout: the task's training: all its attempts, time in queues included
    :param stall_timeout: running without committing anything
    :param budget: what all attempts of the run may consume
    """

    startup_timeout: float | None = None
    queue_timeout: float | None = None
    attempt_timeout: float | None = None
    total_timeout: float | None = None
    stall_timeout: float | None = None
    budget: Budget | None = None

    def validate(self, gpus: float | None = None) -> None:
        """Check the numbers.

        :param gpus: GPUs of the training, if that is known
        :raises InvalidInputError: one is not positive, or a budget could not be kept
        """
        for entry in fields(self):
            if entry.name != "budget":
                _positive(entry.name, getattr(self, entry.name))
        if self.budget is None:
            return
        self.budget.validate()
        if gpus == 0 and self.budget.gpu_seconds is not None:
            raise InvalidInputError(
                "budget counts GPU-hours and the training uses no GPU, so it would limit nothing; set total_timeout "
                "instead, or give the training GPUs"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain types, for :meth:`from_mapping`."""
        return {**vars(self), "budget": None if self.budget is None else dict(vars(self.budget))}

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any]) -> Limits:
        """Limits from plain values: seconds as numbers, as text of a number, or as ``timedelta``; ``budget`` a dict.

        :raises InvalidInputError: a name is unknown, or a value is no number
        """
        given = dict(value)
        budget = given.pop("budget", None)
        if budget is not None and not isinstance(budget, Budget):
            if not isinstance(budget, Mapping):
                raise InvalidInputError(f"budget is {budget!r}; expected a dict with {_names(Budget)}")
            budget = Budget(**_numbers("budget", Budget, budget))
        return cls(**_numbers("limits", cls, given), budget=budget)


@dataclass(frozen=True)
class Times:
    """How far a training is, in Unix seconds; travels with a trigger.

    :param run_began: when the task began to train
    :param attempt_began: when this attempt was created
    :param queued_seconds: the attempt's earlier stays in a queue
    :param queued_since: begin of the present stay in a queue, None if it is in none
    :param startup_since: since when it has been starting, if it was in a queue or running before; None: from its begin
    :param running_since: since when it has been running, None if it is not
    :param last_progress: when something was last committed
    :param usage: consumed by the run so far, as its drivers tell
    :param usage_at: when they told; None: ``usage`` is of earlier attempts alone
    :param earlier: GPU-seconds of earlier attempts of the task, by estimate
    :param unmetered: of these, what no driver has told of
    :param ran: GPU-seconds of this attempt's earlier stretches, by estimate, since its driver last told
    :param gpus: GPUs that a running attempt holds, the most where their number changes
    """

    run_began: float
    attempt_began: float
    queued_seconds: float = 0.0
    running_since: float | None = None
    last_progress: float | None = None
    usage: Usage = field(default_factory=Usage)
    gpus: float = 0.0
    queued_since: float | None = None
    startup_since: float | None = None
    usage_at: float | None = None
    earlier: float = 0.0
    unmetered: float = 0.0
    ran: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain types, for :meth:`from_json`."""
        return {**vars(self), "usage": dict(vars(self.usage))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Times:
        """The times behind ``to_json()``."""
        return cls(**{**value, "usage": Usage(**value["usage"])})

    def seen(self, status: str, now: float, running_since: float | None = None) -> Times:
        """The times once the attempt was observed in ``status`` at ``now``; states that are not known change nothing.

        :param running_since: since when it has been running, if the system says so
        """
        if status == "QUEUED" and self.queued_since is None:
            return replace(self._metered(now), queued_since=now, running_since=None)
        if status == "RUNNING" and self.running_since is None:
            began = now if running_since is None else min(max(running_since, self.attempt_began), now)
            return replace(self._left_queue(now), running_since=began)
        if status == "PENDING" and (self.queued_since is not None or self.running_since is not None):
            return replace(self._metered(now)._left_queue(now), running_since=None, startup_since=now)
        return self

    def next_attempt(self, now: float) -> Times:
        """The times of an attempt that begins at ``now``, after this one."""
        earlier = self.gpu_seconds(now)
        return Times(
            run_began=self.run_began,
            attempt_began=now,
            usage=self.usage,
            gpus=self.gpus,
            earlier=earlier,
            unmetered=earlier - self.usage.gpu_seconds,
        )

    def gpu_seconds(self, now: float) -> float:
        """Consumed by the run up to ``now``, by estimate since its driver last told."""
        return self.usage.gpu_seconds + self.unmetered + self.ran + self.gpus * self._untold(now)

    def told(self, usage: Usage, at: float | None, before: float | None) -> Times:
        """The times with a driver's word.

        :param usage: consumed by the run
        :param at: when it told; None: it is an earlier attempt's
        :param before: GPU-seconds that had been told of when this attempt began, None if that is not known
        """
        if at is not None and self.usage_at is not None and at <= self.usage_at:
            return self
        # What is not known to be missing counts as told, or it would count twice.
        missing = 0.0 if before is None else max(self.earlier - before, 0.0)
        return replace(self, usage=usage, usage_at=at, unmetered=missing, ran=self.ran if at is None else 0.0)

    @property
    def untold_since(self) -> float | None:
        """Since when the attempt consumes without its driver having told; None while it does not run."""
        if self.running_since is None or self.usage_at is None:
            return self.running_since
        return max(self.running_since, self.usage_at)

    def _untold(self, now: float) -> float:
        return 0.0 if self.untold_since is None else max(now - self.untold_since, 0.0)

    def _metered(self, now: float) -> Times:
        # What a driver told of this stretch and is read later must not count again.
        told_at = self.usage_at if self.running_since is None else max(self.usage_at or now, now)
        return replace(self, ran=self.ran + self.gpus * self._untold(now), usage_at=told_at)

    def _left_queue(self, now: float) -> Times:
        if self.queued_since is None:
            return self
        return replace(self, queued_seconds=self.queued_seconds + max(now - self.queued_since, 0.0), queued_since=None)


@dataclass(frozen=True)
class Breach:
    """A limit that is broken.

    :param kind: ``startup``, ``queue``, ``attempt``, ``total``, ``stall`` or ``budget``
    :param message: which limit and what to do, one or two sentences
    :param restart: whether another attempt may mend it
    :param log: the end of the driver's log, where that does not outlive the attempt
    """

    kind: str
    message: str
    restart: bool = False
    log: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain types: the constructor's arguments."""
        return dict(vars(self))


def breach(limits: Limits, times: Times, now: float) -> Breach | None:
    """The limit that was broken first, None while all hold."""
    due = [end for end in _ends(limits, times) if now >= end.at]
    return min(due, key=lambda end: end.at).breach if due else None


def remaining(limits: Limits, times: Times, now: float) -> float | None:
    """Seconds until :func:`breach` finds one if nothing changes, 0 if it does now; None: never.

    A change of state can bring a new limit into force: ask again after each.
    """
    ends = [end.at for end in _ends(limits, times)]
    return max(min(ends) - now, 0.0) if ends else None


def attempt_seconds(limits: Limits, times: Times, now: float) -> float | None:
    """Seconds that an attempt begun at ``now`` may take at most, for a deadline that the cluster keeps by itself."""
    ends = [limits.attempt_timeout]
    if limits.total_timeout is not None:
        ends.append(times.run_began + limits.total_timeout - now)
    allowed = limits.budget.gpu_seconds if limits.budget is not None else None
    # Before it runs it consumes nothing: without a limit for that the budget bounds no time.
    if allowed is not None and times.gpus > 0 and limits.startup_timeout is not None:
        ends.append(limits.startup_timeout + (allowed - times.gpu_seconds(now)) / times.gpus)
    given = [end for end in ends if end is not None]
    return max(min(given), 0.0) if given else None


def after_breach(
    broken: Breach, result: TrainingResult | None, attempt: int, restarts: int, max_restarts: int
) -> Action:
    """What to do about a broken limit once the attempt is stopped; blame is the breach's kind.

    Of the kinds a later try of the task may mend ``startup``, ``queue`` and ``stall``; the others need a higher limit.

    :param result: what the run directory holds: an attempt may have finished while it was being stopped
    """
    if result is not None and result.attempt == attempt and result.succeeded:
        return Action("succeed", f"attempt {attempt} finished")
    if broken.restart:
        return restart_or_fail(broken.message, attempt, restarts, max_restarts, broken.kind)
    return Action("fail", broken.message, broken.kind)


def updated(spec: TrainingSpec, times: Times) -> Times:
    """``times`` with what the run directory tells: consumption and progress. Reads storage; blocks.

    What cannot be read stays as it was, for consumption is then reckoned on from the last time it was told.

    :raises InvalidInputError: the storage does not say when files were written
    """
    try:
        progress, owner, before = last_progress(spec), read_owner(spec), told_before(spec)
    except InvalidInputError:
        raise
    except Exception as error:  # a store that is away for a moment must not end the training
        log.warning("consumption and progress in %s cannot be read: %s", spec.run_dir, error)
        return times
    if progress is not None:
        times = replace(times, last_progress=max(progress, times.last_progress or progress))
    if owner is None or owner.usage.gpu_seconds < times.usage.gpu_seconds:
        return times
    if owner.attempt >= spec.attempt:
        return times.told(owner.usage, owner.heartbeat, before)
    # Once this attempt's driver has told, an earlier one cannot tell any more.
    return times if times.usage_at is not None else times.told(owner.usage, None, owner.usage.gpu_seconds)


def times_of(spec: TrainingSpec, gpus: float, now: float) -> Times:
    """The times of an attempt that begins at ``now``, or that an earlier try began, with what the run has consumed.

    Reads storage; blocks.

    :param gpus: GPUs that the attempt holds while it runs
    :raises InvalidInputError: a file in the run directory is damaged, or the storage does not say when it was written
    """
    began, run_began = began_at(spec) or (now, now)
    return updated(spec, Times(run_began=run_began, attempt_began=began, gpus=gpus))


def estimate_usage(spec: TrainingSpec, times: Times, now: float) -> Usage:
    """Consumption of a run whose last attempt has left no result: as its driver last told, and since by estimate."""
    told = updated(spec, times)
    return replace(told.usage, gpu_seconds=round(told.gpu_seconds(now), 3))


def consumed(
    spec: TrainingSpec, times: Times, result: TrainingResult | None, now: float, price_per_gpu_hour: float | None = None
) -> str:
    """What a run has consumed when attempt ``spec.attempt`` fails, in a sentence; empty if it used no GPU.

    :param result: what the run directory holds: the attempt's own tells exactly, otherwise it is an estimate
    :param price_per_gpu_hour: in any currency; None: not known
    """
    known = result is not None and result.attempt == spec.attempt
    usage = result.usage if known and result is not None else estimate_usage(spec, times, now)
    if usage.gpu_seconds <= 0:
        return ""
    cost = "" if price_per_gpu_hour is None else f", which cost {usage.gpu_seconds / HOUR * price_per_gpu_hour:.2f}"
    return f"The run has used {'' if known else 'about '}{usage.gpu_seconds:.0f} GPU-seconds{cost}."


class _End(NamedTuple):
    at: float
    breach: Breach


def _ends(limits: Limits, times: Times) -> list[_End]:
    """When each limit that is in force breaks if nothing changes."""
    queued, running = times.queued_since is not None, times.running_since is not None
    ends = []

    def end(begin: float, timeout: float | None, kind: str, what: str, then: str = "", restart: bool = False) -> None:
        if timeout is not None:
            message = f"{what} {kind}_timeout={timeout:g} s. {then}".strip()
            ends.append(_End(begin + timeout, Breach(kind, message, restart)))

    if times.queued_since is not None:
        began = times.queued_since - times.queued_seconds
        end(began, limits.queue_timeout, "queue", "The attempt was not admitted by its queue within")
    elif not running:
        began = times.attempt_began + times.queued_seconds if times.startup_since is None else times.startup_since
        end(began, limits.startup_timeout, "startup", "The attempt did not start within")
    if not queued:
        began = times.attempt_began + times.queued_seconds
        end(began, limits.attempt_timeout, "attempt", "The attempt took longer than", _KEPT)
    if times.running_since is not None:
        began = max(times.running_since, times.last_progress or times.running_since)
        end(began, limits.stall_timeout, "stall", "Training committed nothing for", restart=True)
    end(times.run_began, limits.total_timeout, "total", "Training took longer than", _KEPT)
    if limits.budget is not None and (at := _budget_end(limits.budget, times)) is not None:
        ends.append(_End(at, Breach("budget", f"The budget of {_amount(limits.budget)} is used up. {_KEPT}")))
    return ends


def _budget_end(budget: Budget, times: Times) -> float | None:
    allowed = budget.gpu_seconds
    if allowed is None:
        return None
    left = allowed - times.usage.gpu_seconds - times.unmetered - times.ran
    if left <= 0:
        return -math.inf
    if times.untold_since is None or times.gpus <= 0:
        return None
    return times.untold_since + left / times.gpus


def _amount(budget: Budget) -> str:
    hours = None if budget.max_gpu_hours is None else f"{budget.max_gpu_hours:g} GPU-hours"
    cost = None if budget.max_cost is None else f"{budget.max_cost:g} at {budget.price_per_gpu_hour:g} per GPU-hour"
    return " and ".join(part for part in (hours, cost) if part)


def _positive(name: str, value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidInputError(f"{name} is {value!r}; expected a number above 0, or None")


def _numbers(what: str, kind: type, value: Mapping[str, Any]) -> dict[str, float | None]:
    known = {entry.name for entry in fields(kind)} - {"budget"}
    if unknown := sorted(set(value) - known):
        raise InvalidInputError(f"{what} has no {', '.join(unknown)}; it has {_names(kind)}")
    return {name: _number(name, entry) for name, entry in value.items()}


def _names(kind: type) -> str:
    return ", ".join(entry.name for entry in fields(kind))


def _number(name: str, value: Any) -> float | None:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str) and value.strip().lower() in ("", "none"):
        return None
    try:
        return value if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise InvalidInputError(f"{name} is {value!r}; expected a number") from None
