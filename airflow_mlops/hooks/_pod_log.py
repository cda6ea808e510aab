"""Places in the logs of pods, so that a cut connection, or a pod that was replaced, is taken up where it broke."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.hooks._kubernetes import Lines

#: Of so many driver's lines it is known which they were, and with so many digits.
_RECENT, _DIGITS = 128, 6
#: How Ray begins a driver's log; what comes before it in a submitter's log are the submitter's own words.
_BEGIN = "Running entrypoint for job "


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


class DriverLog:
    """A driver's log, out of the logs of its submitters: each of these tells it from its start.

    What a submitter says before the driver's log is passed on once. What it says afterwards, for example why it ends,
    cannot be told from the driver's lines and is passed on with them. Where its successor goes on is found by the
    number of lines that were passed on, and by what the last 128 were: so up to 128 lines of last words hide none of
    the driver's. Those of a submitter that ends while it still repeats can make as many lines come twice.

    :param place: what :meth:`place` has returned, None for the start
    :ivar pod: the submitter whose log was read last, None before
    """

    def __init__(self, place: str | None) -> None:
        # Of an earlier release a place has no more than its first two parts.
        pod, cursor, count, recent = [*(place or "").split(" "), "", "", "", ""][:4]
        try:
            self._count = int(count or 0)
        except ValueError as error:
            raise InvalidInputError(
                f"{place!r} is no place in a driver's log; expected that of an earlier line"
            ) from error
        self.pod, self._cursor = pod or None, cursor
        self._recent = deque(
            (recent[start : start + _DIGITS] for start in range(0, len(recent), _DIGITS)), maxlen=_RECENT
        )
        # The next line's number in the log of this pod, None before the driver's first.
        self._next = self._count or None

    def since(self, pod: str) -> str:
        """The place from which the log of this submitter is to be read."""
        if pod != self.pod:
            self.pod, self._cursor, self._next = pod, "", None
        return self._cursor

    def is_new(self, line: LogLine) -> bool:
        """Whether this line of the submitter's log was not passed on yet; it is from here on."""
        self._cursor = str(line.cursor)
        if self._next is None:
            if not line.text.startswith(_BEGIN):
                return not self._count
            self._next = 0
        mark = hashlib.blake2b(line.text.encode(), digest_size=_DIGITS // 2).hexdigest()
        if back := self._count - self._next:
            if back > len(self._recent) or self._recent[-back] == mark:
                self._next += 1
                return False
            # These were another submitter's last words.
            for _ in range(back):
                self._recent.pop()
        self._recent.append(mark)
        self._next += 1
        self._count = self._next
        return True

    @property
    def place(self) -> str:
        """The place after the last line that was new."""
        return f"{self.pod} {self._cursor} {self._count} {''.join(self._recent)}"


def _second(stamp: str) -> int:
    try:
        # Nanoseconds are more than Python reads, and the zone comes after them.
        zone = stamp[19:].lstrip(".0123456789") or "Z"
        return int(datetime.fromisoformat(stamp[:19] + zone).timestamp())
    except ValueError:
        return 0
