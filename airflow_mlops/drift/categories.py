"""Counts of categories in bounded memory, the same whatever the order they came in.

Up to ``CAPACITY`` distinct values are counted by name. Beyond that, two summaries by a hash of the name: counts
over ``BUCKETS`` hash buckets (a distance between bucket counts is a lower bound of the distance between the
categories' own), and exact counts of the ``SAMPLE`` categories with the smallest hashes. The second sample is
coordinated: two profiles keep the same categories where both have them, which shows new and vanished ones
(Cohen, "Coordinated Sampling", 2014), and its largest hash estimates the number of distinct values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

CAPACITY = 1000
BUCKETS = 256
SAMPLE = 128
_SPAN = 1 << 64


def _hashes(names: Iterable[bytes]) -> np.ndarray:
    """Hashes of UTF-8 ``names``, uint64."""
    # A copy of a fresh state costs less than to make one.
    fresh, digests = blake2b(digest_size=8).copy, []
    for name in names:
        state = fresh()
        state.update(name)
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


@dataclass
class Categories:
    """Counts by name while there are few, by hash bucket and for a sample of hashes when there are many.

    :param names: category to count; empty once hashed
    :param buckets: bucket to count; empty while counted by name
    :param sample: hash to count of the categories with the smallest hashes; empty while counted by name
    """

    names: dict[str, int] = field(default_factory=dict)
    buckets: dict[int, int] = field(default_factory=dict)
    sample: dict[int, int] = field(default_factory=dict)

    @property
    def hashed(self) -> bool:
        """Whether there were too many categories to keep their names."""
        return bool(self.buckets)

    @property
    def total(self) -> int:
        """Number of values counted."""
        return sum(self.names.values()) + sum(self.buckets.values())

    def distinct(self) -> int:
        """Number of distinct categories, estimated with about 9 % error once hashed."""
        if not self.hashed:
            return len(self.names)
        return max(CAPACITY + 1, round((len(self.sample) - 1) / (max(self.sample) / _SPAN)))

    def add(self, counts: Iterable[tuple[str, int]]) -> None:
        """Count pairs of category and number of values."""
        if self.hashed:
            self._add_pairs(counts)
            return
        for name, count in counts:
            self.names[name] = self.names.get(name, 0) + count
        if len(self.names) > CAPACITY:
            self._hash_names()

    def add_many(self, names: Sequence[bytes], counts: np.ndarray | None = None) -> None:
        """Count more than :data:`CAPACITY` distinct UTF-8 ``names``, or whatever there is once hashed.

        :param counts: of each name; one when not given
        """
        self._hash_names()
        self._add_hashes(_hashes(names), counts)

    def merge(self, other: Categories) -> None:
        """Add the counts of ``other``."""
        if other.hashed:
            self._hash_names()
            self._add_counts(other.buckets, other.sample)
        else:
            self.add(other.names.items())

    def as_hashed(self) -> Categories:
        """The same counts by hash, to compare with a profile that had too many names."""
        if self.hashed:
            return self
        copy = Categories()
        copy._add_pairs(self.names.items())
        return copy

    def _hash_names(self) -> None:
        names, self.names = self.names, {}
        self._add_pairs(names.items())

    def _add_pairs(self, pairs: Iterable[tuple[str, int]]) -> None:
        given = list(pairs)
        if given:
            names = [name.encode("utf-8", "surrogatepass") for name, _ in given]
            self._add_hashes(_hashes(names), np.array([count for _, count in given], np.int64))

    def _add_hashes(self, hashes: np.ndarray, counts: np.ndarray | None) -> None:
        inside = (hashes % np.uint64(BUCKETS)).astype(np.int64)
        # Exact: the sums of these floats are whole numbers below 2**53.
        sums = np.bincount(inside, counts, BUCKETS).astype(np.int64)
        buckets = {bucket: int(sums[bucket]) for bucket in np.flatnonzero(sums).tolist()}
        if len(self.sample) >= SAMPLE:
            near = hashes <= np.uint64(max(self.sample))
            hashes, counts = hashes[near], None if counts is None else counts[near]
        smallest, groups = np.unique(hashes, return_inverse=True)
        totals = np.bincount(groups, counts).astype(np.int64)
        self._add_counts(buckets, dict(zip(smallest[:SAMPLE].tolist(), totals[:SAMPLE].tolist())))

    def _add_counts(self, buckets: dict[int, int], sample: dict[int, int]) -> None:
        for key, count in buckets.items():
            self.buckets[key] = self.buckets.get(key, 0) + count
        for key, count in sample.items():
            self.sample[key] = self.sample.get(key, 0) + count
        # The limit only falls, so a hash that stays was there from its first value on: its count is exact.
        self.sample = {key: self.sample[key] for key in sorted(self.sample)[:SAMPLE]}

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON."""
        if not self.hashed:
            return {"names": dict(sorted(self.names.items()))}
        return {
            "buckets": [self.buckets.get(i, 0) for i in range(BUCKETS)],
            "sample": {f"{key:016x}": count for key, count in sorted(self.sample.items())},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Categories:
        """The inverse of :meth:`to_json`; :class:`ValueError` when the content is not a set of counts."""
        if "names" in value:
            names = {str(name): int(count) for name, count in value["names"].items()}
            if len(names) > CAPACITY or any(count <= 0 for count in names.values()):
                raise ValueError("the counts of categories are out of range")
            return cls(names)
        if len(value["buckets"]) != BUCKETS or not 0 < len(value["sample"]) <= SAMPLE:
            raise ValueError("the hashed categories have another size than they should")
        return cls(
            {},
            {i: int(count) for i, count in enumerate(value["buckets"]) if count},
            {int(key, 16): int(count) for key, count in value["sample"].items()},
        )
