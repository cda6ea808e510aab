"""How many distinct values a column has, estimated in one kilobyte, the same whatever the order they came in.

HyperLogLog (Flajolet et al., 2007) with the estimator of Ertl ("New cardinality estimation algorithms for
HyperLogLog sketches", 2017), which needs no correction by range. Standard error 3.3 %.
"""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_BITS = 10
_SIZE = 1 << _BITS
_MOST = 64 - _BITS + 1


@dataclass
class Distinct:
    """:param registers: the longest run of leading zeros, plus one, among the hashes of each of 1024 groups"""

    registers: np.ndarray = field(default_factory=lambda: np.zeros(_SIZE, np.uint8))

    def add(self, bits: np.ndarray) -> None:
        """Count values by their 64 ``bits`` (int64)."""
        mixed = _mix(bits.view(np.uint64))
        lowest = int(self.registers.min())
        if lowest:
            # Only hashes with at least as many zeros as the poorest group has can raise a register.
            mixed = mixed[mixed < np.uint64(1 << (64 - lowest))]
        if len(mixed):
            ranks = np.minimum(65 - np.frexp(mixed.astype(np.float64))[1], _MOST).astype(np.uint8)
            groups = (mixed ^ (mixed >> np.uint64(31))) & np.uint64(_SIZE - 1)
            np.maximum.at(self.registers, groups.astype(np.int64), ranks)

    def merge(self, other: Distinct) -> None:
        """Add the values of ``other``."""
        np.maximum(self.registers, other.registers, out=self.registers)

    def estimate(self) -> int:
        """The number of distinct values."""
        counts = np.bincount(self.registers, minlength=_MOST + 1).tolist()
        if counts[0] == _SIZE:
            return 0
        z = _SIZE * _tau(1 - counts[_MOST] / _SIZE)
        for rank in range(_MOST - 1, 0, -1):
            z = 0.5 * (z + counts[rank])
        z += _SIZE * _sigma(counts[0] / _SIZE)
        return round(_SIZE * _SIZE / (2 * math.log(2) * z))

    def to_json(self) -> str:
        """The registers, compressed."""
        return base64.b64encode(zlib.compress(self.registers.tobytes(), 9)).decode()

    @classmethod
    def from_json(cls, value: Any) -> Distinct:
        """The inverse of :meth:`to_json`; :class:`ValueError` when the content is not a sketch."""
        decoder = zlib.decompressobj()
        try:
            raw = decoder.decompress(base64.b64decode(value, validate=True), _SIZE + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        registers = np.frombuffer(raw, np.uint8).copy()
        if len(registers) != _SIZE or not decoder.eof or (registers > _MOST).any():
            raise ValueError("the sketch of distinct values has another size than it should")
        return cls(registers)


def _mix(bits: np.ndarray) -> np.ndarray:
    """The first rounds of SplitMix64's finaliser (Steele et al., 2014); the last is done where low bits are used."""
    mixed = bits >> np.uint64(30)
    np.bitwise_xor(mixed, bits, out=mixed)
    np.multiply(mixed, np.uint64(0xBF58476D1CE4E5B9), out=mixed)
    np.bitwise_xor(mixed, mixed >> np.uint64(27), out=mixed)
    return np.multiply(mixed, np.uint64(0x94D049BB133111EB), out=mixed)


def _sigma(x: float) -> float:
    power, z, before = 1.0, x, -1.0
    while z != before:
        x, before = x * x, z
        z += x * power
        power += power
    return z


def _tau(x: float) -> float:
    if x in (0.0, 1.0):
        return 0.0
    power, z, before = 1.0, 1 - x, -1.0
    while z != before:
        x, before = math.sqrt(x), z
        power *= 0.5
        z -= (1 - x) ** 2 * power
    return z / 3
