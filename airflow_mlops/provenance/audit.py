"""An append-only log of decisions: numbered entries, each holding the hash of the one before it.

The chain is Haber's and Stornetta's (How to time-stamp a digital document, 1991), one link an entry. An entry's number
is taken by a conditional write, so of two writers one goes on to the next number, and an entry is there whole and
linked, or not at all. A chain alone cannot show that its end was cut off, or that all of it was written anew: for that
keep the hash of an entry elsewhere (:attr:`ModelRecord.audit`) and give it to :func:`verify`, or keep the log in a
bucket with Object Lock.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from airflow_mlops import storage
from airflow_mlops.exceptions import ConcurrentChangeError, DataError
from airflow_mlops.provenance._audit_store import AuditStore, store_of
from airflow_mlops.provenance.record import plain

#: What the first entry has as the hash before it.
GENESIS = "0" * 64
_ENTRIES, _KEYS, _HEAD = "entries", "keys", "head.json"
_NAME = re.compile(r"^\d{12}\.json$")
_TRIES = 1000


@dataclass(frozen=True)
class Entry:
    """One decision on record.

    :param number: place in the log, from 1
    :param time: ISO 8601, UTC
    :param kind: what was decided: ``gate``, ``register``, ``promote``, ...
    :param key: identity of the decision; the same again is not logged twice
    :param body: the decision
    :param previous: hash of the entry before it
    """

    number: int
    time: str
    kind: str
    key: str
    body: Mapping[str, Any]
    previous: str

    @property
    def sha256(self) -> str:
        """Hash of all of it, the link before it included."""
        return hashlib.sha256(_canonical(vars(self))).hexdigest()

    def to_bytes(self) -> bytes:
        """As it is stored: one line of JSON, keys sorted, with its own hash."""
        return _canonical({**vars(self), "sha256": self.sha256})

    @classmethod
    def from_bytes(cls, content: bytes) -> tuple[Entry, str]:
        """The entry and the hash that is stored with it, which may be wrong.

        :raises ValueError: it is no entry, or holds what no entry can: NaN, half a surrogate pair
        """
        try:
            value = json.loads(content)
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
            digest = str(value.pop("sha256", ""))
            entry = cls(**value)
            entry.to_bytes()  # Python reads JSON that it would not write
        except (TypeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        return entry, digest

    def to_anchor(self) -> dict[str, Any]:
        """``number`` and ``sha256``, to keep elsewhere."""
        return {"number": self.number, "sha256": self.sha256}


@dataclass(frozen=True)
class Break:
    """The first place where a log is not what was written.

    :param number: of the entry
    :param uri: where it lies, or should
    :param problem: ``missing``, ``unreadable``, ``misplaced``, ``changed``, ``unlinked``, ``rewritten``, ``truncated``,
        or ``tampered`` (the bucket remembers it)
    :param detail: in words
    """

    number: int
    uri: str
    problem: str
    detail: str

    def __str__(self) -> str:
        return f"entry {self.number} ({self.uri}): {self.problem}: {self.detail}"


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    :param entries: how many links hold, from the first
    :param head: hash of the last of them, :data:`GENESIS` of an empty log
    :param broken: the first that does not hold, None if all do
    """

    entries: int
    head: str
    broken: Break | None

    @property
    def intact(self) -> bool:
        """Whether every link holds."""
        return self.broken is None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "intact": self.intact,
            "entries": self.entries,
            "head": self.head,
            "broken": None if self.broken is None else vars(self.broken),
        }


