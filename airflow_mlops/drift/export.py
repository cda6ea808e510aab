"""The last check of a model as Prometheus metrics: for the node exporter's text files or for a push gateway.

A check is a batch job that is gone when Prometheus comes to scrape, so its metrics are left behind: as a file that the
node exporter's textfile collector reads, or at a push gateway. ``prometheus_client`` comes with Ray.

Alert on ``mlops_drift_last_check_timestamp_seconds`` too: a check that no longer runs leaves its last verdict standing.
"""

from __future__ import annotations

import datetime as dt
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from prometheus_client import CollectorRegistry, Gauge, exposition

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError

VERDICTS = ("harm", "drift", "stable", "not_enough_data", "no_champion")
#: Columns with a metric of their own, those that differ most: each is a time series.
COLUMNS = 50
JOB = "mlops_drift"
_PUSH_SECONDS = 10.0


def registry_of(report: Mapping[str, Any], checked_at: float) -> CollectorRegistry:
    """A registry with the metrics of one check.

    :param report: as :class:`airflow_mlops.sensors.drift.DriftSensor` writes it
    :param checked_at: Unix time of the check, seconds
    """
    registry = CollectorRegistry()
    model = report["model"]["name"]

    def gauge(name: str, text: str, values: Mapping[tuple[str, ...], Any], *labels: str) -> None:
        """One metric; values that are None are left out, and it with them if there is none."""
        known = {key: value for key, value in values.items() if value is not None}
        if known:
            metric = Gauge(f"mlops_drift_{name}", text, ("model", *labels), registry=registry)
            for key, value in known.items():
                metric.labels(model, *key).set(float(value))

    one: tuple[str, ...] = ()
    drift, harm = report.get("drift") or {}, report.get("harm") or {}
    columns = drift.get("columns") or []
    statuses = [column["status"] for column in columns]
    gauge("verdict", "1 for the verdict of the last check", {(v,): v == report["verdict"] for v in VERDICTS}, "verdict")
    gauge("retrain", "Whether the last check asks for retraining", {one: report["retrain"]})
    gauge("last_check_timestamp_seconds", "When the last check ran", {one: checked_at})
    gauge("window_end_timestamp_seconds", "End of the window last checked", {one: _timestamp(report.get("window"))})
    gauge("columns", "Columns by status", {(s,): statuses.count(s) for s in sorted(set(statuses))}, "status")
    gauge(
        "column_effect", f"Effect of the {COLUMNS} columns that differ most",
        {(c["name"],): c["distance"] if c["effect"] is None else c["effect"] for c in columns[:COLUMNS]}, "column",
    )  # fmt: skip
    gauge("rows", "Rows compared", {(side,): rows for side, rows in (drift.get("rows") or {}).items()}, "side")
    tests = harm.get("tests") or []
    for side in ("reference", "current", "tolerance"):
        text = {"tolerance": "Harmless change of the loss"}.get(side, f"Loss of the champion, {side}")
        gauge(f"loss_{side}", text, {(test["name"],): test[side] for test in tests}, "test")
    gauge("harmful", "Whether the test found harm", {(test["name"],): test["harmful"] for test in tests}, "test")
    if held := report.get("hysteresis"):
        gauge("score", "Evidence for retraining, 1 at the policy's tolerance", {one: held["score"]})
        gauge("armed", "Whether the next breach counts", {one: held["armed"]})
        gauge("held_back", "Whether retraining was asked for and held back", {one: bool(held["reason"])})
        gauge("trainings_in_budget_window", "Trainings granted in the budget's window", {one: held["granted"]})
    return registry


def write_textfile(folder: str, report: Mapping[str, Any], checked_at: float) -> str:
    """Replace the model's file in the folder of a textfile collector, whole or not at all, and return its path.

    :param folder: local folder, made when it is not there
    :raises ExternalSystemError: it cannot be written
    """
    name = re.sub(r"\W", "_", str(report["model"]["name"]))
    path = os.path.join(folder, f"{JOB}_{name}.prom")
    try:
        os.makedirs(folder, exist_ok=True)
        exposition.write_to_textfile(path, registry_of(report, checked_at))
    except OSError as error:
        raise ExternalSystemError(
            f"cannot write {path}: {error.strerror or error}. The folder is that of a textfile collector on this "
            "machine, writable for the worker."
        ) from error
    return path


def push(url: str, report: Mapping[str, Any], checked_at: float) -> None:
    """Replace the model's metrics at a push gateway.

    :param url: of the gateway, ``http://host:9091``; user and password in it are sent as basic authentication
    :raises InvalidInputError: the URL is not of http or https
    :raises ExternalSystemError: the gateway does not take them
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInputError(f"the push gateway's URL begins with {parts.scheme!r}; expected http://host:port")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def handler(**request: Any) -> Any:
        if user:
            return exposition.basic_auth_handler(**request, username=user, password=password)
        return exposition.default_handler(**request)

    registry = registry_of(report, checked_at)
    try:
        exposition.push_to_gateway(
            bare, JOB, registry, {"model": str(report["model"]["name"])}, timeout=_PUSH_SECONDS, handler=handler
        )
    except OSError as error:
        raise ExternalSystemError(f"the push gateway {bare} did not take the metrics: {error}") from error


def _timestamp(window: Mapping[str, Any] | None) -> float | None:
    return dt.datetime.fromisoformat(window["end"]).timestamp() if window else None
