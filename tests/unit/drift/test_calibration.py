"""The error rates and the power that the verdict promises, by simulation from counts, so that 10 million rows cost
no more than a thousand.

A fast subset by default; ``MLOPS_CALIBRATION_GRID=300`` runs the whole grid with so many windows a point (about an hour
on one core; ``-s`` shows the figures).
"""

from __future__ import annotations

import os
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from airflow_mlops.drift import DriftPolicy, Profile, compare
from airflow_mlops.drift.categories import Categories
from airflow_mlops.drift.column import Column
from airflow_mlops.drift.distances import _chi2, between
from airflow_mlops.drift.histogram import Histogram, to_keys

GRID = int(os.environ.get("MLOPS_CALIBRATION_GRID", 0))
LEVELS = (2, 5, 20, 50, 100, 500)
# A measurement rounded to a 25th of its standard deviation.
VALUES = np.round(np.arange(-125, 126) / 25, 2)
CLASSES = 12


def numeric_column(counts: np.ndarray, values: np.ndarray = VALUES) -> Column:
    """The profile of a column with ``counts`` of each of ``values``."""
    used = counts > 0
    values, counts = values[used], counts[used].astype(np.int64)
    order = np.argsort(values)
    column = Column("numeric", "double", rows=int(counts.sum()))
    column.minimum, column.maximum = float(values.min()), float(values.max())
    column.total = Fraction(float(np.dot(values, counts)))
    column.squares = Fraction(float(np.dot(values**2, counts)))
    column.histogram = Histogram(0, to_keys(values[order]), counts[order])
    return column


def category_column(counts: np.ndarray) -> Column:
    column = Column("categorical", "string", rows=int(counts.sum()))
    column.categories = Categories({f"c{i}": int(count) for i, count in enumerate(counts) if count})
    return column


