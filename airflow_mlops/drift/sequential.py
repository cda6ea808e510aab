"""Whether a champion's loss has risen, asked again and again as labels arrive late.

:class:`LossTest` bets (:mod:`airflow_mlops.drift.betting`) against "in no cluster of days was the expected loss above
the limit", the limit being the reference's loss, plus its own uncertainty, plus ``epsilon``. The chance that it *ever*
calls harm where there is none is at most ``alpha``: one may look after every cluster, for ever, and stop at will. A
rise of the risk over a reference with its own uncertainty: Podkopaev and Ramdas, "Tracking the risk of a deployed model
and detecting harmful distribution shifts" (ICLR, 2022).

**Dependence.** Rows of one day hang together, so all rows of a cluster of ``days`` count as one number, their mean;
what goes on inside a cluster needs no assumption. That neighbouring clusters hang together is allowed for up to an
autocorrelation of ``correlation``. Where they correlate by more, or weekdays differ, use longer ones, for example
``days=7``.

**Bounded loss.** Losses are clipped at ``bound``. Clipping only lowers a mean, so the error rate holds against an
unclipped reference; a rise that comes only from losses above the bound is not seen. A cluster's mean never lies below
``floor`` (0 for log loss, Brier score and error rate), which limits the stakes; a floor known to be higher finds
strong harm sooner.

**Late labels.** A cluster is judged when all of it lies before ``matured_until``, with whatever labels it has then;
before that its rows wait, since labels that come early are no random sample.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
from scipy import stats

from airflow_mlops.drift.betting import AT_LIMIT, LEVELS, Capital
from airflow_mlops.drift.clusters import cluster_of, day_of, end_of, sums_by_cluster
from airflow_mlops.drift.harm import Estimate
from airflow_mlops.drift.limits import check_ranges, known_fields
from airflow_mlops.exceptions import InvalidInputError

VERSION = 1


@dataclass(frozen=True)
class LossState:
    """What a :class:`LossTest` has seen.

    :param matured_until: latest maturity told so far, ISO 8601 in UTC
    :param waiting: cluster (ISO date of its first day) -> batch, or span "start/end" within a day -> rows, rows with a
        loss, sum of their losses
    :param capital: the bettors; None before the first judged cluster
    :param looks: clusters judged
    :param rows: rows with a loss in them
    :param total: sum of the judged clusters' means
    :param skipped: clusters with too few labels when they matured
    :param below_floor: clusters judged whose mean lay below the floor
    :param since: the first cluster by which harm was shown
    """

    matured_until: str | None = None
    waiting: Mapping[str, Mapping[str, tuple[int, int, float]]] = field(default_factory=dict)
    capital: Capital | None = None
    looks: int = 0
    rows: int = 0
    total: float = 0.0
    skipped: int = 0
    below_floor: int = 0
    since: str | None = None


@dataclass(frozen=True)
class LossVerdict:
    """What the test says now.

    :param verdict: ``harm`` (once shown, it stays), ``stable`` (no rise shown) or ``not_enough_data``
    :param harmful: whether ``evidence`` has reached what the test's ``alpha`` asks
    :param evidence: the highest capital so far, from a stake of 1; an e-value, 1 / evidence is a p-value
    :param needed: the evidence that is harm
    :param looks: clusters judged
    :param mean: mean of their mean losses; None before the first
    :param low: with the test's confidence, the expected loss of some cluster was above this
    :param limit: the loss that is tolerated: reference, its uncertainty and epsilon
    :param autocorrelation: of neighbouring clusters, as far as it is known
    :param since: first day of the cluster by which harm was shown
    :param waiting: clusters with rows whose labels have not matured
    :param skipped: clusters that matured with too few labels
    :param late_rows: rows in this update that belong to clusters judged or skipped before; they change nothing
    :param reasons: why, in words
    """

    verdict: str
    harmful: bool
    evidence: float
    needed: float
    looks: int
    mean: float | None
    low: float
    limit: float
    autocorrelation: float
    since: str | None
    waiting: int
    skipped: int
    late_rows: int
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON, without NaN."""
        return {**asdict(self), "reasons": list(self.reasons)}


