"""Evidence from Prometheus: counters and histogram buckets by arm and replica, never ratios."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, MlopsError
from airflow_mlops.rollout.observation import Observation
from airflow_mlops.rollout.sources.prometheus_api import PrometheusApi, Series, described
from airflow_mlops.rollout.sources.promql import PART, metric_of, placeholders, render, selectors, union, value_and_time
from airflow_mlops.rollout.sources.protocol import ARMS
from airflow_mlops.rollout.sources.query_sets import COUNT, HISTOGRAM, MOMENTS, Metric, QuerySet
from airflow_mlops.rollout.sources.samples import Unusable, count_of, histogram_of, squares_bound
from airflow_mlops.rollout.targets.protocol import TargetState

if TYPE_CHECKING:
    import aiohttp

#: Placeholders whose value differs between the arms: a query with one is asked for each, one without must tell them.
PER_ARM = frozenset({"arm", "version", "workload", "index"})
ANY = "any"
#: Labels that differ between two scrapes of the same thing.
SCRAPES = ("job", "instance", "prometheus", "prometheus_replica")


@dataclass
class _Part:
    """What came back for one part of one metric and arm: replica to (le to) value, and to its newest sample's time."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)

    def time(self, replica: str) -> float | None:
        """When the replica's newest sample was taken; for a value without a replica the newest of all."""
        return self.times.get(replica) or (max(self.times.values(), default=None) if replica == "" else None)


