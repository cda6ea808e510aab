"""Columns that move with the calendar, found in the training data itself; and the same season of another year.

July is not drift because it is warm. Two ways to say so:

- the *reference by season*: :func:`same_season` gives the profile of the same season in the other years, for the
  ``season`` of :func:`airflow_mlops.drift.compare`;
- *calendar columns*: :func:`calendar_bound` finds the columns whose changes between the periods of the training data
  follow the calendar, for ``DriftPolicy.calendar_columns``.

Limits, honestly: with one year nobody can tell a season from a trend, and :func:`calendar_bound` says so for each such
column; with two it needs about eight seasons a year to be sure of anything. A column that is bound to the calendar can
still drift for another reason: declared as such it is shown and never counted, against the season it still is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from airflow_mlops.drift import distances
from airflow_mlops.drift.column import Column
from airflow_mlops.drift.discoveries import adjust
from airflow_mlops.drift.limits import MIN_EFFECT
from airflow_mlops.drift.profile import Profile
from airflow_mlops.exceptions import DataError, InvalidInputError

_SHUFFLES = 20_000
# Pairs of periods held at a time while shuffling.
_PAIRS = 2_000_000


@dataclass(frozen=True)
class CalendarColumn:
    """The evidence that a column moves with the calendar.

    :param name: column
    :param evidence: ``season``: periods of one season are alike in different years, periods of different seasons are
        not; ``season or trend``: it moves from period to period of the only year there is, and which of the two it is
        cannot be told
    :param between: mean effect between different seasons (of different years; of one year: of each period against all
        the others)
    :param within: mean effect between the same season of different years; None with one year
    :param largest: the largest effect among those that ``between`` is the mean of: changes up to it have been seen
    :param p_value: of no season (one year: of no movement), not adjusted
    :param adjusted_p: adjusted for the number of columns, after Benjamini and Yekutieli
    :param reason: in words
    """

    name: str
    evidence: str
    between: float
    within: float | None
    largest: float
    p_value: float
    adjusted_p: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The evidence as JSON."""
        return asdict(self)


def split_period(period: str) -> tuple[str, str]:
    """Year and season of a period: ``2013-07`` is season ``07`` of ``2013``, ``2013-W30`` season ``W30``.

    :raises InvalidInputError: no such period
    """
    year, dash, season = period.partition("-")
    if not (year and dash and season):
        raise InvalidInputError(f"period {period!r} has no year and season; expected for example 2013-07 or 2013-W30")
    return year, season


def same_season(
    profiles: Mapping[str, Profile], period: str, split: Callable[[str], tuple[str, str]] = split_period
) -> Profile | None:
    """The profile of the season of ``period`` in all the other years; None when there is none.

    :param profiles: period to the profile of its data
    :param period: the period to be judged
    :param split: period to its year and season
    """
    year, season = split(period)
    others = [profiles[other] for other in sorted(profiles) if split(other)[1] == season and split(other)[0] != year]
    if not others:
        return None
    merged = others[0]
    for other in others[1:]:
        merged = merged.merge(other)
    return merged


def calendar_bound(
    profiles: Mapping[str, Profile],
    *,
    split: Callable[[str], tuple[str, str]] = split_period,
    fdr: float = 0.05,
    min_effect: float | None = None,
    min_explained: float = 0.5,
    min_rows: int = 500,
    columns: Sequence[str] | None = None,
    seed: int = 0,
) -> list[CalendarColumn]:
    """The columns whose changes between periods follow the calendar, most certain first.

    With two years or more a column is returned when

    1. the mean distance between periods of one season in different years is smaller than it would be had each year's
       periods been in another order, by a permutation test at false discovery rate ``fdr``,
    2. no shift of one year's seasons against the others brings them closer together,
    3. the distance between different seasons is at least ``min_effect``, and the season explains the share
       ``min_explained`` of it.

    *Error rate.* Of the columns returned, at most the share ``fdr`` have no season, when what moves a column without
    season moves it independently from period to period. Where it wanders (periods hang together without a season) only
    2. bounds the error for certain: of S seasons, the right alignment is the best one by chance about once in S times.
    Simulated with 200 random walks over two years of months, all of the conditions together let one in 4,000 pass.

    With one year a column is returned as ``season or trend`` when its periods differ (at false discovery rate ``fdr``,
    if rows are independent) and the median effect of a period against the rest is at least ``min_effect``. Whether the
    calendar moves it is not known, and a lasting change looks the same.

    :param profiles: period to the profile of its data
    :param split: period to its year and season; seasons in order of their names
    :param fdr: bound on the share of false ones among the columns returned
    :param min_effect: smallest effect that counts; that of the distance's method when None, see
        :data:`airflow_mlops.drift.limits.MIN_EFFECT`
    :param min_explained: share of the distance between seasons that is not there within one
    :param min_rows: values that a column needs in every period; columns with fewer in any are left out
    :param columns: the columns to look at; those that every period has when not given
    :param seed: of the permutations; the same seed gives the same answer
    :raises DataError: fewer than three periods, or ``columns`` that a period lacks
    """
    periods = sorted(profiles, key=split)
    if len(periods) < 3:
        raise DataError(f"{len(periods)} period(s); a column's movement with the calendar needs at least three")
    common = [name for name in profiles[periods[0]].columns if all(name in profiles[p].columns for p in periods)]
    if absent := sorted(set(columns or ()) - set(common)):
        raise DataError(f"column(s) {', '.join(absent)} asked for, but not every period has them")
    sides = {name: [profiles[period].columns[name] for period in periods] for name in columns or common}
    sides = {name: side for name, side in sides.items() if _comparable(side, min_rows)}
    years, seasons = zip(*(split(period) for period in periods))
    if len(set(years)) == 1:
        found = {name: _one_year(side) for name, side in sides.items()}
    else:
        found = _many_years(
            sides, np.unique(years, return_inverse=True)[1], np.unique(seasons, return_inverse=True)[1], seed
        )
    adjusted = dict(zip(found, adjust([evidence.p_value for evidence in found.values()])))
    bound = []
    for name, evidence in found.items():
        least = (
            MIN_EFFECT["wasserstein" if sides[name][0].kind == "numeric" else "js"]
            if min_effect is None
            else min_effect
        )
        if adjusted[name] <= fdr and evidence.typical >= least and evidence.explained >= min_explained:
            bound.append(evidence.column(name, adjusted[name]))
    return sorted(bound, key=lambda column: (column.adjusted_p, -column.between, column.name))


