"""From Arrow arrays of a categorical column to the names of its categories and how often they come.

Every name costs one BLAKE2b where there are too many to keep them, some 0.3 microseconds in Python; all else is done
by Arrow. Equal names are counted first, unless so few are equal that to hash each of them costs less.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from airflow_mlops.drift.categories import CAPACITY, Categories

# A part of an array tells whether many of its values are equal: where more than this share of a sixteenth is distinct,
# more than two fifths of the whole are, if they come by chance.
_PART, _DISTINCT = 16, 0.94
_RUN = 64
_LONG = 1 << 16
# A million names as Python objects take much memory.
_SLICE = 1 << 16
_WHOLE = float(1 << 53)


def add_names(categories: Categories, values: Any) -> int:
    """Count ``values``, an array of text, booleans or numbers, perhaps a dictionary; how many of them are missing."""
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())  # counting views loses their nulls
    if _is_text(values.type) and _hardly_repeats(values):
        _add_hashed(categories, values.drop_null())
        return values.null_count
    counted = pc.value_counts(values)
    names, counts = counted.field("values"), counted.field("counts").to_numpy()
    distinct = not pa.types.is_dictionary(names.type)  # one may hold a name twice
    if not distinct:
        names = names.dictionary_decode()
    names = _without_nan(names)
    missing = int(counts[names.is_null().to_numpy(zero_copy_only=False)].sum())
    counts, names = counts[names.is_valid().to_numpy(zero_copy_only=False)], names.drop_null()
    text = _as_text(names)
    if categories.hashed or _too_many(text, distinct and text.type == names.type):
        _add_hashed(categories, text, counts)
    else:
        categories.add(zip(text.to_pylist(), counts.tolist()))
    return missing


def category_name(value: Any) -> str:
    """A category's name: 1 and 1.0 are one category, since a missing value turns whole numbers into floats."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _is_text(type_: Any) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


def _hardly_repeats(values: Any) -> bool:
    """Whether counting equal ones first is not worth it; false of the few categories whose names are kept."""
    if len(values) < _LONG:
        return False
    # Short runs from all over: equal values may lie side by side, or come in turn.
    starts = np.arange(0, len(values) - _PART * _RUN, _PART * _RUN)
    starts += np.random.default_rng(0).integers(0, (_PART - 1) * _RUN, len(starts))
    part = values.take(pa.array((starts[:, None] + np.arange(_RUN)).ravel())).drop_null()
    return len(part) > CAPACITY / _DISTINCT and pc.count_distinct(part).as_py() > _DISTINCT * len(part)


def _without_nan(names: Any) -> Any:
    if not pa.types.is_floating(names.type):
        return names
    return pc.if_else(pc.is_nan(names), pa.scalar(None, names.type), names)


def _as_text(names: Any) -> Any:
    """The names of valid values, as :func:`category_name` has them."""
    if _is_text(names.type):
        return names
    if pa.types.is_floating(names.type):
        numbers = names.cast(pa.float64())
        sizes = pc.abs(numbers)
        if pc.all(pc.and_(pc.less(sizes, _WHOLE), pc.equal(pc.floor(sizes), sizes)), min_count=0).as_py():
            names = numbers.cast(pa.int64())
    if pa.types.is_integer(names.type):
        return names.cast(pa.string())
    return pa.array([category_name(name) for name in names.to_pylist()], pa.string())


def _too_many(names: Any, distinct: bool) -> bool:
    """Whether there are more names than are kept.

    :param distinct: no two of them are equal
    """
    if len(names) <= CAPACITY or distinct:
        return len(names) > CAPACITY
    return any(pc.count_distinct(part).as_py() > CAPACITY for part in (names.slice(0, 4 * CAPACITY), names))


def _add_hashed(categories: Categories, names: Any, counts: np.ndarray | None = None) -> None:
    for start in range(0, len(names), _SLICE):
        texts = names.slice(start, _SLICE).cast(pa.large_binary()).to_pylist()
        categories.add_many(texts, None if counts is None else counts[start : start + _SLICE])
