"""Extra links of the operators, made from XCom alone.

A link is asked for at every exit of a worker, deferral and resume included, when the operator's attributes may be
those of a fresh instance; what is in XCom stays right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import XCom
from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

#: XCom key of ``{"dashboard_url", "grafana_url", "submission_id", "attempt", "run_dir"}``, pushed whenever an attempt
#: starts.
RAY_ATTEMPT = "ray_attempt"
#: XCom key of an address in MLflow's web interface.
MLFLOW_URL = "mlflow_url"
#: Where a run in MLflow has a rollout's report.
ROLLOUT_PAGE = "rollout.html"


class RayDashboardLink(BaseOperatorLink):
    """The job of the current attempt in Ray's dashboard; none in local mode."""

    name = "Ray dashboard"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The link, empty where there is nothing to show."""
        attempt = XCom.get_value(ti_key=ti_key, key=RAY_ATTEMPT) or {}
        if not attempt.get("dashboard_url"):
            return ""
        return f"{attempt['dashboard_url'].rstrip('/')}/#/jobs/{attempt['submission_id']}"


class GrafanaLink(BaseOperatorLink):
    """The current attempt on a Grafana dashboard, where ``[mlops] grafana_url`` names one."""

    name = "Grafana"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The link, empty where there is nothing to show."""
        return str((XCom.get_value(ti_key=ti_key, key=RAY_ATTEMPT) or {}).get("grafana_url") or "")


class MlflowRunLink(BaseOperatorLink):
    """The run or model version in MLflow: XCom ``mlflow_url``, or that field of the task's result or of its metrics.

    A training loop that logs to MLflow shows its run here by reporting the address as the metric ``mlflow_url``.
    """

    name = "MLflow"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The link, empty where MLflow has no web address."""
        pushed = XCom.get_value(ti_key=ti_key, key=MLFLOW_URL)
        result = _result(ti_key)
        return str(pushed or result.get(MLFLOW_URL) or (result.get("metrics") or {}).get(MLFLOW_URL) or "")


class ReportLink(BaseOperatorLink):
    """The report a task has written: ``html_uri`` of its result, else ``report_uri``."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The link, empty before there is a report."""
        result = _result(ti_key)
        return _address(result.get("html_uri") or result.get("report_uri"))


class RolloutReportLink(BaseOperatorLink):
    """A rollout's report, of the task's result: where a browser reaches it, ``html_uri`` or the run in MLflow."""

    name = "Rollout report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """The link, empty before there is a verdict."""
        result = _result(ti_key)
        page, run = str(result.get("html_uri") or ""), result.get(MLFLOW_URL)
        if run and not page.startswith(("http://", "https://")):
            return f"{run}/artifacts/{ROLLOUT_PAGE}"
        return _address(page)


def _address(uri: Any) -> str:
    """What a browser opens; a path is a file."""
    return f"file://{uri}" if str(uri or "").startswith("/") else str(uri or "")


def _result(ti_key: TaskInstanceKey) -> dict[str, Any]:
    value = XCom.get_value(ti_key=ti_key, key="return_value")
    return value if isinstance(value, dict) else {}
