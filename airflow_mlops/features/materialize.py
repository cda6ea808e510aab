"""Writing a window of features to the online store, so that the newest value of an entity stays.

Feast records the windows it has written in the registry. SQLite and Postgres stores overwrite whatever they hold, so
a window older than the newest one written is refused, or written with every value that is already newer left alone.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import ConcurrentChangeError
from airflow_mlops.windows import Window

if TYPE_CHECKING:
    from feast import FeatureStore

# Feast's bounds are both inclusive, and its times have microseconds.
STEP = dt.timedelta(microseconds=1)
# SQLite takes at most 32,766 variables in a statement, older builds 999.
READ_BATCH = 900


@dataclass(frozen=True)
class Written:
    """What one feature view's window put into the online store.

    :param rows: entity rows written; None where a remote engine writes them out of sight
    :param kept: rows left out because the store held a newer value of the entity
    """

    view: str
    rows: int | None
    kept: int

    def to_json(self) -> dict[str, int | None]:
        """``{"rows": n, "kept_newer": n}``."""
        return {"rows": self.rows, "kept_newer": self.kept}


def newest_end(store: FeatureStore, view: str) -> dt.datetime | None:
    """The exclusive end of the newest window written to the online store for ``view``; None if there was none."""
    registered: Any = store.registry.get_any_feature_view(view, store.project)
    ends = [end for _, end in registered.materialization_intervals]
    return max(ends).astimezone(dt.timezone.utc) + STEP if ends else None


def refuse_older(store: FeatureStore, views: Sequence[str], window: Window) -> None:
    """:raises ConcurrentChangeError: a view already holds a window that ends later; names the views and the ends"""
    newer = {view: end for view in views if (end := newest_end(store, view)) and end > window.end}
    if newer:
        held = ", ".join(f"{view} up to {end.isoformat()}" for view, end in newer.items())
        raise ConcurrentChangeError(
            f"the window {window} is older than what the online store holds ({held}); writing it would put old values "
            "in the place of newer ones. Run the windows in order, or set allow_older=True: then entities that have "
            "a newer value keep it."
        )


def materialize_view(store: FeatureStore, view: str, window: Window, *, batch_size: int | None = None) -> Written:
    """Write the newest value of each entity within ``window`` to the online store.

    Where the store holds a later window, an entity's newer value is kept. Running a window again changes nothing.

    :param window: its end is exclusive
    :param batch_size: rows in one write, for example 10,000; None keeps the repository's setting
    """
    if batch_size is not None:
        store.config.materialization_config.online_write_batch_size = batch_size
    end = newest_end(store, view)
    with _watched_writes(store, keep_newer=bool(end and end > window.end)) as counts:
        store.materialize(window.start, window.end - STEP, feature_views=[view])
    return Written(view, counts["rows"] if _local_engine(store) else None, counts["kept"])


def _local_engine(store: FeatureStore) -> bool:
    engine = store.config.batch_engine
    return getattr(engine, "type", engine) == "local"


@contextmanager
def _watched_writes(store: FeatureStore, *, keep_newer: bool) -> Iterator[dict[str, int]]:
    """Count what the engine hands to the online store; with ``keep_newer`` drop rows older than what is there."""
    provider: Any = store._get_provider()
    online = provider.online_store
    write = online.online_write_batch
    counts = {"rows": 0, "kept": 0}

    def counted(config: Any, table: Any, data: Any, progress: Any) -> None:
        chosen = _not_older(online, config, table, data) if keep_newer else data
        if chosen:
            write(config=config, table=table, data=chosen, progress=progress)
        counts["rows"] += len(chosen)
        counts["kept"] += len(data) - len(chosen)

    online.online_write_batch = counted
    try:
        yield counts
    finally:
        del online.online_write_batch


def _not_older(online: Any, config: Any, table: Any, data: Any) -> list[Any]:
    from feast.utils import make_tzaware

    chosen = []
    for first in range(0, len(data), READ_BATCH):
        rows = data[first : first + READ_BATCH]
        held = online.online_read(config, table, [row[0] for row in rows])
        for row, (stamp, _) in zip(rows, held):
            if stamp is None or make_tzaware(stamp) <= make_tzaware(row[2]):
                chosen.append(row)
    return chosen
