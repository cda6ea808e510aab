"""What Ray's Jobs API answers, as values and errors of this package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError
from airflow_mlops.hooks._ray_endpoint import Endpoint
from airflow_mlops.training.decide import ACTIVE, FINAL, Observation


class AccessRefusedError(InvalidInputError):
    """The cluster, or the API server before it, does not accept the credentials."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster describes it.

    :param submission_id: its name
    :param status: Ray's word for its state, ``LOST`` if the cluster does not know it
    :param message: of a state that is final
    :param exit_code: of the driver's process, negative for a signal
    :param submitted: Unix time at which the cluster took it
    :param ended: Unix time of its end
    :param nonce: which call has submitted it
    """

    submission_id: str
    status: str
    message: str = ""
    exit_code: int | None = None
    submitted: float | None = None
    ended: float | None = None
    nonce: str | None = None

    @property
    def observation(self) -> Observation:
        """What the rules of :mod:`airflow_mlops.training.decide` go by."""
        return Observation(self.status, self.exit_code, self.message)

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in FINAL

    @classmethod
    def lost(cls, submission_id: str) -> Job:
        """A job that the cluster does not know."""
        return cls(submission_id, "LOST", f"The cluster does not know job {submission_id}.")

    @classmethod
    def of(cls, submission_id: str, value: dict[str, Any]) -> Job:
        """The job that Ray describes by ``value``."""
        status = str(value.get("status"))
        message = "" if status in ACTIVE else str(value.get("message") or "")[-2000:]
        began, ended = (_seconds(value.get(name)) for name in ("start_time", "end_time"))
        nonce = (value.get("metadata") or {}).get("submission")
        return cls(submission_id, status, message, value.get("driver_exit_code"), began, ended, nonce)


class Lines:
    """Cuts a text that is sent again and again from its start into lines, each of them once.

    :param offset: bytes from the start that have been seen before
    """

    def __init__(self, offset: int) -> None:
        self._offset, self._rest, self._position = offset, b"", 0

    def replayed(self) -> None:
        """The text begins from its start again."""
        self._position = 0

    def feed(self, text: str) -> Iterator[tuple[int, str]]:
        """The next piece; its new whole lines, each with the offset behind it."""
        data = text.encode()
        known = max(0, self._offset + len(self._rest) - self._position)
        self._position += len(data)
        *whole, self._rest = (self._rest + data[known:]).split(b"\n")
        for line in whole:
            self._offset += len(line) + 1
            yield self._offset, line.decode(errors="replace")

    def rest(self) -> Iterator[tuple[int, str]]:
        """What follows the last whole line, at the end of the text."""
        if self._rest:
            self._offset += len(self._rest)
            yield self._offset, self._rest.decode(errors="replace")


def away(endpoint: Endpoint, error: BaseException) -> ExternalSystemError:
    """The error of a request that got no answer."""
    return ExternalSystemError(
        f"Ray's dashboard at {endpoint.address} does not answer ({type(error).__name__}: {error}); check that the "
        "cluster runs and that the connection's host is its dashboard, usually port 8265"
    )


def checked(endpoint: Endpoint, code: int, text: str, allow: tuple[int, ...]) -> tuple[int, str]:
    """Status and text of an answer, or the error that its status stands for."""
    if code < 400 or code in allow:
        return code, text
    if code in (401, 403) and endpoint.proxied and '"kind":"Status"' in text.replace(" ", ""):
        raise AccessRefusedError(
            f"the Kubernetes API server before Ray at {endpoint.address} refuses the request (HTTP {code}): "
            f"{_status_message(text)}. Mend the Kubernetes connection's credentials, or grant its account the verbs "
            "get and create on services/proxy in that namespace"
        )
    if code == 401:
        raise AccessRefusedError(
            f"Ray at {endpoint.address} wants a token: put it in the connection's password (HTTP 401)"
        )
    if code == 403:
        raise AccessRefusedError(f"Ray at {endpoint.address} refuses the token in the connection's password (HTTP 403)")
    if code < 500 and code != 429:
        raise InvalidInputError(f"Ray at {endpoint.address} refuses the request (HTTP {code}): {text[-2000:]}")
    raise ExternalSystemError(f"Ray at {endpoint.address} answered HTTP {code}: {text[-2000:]}")


def _status_message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, TypeError, KeyError):
        return text[:500]


def _parsed(text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise ExternalSystemError(
            f"what answers is no Ray dashboard but perhaps a proxy's page; check the connection's host: {text[:200]!r}"
        )
    return value


def decoded(text: str) -> dict[str, Any]:
    """The object that an answer holds."""
    return _parsed(text, dict)


def logs_of(code: int, text: str) -> str:
    """The log that an answer holds."""
    return "" if code == 404 else str(decoded(text).get("logs") or "")


def job_of(submission_id: str, code: int, text: str) -> Job:
    """The job that an answer describes."""
    if code == 404:
        if "does not exist" not in text:
            raise ExternalSystemError(f"no Ray dashboard answers at this address: HTTP 404 {text[:200]}")
        return Job.lost(submission_id)
    return Job.of(submission_id, decoded(text))


def jobs_of(text: str) -> dict[str, Job]:
    """The submitted jobs that an answer lists."""
    # Drivers that were not submitted have no submission id.
    names = ((value.get("submission_id"), value) for value in _parsed(text, list))
    return {name: Job.of(name, value) for name, value in names if name}


def _seconds(milliseconds: Any) -> float | None:
    return milliseconds / 1000 if isinstance(milliseconds, int | float) and milliseconds else None
