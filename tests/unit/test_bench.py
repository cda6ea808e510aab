"""The benchmark is run by hand: what it needs of the package must not vanish unnoticed."""

from __future__ import annotations

import importlib


def test_every_part_of_the_benchmark_can_be_imported():
    parts = importlib.import_module("tests.bench.__main__").PARTS
    assert parts and all(callable(part.measure) for part in parts.values())


def test_the_intervals_of_the_canarys_shares_are_wilsons():
    wilson = importlib.import_module("tests.bench.canary").wilson
    assert wilson(0, 80) == "0.0 (0.0 to 4.6)"
    assert wilson(4, 80) == "5.0 (2.0 to 12.2)"
    assert wilson(80, 80) == "100.0 (95.4 to 100.0)"
