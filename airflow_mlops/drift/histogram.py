"""A mergeable histogram of floats whose bins nobody has to choose.

A float64 read as a 64-bit integer keeps its order, and dropping low bits of that integer rounds the number to
fewer significant digits. The histogram counts values by these shortened keys and drops one more bit whenever
there are more than ``CAPACITY`` distinct keys. The number of bits dropped is then the smallest that suits the
*whole* data, whatever the order it came in, so that profiles merge to the same bits in any order; randomised
quantile sketches (KLL, whose seed the ``datasketches`` library does not expose) do not. A column with few
distinct values is held exactly. Two histograms share a grid, so their distribution functions are exact at every
bin edge.

:class:`Bins` counts quickly: a window of short keys held densely, everything outside it as pairs of key and count.

Limit: bins are equally wide on a logarithmic scale, so a bulk far from zero *and* outliers over many orders of
magnitude on both sides leave few bins for the bulk.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

CAPACITY = 1024
_FIRST = 4096
_SLOTS = 4096
_FLIP = np.int64(0x7FFFFFFFFFFFFFFF)


def to_keys(values: np.ndarray) -> np.ndarray:
    """Finite float64 ``values`` as int64 in the same order; both zeros are one key."""
    bits = (values + 0.0).view(np.int64)
    return bits ^ ((bits >> 63) & _FLIP)


def from_keys(keys: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_keys`."""
    return (keys ^ ((keys >> 63) & _FLIP)).view(np.float64)


