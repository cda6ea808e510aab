"""The part of Airflow's REST API that the demo needs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import requests

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError

_PAGE = 100


class AirflowClient:
    """Talks to one Airflow API server.

    :param url: of the API server
    :param timeout: seconds per request
    """

    def __init__(self, url: str, *, timeout: float = 30.0) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._session = requests.Session()

    def login(self) -> None:
        """Get a token; the simple auth manager gives one to everybody when all are admins."""
        answer = self._send("GET", f"{self.url}/auth/token")
        self._session.headers["Authorization"] = f"Bearer {answer['access_token']}"

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """``method`` on ``/api/v2`` + ``path``; the decoded JSON answer.

        :raises InvalidInputError: the server refused the request (4xx); shows its reason
        :raises ExternalSystemError: the server cannot be reached or failed (5xx)
        """
        return self._send(method, f"{self.url}/api/v2{path}", **kwargs)

    def _send(self, method: str, url: str, **kwargs: Any) -> Any:
        try:
            response = self._session.request(method, url, timeout=self._timeout, **kwargs)
        except requests.RequestException as error:
            raise ExternalSystemError(f"Airflow's API at {self.url} does not answer: {error}") from error
        if response.status_code >= 400:
            kind = InvalidInputError if response.status_code < 500 else ExternalSystemError
            raise kind(f"Airflow answered {response.status_code} to {method} {url}: {response.text[:500]}")
        return response.json() if response.content else None

    def dag(self, dag_id: str) -> dict[str, Any] | None:
        """The Dag, or None while Airflow has not parsed it."""
        found = self.call("GET", "/dags", params={"dag_id_pattern": dag_id})["dags"]
        return next((dag for dag in found if dag["dag_id"] == dag_id), None)

    def import_errors(self) -> dict[str, str]:
        """Stack trace by file, of the Dag files that Airflow cannot import."""
        errors = self.call("GET", "/importErrors")["import_errors"]
        return {error["filename"]: error["stack_trace"] for error in errors}

    def pause(self, dag_id: str, paused: bool = True) -> None:
        """Let the scheduler start no run of the Dag, or with ``paused=False`` let it."""
        self.call("PATCH", f"/dags/{dag_id}", json={"is_paused": paused})

    def task_ids(self, dag_id: str) -> list[str]:
        """The Dag's task ids, in topological order as far as the API gives it."""
        return [task["task_id"] for task in self.call("GET", f"/dags/{dag_id}/tasks")["tasks"]]

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """All runs of the Dag, earliest first."""
        params = {"limit": _PAGE, "order_by": "run_after"}
        return self.call("GET", f"/dags/{dag_id}/dagRuns", params=params)["dag_runs"]

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """Every task instance of one run."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}/taskInstances"
        return self.call("GET", path, params={"limit": _PAGE})["task_instances"]

    def clear(self, dag_id: str, run_id: str, task_ids: Sequence[str]) -> None:
        """Run tasks of a run again, and all that come after them."""
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": list(task_ids),
            "include_downstream": True,
            "only_failed": False,
            "reset_dag_runs": True,
        }
        self.call("POST", f"/dags/{dag_id}/clearTaskInstances", json=body)

    def delete_run(self, dag_id: str, run_id: str) -> None:
        """Forget a run."""
        self.call("DELETE", f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}")

    def backfill_active(self, dag_id: str) -> bool:
        """Whether a backfill of the Dag is unfinished; Airflow takes no other one until then."""
        listing = self.call("GET", "/backfills", params={"dag_id": dag_id})["backfills"]
        return any(backfill["completed_at"] is None for backfill in listing)

    def backfill(self, dag_id: str, first: dt.date, last: dt.date) -> int:
        """Run the Dag's intervals that start from ``first`` to ``last``, one at a time; returns the backfill's id."""
        body = {
            "dag_id": dag_id,
            "from_date": f"{first.isoformat()}T00:00:00+00:00",
            "to_date": f"{last.isoformat()}T00:00:00+00:00",
            "max_active_runs": 1,
            "reprocess_behavior": "none",
        }
        return self.call("POST", "/backfills", json=body)["id"]

    def log(self, dag_id: str, run_id: str, task_id: str, *, try_number: int, map_index: int = -1) -> list[str]:
        """The lines of one try's log; exceptions as ``type: message`` with their innermost frames."""
        path = f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}/taskInstances/{task_id}/logs/{try_number}"
        answer = self.call("GET", path, params={"map_index": map_index}, headers={"Accept": "application/json"})
        lines: list[str] = []
        content = answer["content"]
        for entry in content if isinstance(content, list) else str(content).splitlines():
            if isinstance(entry, str):
                lines.append(entry)
                continue
            lines.append(str(entry.get("event", "")))
            for error in entry.get("error_detail") or []:
                for frame in (error.get("frames") or [])[-3:]:
                    lines.append(f"  {frame.get('filename')}:{frame.get('lineno')} in {frame.get('name')}")
                lines.append(f"  {error.get('exc_type')}: {error.get('exc_value')}")
        return lines
