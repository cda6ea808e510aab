"""Runs the monthly Dag through Airflow's own backfill, watches it, and goes on where an earlier demo ended."""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from airflow_mlops.embedded.airflow_client import AirflowClient
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, MlopsError

YEAR = 2013
BOOTSTRAP_MONTH = 3
_ENDED = ("success", "skipped", "failed", "upstream_failed", "removed")
_BAD = ("failed", "upstream_failed")
_LOG_LINES = 40


class MonthFailedError(MlopsError):
    """A month's run did not succeed; the message shows the end of the failing task's log."""


@dataclass(frozen=True)
class MonthState:
    """How far one month's run has come.

    :param month: ``YYYY-MM``
    :param state: the run's state, or ``waiting`` while there is no run
    :param tasks: state by task id, in the order in which they ended; None for a task that has not begun
    :param seconds: wall time by task id, of the tasks that ended
    :param total: number of the Dag's tasks
    """

    month: str
    state: str
    tasks: Mapping[str, str | None] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    total: int = 0

    @property
    def ended(self) -> list[str]:
        """Ids of the tasks that ended, in any way."""
        return [task for task, state in self.tasks.items() if state in _ENDED]

    @property
    def running(self) -> list[str]:
        """Ids of the tasks at work or waiting for something outside."""
        return [task for task, state in self.tasks.items() if state in ("running", "deferred", "up_for_retry")]

    @property
    def failed(self) -> list[str]:
        """Ids of the tasks that failed, and of those that could not begin because of them."""
        return [task for task, state in self.tasks.items() if state in _BAD]

    @property
    def done(self) -> bool:
        """Whether the run is over and nothing in it failed."""
        return self.state == "success" and not self.failed


