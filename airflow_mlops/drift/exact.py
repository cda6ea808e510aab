"""Sums of floats and of their squares without rounding, so that no order and no grouping can change them.

The floats are split into parts on grids so coarse that sums of the parts, and of products of two parts, stay exact in
float64 ("error-free vector transformation": Rump, Ogita, Oishi, "Accurate Floating-Point Summation", 2008).
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

#: Most values summed at once; as float64 they fit a processor's cache.
SLICE = 1 << 15
# 2**15 products of two such parts fill the 53 bits of a float64.
_PART_BITS = 19
# Products of parts of numbers so far apart neither overflow nor underflow.
_SPAN = 2.0**-400
_USUAL = 100
# Whole multiples of 2**-_SCALE: every sum of such products.
_SCALE = 1300
_BLOCK = 1 << 13


def sums(values: np.ndarray) -> tuple[Fraction, Fraction]:
    """The exact sum, and the exact sum of the squares, of at most :data:`SLICE` finite float64 ``values``."""
    highest = _magnitude(values)
    if not highest:
        return Fraction(0), Fraction(0)
    total, squares = Fraction(0), Fraction(0)
    exponent = math.frexp(highest)[1]
    sizes = np.abs(values)
    if float(sizes.min()) < highest * _SPAN:
        far = (sizes < highest * _SPAN) & (sizes > 0)
        if far.any():
            total, squares = _one_by_one(values[far])
            values = values[~far]
    if abs(exponent) > _USUAL:
        values, highest = np.ldexp(values, -exponent), math.ldexp(highest, -exponent)
    else:
        exponent = 0
    parts = _split(values, highest)
    first = second = 0
    for i, part in enumerate(parts):
        first += _scaled(float(part.sum()))
        second += _scaled(_dot(part, part)) + 2 * sum(_scaled(_dot(part, other)) for other in parts[:i])
    scale = Fraction(2) ** (exponent - _SCALE), Fraction(2) ** (2 * exponent - _SCALE)
    return total + first * scale[0], squares + second * scale[1]


def _scaled(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()
    return numerator << (_SCALE + 1 - denominator.bit_length())


def _dot(first: np.ndarray, second: np.ndarray) -> float:
    # In blocks so short that the linear algebra library starts no threads for them.
    whole = len(first) // _BLOCK * _BLOCK
    blocks = np.vecdot(first[:whole].reshape(-1, _BLOCK), second[:whole].reshape(-1, _BLOCK))
    return float(blocks.sum() + np.vecdot(first[whole:], second[whole:]))


def _magnitude(values: np.ndarray) -> float:
    return max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))


def _split(values: np.ndarray, highest: float) -> list[np.ndarray]:
    """Arrays that add up to ``values``, each of multiples of a power of two that need 19 bits at most."""
    parts: list[np.ndarray] = []
    while highest:
        rounder = math.ldexp(1.5, math.frexp(highest)[1] - _PART_BITS + 52)
        part = values + rounder
        np.subtract(part, rounder, out=part)
        values = np.subtract(values, part, out=values if parts else None)
        parts.append(part)
        highest = _magnitude(values)
    return parts


def _one_by_one(values: np.ndarray) -> tuple[Fraction, Fraction]:
    """For the few numbers that are too small beside the others."""
    distinct, counts = np.unique(values, return_counts=True)
    pairs = [(Fraction(value), count) for value, count in zip(distinct.tolist(), counts.tolist())]
    return sum((v * n for v, n in pairs), Fraction(0)), sum((v * v * n for v, n in pairs), Fraction(0))
