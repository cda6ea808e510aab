"""What to do next with a training attempt: one table for every mode, blocking or deferred."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_mlops.training.result import TrainingResult

#: Non-final states: the attempt may still be working, or may come to work. QUEUED: suspended, waiting to be admitted.
#: STOPPING: being deleted. SUBMITTER_LOST: the process that watched the job is gone, which says nothing about the job.
ACTIVE = ("PENDING", "RUNNING", "QUEUED", "STOPPING", "SUBMITTER_LOST")
#: LOST: the system that ran it no longer knows it. UNREACHABLE: that system has not answered for too long.
#: INVALID: the system refuses it. DEADLINE: it has used up its time. CAPACITY: there was no room to start it.
FINAL = ("SUCCEEDED", "FAILED", "STOPPED", "LOST", "UNREACHABLE", "INVALID", "DEADLINE", "CAPACITY")

#: Seconds before the first restart for lack of capacity; doubled for each further one up to the longest.
BACKOFF, LONGEST_BACKOFF = 60.0, 900.0

#: Exit codes of the driver.
EXIT_OK, EXIT_APP, EXIT_INFRA, EXIT_REFUSED, EXIT_STOPPED = 0, 1, 70, 75, 143


@dataclass(frozen=True)
class Observation:
    """What the system that runs an attempt says about it.

    :param status: one of :data:`ACTIVE` or :data:`FINAL`; anything else is a state this version does not know
    :param exit_code: of the driver's process, negative for a signal; None if not known
    :param message: in the system's own words
    """

    status: str
    exit_code: int | None = None
    message: str = ""


@dataclass(frozen=True)
class Action:
    """What to do: ``wait``, ``ask``, ``succeed``, ``restart`` (as the next attempt) or ``fail``.

    ``ask`` whoever runs the job itself how it is, and decide again on that answer; LOST if there is none.

    :param blame: of a ``fail``: ``app`` (the training code), ``infra`` (all restarts used up), ``capacity`` (no room,
        and all restarts used up), ``unreachable``, ``stopped``, ``refused`` (another driver has the run directory),
        ``invalid`` (refused as it is written) or ``deadline``; of a breached limit its kind, see
        :func:`airflow_mlops.training.limits.after_breach`
    :param reason: why, one sentence
    :param delay: of a ``restart``: seconds to wait before it
    """

    kind: str
    reason: str
    blame: str | None = None
    delay: float = 0.0


def next_action(
    seen: Observation,
    result: TrainingResult | None,
    attempt: int,
    restarts: int,
    max_restarts: int,
    adopted: bool = False,
) -> Action:
    """The rule for every pair of what is seen and what the run directory holds.

    The run directory is the truth: an attempt whose result says it succeeded has, whatever became of its process.
    A state that is not known is waited for; the deadline is the caller's.

    :param seen: state of attempt ``attempt``
    :param result: what the run directory holds, of whichever attempt; None if nothing
    :param restarts: restarts already made by this task
    :param max_restarts: restarts allowed
    :param adopted: whether an earlier try of the task started the attempt: clearing a task stops its attempt, which
        the next try may find still running; that stop was not meant for it
    """
    own = result if result is not None and result.attempt == attempt else None
    # Who has left a result has ended: nobody need be asked.
    if seen.status == "SUBMITTER_LOST" and own is None:
        return Action("ask", _said(f"attempt {attempt} is no longer watched by its submitter.", seen))
    if seen.status not in FINAL and seen.status != "SUBMITTER_LOST":
        return Action("wait", f"attempt {attempt} is {seen.status}")
    if own is not None and own.succeeded:
        return Action("succeed", f"attempt {attempt} finished")
    if seen.status == "INVALID":
        return Action("fail", _said(f"attempt {attempt} is not accepted.", seen), "invalid")
    if seen.status == "SUCCEEDED":
        return Action("fail", f"attempt {attempt} ended well but left no result in the run directory", "app")
    # Only the system knows a stop that was asked for: a driver is also ended by a machine that goes down.
    if seen.status == "STOPPED" and adopted:
        return Action("restart", f"attempt {attempt} was stopped with the earlier try that had started it.")
    if seen.status == "STOPPED":
        return Action("fail", _said(f"attempt {attempt} was stopped.", seen), "stopped")
    if own is not None and own.exit_class == "app":
        return Action("fail", f"attempt {attempt} failed in the training code", "app")
    if seen.status == "DEADLINE":
        return Action("fail", _said(f"attempt {attempt} has used up its time.", seen), "deadline")
    if seen.exit_code == EXIT_REFUSED:
        return Action("fail", "another driver is working in the run directory", "refused")
    if seen.status == "UNREACHABLE":
        return Action("fail", _said(f"attempt {attempt} cannot be followed.", seen), "unreachable")
    # Without a result of its own a driver that exited by itself never got as far as training: no restart mends that.
    if seen.status == "FAILED" and own is None and _gave_up(seen):
        code = "" if seen.exit_code is None else f" (exit code {seen.exit_code})"
        return Action("fail", _said(f"the driver could not start{code}.", seen), "app")
    if seen.status == "CAPACITY":
        return _for_capacity(seen, attempt, restarts, max_restarts)
    return restart_or_fail(_said(f"attempt {attempt} was lost ({seen.status}).", seen), attempt, restarts, max_restarts)


def restart_or_fail(
    reason: str, attempt: int, restarts: int, max_restarts: int, blame: str = "infra", delay: float = 0.0
) -> Action:
    """A restart while there are any left, else the failure.

    :param reason: what became of the attempt, one sentence
    :param blame: of the failure
    """
    if restarts < max_restarts:
        return Action("restart", reason, delay=delay)
    return Action("fail", f"{reason} That was attempt {attempt}, and all {max_restarts} restarts are used up.", blame)


def backoff(restarts: int) -> float:
    """Seconds to wait before restart number ``restarts + 1`` for lack of capacity."""
    return min(BACKOFF * 2.0 ** min(restarts, 10), LONGEST_BACKOFF)


def _for_capacity(seen: Observation, attempt: int, restarts: int, max_restarts: int) -> Action:
    reason = _said(f"attempt {attempt} was not started for lack of capacity.", seen)
    return restart_or_fail(reason, attempt, restarts, max_restarts, "capacity", backoff(restarts))


def _said(sentence: str, seen: Observation) -> str:
    return f"{sentence} {seen.message}".strip()


def _gave_up(seen: Observation) -> bool:
    """Whether a process ended by itself (128 and more: a shell reporting a signal) and not for lack of a machine."""
    if seen.exit_code is None:
        # What Ray says of a job whose environment could not be built, so that its command was never run.
        return seen.message.startswith("runtime_env setup failed")
    return 0 < seen.exit_code < 128 and seen.exit_code != EXIT_INFRA


@dataclass
class Patience:
    """Turns silence into ``UNREACHABLE`` once it has lasted ``timeout`` seconds.

    :param timeout: seconds without an answer that are tolerated
    """

    timeout: float
    silent_since: float | None = None

    def answered(self) -> None:
        """The system answered."""
        self.silent_since = None

    def silent(self, now: float, error: str) -> Observation | None:
        """The system did not answer at ``now`` (monotonic seconds); an observation once patience is over."""
        if self.silent_since is None:
            self.silent_since = now
        waited = now - self.silent_since
        if waited < self.timeout:
            return None
        return Observation("UNREACHABLE", message=f"No answer for {waited:.0f} s: {error}")
