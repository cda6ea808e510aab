"""Shows how far each month has come: one live line per month on a terminal, else one line per finished step."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from airflow_mlops.embedded.months import MonthState

_BAR_WIDTH = 24
_COLOURS = {"success": "green", "failed": "red", "running": "cyan", "queued": "cyan"}


def short(task_id: str) -> str:
    """A task's name without its task groups."""
    return task_id.rpartition(".")[2]


class Progress:
    """Context manager; :meth:`update` takes the months' states as they are read.

    :param stream: where to write; a terminal gets live lines
    """

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._live: Live | None = None
        self._begin: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._told: set[tuple[str, str]] = set()
        if stream.isatty():
            self._live = Live(console=Console(file=stream), refresh_per_second=4, transient=False)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, states: Sequence[MonthState]) -> None:
        """Show ``states``."""
        now = time.monotonic()
        for state in states:
            if state.tasks and state.month not in self._took:
                self._begin.setdefault(state.month, now)
                if state.state in ("success", "failed"):
                    self._took[state.month] = now - self._begin[state.month]
        if self._live is not None:
            self._live.update(Text("\n").join(self._line(state, now) for state in states))
        else:
            for state in states:
                self._tell(state)

    def _line(self, state: MonthState, now: float) -> Text:
        ended, total = len(state.ended), state.total or 1
        filled = min(_BAR_WIDTH, round(_BAR_WIDTH * ended / total))
        line = Text(f"{state.month}  ")
        line.append("█" * filled, style=_COLOURS.get("failed" if state.failed else state.state, ""))
        line.append("░" * (_BAR_WIDTH - filled), style="dim")
        line.append(f" {ended:2d}/{total:<2d} ")
        begin = self._begin.get(state.month)
        if begin is not None:
            seconds = self._took.get(state.month, now - begin)
            line.append(f"{int(seconds) // 60:2d}:{int(seconds) % 60:02d}  ")
        line.append(self._doing(state))
        return line

    @staticmethod
    def _doing(state: MonthState) -> str:
        if state.failed:
            return "failed: " + ", ".join(short(task) for task in state.failed[:3])
        if state.state == "success":
            return "done"
        return ", ".join(short(task) for task in state.running) or state.state

    def _tell(self, state: MonthState) -> None:
        for number, task in enumerate(state.ended, 1):
            if (state.month, task) in self._told:
                continue
            self._told.add((state.month, task))
            seconds = f" {state.seconds[task]:.1f} s" if task in state.seconds else ""
            print(
                f"{state.month} [{number:2d}/{state.total}] {task}: {state.tasks[task]}{seconds}",
                file=self._stream,
                flush=True,
            )
