"""What to do next with a training attempt: one table for every mode, blocking or deferred."""

from __future__ import annotations

from dataclasses import dataclass

from airflow_mlops.training.result import TrainingResult

#: States in which an attempt may still be working.
ACTIVE = ("PENDING", "RUNNING")
#: LOST: the system that ran it no longer knows it. UNREACHABLE: that system has not answered for too long.
FINAL = ("SUCCEEDED", "FAILED", "STOPPED", "LOST", "UNREACHABLE")

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
    """What to do: ``wait``, ``succeed``, ``restart`` (as the next attempt) or ``fail``.

    :param blame: of a ``fail``: ``app`` (the training code), ``infra`` (all restarts used up), ``unreachable``,
        ``stopped`` or ``refused`` (another driver has the run directory)
    :param reason: why, one sentence
    """

    kind: str
    reason: str
    blame: str | None = None


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
    if seen.status not in FINAL:
        return Action("wait", f"attempt {attempt} is {seen.status}")
    own = result if result is not None and result.attempt == attempt else None
    if own is not None and own.succeeded:
        return Action("succeed", f"attempt {attempt} finished")
    if seen.status == "SUCCEEDED":
        return Action("fail", f"attempt {attempt} ended well but left no result in the run directory", "app")
    # Only the system knows a stop that was asked for: a driver is also ended by a machine that goes down.
    if seen.status == "STOPPED" and adopted:
        return Action("restart", f"attempt {attempt} was stopped with the earlier try that had started it.")
    if seen.status == "STOPPED":
        return Action("fail", f"attempt {attempt} was stopped. {seen.message}".strip(), "stopped")
    if own is not None and own.exit_class == "app":
        return Action("fail", f"attempt {attempt} failed in the training code", "app")
    if seen.exit_code == EXIT_REFUSED:
        return Action("fail", "another driver is working in the run directory", "refused")
    if seen.status == "UNREACHABLE":
        return Action("fail", f"attempt {attempt} cannot be followed. {seen.message}".strip(), "unreachable")
    # Without a result of its own a driver that exited by itself never got as far as training: no restart mends that.
    if seen.status == "FAILED" and own is None and _gave_up(seen.exit_code):
        return Action("fail", f"the driver could not start (exit code {seen.exit_code}). {seen.message}".strip(), "app")
    if restarts >= max_restarts:
        return Action("fail", f"attempt {attempt} was lost and all {max_restarts} restarts are used up", "infra")
    return Action("restart", f"attempt {attempt} was lost ({seen.status}). {seen.message}".strip())


def _gave_up(exit_code: int | None) -> bool:
    """Whether a process ended by itself (128 and more: a shell reporting a signal) and not for lack of a machine."""
    return exit_code is not None and 0 < exit_code < 128 and exit_code != EXIT_INFRA


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
