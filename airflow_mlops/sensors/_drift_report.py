"""Where a :class:`airflow_mlops.sensors.drift.DriftSensor` leaves what it found: XCom, MLflow, Prometheus, a page.

Only the report itself is part of the verdict: what fails here is logged and costs none.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_mlops import storage
from airflow_mlops.sensors._drift import Found

if TYPE_CHECKING:
    from airflow_mlops.drift import DriftReport, HarmReport, Profile
    from airflow_mlops.hooks.mlflow import MlflowHook

_SHOWN = 15
# Evidently draws two charts a column: a hundred columns are 10 MB of page and as many seconds.
PAGE_COLUMNS = 20


def small(report: Mapping[str, Any], drift: DriftReport | None, harm: HarmReport | None) -> dict[str, Any]:
    """What of a report goes to XCom."""
    kept = ("verdict", "retrain", "model", "window", "html_uri", "engine", "hysteresis")
    return {
        **{key: report[key] for key in kept},
        "reasons": report["reasons"][:_SHOWN],
        "columns": columns_of(drift, "drift")[:_SHOWN],
        "drifted": len(columns_of(drift, "drift")),
        "calendar_columns": columns_of(drift, "calendar")[:_SHOWN],
        "broken_columns": columns_of(drift, "broken")[:_SHOWN],
        "compared": len(drift.columns) if drift else 0,
        "drift": drift.verdict if drift else None,
        "harm": small_harm(harm),
        "estimate": report["estimate"],
        "sequential": report["sequential"],
    }


def write_page(log: Any, uri: str, reference: Profile, found: Found, source: str) -> str | None:
    """Write Evidently's page to ``uri``, on the columns that differ most; None when there is none."""
    from airflow_mlops.drift import Profile, page

    shown = [column.name for column in found.report.columns][:PAGE_COLUMNS]

    def most_different(profile: Profile) -> Profile:
        return Profile(profile.rows, {name: profile.columns[name] for name in shown if name in profile.columns})

    try:
        left_out = page.write_page(uri, most_different(reference), most_different(found.profile), source)
    except Exception:
        log.warning("Evidently's page could not be written to %s", uri, exc_info=True)
        return None
    if left_out:
        log.info("not on Evidently's page: %s", ", ".join(left_out))
    return uri if storage.exists(uri) else None


def to_mlflow(
    log: Any,
    hook: MlflowHook,
    experiment: str,
    report: Mapping[str, Any],
    report_uri: str,
) -> dict[str, str | None]:
    """``mlflow_run_id`` and ``mlflow_url`` of the run that the check was put into; None where it could not be."""
    try:
        run_id = record(hook, experiment, report, report_uri, report["html_uri"])
        return {"mlflow_run_id": run_id, "mlflow_url": hook.run_url(experiment, run_id)}
    except Exception:
        log.warning("the check could not be put into MLflow", exc_info=True)
        return {"mlflow_run_id": None, "mlflow_url": None}


def to_prometheus(log: Any, report: Mapping[str, Any], folder: str, gateway: str) -> None:
    """Leave the check's metrics in a textfile collector's folder and at a push gateway, where there are such."""
    if not folder and not gateway:
        return
    from airflow_mlops.drift import export

    if folder:
        try:
            log.info("Metrics: %s", export.write_textfile(folder, report, time.time()))
        except Exception:
            log.warning("the check's metrics could not be written to %s", folder, exc_info=True)
    if gateway:
        try:
            export.push(gateway, report, time.time())
        except Exception:
            log.warning("the check's metrics could not be pushed", exc_info=True)


def columns_of(drift: DriftReport | None, status: str) -> list[str]:
    return [column.name for column in drift.columns if column.status == status] if drift else []


def small_harm(harm: HarmReport | None) -> dict[str, Any] | None:
    if harm is None:
        return None
    tests = {
        test.name: {"change": test.change, "p_value": test.p_value, "harmful": test.harmful} for test in harm.tests
    }
    return {"verdict": harm.verdict, "rows": harm.rows, "clusters": harm.clusters, "tests": tests}


def short(result: Mapping[str, Any]) -> str:
    return "; ".join(result["reasons"])[:300]


def record(hook: MlflowHook, experiment: str, report: Mapping[str, Any], report_uri: str, html_uri: str | None) -> str:
    """Put a check into the MLflow run of its report: verdict, numbers, and Evidently's page; return the run's id.

    A check that is done again writes over what it wrote before.
    """
    import datetime as dt

    from mlflow.entities import Metric, RunTag

    model, window = report["model"], report["window"]
    key = f"drift/{hashlib.sha256(report_uri.encode()).hexdigest()[:32]}"
    name = f"{model['name']} {window['start'][:10] if window else ''}".strip()
    run = hook.run_for_key(experiment, key, name=name, tags={"mlops.kind": "drift"})
    end = dt.datetime.fromisoformat(window["end"]) if window else dt.datetime.fromtimestamp(0, dt.timezone.utc)
    step = int(f"{dt.datetime.fromisoformat(window['start']):%Y%m%d}") if window else 0
    metrics = [Metric(name, value, int(end.timestamp() * 1000), step) for name, value in _numbers(report).items()]
    tags = {
        "mlops.model": model["name"],
        "mlops.version": model["version"],
        "mlops.verdict": report["verdict"],
        "mlops.retrain": str(report["retrain"]).lower(),
        "mlops.report_uri": report_uri,
        "mlops.window_start": window and window["start"],
        "mlops.window_end": window and window["end"],
    }
    client, run_id = hook.client, run.info.run_id
    client.log_batch(run_id, metrics, tags=[RunTag(name, str(value)) for name, value in tags.items() if value])
    client.log_dict(run_id, dict(report), "verdict.json")
    if html_uri:
        client.log_text(run_id, storage.read_bytes(html_uri).decode(), "evidently.html")
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a check: columns by status, the largest effect, the losses, the score."""
    columns = (report["drift"] or {}).get("columns", [])
    found: dict[str, Any] = {"retrain": report["retrain"], "columns": len(columns)}
    for status in ("drift", "calendar", "broken", "not_enough_data"):
        found[f"columns_{status}"] = sum(column["status"] == status for column in columns)
    effects = [column["effect"] for column in columns if column["effect"] is not None]
    found["largest_effect"] = max(effects, default=None)
    for test in (report["harm"] or {}).get("tests", []):
        found |= {f"{test['name']}_reference": test["reference"], f"{test['name']}_current": test["current"]}
    found["score"] = (report["hysteresis"] or {}).get("score")
    return {name: float(value) for name, value in found.items() if value is not None}