@dataclass(frozen=True)
class _Evidence:
    """One column's figures; ``typical`` and ``explained`` are what the thresholds ask about."""

    between: float
    within: float | None
    largest: float
    p_value: float
    typical: float
    explained: float

    def column(self, name: str, adjusted: float) -> CalendarColumn:
        if self.within is None:
            reason = (
                f"moves from period to period: {self.between:.3f} from the rest on average, {self.largest:.3f} at "
                "most; one year cannot tell a season from a trend"
            )
            kind = "season or trend"
        else:
            reason = f"{self.between:.3f} between different seasons, {self.within:.3f} within one in different years"
            kind = "season"
        return CalendarColumn(name, kind, self.between, self.within, self.largest, self.p_value, adjusted, reason)


def _comparable(side: list[Column], min_rows: int) -> bool:
    kinds = {column.kind for column in side}
    return len(kinds) == 1 and kinds <= set(distances.METHODS) and min(column.count for column in side) >= min_rows


def _total(side: Sequence[Column]) -> Column:
    total = Column(side[0].kind, side[0].type)
    for column in side:
        total.merge(column)
    return total


def _one_year(side: list[Column]) -> _Evidence:
    """Each period against all the others."""
    scale = _total(side).std
    found = [distances.between(_total(side[:i] + side[i + 1 :]), side[i], None, scale) for i in range(len(side))]
    effects = [distance.effect for distance in found]
    p_value = min(min(distance.p_value for distance in found) * len(found), 1.0)
    return _Evidence(float(np.mean(effects)), None, max(effects), p_value, float(np.median(effects)), 1.0)


def _many_years(
    sides: Mapping[str, list[Column]], years: np.ndarray, seasons: np.ndarray, seed: int
) -> dict[str, _Evidence]:
    """Periods of the same season against periods of different ones, always of different years."""
    across = years[:, None] < years[None, :]
    same = across & (seasons[:, None] == seasons[None, :])
    if not same.any():
        raise DataError("no season comes in two of the years; give the periods of the same seasons of each year")
    effects = {name: _effects(side, across) for name, side in sides.items()}
    if not effects:
        return {}
    flat = np.stack([effect[across] for effect in effects.values()], axis=1)
    observed = flat[same[across]].mean(axis=0)
    p_values = _permutation_p(flat, observed, years, seasons, across, np.random.default_rng(seed))
    best = _best_aligned(flat, observed, years, seasons, across)
    result = {}
    for place, (name, effect) in enumerate(effects.items()):
        different = effect[across & ~same]
        within, between = float(observed[place]), float(different.mean())
        explained = 1 - within / between if between > 0 else 0.0
        p_value = float(p_values[place]) if best[place] else 1.0
        result[name] = _Evidence(between, within, float(different.max()), p_value, between, explained)
    return result


def _effects(side: list[Column], across: np.ndarray) -> np.ndarray:
    scale = _total(side).std
    effects = np.zeros(across.shape)
    for first, second in zip(*np.nonzero(across)):
        effects[first, second] = distances.between(side[first], side[second], None, scale).effect
    return effects


def _permutation_p(
    flat: np.ndarray,
    observed: np.ndarray,
    years: np.ndarray,
    seasons: np.ndarray,
    across: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """By column, how often the periods of one season are as close when each year's are put in random order."""
    block = min(max(_PAIRS // max(int(across.sum()), 1), 1), _SHUFFLES)
    as_close, made = np.zeros(flat.shape[1]), 0
    while made < _SHUFFLES:
        labels = np.tile(seasons, (block, 1))
        for year in np.unique(years):
            labels[:, years == year] = rng.permuted(labels[:, years == year], axis=1)
        as_close += np.sum(_mean_within(flat, labels, across) <= observed * (1 + 1e-12), axis=0)
        made += block
    return (1 + as_close) / (1 + made)


def _best_aligned(
    flat: np.ndarray, observed: np.ndarray, years: np.ndarray, seasons: np.ndarray, across: np.ndarray
) -> np.ndarray:
    """By column, whether no shift of a single year's seasons brings the periods of one season closer together."""
    shifted = []
    for year in np.unique(years):
        own = seasons[years == year]
        for step in range(1, len(own)):
            labels = seasons.copy()
            labels[years == year] = np.roll(own, step)
            shifted.append(labels)
    return np.all(_mean_within(flat, np.array(shifted), across) > observed, axis=0)


def _mean_within(flat: np.ndarray, labels: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The mean distance between periods of one season for each labelling (rows of ``labels``) and column."""
    first, second = np.nonzero(across)
    same = (labels[:, first] == labels[:, second]).astype(np.float64)
    return same @ flat / same.sum(axis=1, keepdims=True)