@dataclass(frozen=True)
class LossTest:
    """A test of one champion against its own reference; immutable, :meth:`update` returns its successor.

    :param reference: mean loss of the champion on the data it was accepted on, with its standard error by cluster,
        for example :attr:`LossReference.log_loss`
    :param epsilon: rise that is harmless, in the loss's unit
    :param alpha: bound on the chance of ever calling harm where there is none
    :param reference_share: part of ``alpha`` spent on the reference's uncertainty (Student's t over its clusters);
        0 takes the reference's mean as exact
    :param floor: no cluster's mean loss lies below this
    :param bound: losses are clipped to this
    :param days: days in a cluster
    :param correlation: largest autocorrelation of neighbouring clusters that the error rate is kept for, at the price
        of power; 0 where clusters are independent
    :param zone: time zone in which a day begins
    :param min_labelled: share of a cluster's rows whose loss must be known at maturity, else it is skipped
    """

    reference: Estimate
    epsilon: float = 0.02
    alpha: float = 0.01
    reference_share: float = 0.5
    floor: float = 0.0
    bound: float = 5.0
    days: int = 1
    correlation: float = 0.5
    zone: str = "UTC"
    min_labelled: float = 0.8
    state: LossState = field(default_factory=LossState)

    @classmethod
    def from_fields(cls, reference: Estimate, value: Mapping[str, Any]) -> LossTest:
        """A new test from a mapping of its parameters; numbers may be strings, as templates render them.

        :raises InvalidInputError: an unknown parameter, or a value out of range
        """
        if given := sorted({"reference", "state"} & set(value)):
            raise InvalidInputError(f"unknown field(s) of a loss test: {', '.join(given)}")
        test = cls(reference, **known_fields(cls, "loss test", value))
        test.check()
        return test

    def check(self) -> None:
        """Raise :class:`InvalidInputError` when a parameter is out of range."""
        check_ranges(self, "loss test", _RANGES)
        if not isinstance(self.days, int):
            raise InvalidInputError(f"loss test: days is {self.days!r}; expected a whole number")
        try:
            ZoneInfo(self.zone)
        except (KeyError, ValueError, OSError, TypeError) as error:
            raise InvalidInputError(
                f"loss test: {self.zone!r} is no time zone; expected a name like 'Europe/Zurich' or 'UTC'"
            ) from error
        reference = self.reference
        if not (math.isfinite(reference.mean) and math.isfinite(reference.se)) or reference.se < 0:
            raise InvalidInputError(f"loss test: the reference is {reference}; measure it again on labelled rows")
        if reference.se > 0 and reference.clusters < 2:
            raise InvalidInputError(
                f"loss test: the reference has {reference.clusters} clusters; expected at least 2, for example days"
            )
        if not self.floor < self.limit < self.bound:
            raise InvalidInputError(
                f"loss test: losses up to {self.limit:.4g} are tolerated, which must lie between floor {self.floor:g} "
                f"and bound {self.bound:g}; raise the bound, lower the floor or epsilon, or measure the reference on "
                "more days"
            )

    @property
    def limit(self) -> float:
        """The loss that is tolerated."""
        margin = 0.0
        if self.reference_share > 0 and self.reference.se > 0:
            margin = self.reference.se * float(
                stats.t.isf(self.alpha * self.reference_share, self.reference.clusters - 1)
            )
        return self.reference.mean + margin + self.epsilon

    def update(
        self, times: Any, losses: Any, *, matured_until: dt.datetime, batch: str
    ) -> tuple[LossVerdict, LossTest]:
        """Take in rows in any order, then judge the clusters that have matured.

        Rows go under their ``batch``: giving a batch again replaces what it gave before, so a repeated task changes
        nothing, and the order in which batches come changes nothing as long as they come before their days mature.

        :param times: when each row was predicted, with a time zone
        :param losses: loss by row, missing where the label is not known; infinity is clipped to ``bound``
        :param matured_until: labels of rows predicted before this are all there that will be: now less the label
            delay; never goes back
        :param batch: what identifies these rows, for example the start of their window
        :return: the verdict, and the test to go on with
        :raises DataError: lengths differ, a time is missing or has no zone
        :raises InvalidInputError: a parameter is out of range, or ``matured_until`` has no zone
        """
        self.check()
        if not isinstance(matured_until, dt.datetime) or matured_until.tzinfo is None:
            raise InvalidInputError(
                f"matured_until is {matured_until!r}; expected a datetime with a time zone: now less the label delay"
            )
        matured = matured_until.astimezone(dt.timezone.utc)
        if self.state.matured_until is not None:
            matured = max(matured, dt.datetime.fromisoformat(self.state.matured_until))
        groups = sums_by_cluster(times, losses, days=self.days, zone=self.zone, bound=self.bound)
        late = sum(rows for key, (rows, _, _) in groups.items() if self._closed(key))
        waiting = {
            key: {name: value for name, value in batches.items() if name != batch}
            for key, batches in self.state.waiting.items()
        }
        for key, group in groups.items():
            if not self._closed(key):
                waiting.setdefault(key, {})[batch] = group
        state = replace(self.state, matured_until=matured.isoformat(), waiting={})
        left = {}
        for key in sorted(key for key, batches in waiting.items() if batches):
            if end_of(key, self.days, self.zone) <= matured:
                state = self._judge(state, key, waiting[key])
            else:
                left[key] = waiting[key]
        test = replace(self, state=replace(state, waiting=left))
        return test._verdict(late), test

    def update_from(
        self, times: Any, losses: Any, *, since: dt.datetime, until: dt.datetime, matured_until: dt.datetime
    ) -> tuple[LossVerdict, LossTest]:
        """As :meth:`update`, with all the rows there are from ``since`` to ``until``, given before or not.

        Rows go under their day, and every row counts once: what waits of a day is replaced, unless it has more rows. So
        spans may overlap, and labels that come late are found by reading from :attr:`open_from` on. Rows outside the
        span and of clusters that have been judged are passed over.

        :param since: with a time zone
        :param until: likewise
        """
        self.check()
        since = since if self.open_from is None else max(since, self.open_from)
        waiting = {key: dict(batches) for key, batches in self.state.waiting.items()}
        inside: dict[str, list[tuple[str, str]]] = {}
        for key, batches in waiting.items():
            for name in batches:
                start, end = _ends(name)
                if start is None or end is None or end <= since or start >= until:
                    continue
                if start < since:  # part of a day that the rows given have but the rest of
                    since = end
                elif end > until:
                    until = start
                else:
                    inside.setdefault(day_of(start, self.zone).isoformat(), []).append((key, name))
        groups = {}
        if since < until:
            groups = sums_by_cluster(times, losses, days=1, zone=self.zone, bound=self.bound, span=(since, until))
        for day, group in groups.items():
            begin, end = end_of(day, 0, self.zone), end_of(day, 1, self.zone)
            old = inside.get(begin.isoformat(), [])
            if sum(waiting[key][name][0] for key, name in old) > group[0]:
                continue
            for key, name in old:
                del waiting[key][name]
            piece = f"{max(begin, since).isoformat()}/{min(end, until).isoformat()}"
            waiting.setdefault(cluster_of(day, self.days), {})[piece] = group
        test = replace(self, state=replace(self.state, waiting=waiting))
        return test.update([], [], matured_until=matured_until, batch="")

    @property
    def open_from(self) -> dt.datetime | None:
        """Start of the first cluster that has not matured, in UTC; None before the first update."""
        if self.state.matured_until is None:
            return None
        day = day_of(dt.datetime.fromisoformat(self.state.matured_until), self.zone).astimezone(ZoneInfo(self.zone))
        return end_of(cluster_of(day.date().isoformat(), self.days), 0, self.zone)

    def differs(self, other: LossTest) -> list[str]:
        """The parameters that another test has otherwise; what the two have seen does not matter."""
        names = (*_RANGES, "zone", "reference")
        return sorted(name for name in names if getattr(self, name) != getattr(other, name))

    def unlabelled(self, before: dt.datetime) -> int:
        """Clusters that are over by ``before`` and wait with too few labels to be judged."""
        found = 0
        for key, batches in self.state.waiting.items():
            rows, known = (sum(group[place] for group in batches.values()) for place in (0, 1))
            found += end_of(key, self.days, self.zone) <= before and (not known or known < self.min_labelled * rows)
        return found

    def _closed(self, key: str) -> bool:
        matured = self.state.matured_until
        return matured is not None and end_of(key, self.days, self.zone) <= dt.datetime.fromisoformat(matured)

    def _judge(self, state: LossState, key: str, batches: Mapping[str, tuple[int, int, float]]) -> LossState:
        rows = sum(batch[0] for batch in batches.values())
        known = sum(batch[1] for batch in batches.values())
        if not known or known < self.min_labelled * rows:
            return replace(state, skipped=state.skipped + 1)
        mean = sum(batch[2] for batch in batches.values()) / known
        # The clusters of the reference show how far means of clusters spread; a tenth of the limit when they do not.
        reference = self.reference
        room = self.limit - self.floor
        variance = max(reference.se**2 * reference.clusters, (0.1 * room) ** 2)
        capital = state.capital or Capital.start(reference.mean, variance, self.correlation)
        levels = self.floor + room * LEVELS
        rise = math.sqrt(variance) / 2
        capital = capital.bet(max(mean, self.floor), levels, self.floor, rise, variance, self.correlation)
        shown = capital.best[AT_LIMIT] >= math.log(self.needed)
        return replace(
            state,
            capital=capital,
            looks=state.looks + 1,
            rows=state.rows + known,
            total=state.total + mean,
            below_floor=state.below_floor + (mean < self.floor),
            since=state.since or (key if shown else None),
        )

    @property
    def needed(self) -> float:
        """The evidence that is harm: one over what the reference leaves of ``alpha``."""
        share = self.reference_share if self.reference.se > 0 else 0.0
        return 1 / (self.alpha * (1 - share))

    def _verdict(self, late: int) -> LossVerdict:
        state, limit = self.state, self.limit
        best = state.capital.best if state.capital else np.zeros(len(LEVELS))
        exceeded = int(np.argmin([*(best >= math.log(self.needed)), False]))
        low = self.floor + (limit - self.floor) * float(LEVELS[exceeded - 1]) if exceeded else self.floor
        harmful = state.since is not None
        reasons = []
        if harmful:
            reasons.append(f"by the cluster of {state.since} the loss was shown to be above {limit:.4g}")
        if not state.looks:
            reasons.append("no cluster has been judged yet: wait until labels have matured")
        if state.skipped:
            reasons.append(
                f"{state.skipped} clusters matured with fewer than {self.min_labelled:.0%} of their labels and were "
                "left out: tell a later maturity"
            )
        if state.below_floor:
            reasons.append(
                f"{state.below_floor} clusters had a mean loss below the floor {self.floor:g}: lower the floor, the "
                "error rate does not hold"
            )
        enough = state.looks > 0 and state.skipped <= state.looks and not state.below_floor
        if enough and not harmful:
            reasons.append(f"no loss above {limit:.4g} shown in {state.looks} looks")
        return LossVerdict(
            verdict="harm" if harmful else "stable" if enough else "not_enough_data",
            harmful=harmful,
            evidence=math.exp(min(float(best[AT_LIMIT]), 700.0)),
            needed=self.needed,
            looks=state.looks,
            mean=state.total / state.looks if state.looks else None,
            low=low,
            limit=limit,
            autocorrelation=float(state.capital.correlation) if state.capital else self.correlation,
            since=state.since,
            waiting=len(state.waiting),
            skipped=state.skipped,
            late_rows=late,
            reasons=tuple(reasons),
        )

    def to_json(self) -> dict[str, Any]:
        """The test with all it has seen as JSON, a few kilobytes."""
        parameters = {name: getattr(self, name) for name in (*_RANGES, "zone")}
        state = {name: getattr(self.state, name) for name in LossState.__dataclass_fields__}
        state["capital"] = self.state.capital.to_json() if self.state.capital else None
        state["waiting"] = {
            key: {name: list(value) for name, value in batches.items()} for key, batches in self.state.waiting.items()
        }
        return {"loss_test_version": VERSION, "reference": asdict(self.reference), **parameters, "state": state}

    @classmethod
    def from_json(cls, value: Any) -> LossTest:
        """The inverse of :meth:`to_json`.

        :raises InvalidInputError: not a loss test, a newer version, or damaged
        """
        if not isinstance(value, dict) or not isinstance(value.get("loss_test_version"), int):
            raise InvalidInputError("this is not a loss test; expected JSON written by LossTest.to_json()")
        if value["loss_test_version"] > VERSION:
            raise InvalidInputError(
                f"the loss test has version {value['loss_test_version']}, this airflow-mlops reads up to {VERSION}: "
                "upgrade airflow-mlops here"
            )
        try:
            test = cls(
                reference=Estimate(**value["reference"]),
                **{name: value[name] for name in (*_RANGES, "zone")},
                state=_state(value["state"]),
            )
            test.check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(
                f"the loss test is damaged ({error}); start a new one from the champion's reference"
            ) from error
        return test