class PrometheusSource:
    """Reads both arms' counters with one HTTP request per metric, all at once and for the same instant.

    All counts come in one request, so that one snapshot has them: errors never exceed requests because a scrape came
    between two answers. Counters are given as they are, also after a reset, by replica. After a change of the weights
    nothing is given until every replica was scraped anew: what came before followed the old weights.

    A replica whose newest sample is older than ``max_age`` is left out, an arm without a fresh one is a problem. To see
    that takes the samples' own time, for an instant query gives what is up to five minutes old.

    :param api: where to ask
    :param queries: what to ask
    :param metrics: names of the metrics that are needed, those the guardrails read; None means all of ``queries``.
        Any of them that an arm lacks is a problem; ``requests`` is always needed
    :param name: ``{name}`` in the queries: the rollout's route or service
    :param namespace: ``{namespace}`` in the queries
    :param workload: template of ``{workload}``, one for both arms or one each; None: the name that the target gives,
        else that of ``queries``
    :param labels: values of further placeholders
    :param arm_label: label that tells the arms in the answer to a query that is asked for both at once; its values are
        ``stable`` and ``canary``, versions or workloads
    :param max_age: seconds after which a sample is stale
    :param delay: seconds before now that is asked for, so that scrapes under way and ingestion are over
    :param settle: seconds from a change of the weights until all traffic follows it; that of ``queries`` if None
    """

    def __init__(
        self,
        api: PrometheusApi,
        queries: QuerySet,
        *,
        metrics: Iterable[str] | None = None,
        name: str = "",
        namespace: str | None = None,
        workload: str | Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        arm_label: str = "version",
        max_age: float = 90.0,
        delay: float = 1.0,
        settle: float | None = None,
    ) -> None:
        needed = set(queries.metrics if metrics is None else metrics) | {"requests"}
        unknown = sorted(needed - set(queries.metrics))
        if unknown:
            raise InvalidInputError(
                f"no query is known for the metric {', '.join(unknown)}; add one to queries, which have "
                f"{', '.join(sorted(queries.metrics))}"
            )
        for option, value, least in (("max_age", max_age, 1e-3), ("delay", delay, 0), ("settle", settle or 0, 0)):
            if not isinstance(value, int | float) or not math.isfinite(value) or value < least:
                raise InvalidInputError(f"{option} is {value!r}; expected seconds, at least {least:g}")
        self._api, self._queries = api, queries
        self.metrics = {name: metric for name, metric in queries.metrics.items() if name in needed}
        self._name, self._namespace = name, namespace
        self._workload = workload
        self._labels = {**queries.labels, **(labels or {})}
        self._arm_label, self._max_age, self._delay = arm_label, max_age, delay
        self._settle = queries.settle if settle is None else settle
        self._epoch: str | None = None
        self._since = 0.0

    async def check(self, state: TargetState, now: float) -> None:
        """Ask once and raise for what no waiting mends.

        :raises InvalidInputError: Prometheus refuses a query or the credentials, a query gives several series where one
            is expected or no counts, Prometheus knows no metric of a query's name, or has each request twice
        """
        try:
            async with self._api.session() as session:
                parts = await self._ask(session, state, now)
                await self._check_names(session, parts, now)
                await self._check_scraped_once(session, state, now)
            self._counters(parts, now - self._delay, bare=True)
        except InvalidInputError:
            raise
        except Unusable as error:
            if error.permanent:
                raise InvalidInputError(str(error)) from None
        except MlopsError:
            return

    async def observe(self, state: TargetState, now: float) -> Observation:
        """Counters of both arms shortly before ``now``; never raises."""
        if state.epoch != self._epoch:
            self._epoch, self._since = state.epoch, now
        common: dict[str, Any] = {"time": now, "epoch": state.epoch, "weight": state.weight, "shadow": state.shadow}
        if state.problem:
            return Observation(**common, problem=state.problem)
        try:
            async with self._api.session() as session:
                parts = await self._ask(session, state, now)
            arms, oldest = self._counters(parts, now - self._delay, full=state.weight >= 100)
        except (MlopsError, Unusable) as error:
            return Observation(**common, problem=str(error))
        waiting = self._since + self._settle - oldest
        if waiting > 0:
            problem = "the weights have changed and not every replica was scraped since"
            return Observation(**common, problem=f"{problem} (missing {waiting:.1f} s)")
        return Observation(**common, stable=arms["stable"], canary=arms["canary"], routed=state.routed)

    def _values(self, state: TargetState) -> dict[str, dict[str, str | None]]:
        """Of each arm, the placeholders' values."""
        shared: dict[str, str | None] = {
            "name": self._name or None,
            "namespace": self._namespace,
            "stable": state.stable,
            "canary": state.canary,
            **self._labels,
        }
        known = state.workloads or {}
        values = {}
        for index, arm in enumerate(ARMS):
            own = {**shared, "arm": arm, "version": shared[arm], "index": str(index)}
            template = self._workload.get(arm) if isinstance(self._workload, Mapping) else self._workload
            name = known.get(arm) if template is None else None
            if name is None and own["version"] is not None:
                try:
                    name = render(f'"{template or self._queries.workload}"', own)[1:-1]
                except InvalidInputError:
                    name = None  # Needed only where a query has {workload}, and that says so.
            values[arm] = {**own, "workload": name}
        return values

    async def _ask(self, session: aiohttp.ClientSession, state: TargetState, now: float) -> dict[str, dict[str, _Part]]:
        """Arm to ``metric.part`` to what came back."""
        values = self._values(state)
        missing = [arm for arm in ARMS if values[arm]["version"] is None]
        if missing:
            raise ExternalSystemError(f"the target has no {' and no '.join(missing)} version")
        groups: dict[str, dict[str, str]] = {}
        for name, metric in self.metrics.items():
            group = groups.setdefault("the counts" if metric.kind == COUNT else name, {})
            for part, template in metric.parts.items():
                group.update(self._rendered(f"{name}/{part}", template, part, values))
        asked = [self._answer(session, group, queries, now) for group, queries in groups.items()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        # What no retry mends is the more useful thing to say.
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in sorted(failures, key=lambda error: not isinstance(error, InvalidInputError)):
            raise failure
        found: dict[str, dict[str, _Part]] = {arm: {} for arm in ARMS}
        for answer in answers:
            assert not isinstance(answer, BaseException)
            for series in answer:
                self._file(found, series, values)
        return found

    def _rendered(
        self, key: str, template: str, part: str, values: Mapping[str, Mapping[str, str | None]]
    ) -> dict[str, str]:
        edges = ["le"] if part in (HISTOGRAM, "buckets") else []
        per_arm = bool(placeholders(template) & PER_ARM)
        replica = self._queries.replica if per_arm else (*self._queries.replica, self._arm_label)
        queries = {}
        for arm in ARMS if per_arm else (ANY,):
            value, time = value_and_time(render(template, values["stable" if arm == ANY else arm]), replica, edges)
            queries[f"{arm}/{key}/value"], queries[f"{arm}/{key}/time"] = value, time
        return queries

    async def _answer(
        self, session: aiohttp.ClientSession, group: str, queries: Mapping[str, str], now: float
    ) -> list[Series]:
        try:
            return await self._api.query(session, union(queries), now - self._delay)
        except (InvalidInputError, ExternalSystemError) as error:
            raise type(error)(f"{group}: {error}") from None

    def _file(
        self,
        found: dict[str, dict[str, _Part]],
        series: Series,
        values: Mapping[str, Mapping[str, str | None]],
    ) -> None:
        labels = dict(series.labels)
        try:
            arm, name, part, what = labels.pop(PART, "").split("/")
        except ValueError:
            message = f"answers in a form that cannot be read: {described(labels)} was not asked for"
            raise ExternalSystemError(f"Prometheus at {self._api.url} {message}") from None
        if arm == ANY:
            label = labels.pop(self._arm_label, None)
            arms = [arm for arm in ARMS if label in (arm, values[arm]["version"], values[arm]["workload"])]
            if label is None:
                raise InvalidInputError(
                    f"the query {name!r} does not tell the arms: its series {described(labels)} has no label "
                    f"{self._arm_label!r}. Aggregate by it as well, or select one arm with {{version}} or {{workload}}"
                )
            if not arms:
                return
            arm = arms[0]
        replica = "/".join(filter(None, (labels.pop(each, "") for each in self._queries.replica)))
        target = found[arm].setdefault(f"{name}.{part}", _Part())
        if what == "time":
            if math.isfinite(series.value):
                target.times[replica] = max(series.value, target.times.get(replica, -math.inf))
            return
        edge = labels.pop("le", "") if part in (HISTOGRAM, "buckets") else ""
        cell = target.values.setdefault(replica, {})
        if edge in cell:
            of = f" of replica {replica!r}" if replica else ""
            by = ", ".join([*(["le"] if edge else []), *self._queries.replica])
            differing = f"they differ in {', '.join(sorted(labels))}" if labels else "they have no label to tell them"
            raise InvalidInputError(
                f"the query {name!r} gives several series for the {arm} arm{of}: {differing}, for example "
                f"{described(labels)}. Aggregate them: sum by ({by}) (...)"
            )
        cell[edge] = series.value

    async def _check_names(self, session: aiohttp.ClientSession, parts: Mapping[str, Any], now: float) -> None:
        """:raises InvalidInputError: nothing of a needed metric is there, and Prometheus knows no such name at all"""
        for name, metric in self.metrics.items():
            for part, template in metric.parts.items():
                if metric.zero or any(parts[arm].get(f"{name}.{part}") for arm in ARMS):
                    continue
                for known in filter(None, map(metric_of, selectors(template))):
                    if not await self._api.query(session, f"count({known})", now):
                        raise InvalidInputError(
                            f"the query {name!r} reads {known}, of which Prometheus has no series at all: is the name "
                            "right for the version in use, and is what exposes it scraped?"
                        )

    async def _check_scraped_once(self, session: aiohttp.ClientSession, state: TargetState, now: float) -> None:
        """:raises InvalidInputError: one replica's requests come from several scrapes, whose sum counts all twice"""
        template = self.metrics["requests"].parts[COUNT]
        if selectors(template) != [template.strip()] or not placeholders(template) & PER_ARM:
            return  # Who writes an expression says how to sum up.
        for values in self._values(state).values():
            by = ", ".join(dict.fromkeys([*self._queries.replica, *SCRAPES]))
            origins: dict[str, list[str]] = {}
            for series in await self._api.query(session, f"group by ({by}) ({render(template, values)})", now):
                labels = dict(series.labels)
                replica = "/".join(labels.pop(each, "") for each in self._queries.replica)
                origins.setdefault(replica, []).append(described(labels))
            for replica, found in origins.items():
                if len(found) > 1:
                    raise InvalidInputError(
                        f"the requests of replica {replica!r} are in Prometheus {len(found)} times: "
                        f"{', '.join(found)}. If it is scraped twice, name one job in a query of your own; if they are "
                        f"different requests, give the sum yourself: sum by ({', '.join(self._queries.replica)}) (...)"
                    )

    def _counters(
        self, parts: Mapping[str, Mapping[str, _Part]], at: float, *, full: bool = False, bare: bool = False
    ) -> tuple[dict[str, dict[str, dict[str, Any]] | None], float]:
        """Both arms' counters by replica, and the time of the oldest newest sample among them.

        :param full: all traffic goes to the canary, so that stable may be gone
        :param bare: only look for what is wrong with the numbers, not for what is missing
        """
        arms: dict[str, dict[str, dict[str, Any]] | None] = {}
        times: list[float] = []
        for arm in ARMS:
            try:
                arms[arm], oldest = self._arm(arm, parts[arm], at)
                times.append(oldest)
            except _Missing as error:
                if arm == "stable" and full:
                    arms[arm] = None
                elif not bare:
                    raise Unusable(str(error)) from None
        return arms, min(times, default=-math.inf)

    def _arm(self, arm: str, parts: Mapping[str, _Part], at: float) -> tuple[dict[str, dict[str, Any]], float]:
        requests = parts.get("requests.count", _Part())
        if not requests.values:
            raise _Missing(f"Prometheus has no requests of the {arm} arm")
        counters: dict[str, dict[str, Any]] = {}
        stamps: list[float] = []
        stale: list[float] = []
        for replica in requests.values:
            # A replica whose parts are not all fresh would mix two instants.
            times = [part.time(replica) for part in parts.values() if replica in part.values]
            newest = min((time for time in times if time is not None), default=-math.inf)
            if not at - newest <= self._max_age:
                stale.append(newest)
                continue
            counters[replica] = self._replica(arm, replica, parts)
            stamps.append(newest)
        if not counters:
            age = f"{at - max(stale):.0f} s old" if max(stale) > 0 else "of unknown age"
            raise _Missing(f"the newest sample of the {arm} arm is {age}, stale after {self._max_age:g} s")
        for name, metric in self.metrics.items():
            kind = {COUNT: "counts", HISTOGRAM: "histograms", MOMENTS: "moments"}[metric.kind]
            if not any(name in each[kind] for each in counters.values()):
                raise _Missing(self._why_missing(arm, name, metric, parts, counters))
        return counters, min(stamps)

    def _why_missing(
        self, arm: str, name: str, metric: Metric, parts: Mapping[str, _Part], counters: Mapping[str, Any]
    ) -> str:
        text = f"Prometheus has no {name} of the {arm} arm"
        if metric.kind == MOMENTS:
            absent = [part for part in metric.parts if not parts.get(f"{name}.{part}", _Part()).values]
            if not set(metric.parts) & {"squares", "buckets"}:
                return f"{text}: without squares or buckets a mean has no variance and cannot be tested"
            if absent:
                text += f": no series of its {', '.join(absent)}"
        others = sorted(
            {replica for part, each in parts.items() if part.startswith(f"{name}.") for replica in each.values}
        )
        if others:
            text += (
                f" under the same replicas: requests have {sorted(counters)[:3]}, {name} has {others[:3]}; aggregate "
                f"all queries by {', '.join(self._queries.replica)}"
            )
        return text

    def _replica(self, arm: str, replica: str, parts: Mapping[str, _Part]) -> dict[str, Any]:
        result: dict[str, Any] = {"counts": {}, "histograms": {}, "moments": {}}
        of = f"of the {arm} arm" + (f", replica {replica}" if replica else "")
        for name, metric in self.metrics.items():
            cells = {
                part: parts[f"{name}.{part}"].values.get(replica) for part in metric.parts if f"{name}.{part}" in parts
            }
            what = f"{name} {of}"
            if metric.kind == COUNT:
                cell = cells.get(COUNT)
                if cell is not None:
                    result["counts"][name] = count_of(cell[""], what)
                elif metric.zero:
                    result["counts"][name] = 0
            elif metric.kind == HISTOGRAM:
                cell = cells.get(HISTOGRAM)
                if cell is not None:
                    result["histograms"][name] = histogram_of(cell, metric.scale, what)
                    moments = _histogram_moments(result["histograms"][name], cells.get("sum"), metric, what)
                    if moments is not None:
                        result["moments"][name] = moments
            else:
                moments = _moments(cells, metric, what)
                if moments is not None:
                    result["moments"][name] = moments
        return result


class _Missing(Exception):
    """An arm has no fresh data of something that is needed."""


def _moments(cells: Mapping[str, Mapping[str, float] | None], metric: Metric, what: str) -> list[float] | None:
    """``[n, sum, sum of squares]``; None when a part is not there, or when there is nothing to take a variance from."""
    count, total = cells.get("count"), cells.get("sum")
    if count is None or total is None:
        return None
    scale = metric.scale
    n, summed = count_of(count[""], f"count of {what}"), total[""] * scale
    squares, buckets = cells.get("squares"), cells.get("buckets")
    if squares is not None:
        squared = squares[""] * scale * scale
    elif buckets is not None:
        found = histogram_of(buckets, scale, what)
        squared = squares_bound(found["edges"], found["counts"], what)
    else:
        return None
    if not math.isfinite(summed) or not math.isfinite(squared):
        raise Unusable(f"{what} has a sum of {summed} and squares of {squared}")
    return [n, summed, squared]


def _histogram_moments(
    histogram: Mapping[str, Any], total: Mapping[str, float] | None, metric: Metric, what: str
) -> list[float] | None:
    """The same from a histogram and its sum; None where its highest bucket bounds nothing."""
    if total is None or not math.isfinite(total[""]):
        return None
    try:
        squares = squares_bound(histogram["edges"], histogram["counts"], what)
    except Unusable:
        return None
    return [sum(histogram["counts"]), total[""] * metric.scale, squares]
