"""Places in the log of a pod, so that a cut connection is taken up where it broke."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks._kubernetes import Lines


@dataclass(frozen=True)
class LogCursor:
    """A place in a pod's log: after ``count`` lines written at ``second`` or later.

    The server can only be asked for lines since a whole second, and gives them in the order of the file: counting
    them finds the place again, whatever their time stamps are.
    """

    second: int = 0
    count: int = 0

    @classmethod
    def parse(cls, text: str | None) -> LogCursor:
        """The cursor behind ``str(cursor)``; the log's beginning for nothing."""
        if not text:
            return cls()
        try:
            second, count = text.split("#")
            return cls(int(second), int(count))
        except ValueError as error:
            raise InvalidInputError(f"{text!r} is no place in a log; expected the cursor of an earlier line") from error

    def __str__(self) -> str:
        return f"{self.second}#{self.count}"

    @property
    def query(self) -> dict[str, str]:
        """Query of the request for what comes after, and for the :attr:`count` lines before it."""
        since = {"sinceTime": datetime.fromtimestamp(self.second, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")}
        return {"timestamps": "true", **(since if self.second else {})}

    def after(self, stamp: str) -> LogCursor:
        """The place after one more line with this time stamp."""
        second = _second(stamp)
        return (
            LogCursor(second, 1) if second > self.second else replace(self, count=self.count + (second == self.second))
        )


@dataclass(frozen=True)
class LogLine:
    """One line of a pod's log, and the place after it."""

    cursor: LogCursor
    text: str


class LogReader:
    """Turns the lines of one connection into those that were not read before.

    :param cursor: where the last connection ended
    """

    def __init__(self, cursor: LogCursor) -> None:
        self.cursor, self._known, self._lines = cursor, cursor.count, Lines()

    def feed(self, chunk: bytes) -> Iterator[LogLine]:
        """The new lines that ``chunk`` completes; an unfinished one is read again on the next connection."""
        for line in self._lines.feed(chunk):
            stamp, _, text = line.decode("utf-8", errors="replace").partition(" ")
            if self._known:
                self._known -= 1
                continue
            self.cursor = self.cursor.after(stamp)
            yield LogLine(self.cursor, text.rstrip("\r"))


def _second(stamp: str) -> int:
    try:
        # Nanoseconds are more than Python reads, and the zone comes after them.
        zone = stamp[19:].lstrip(".0123456789") or "Z"
        return int(datetime.fromisoformat(stamp[:19] + zone).timestamp())
    except ValueError:
        return 0