class World:
    """Columns that hang together by a hidden class of each row; numbers and categories in turn.

    :param columns: how many
    :param moved: the first so many have drifted, on the current side, by a Jensen-Shannon distance of ``distance``
    """

    def __init__(self, rng, columns: int, moved: int = 0, distance: float = 0.1, levels=LEVELS):
        self.rng = rng
        self.shares = rng.dirichlet(np.full(CLASSES, 3.0))
        self.numeric = np.arange(columns) % 2 == 0
        self.levels = [levels[i // 2 % len(levels)] for i in range(columns)]
        self.before = [self._make(i) for i in range(columns)]
        self.after = [self._move(table, i, distance) if i < moved else table for i, table in enumerate(self.before)]

    def _make(self, column: int) -> np.ndarray:
        """The distribution in each class, one a row."""
        if self.numeric[column]:
            return _normal(self.rng.normal(0, 0.7, CLASSES), 0.7)
        usual = self.rng.dirichlet(np.ones(self.levels[column]))
        tables = usual * np.exp(self.rng.normal(0, 0.3, (CLASSES, self.levels[column])))
        return tables / tables.sum(axis=1, keepdims=True)

    def _move(self, table: np.ndarray, column: int, distance: float) -> np.ndarray:
        """The same in every class, so far that the column as a whole moves by ``distance``."""
        if self.numeric[column]:

            def moved(size: float) -> np.ndarray:
                shift = size * 25
                steps = np.arange(len(VALUES))
                return np.stack([np.interp(steps - shift, steps, row, left=0, right=0) for row in table])

        else:
            direction = self.rng.permutation(np.where(np.arange(table.shape[1]) % 2, 1.0, -1.0))

            def moved(size: float) -> np.ndarray:
                return table * np.exp(size * direction)

        def normalised(size: float) -> np.ndarray:
            result = moved(size)
            return result / result.sum(axis=1, keepdims=True)

        low, high = 0.0, 8.0
        for _ in range(40):
            middle = (low + high) / 2
            if jensen_shannon(self.shares @ table, self.shares @ normalised(middle)) < distance:
                low = middle
            else:
                high = middle
        return normalised(high)

    def profile(self, rows: int, *, drifted: bool = False) -> Profile:
        """A sample of so many rows."""
        sizes = self.rng.multinomial(rows, self.shares)
        columns = {}
        for i, table in enumerate(self.after if drifted else self.before):
            counts = self.rng.multinomial(sizes, table).sum(axis=0)
            columns[f"x{i:03d}"] = (numeric_column if self.numeric[i] else category_column)(counts)
        return Profile(rows, columns)

    def methods(self) -> dict[str, str]:
        """Every method in turn."""
        numeric, category = ("wasserstein", "js", "psi", "ks"), ("js", "psi")
        return {
            f"x{i:03d}": numeric[i // 2 % 4] if self.numeric[i] else category[i // 2 % 2]
            for i in range(len(self.before))
        }


def _normal(means: np.ndarray, scale: float) -> np.ndarray:
    tables = np.exp(-(((VALUES[None, :] - means[:, None]) / scale) ** 2) / 2)
    return tables / tables.sum(axis=1, keepdims=True)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / middle), 0) + np.where(q > 0, q * np.log(q / middle), 0)
    return float(np.sqrt(np.sum(terms) / 2))


FAST_SIZES = [(1_000, 1_000), (100_000, 1_000), (10_000_000, 10_000_000)]
ALL_SIZES = [
    *[(n, n) for n in (1_000, 10_000, 100_000, 1_000_000, 10_000_000)],
    (10_000_000, 1_000),
    (1_000, 10_000_000),
    (100_000, 1_000),
]


@pytest.mark.parametrize("sizes", ALL_SIZES if GRID else FAST_SIZES)
@pytest.mark.parametrize("requested", [False, True] if GRID else [True])
def test_windows_without_drift_alarm_in_one_percent_at_most(sizes, requested):
    """200 columns that hang together, 2 to 500 levels; any effect counts, which only adds alarms."""
    rng = np.random.default_rng([1, *sizes])
    windows = GRID or 20
    world = World(rng, 200)
    found = {"by": 0, "e-bh": 0, "default": 0}
    for window in range(windows):
        if window % 10 == 0:
            reference = world.profile(sizes[0])
        current = world.profile(sizes[1])
        for control in ("by", "e-bh", "default") if GRID else ("by",):
            policy = DriftPolicy(control=control, min_effect=0.0, method=world.methods() if requested else {})
            found[control] += (
                compare(reference, current, DriftPolicy() if control == "default" else policy).verdict != "stable"
            )
    print(f"no drift, n {sizes}, every method {requested}: {found} of {windows}")
    assert max(found.values()) <= 0.01 * windows


@pytest.mark.parametrize("levels", LEVELS)
def test_a_single_category_alarms_in_one_percent_at_most(levels):
    """One column is the hardest case: nothing is gained by the control over many."""
    rng = np.random.default_rng(levels)
    windows = 5 * GRID or 150
    for sizes in ALL_SIZES if GRID else [(1_000, 1_000), (1_000_000, 1_000)]:
        found = 0
        for window in range(windows):
            if window % 10 == 0:
                weights = rng.dirichlet(np.ones(levels))
            profiles = [Profile(n, {"c": category_column(rng.multinomial(n, weights))}) for n in sizes]
            found += compare(*profiles).verdict != "stable"
        print(f"no drift, {levels} levels, n {sizes}: {found} of {windows}")
        assert found <= 0.01 * windows + (0 if GRID else 1)


@pytest.mark.parametrize(("rows", "levels"), [(3_000, (2, 5, 20)), (10_000, (2, 5, 20, 50, 100)), (1_000_000, LEVELS)])
@pytest.mark.parametrize("control", ["by", "e-bh"] if GRID else ["by"])
def test_false_discovery_rate_and_power_at_a_jensen_shannon_distance_of_a_tenth(rows, levels, control):
    """40 of 200 columns have moved by 0.1; q = 0.1. Numbers are judged by their Wasserstein distance."""
    rng = np.random.default_rng([3, rows])
    windows = GRID // 5 or 4
    for least in (None, 0.0):
        false, power = [], []
        for _ in range(windows):
            world = World(rng, 200, moved=40, levels=levels)
            policy = DriftPolicy(fdr=0.1, min_effect=least, control=control)
            report = compare(world.profile(rows), world.profile(rows, drifted=True), policy)
            found = np.array([int(name[1:]) < 40 for name in report.drifted])
            false.append(1 - found.mean() if len(found) else 0.0)
            power.append(found.sum() / 40)
        print(
            f"n {rows}, levels up to {levels[-1]}, {control}, min_effect {least}: FDR {np.mean(false):.4f}, "
            f"power {np.mean(power):.3f}"
        )
        assert np.mean(false) <= 0.1
        assert np.mean(power) >= 0.9


@pytest.mark.parametrize("method", ["wasserstein", "js", "psi", "ks"])
def test_a_shift_of_a_hundredth_of_a_deviation_is_silent_at_ten_million_rows(method):
    rng = np.random.default_rng(5)
    before, after = (_normal(np.array([mean]), 1.0)[0] for mean in (0.0, 0.01))
    for _ in range(GRID or 3):
        sides = [Profile(10_000_000, {"x": numeric_column(rng.multinomial(10_000_000, p))}) for p in (before, after)]
        report = compare(*sides, DriftPolicy(method={"x": method}))
        assert report.verdict == "stable"
        assert report.columns[0].p_value < 1e-10 and "too small to matter" in report.columns[0].reason


@pytest.mark.parametrize("method", ["wasserstein", "js", "psi", "ks"])
@pytest.mark.parametrize("sizes", [(1_000, 1_000), (100_000, 1_000)])
def test_the_part_of_sampling_is_taken_off(method, sizes):
    """Without drift the effect is a small part of the distance; with it, nothing of it is lost."""
    rng = np.random.default_rng(6)
    before, after = (_normal(np.array([mean]), 1.0)[0] for mean in (0.0, 0.5))
    effects, distances = [], []
    for _ in range(60):
        still = between(*(numeric_column(rng.multinomial(n, before)) for n in sizes), method)
        effects.append(still.effect)
        distances.append(still.raw)
    # Half of the samples lie above what is expected, and the root of a small rest is not small.
    assert np.mean(effects) < 0.6 * np.mean(distances)
    moved = [
        between(numeric_column(rng.multinomial(n, before)), numeric_column(rng.multinomial(m, after)), method).effect
        for n, m in [sizes] * 60
    ]
    huge = [numeric_column(np.round(p * 1e9)) for p in (before, after)]
    assert np.mean(moved) == pytest.approx(between(*huge, method).raw, rel=0.05)


@pytest.mark.parametrize("method", ["js", "psi"])
@pytest.mark.parametrize("sizes", [(1_000, 1_000), (10_000_000, 1_000), (1_000, 10_000_000), (30_000, 2_000)])
def test_the_noise_of_rare_categories_is_known(method, sizes):
    """500 levels, most of them expected less than once on the smaller side: the effect is as often 0 as not."""
    rng = np.random.default_rng(7)
    weights = rng.dirichlet(np.full(500, 0.3))
    found = [between(*(category_column(rng.multinomial(n, weights)) for n in sizes), method) for _ in range(60)]
    noise = np.mean([d.raw**2 if method == "js" else d.raw for d in found])
    rest = np.mean([d.raw**2 - d.effect**2 if method == "js" else d.raw - d.effect for d in found if d.effect > 0])
    assert rest == pytest.approx(noise, rel=0.05)
    assert 0.25 < np.mean([d.effect == 0 for d in found]) < 0.75


@pytest.mark.parametrize("sizes", [(1_000, 1_000), (10_000_000, 1_000), (1_000, 10_000_000)])
@pytest.mark.parametrize("levels", [20, 500])
def test_the_chi_squared_test_is_honest_far_into_its_tail(sizes, levels):
    rng = np.random.default_rng([8, levels, *sizes])
    trials = 100 * GRID or 1_500
    weights = rng.dirichlet(np.ones(levels))
    a, b = (rng.multinomial(n, weights, trials).astype(float) for n in sizes)
    p = np.array([_chi2(x[used], y[used]) for x, y in zip(a, b) if (used := (x + y) > 0).any()])
    for level in (0.05, 0.005, 0.0005) if GRID else (0.05, 0.005):
        allowed = stats.binom.ppf(0.9999, trials, 1.3 * level)
        print(f"chi-squared, {levels} levels, n {sizes}: {np.mean(p <= level):.5f} at {level}")
        assert np.sum(p <= level) <= allowed


def test_many_rare_categories_still_have_a_say():
    """500 levels and 1,000 rows: not one is expected five times, and a large drift is found all the same."""
    rng = np.random.default_rng(9)
    weights = np.full(500, 1 / 500)
    moved = weights * np.exp(rng.permutation(np.where(np.arange(500) % 2, 1.0, -1.0)))
    for _ in range(5):
        sides = [category_column(rng.multinomial(1_000, p)) for p in (weights, moved / moved.sum())]
        assert compare(*(Profile(1_000, {"c": side}) for side in sides)).verdict == "drift"