def _count(keys: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    counted = pc.value_counts(pa.array(keys >> shift))
    return counted.field("values").to_numpy(), counted.field("counts").to_numpy()


def _group(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum ``counts`` over equal ``keys``, keys sorted."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    return keys[first], np.add.reduceat(counts, first)


def _bits_to_drop(keys: np.ndarray) -> int:
    """The smallest number of low bits after which the sorted, distinct ``keys`` fit the capacity."""
    low, high = 0, 64
    while low < high:
        middle = (low + high) // 2
        short = keys >> min(middle, 63)
        if 1 + np.count_nonzero(short[1:] != short[:-1]) <= CAPACITY:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass
class Histogram:
    """Counts of finite values by the leading bits of their binary form.

    :param shift: low bits dropped from every key, 0 while all distinct values are held exactly
    :param keys: sorted distinct keys, int64
    :param counts: number of values of each key, int64
    """

    shift: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray) -> None:
        """Count finite float64 ``values``."""
        if len(values):
            self.absorb(*_count(to_keys(values), self.shift), self.shift)

    def merge(self, other: Histogram) -> None:
        """Add the counts of ``other``."""
        if len(other.keys):
            self.absorb(other.keys, other.counts, other.shift)

    def absorb(self, keys: np.ndarray, counts: np.ndarray, shift: int) -> None:
        """Add ``counts`` of values by their ``keys``, of which ``shift`` bits were dropped."""
        common = max(self.shift, shift)
        keys, counts = _group(
            np.concatenate([self.keys >> (common - self.shift), keys >> (common - shift)]),
            np.concatenate([self.counts, counts]),
        )
        extra = _bits_to_drop(keys)
        if extra:
            keys, counts = _group(keys >> extra, counts)
        self.shift, self.keys, self.counts = common + extra, keys, counts

    def coarser(self, shift: int) -> Histogram:
        """The same counts with ``shift`` bits dropped, ``shift`` at least this histogram's own."""
        if shift == self.shift or not len(self.keys):
            return Histogram(shift, self.keys, self.counts)
        return Histogram(shift, *_group(self.keys >> (shift - self.shift), self.counts))

    def quantiles(self, ranks: np.ndarray, minimum: float, maximum: float) -> np.ndarray:
        """Values at ``ranks`` in [0, 1], uniform inside a bin, within the data's true minimum and maximum."""
        low, high = edges(self.keys, self.shift, minimum, maximum)
        cumulative = np.cumsum(self.counts)
        wanted = np.asarray(ranks) * cumulative[-1]
        index = np.minimum(np.searchsorted(cumulative, wanted, side="left"), len(self.keys) - 1)
        inside = (wanted - (cumulative[index] - self.counts[index])) / self.counts[index]
        return low[index] + np.clip(inside, 0, 1) * (high[index] - low[index])

    def to_json(self) -> dict[str, Any]:
        """The histogram as JSON, numbers compressed."""
        columns = np.stack([np.diff(self.keys, prepend=np.int64(0)), self.counts]).astype("<i8")
        planes = np.frombuffer(columns.tobytes(), np.uint8).reshape(-1, 8).T  # equal bytes together compress well
        return {
            "shift": self.shift,
            "bins": base64.b64encode(zlib.compress(np.ascontiguousarray(planes).tobytes(), 9)).decode(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Histogram:
        """The inverse of :meth:`to_json`; :class:`ValueError` when the content is not a histogram."""
        limit = 2 * 8 * CAPACITY
        decoder = zlib.decompressobj()
        try:
            raw = decoder.decompress(base64.b64decode(value["bins"], validate=True), limit + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if len(raw) > limit or len(raw) % 16 or not decoder.eof:
            raise ValueError("the histogram has another size than it should")
        planes = np.frombuffer(raw, np.uint8).reshape(8, -1).T
        columns = np.frombuffer(np.ascontiguousarray(planes).tobytes(), "<i8").astype(np.int64).reshape(2, -1)
        shift, keys, counts = int(value["shift"]), np.cumsum(columns[0]), columns[1]
        if not 0 <= shift <= 63 or (counts <= 0).any() or (keys[1:] <= keys[:-1]).any():
            raise ValueError("the histogram's bins are not in order")
        return cls(shift, keys, counts)


class Bins:
    """A histogram under construction.

    Keys of one sign are in the order of their magnitudes, so that counts of the largest magnitudes, where nearly all
    values are, fit an array of either sign; the few smaller ones are counted one by one.
    """

    def __init__(self) -> None:
        self._histogram = Histogram()
        self._counts = np.zeros(0, np.int64)
        self._shift = self._floor = self._zeros = 0

    def add(self, bits: np.ndarray, lowest: float, highest: float) -> None:
        """Count values by the ``bits`` (int64) of their floats, zeros positive, between ``lowest`` and ``highest``."""
        if lowest <= 0 <= highest and (zeros := len(bits) - int(np.count_nonzero(bits))):
            # Often many, and far below all others.
            self._zeros += zeros
            bits = bits[bits != 0]
        if not len(self._histogram.keys):
            # The first values settle most of the shift: what follows is not counted at full resolution.
            self._one_by_one(bits[:_FIRST])
            bits = bits[_FIRST:]
        if self._histogram.shift:
            self._in_array(bits, lowest < 0, max(-lowest, highest))
        else:
            self._one_by_one(bits)

    def add_counts(self, values: np.ndarray, counts: np.ndarray) -> None:
        """Add ``counts`` of distinct ``values``."""
        self._histogram.absorb(to_keys(values), counts, 0)

    def finish(self) -> Histogram:
        """The histogram of all that was added."""
        used = np.flatnonzero(self._counts)
        if len(used):
            size = len(self._counts) // 2
            magnitudes = self._floor - 1 + used % size
            keys = np.where(used < size, magnitudes, ~magnitudes)
            self._histogram.absorb(keys, self._counts[used], self._shift)
        self._counts = np.zeros(0, np.int64)
        if self._zeros:
            self._histogram.absorb(np.zeros(1, np.int64), np.array([self._zeros]), 0)
            self._zeros = 0
        return self._histogram

    def _one_by_one(self, bits: np.ndarray) -> None:
        if not len(bits):
            return
        keys = bits ^ ((bits >> 63) & _FLIP)
        self._histogram.absorb(*_count(keys, self._histogram.shift), self._histogram.shift)

    def _in_array(self, bits: np.ndarray, signed: bool, largest: float) -> None:
        top = int(np.float64(largest).view(np.int64))
        if not len(self._counts) or top >> self._shift >= self._floor + _SLOTS:
            self.finish()
            self._shift = self._histogram.shift
            # An eighth of the array is left for larger values to come.
            self._floor = max((top >> self._shift) - _SLOTS * 7 // 8, 0)
            self._counts = np.zeros(2 * (_SLOTS + 1), np.int64)
        # Slot 0 of either sign is for what lies below the array.
        slots = (bits & _FLIP) >> self._shift if signed else bits >> self._shift
        np.subtract(slots, self._floor - 1, out=slots)
        np.maximum(slots, 0, out=slots)
        if signed:
            np.add(slots, (bits >> 63) & (_SLOTS + 1), out=slots)
        counts = np.bincount(slots, minlength=len(self._counts) if signed else _SLOTS + 1)
        below = int(counts[0]) + (int(counts[_SLOTS + 1]) if signed else 0)
        counts[0] = 0
        if signed:
            counts[_SLOTS + 1] = 0
        self._counts[: len(counts)] += counts
        if below:
            self._one_by_one(bits[(bits & _FLIP) >> self._shift < self._floor])
            if below > len(bits) // 4:
                self.finish()


def edges(keys: np.ndarray, shift: int, minimum: float, maximum: float) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper edge of each bin, clipped to the range of the data."""
    low = from_keys(keys << shift)
    # The last key of a bin, not the first of the next: the next one can be infinite or overflow.
    high = from_keys((keys << shift) | np.int64((1 << shift) - 1)) if shift else low
    with np.errstate(invalid="ignore"):
        low, high = np.nan_to_num(low, nan=minimum), np.nan_to_num(high, nan=maximum)
    return np.clip(low, minimum, maximum), np.clip(high, minimum, maximum)
