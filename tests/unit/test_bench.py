"""The benchmark is run by hand: what it needs of the package must not vanish unnoticed."""

from __future__ import annotations

import importlib


def test_every_part_of_the_benchmark_can_be_imported():
    parts = importlib.import_module("tests.bench.__main__").PARTS
    assert parts and all(callable(part.measure) for part in parts.values())
