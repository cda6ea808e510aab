"""The held-out flights of a month as traffic: each asked for when it would have been, its label sent once it landed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError
from airflow_mlops.rollout.replay import frame_rows, replay, rollout_begun, rollout_settled
from airflow_mlops.windows import parse_instant

#: Rows in one call; every fifth row still travels alone, and those are the ones whose latency is judged.
BATCH = 25
#: Calls under way at once; more would only make them wait for each other on a small machine.
CONCURRENCY = 4


def replay_holdout(
    route_url: str,
    version: str,
    month_set: Mapping[str, Any],
    holdout_start: str,
    *,
    wait_seconds: float = 300.0,
    max_seconds: float = 900.0,
) -> dict[str, Any]:
    """Send the held-out flights to a route from the start of the rollout of ``version`` until it is settled.

    :param route_url: ``http://host:port/route``
    :param version: the version that is rolled out
    :param month_set: the month's rows: ``uri``, ``features``, ``label`` as ``FeastTrainingSetOperator`` returns them
    :param holdout_start: first instant of the held-out rows, ISO 8601
    :param wait_seconds: how long to wait for the rollout to begin
    :param max_seconds: how long to send at most
    :return: what was sent and answered, see :class:`airflow_mlops.rollout.replay.ReplayReport`
    :raises ExternalSystemError: the rollout does not begin in time
    :raises DataError: there are no held-out rows
    """
    frame = pd.read_parquet(storage.local_path(month_set["uri"]))
    held_out = frame[frame["event_timestamp"] >= pd.Timestamp(parse_instant(holdout_start, "holdout_start"))]
    if held_out.empty:
        raise DataError(f"{month_set['uri']} has no rows from {holdout_start} on; there is nothing to replay")
    return replay(
        route_url,
        frame_rows(held_out, month_set["features"], month_set["label"], prefix=f"{holdout_start[:7]}-v{version}-"),
        start_when=rollout_begun(version),
        stop_when=rollout_settled(version),
        wait_seconds=wait_seconds,
        max_seconds=max_seconds,
        batch_size=BATCH,
        concurrency=CONCURRENCY,
    ).to_json()