_RANGES = {
    "epsilon": (0.0, math.inf),
    "alpha": (1e-12, 0.5),
    "reference_share": (0.0, 0.99),
    "floor": (-1e12, 1e12),
    "bound": (-1e12, 1e12),
    "days": (1, 366),
    "correlation": (0.0, 0.9),
    "min_labelled": (0.0, 1.0),
}


def _ends(batch: str) -> tuple[dt.datetime | None, dt.datetime | None]:
    """Start and end of the span that a batch is named by; None where it has another name."""
    start, _, end = batch.partition("/")
    try:
        found = dt.datetime.fromisoformat(start), dt.datetime.fromisoformat(end)
    except ValueError:
        return None, None
    return found if found[0].tzinfo and found[1].tzinfo else (None, None)


def _state(value: Mapping[str, Any]) -> LossState:
    counts = {name: value[name] for name in ("looks", "rows", "skipped", "below_floor")}
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in counts.values()):
        raise ValueError(f"counts are {counts}")
    capital = None if value["capital"] is None else Capital.from_json(value["capital"])
    if (capital is None) != (counts["looks"] == 0) or not math.isfinite(value["total"]):
        raise ValueError("looks, total and capital do not fit each other")
    if value["matured_until"] is not None and dt.datetime.fromisoformat(value["matured_until"]).tzinfo is None:
        raise ValueError("matured_until has no time zone")
    for day in [*value["waiting"], *([value["since"]] if value["since"] is not None else [])]:
        dt.date.fromisoformat(day)
    waiting = {
        key: {str(name): (int(rows), int(known), float(total)) for name, (rows, known, total) in batches.items()}
        for key, batches in value["waiting"].items()
    }
    return LossState(
        matured_until=value["matured_until"],
        waiting=waiting,
        capital=capital,
        total=float(value["total"]),
        since=value["since"],
        **counts,
    )
