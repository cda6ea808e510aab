"""The profile of a dataset built by Ray Data over many machines: the same bits as built in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from airflow_mlops.drift.profile import Plan, Profile, merged
from airflow_mlops.drift.sources import open_source
from airflow_mlops.exceptions import DataError

#: How often a part of the data is tried again whose worker was lost.
RETRIES = 3


def profile_on_ray(
    uri: str | Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    categorical: Sequence[str] = (),
    label: str | None = None,
    num_cpus: float = 1.0,
) -> Profile:
    """Profile each part of the files (a million rows, or a row group) in a task of its own and merge.

    Ray must be initialised, or be reachable as ``RAY_ADDRESS`` says; its workers must be able to read ``uri`` and to
    import this package. Only profiles travel, some kilobytes for each column and part.

    :param uri: as :meth:`Profile.of` takes it: files, a directory or a glob, or several of them; not tables
    :param columns: as in :meth:`Profile.of`
    :param categorical: the same
    :param label: the same
    :param num_cpus: processors for each task
    :raises DataError: as :meth:`Profile.of`
    """
    import ray.data

    units = open_source(uri, columns)
    plan = Plan.of(units, columns, categorical, label)

    def profile(row: dict[str, Any]) -> dict[str, str]:
        try:
            return {"profile": json.dumps(plan.profile(units[row["unit"]]).to_json()), "error": ""}
        except DataError as error:  # Ray would wrap it, and try the task again
            return {"profile": "", "error": str(error)}

    parts = ray.data.from_items([{"unit": i} for i in range(len(units))], override_num_blocks=len(units))

    def received() -> Iterator[Profile]:
        # Ray Data would else try a part for ever that ends its worker, such as one too large for its memory.
        for row in parts.map(profile, num_cpus=num_cpus, max_retries=RETRIES).iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            yield Profile.from_json(json.loads(row["profile"]))

    return plan.checked(merged(received()), uri)
