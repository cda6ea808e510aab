"""Prometheus's HTTP API for instant queries, of Prometheus itself and of what speaks like it (Thanos, Mimir)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError

if TYPE_CHECKING:
    import ssl

    import aiohttp

#: An answer for fifty replicas with histograms has less than 1 MiB; one of more is a query that selects too much.
MAX_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Series:
    """One element of an instant vector."""

    labels: Mapping[str, str]
    value: float


class PrometheusApi:
    """Instant queries at one server.

    :param url: of the server, with the path before ``/api/v1``
    :param headers: of every request: credentials, tenant; they are never shown
    :param ssl: True, False or a context, as aiohttp takes it
    :param timeout: seconds for one request
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        ssl: bool | ssl.SSLContext = True,
        timeout: float = 10.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._headers, self._ssl, self._timeout = dict(headers or {}), ssl, timeout

    def session(self) -> aiohttp.ClientSession:
        """For the queries of one look."""
        import aiohttp

        return aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=self._timeout))

    async def query(self, session: aiohttp.ClientSession, query: str, at: float | None = None) -> list[Series]:
        """The instant vector of ``query`` at the Unix time ``at``.

        :raises InvalidInputError: Prometheus refuses the query, or us; no retry mends that
        :raises ExternalSystemError: no answer, or one that cannot be believed
        """
        import aiohttp

        form = {"query": query, "timeout": f"{self._timeout:g}s"}
        if at is not None:
            form["time"] = f"{at:.3f}"
        try:
            status, text = await self._send(session, "POST", form)
            if status == 405:
                status, text = await self._send(session, "GET", form)
        except TimeoutError:
            raise ExternalSystemError(f"Prometheus at {self.url} has not answered in {self._timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ExternalSystemError(f"Prometheus at {self.url} cannot be reached: {_words(error)}") from None
        return _vector(self.url, status, text)

    async def _send(self, session: aiohttp.ClientSession, method: str, form: dict[str, str]) -> tuple[int, str]:
        url = f"{self.url}/api/v1/query"
        # A proxy that wants a login redirects to it: its page is no answer, and must not get the credentials.
        options: dict[str, Any] = {"ssl": self._ssl, "allow_redirects": False}
        options["data" if method == "POST" else "params"] = form
        async with session.request(method, url, **options) as answer:
            content = bytearray()
            async for chunk in answer.content.iter_chunked(1 << 16):
                content += chunk
                if len(content) > MAX_BYTES:
                    raise ExternalSystemError(
                        f"Prometheus at {self.url} answers with more than {MAX_BYTES >> 20} MiB; the query selects too "
                        "many series: name the arms by a label and sum up by replica"
                    )
            return answer.status, content.decode(errors="replace")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _vector(url: str, status: int, text: str) -> list[Series]:
    where = f"Prometheus at {url}"
    if status in (401, 403):
        raise InvalidInputError(f"{where} refuses the credentials (HTTP {status}); correct the connection's")
    try:
        answer = json.loads(text)
        if not isinstance(answer, dict):
            raise ValueError("no JSON object")
    except ValueError:
        message = f"{where} answers with HTTP {status} and no JSON: {_start(text)}"
        if status in (301, 302, 303, 307, 308, 404):
            hint = "is the path before /api/v1 right, and does a proxy want a login?"
            raise InvalidInputError(f"{message}; {hint}") from None
        raise ExternalSystemError(message) from None
    if answer.get("status") != "success" or status >= 400:
        message = f"{where} answers with HTTP {status}: {answer.get('errorType')}: {_start(str(answer.get('error')))}"
        permanent = status in (400, 404, 422) or answer.get("errorType") in ("bad_data", "execution")
        raise (InvalidInputError if permanent else ExternalSystemError)(message)
    if answer.get("warnings") or answer.get("isPartial"):
        warnings = "; ".join(map(str, answer.get("warnings") or ["the answer is partial"]))
        raise ExternalSystemError(f"{where} warns, so that something may be missing: {_start(warnings)}")
    try:
        data = answer["data"]
        kind, result = data["resultType"], data["result"]
        if kind != "vector":
            raise InvalidInputError(f"the query gives a {kind}; expected an instant vector, one number per series")
        return [_series(each) for each in result]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise ExternalSystemError(f"{where} answers in a form that cannot be read: {_words(error)}") from None


def _series(element: Mapping[str, Any]) -> Series:
    labels = {str(name): str(value) for name, value in element["metric"].items()}
    if "histogram" in element and "value" not in element:
        raise InvalidInputError(
            f"the series {described(labels)} is a native histogram, whose buckets change as it grows; have classic "
            "buckets scraped as well (always_scrape_classic_histograms, or scrape_classic_histograms before "
            "Prometheus 3) and query those, with _bucket"
        )
    return Series(labels, float(element["value"][1]))


def described(labels: Mapping[str, str]) -> str:
    """Labels as PromQL writes them."""
    return "{" + ", ".join(f'{name}="{value}"' for name, value in sorted(labels.items())) + "}"


def _start(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."


def whole(value: float) -> int | None:
    """A counter's value as a count; ``None`` when it is none. Counters are floats, exact up to 2**53."""
    if not math.isfinite(value) or value < 0 or abs(value - round(value)) > 1e-6:
        return None
    return round(value)