def parse_months(text: str) -> list[str]:
    """``"4-7"`` or ``"5"`` as months after the bootstrap, ``["2013-04", ...]``.

    :raises InvalidInputError: not a month or a range of months from April to December
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    begin, end = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not BOOTSTRAP_MONTH < begin <= end <= 12:
        raise InvalidInputError(
            f"months are {text!r}; expected a month or a range from {BOOTSTRAP_MONTH + 1} to 12, for example 4-7: the "
            f"first champion is trained on January to March {YEAR}"
        )
    # The loop is a chain: a later month needs the months before it.
    return [f"{YEAR}-{month:02d}" for month in range(BOOTSTRAP_MONTH + 1, end + 1)]


def first_day(month: str) -> dt.date:
    """The first day of ``YYYY-MM``."""
    return dt.date.fromisoformat(f"{month}-01")


class MonthRunner:
    """Brings one Dag's monthly runs to their end, in order, none of them twice.

    :param client: logged-in client of the running Airflow
    :param dag_id: the Dag
    :param months: ``YYYY-MM``, in order
    :param on_update: called with every month's state whenever they were read
    :param check: raises when a service of the stack has ended
    :param timeout: seconds for all of it
    :param poll: seconds between two looks
    """

    def __init__(
        self,
        client: AirflowClient,
        dag_id: str,
        months: Sequence[str],
        *,
        on_update: Callable[[list[MonthState]], None],
        check: Callable[[], None],
        timeout: float,
        poll: float = 1.0,
    ) -> None:
        self._client = client
        self._dag_id = dag_id
        self._months = list(months)
        self._on_update = on_update
        self._check = check
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._poll = poll
        self._total = 0
        self._finished: dict[str, MonthState] = {}

    def run(self) -> list[str]:
        """Bring every month to its end; returns the months that an earlier start had already finished.

        :raises MonthFailedError: a run failed
        :raises InvalidInputError: Airflow does not know the Dag, or cannot import its file
        :raises ExternalSystemError: not done in time
        """
        self._wait_for_dag()
        self._total = len(self._client.task_ids(self._dag_id))
        kept = self._prepare()
        self._client.pause(self._dag_id, False)
        for month in self._runs():
            if month in self._months and month not in kept:
                self._follow(month)
        missing = [month for month in self._months if month not in self._finished]
        if missing:
            while self._client.backfill_active(self._dag_id):
                self._pause("Airflow has not yet completed an earlier backfill")
            self._client.backfill(self._dag_id, first_day(missing[0]), first_day(missing[-1]))
            for month in missing:
                self._follow(month)
        return kept

    def _wait_for_dag(self) -> None:
        while self._client.dag(self._dag_id) is None:
            errors = self._client.import_errors()
            if errors:
                text = "\n".join(f"{file}:\n{trace}" for file, trace in errors.items())
                raise InvalidInputError(f"Airflow cannot import the Dag files. Mend them and start again.\n{text}")
            self._pause(f"Airflow has not found the Dag {self._dag_id!r}; is it in the Dags folder?")

    def _prepare(self) -> list[str]:
        """Make what an earlier start left unfinished ready to go on; returns the months it had finished."""
        kept = []
        for month, run in self._runs().items():
            state = self._state(month, run)
            if month not in self._months:
                if run["state"] == "queued":
                    self._client.delete_run(self._dag_id, run["dag_run_id"])
            elif state.done:
                kept.append(month)
                self._finished[month] = state
            elif run["state"] in ("success", "failed"):
                # Only what failed and what comes after it: nothing that stands is done twice.
                broken = [task for task, task_state in state.tasks.items() if task_state not in ("success", "skipped")]
                self._client.clear(self._dag_id, run["dag_run_id"], broken)
        return kept

    def _follow(self, month: str) -> None:
        """Watch one month until its run is over."""
        while True:
            run = self._runs().get(month)
            state = self._state(month, run) if run else MonthState(month, "waiting", total=self._total)
            self._report(state)
            if run and run["state"] == "success" and not state.failed:
                self._finished[month] = state
                return
            if run and run["state"] in ("success", "failed"):
                # The next month must not begin on top of a broken one.
                self._client.pause(self._dag_id)
                raise MonthFailedError(self._explain(state, run["dag_run_id"]))
            self._pause(f"{month} is {state.state}; at work: {', '.join(state.running) or 'nothing'}")

    def _report(self, current: MonthState) -> None:
        states = {**self._finished, current.month: current}
        self._on_update([states.get(month, MonthState(month, "waiting", total=self._total)) for month in self._months])

    def _pause(self, doing: str) -> None:
        self._check()
        if time.monotonic() > self._deadline:
            raise ExternalSystemError(
                f"not finished after {self._timeout:.0f} s: {doing}. Give more time with --timeout, or see the logs."
            )
        time.sleep(self._poll)

    def _runs(self) -> dict[str, dict[str, Any]]:
        """Latest run by month, earliest month first."""
        runs = self._client.runs(self._dag_id)
        by_month = {run["data_interval_start"][:7]: run for run in runs if run.get("data_interval_start")}
        return dict(sorted(by_month.items()))

    def _state(self, month: str, run: Mapping[str, Any]) -> MonthState:
        instances = self._client.task_instances(self._dag_id, run["dag_run_id"])
        seconds = {ti["task_id"]: ti["duration"] for ti in instances if ti.get("duration") is not None}
        by_end = sorted(instances, key=lambda ti: ti["end_date"] or "9")
        tasks = {ti["task_id"]: ti["state"] for ti in by_end}
        return MonthState(month, run["state"], tasks, seconds, max(self._total, len(tasks)))

    def _explain(self, state: MonthState, run_id: str) -> str:
        instances = self._client.task_instances(self._dag_id, run_id)
        failed = sorted((ti for ti in instances if ti["state"] == "failed"), key=lambda ti: ti["end_date"] or "")
        if not failed:
            return f"the run of {state.month} failed, though none of its tasks did; see the scheduler's log"
        first = failed[0]
        lines = self._client.log(
            self._dag_id, run_id, first["task_id"], try_number=first["try_number"], map_index=first["map_index"]
        )
        end = "\n".join([line for line in lines if not line.startswith("::")][-_LOG_LINES:])
        return f"{state.month}: the task {first['task_id']} failed. The end of its log:\n{end}"
