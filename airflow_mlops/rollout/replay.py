"""Replay recorded requests with their labels against a route, as its users would send them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError

Condition = Callable[[Mapping[str, Any]], bool]


@dataclass
class ReplayReport:
    """What a replay sent and got.

    :param requests: requests answered or failed
    :param failed: requests without an answer (HTTP error, no connection, time-out)
    :param fallbacks: requests the canary failed and stable answered
    :param labels: labels sent
    :param arms: answered requests by arm
    :param seconds: wall time
    :param errors: the first few failures, as text
    :param stopped: whether ``stop_when`` ended it before the rows did
    """

    requests: int = 0
    failed: int = 0
    fallbacks: int = 0
    labels: int = 0
    arms: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def frame_rows(frame: Any, features: Iterable[str], label: str | None, prefix: str = "") -> list[dict[str, Any]]:
    """A pandas frame as rows for :func:`replay`; NaN becomes ``None``.

    :param frame: one row per request
    :param features: columns to send
    :param label: column with the label, or ``None``
    :param prefix: start of every request id; the rest is the row's position
    """
    columns = list(features)
    missing = [name for name in [*columns, *([label] if label else [])] if name not in frame.columns]
    if missing:
        raise InvalidInputError(f"the frame to replay lacks the columns {missing}; it has {list(frame.columns)[:40]}")
    chosen = frame[columns].astype(object).where(frame[columns].notna(), None)
    labels = frame[label].tolist() if label else [None] * len(frame)
    return [
        {"request_id": f"{prefix}{i}", "features": dict(zip(columns, values)), "label": y}
        for i, (values, y) in enumerate(zip(chosen.values.tolist(), labels))
    ]


async def areplay(
    route_url: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    concurrency: int = 16,
    rate: float | None = None,
    max_seconds: float | None = None,
    stop_when: Condition | None = None,
    start_when: Condition | None = None,
    wait_seconds: float = 60.0,
    check_every: float = 0.5,
    batch_size: int = 1,
    single_share: float = 0.2,
    labels_per_call: int = 100,
    timeout: float = 30.0,
) -> ReplayReport:
    """Send ``rows`` in order, at most ``concurrency`` at a time; see :func:`replay`."""
    import aiohttp

    route_url = route_url.rstrip("/")
    report = ReplayReport()
    started = time.monotonic()
    pending: list[dict[str, Any]] = []
    halt = asyncio.Event()
    sent = 0

    def note(error: BaseException) -> None:
        if len(report.errors) < 5:
            report.errors.append(f"{type(error).__name__}: {error}"[:300])

    async def post(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        async with session.post(route_url + path, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:200]}")
            return await response.json()

    async def send_labels(least: int) -> None:
        while pending and len(pending) >= least:
            batch = pending[:labels_per_call]
            del pending[: len(batch)]
            try:
                await post("/feedback", {"items": batch})
                report.labels += len(batch)
            except (aiohttp.ClientError, RuntimeError, TimeoutError) as error:
                note(error)

    def chunks() -> Iterator[list[Mapping[str, Any]]]:
        """Rows to send together: mostly ``batch_size``, and by turns one alone, as only those are timed."""
        single_every = max(round(1 / single_share), 1) if single_share > 0 else 0
        batch: list[Mapping[str, Any]] = []
        for index, row in enumerate(rows):
            if batch_size <= 1 or (single_every and index % single_every == 0):
                yield [row]
            else:
                batch.append(row)
            if len(batch) >= batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def count(row: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            report.failed += 1
            note(RuntimeError(str(answer["error"])))
            return
        report.arms[answer["arm"]] = report.arms.get(answer["arm"], 0) + 1
        report.fallbacks += bool(answer.get("fallback"))
        if row.get("label") is not None:
            pending.append({"request_id": row["request_id"], "label": float(row["label"])})

    async def worker() -> None:
        nonlocal sent
        for chunk in queue:
            if halt.is_set():
                return
            position, sent = sent, sent + len(chunk)
            if rate:
                await asyncio.sleep(max(started + position / rate - time.monotonic(), 0))
            report.requests += len(chunk)
            items = [{"request_id": row["request_id"], "features": row["features"]} for row in chunk]
            try:
                answer = await post("", items[0] if len(items) == 1 else {"items": items})
            except (aiohttp.ClientError, RuntimeError, TimeoutError) as error:
                report.failed += len(chunk)
                note(error)
                continue
            for row, result in zip(chunk, [answer] if len(items) == 1 else answer["results"]):
                count(row, result)
            await send_labels(labels_per_call)

    async def route_state() -> dict[str, Any] | None:
        try:
            async with session.get(route_url + "/state") as response:
                return await response.json() if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def wait_to_start() -> None:
        while True:
            state = await route_state()
            if state is not None and (start_when is None or start_when(state)):
                return
            if time.monotonic() - started > wait_seconds:
                raise ExternalSystemError(
                    f"{route_url} was not ready for the replay within {wait_seconds:g} s: "
                    + ("it does not answer" if state is None else "the rollout waited for did not begin")
                )
            await asyncio.sleep(check_every)

    async def watch() -> None:
        while True:
            if max_seconds is not None and time.monotonic() - started >= max_seconds:
                halt.set()
            state = await route_state() if stop_when is not None else None
            if stop_when is not None and state is not None and stop_when(state):
                report.stopped = True
                halt.set()
            await asyncio.sleep(check_every)

    queue = chunks()
    connector = aiohttp.TCPConnector(limit=concurrency + 4)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=timeout)) as session:
        await wait_to_start()
        started = time.monotonic()
        watcher = asyncio.create_task(watch())
        try:
            workers: list[Awaitable[None]] = [worker() for _ in range(max(1, concurrency))]
            await asyncio.gather(*workers)
            await send_labels(1)
        finally:
            watcher.cancel()
    report.seconds = time.monotonic() - started
    return report


def rollout_begun(model_version: str) -> Condition:
    """A ``start_when`` that is true once ``model_version`` is being rolled out on the route, or has been."""
    return lambda state: str((state.get("rollout") or {}).get("version")) == str(model_version)


def rollout_settled(model_version: str) -> Condition:
    """A ``stop_when`` that is true once the rollout of ``model_version`` on the route has its final verdict."""

    def settled(state: Mapping[str, Any]) -> bool:
        rollout = state.get("rollout") or {}
        return str(rollout.get("version")) == str(model_version) and bool(rollout.get("finished"))

    return settled


def replay(route_url: str, rows: Iterable[Mapping[str, Any]], **options: Any) -> ReplayReport:
    """Send recorded requests, then their labels, until the rows end, time is up or ``stop_when`` says so.

    :param route_url: ``http://host:port/route``
    :param rows: ``{"request_id", "features": {...}, "label": 0 | 1 | None}``; see :func:`frame_rows`
    :param options: ``concurrency`` (16), ``rate`` (requests per second, as fast as possible if not given),
        ``start_when`` (a function of the route's state, awaited up to ``wait_seconds``; without it the replay starts
        when the route answers), ``max_seconds``, ``stop_when`` (a function of the route's state, asked every
        ``check_every`` seconds),
        ``batch_size`` (1: one row per call) with ``single_share`` (0.2, rows still sent alone, which are the ones
        timed), ``labels_per_call`` (100), ``timeout`` (seconds per request)
    :raises ExternalSystemError: the route does not answer, or the rollout does not begin, within ``wait_seconds``
    """
    return asyncio.run(areplay(route_url, rows, **options))