class AuditLog:
    """The log at ``uri``.

    :param uri: a folder, or ``s3://bucket/prefix`` with boto3's own settings
    :param retain_days: on S3: days that Object Lock keeps an entry; 0 for the bucket's default
    :param clock: what time it is
    """

    def __init__(
        self,
        uri: str,
        *,
        retain_days: int = 0,
        clock: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.timezone.utc),
    ) -> None:
        self.uri = uri.rstrip("/")
        self._store: AuditStore = store_of(self.uri, retain_days)
        self._clock = clock

    def append(self, kind: str, key: str, body: Mapping[str, Any]) -> Entry:
        """Log a decision once: with the same key again, also from two writers at once, the first entry is returned.

        :raises ConcurrentChangeError: other writers took every number that was tried
        :raises ExternalSystemError: the store cannot be reached; nothing was logged
        """
        newest = self._newest()
        claim = f"{_KEYS}/{hashlib.sha256(key.encode()).hexdigest()}.json"
        seen = newest.number if newest else 0
        if not self._store.create(claim, _canonical({"after": seen, "key": key})):
            # Somebody began to log this decision; where it is logged, it is after what they had seen.
            claimed = self._store.read(claim)
            seen = int(json.loads(claimed)["after"]) if claimed else 0
        for _ in range(_TRIES):
            # An entry is written only after all before it were looked at, so no decision is there twice.
            for entry in self._from(seen + 1):
                newest, seen = entry, entry.number
                if entry.key == key:
                    self._point_to(entry)
                    return entry
            now = self._clock().astimezone(dt.timezone.utc).isoformat()
            previous = newest.sha256 if newest and newest.number == seen else self._hash_of(seen)
            made = Entry(seen + 1, now, kind, key, plain(body), previous)
            if self._store.create(_name(made.number), made.to_bytes()):
                self._point_to(made)
                return made
        raise ConcurrentChangeError(
            f"{_TRIES} times another writer was first at {self.uri}; clear this task to try again"
        )

    def entries(self) -> Iterator[Entry]:
        """Every entry from the first to the last before a gap, unverified."""
        yield from self._from(1)

    def _from(self, number: int) -> Iterator[Entry]:
        while (content := self._store.read(_name(number))) is not None:
            yield self._entry(number, content)
            number += 1

    def _entry(self, number: int, content: bytes) -> Entry:
        try:
            return Entry.from_bytes(content)[0]
        except ValueError as error:
            raise DataError(
                f"entry {number} of the log at {self.uri} cannot be read ({error}); verify the log before anything is "
                "added to it"
            ) from error

    def _hash_of(self, number: int) -> str:
        if number == 0:
            return GENESIS
        content = self._store.read(_name(number))
        if content is None:
            raise ConcurrentChangeError(
                f"entry {number} of {self.uri} was there and is gone; verify the log before anything is added to it"
            )
        return self._entry(number, content).sha256

    def _newest(self) -> Entry | None:
        """The last entry: from where the pointer says, which a writer that died leaves behind, forward."""
        hint = _number(self._store.read(_HEAD))
        if hint == 0:
            numbers = self._numbers()
            hint = numbers[-1] if numbers else 0
        last = None
        for entry in self._from(max(hint, 1)):
            last = entry
        if last is None and hint:
            raise ConcurrentChangeError(
                f"the log at {self.uri} had an entry {hint}, and it is gone; verify the log before anything is added "
                "to it"
            )
        return last

    def _point_to(self, entry: Entry) -> None:
        if _number(self._store.read(_HEAD)) < entry.number:
            self._store.replace(_HEAD, _canonical(entry.to_anchor()))

    def _numbers(self) -> list[int]:
        return [int(name[:12]) for name in self._store.names(_ENTRIES) if _NAME.match(name)]

    # --- verification ---------------------------------------------------------------------------------------

    def verify(self, anchors: Iterable[Mapping[str, Any]] = ()) -> Verification:
        """Follow the chain from its first entry; name the first link that does not hold.

        :param anchors: ``number`` and ``sha256`` of entries, kept elsewhere; of several for one number each must hold
        """
        # Both may be ahead of the entries only where some were removed.
        told = _pointed(self._store.read(_HEAD))
        for anchor in anchors:
            told.setdefault(int(anchor["number"]), set()).add(str(anchor["sha256"]))
        marks = self._store.tampered(_ENTRIES)
        newest = max(self._numbers(), default=0)
        last = max([newest, *told])
        before = GENESIS
        for number in range(1, last + 1):
            found = self._check(number, before, told.get(number, set()), marks, newest)
            if isinstance(found, Break):
                return Verification(number - 1, before, found)
            before = found
        return Verification(last, before, None)

    def _check(self, number: int, before: str, anchors: set[str], marks: Mapping[str, str], newest: int) -> Break | str:
        """The hash of entry ``number``, or what is wrong with it."""
        name = _name(number)

        def broken(problem: str, detail: str) -> Break:
            return Break(number, storage.join(self.uri, name), problem, detail)

        if mark := marks.get(name.rsplit("/", 1)[-1]):
            return broken("tampered", f"it {mark}")
        content = self._store.read(name)
        if content is None and number > newest:
            return broken("truncated", f"the log ends with entry {newest}, and it is known to have had this one")
        if content is None:
            return broken("missing", f"there is none, though the log goes on to entry {newest}")
        try:
            entry, digest = Entry.from_bytes(content)
        except ValueError as error:
            return broken("unreadable", str(error))
        if entry.number != number:
            return broken("misplaced", f"what lies there is entry {entry.number}")
        if digest != entry.sha256 or content != entry.to_bytes():
            return broken("changed", f"its content has the hash {entry.sha256}, and it says {digest or 'none'}")
        if entry.previous != before:
            return broken(
                "unlinked",
                f"it follows an entry with the hash {entry.previous}, and the one before it has {before}: this one or "
                f"entry {number - 1} was written anew",
            )
        if others := sorted(anchors - {digest}):
            return broken("rewritten", f"its hash was {', '.join(others)} and is {digest}: the log was written anew")
        return digest


def verify(uri: str, anchors: Iterable[Mapping[str, Any]] = ()) -> Verification:
    """Verify the log at ``uri``; see :meth:`AuditLog.verify`."""
    return AuditLog(uri).verify(anchors)


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _name(number: int) -> str:
    return f"{_ENTRIES}/{number:012d}.json"


def _pointed(pointer: bytes | None) -> dict[int, set[str]]:
    """The number that the pointer names, and the hash if it names one: an entry of that number was there."""
    number = _number(pointer)
    if pointer is None or number == 0:
        return {}
    digest = json.loads(pointer).get("sha256")
    return {number: set() if digest is None else {str(digest)}}


def _number(pointer: bytes | None) -> int:
    """The number that the pointer names; 0 where there is none, or it is damaged: it is only a hint."""
    if pointer is None:
        return 0
    try:
        return int(json.loads(pointer)["number"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return 0
