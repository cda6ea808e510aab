"""When evidence may start a training: not at every swing of it, not too soon after the last, not too often.

A Schmitt trigger with a counter, a cool-down and a budget. A *breach* is a score at or above ``arm``. After
``consecutive_breaches`` windows of it in a row a training is granted, and the trigger is disarmed until a score falls
below ``disarm``. Cool-down and budget count what has been granted.

Everything runs on the windows' own time, so that a backfill decides what the schedule would have decided. A window that
is judged again replaces its own entry and is never counted twice; one older than the newest judged changes nothing.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from airflow_mlops.drift.harm import HarmReport
from airflow_mlops.drift.limits import check_ranges, known_fields
from airflow_mlops.drift.report import ColumnDrift, DriftReport
from airflow_mlops.exceptions import InvalidInputError

STATE_VERSION = 1
_KEPT = 64
_LONGEST = dt.timedelta(days=36_525)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Decision:
    """What was decided on one window.

    :param retrain: whether a training is granted
    :param reason: why not, in words; empty where there is no breach, or it is granted
    :param until: earliest end of a window that may be granted, ISO 8601, where time alone lifts the hold
    :param score: of the window; None without evidence
    :param breaches: breaches in a row, this window included
    :param armed: whether a breach in the next window counts
    :param granted: trainings granted within the budget's window, this one included
    """

    retrain: bool
    reason: str
    until: str | None
    score: float | None
    breaches: int
    armed: bool
    granted: int

    def to_json(self) -> dict[str, Any]:
        """The decision as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Hysteresis:
    """Limits on how often evidence may start a training.

    :param arm: scores from here on are breaches
    :param disarm: after a training was granted, no breach counts until a score was below this
    :param consecutive_breaches: windows in a row with a breach that it takes
    :param cooldown: least time between two trainings, from window end to window end
    :param budget_per_window: most trainings within any ``window``; None for no limit
    :param window: length of the budget's window
    :param rearm_after: arm again after so long without a score below ``disarm``; None for never. Evidence against
        another model than the one that was granted a training arms it anyway; where a gate can turn the challenger
        down, so that the champion stays, give a time after which another may be trained

    Spans are :class:`datetime.timedelta`, seconds, or text such as ``"12h"``, ``"30d"``, ``"4w"``.
    """

    arm: float = 1.0
    disarm: float = 0.5
    consecutive_breaches: int = 1
    cooldown: dt.timedelta = dt.timedelta(0)
    budget_per_window: int | None = None
    window: dt.timedelta = dt.timedelta(days=30)
    rearm_after: dt.timedelta | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Hysteresis:
        """The limits from a mapping of their fields.

        :raises InvalidInputError: an unknown field, or a value out of range
        """
        given = known_fields(cls, "hysteresis", value)
        for name in ("cooldown", "window", "rearm_after"):
            if given.get(name) is not None:
                given[name] = span(name, given[name])
        limits = cls(**given)
        limits.check()
        return limits

    def check(self) -> None:
        """Raise :class:`InvalidInputError` when a value is out of range."""
        check_ranges(self, "hysteresis", {"arm": (1e-9, math.inf), "consecutive_breaches": (1, math.inf)})
        check_ranges(self, "hysteresis", {"disarm": (0.0, self.arm)})
        if self.budget_per_window is not None:
            check_ranges(self, "hysteresis", {"budget_per_window": (0, math.inf)})
        for name in ("consecutive_breaches", "budget_per_window"):
            if (count := getattr(self, name)) is not None and count != int(count):
                raise InvalidInputError(f"hysteresis: {name} is {count!r}; expected a whole number")
        for name in ("cooldown", "window", "rearm_after"):
            length = getattr(self, name)
            if length is None and name == "rearm_after":
                continue
            if not isinstance(length, dt.timedelta) or not dt.timedelta(0) <= length <= _LONGEST:
                raise InvalidInputError(f"hysteresis: {name} is {length!r}; expected a span of time such as '30d'")

    def decide(
        self, state: Mapping[str, Any] | None, score: float | None, at: dt.datetime, subject: str | None = None
    ) -> tuple[Decision, dict[str, Any]]:
        """Whether the window that ends at ``at`` may start a training.

        :param state: what the last call returned; None at the first
        :param score: of the window; None or NaN without evidence, which neither counts nor arms
        :param at: end of the window, which identifies it
        :param subject: what the score is about, for example the champion's version
        :return: the decision, and the state to keep: JSON of a few kilobytes at most
        :raises InvalidInputError: the state is damaged or of a newer version, or ``at`` has no time zone
        """
        log, grants = _parts(state)
        when = _instant(at)
        if score is not None and math.isnan(score):
            score = None
        if log and when < dt.datetime.fromisoformat(log[-1]["at"]):
            return self._late(log, grants, when, score), _state(log, grants)
        before = [entry for entry in log if dt.datetime.fromisoformat(entry["at"]) < when]
        last = before[-1] if before else None
        breach = score is not None and score >= self.arm
        calm = score is not None and score < self.disarm
        breaches, armed = (last["breaches"], last["armed"]) if last else (0, True)
        if last and subject != last["subject"]:
            breaches, armed = 0, True
        earlier = [grant for grant in grants if grant < when]
        if self.rearm_after is not None and earlier and when - earlier[-1] >= self.rearm_after:
            armed = True
        armed = armed or calm
        breaches = breaches + 1 if breach else breaches if score is None else 0
        reason, until = self._hold(breaches, armed, earlier, when) if breach else ("", None)
        granted = breach and not reason
        if granted:
            grants = [*earlier, when]
        if granted or (when in grants and not calm):
            breaches, armed = (0, False) if granted else (breaches, False)
        recent = sum(when - self.window < grant <= when for grant in grants)
        decision = Decision(granted, reason, until, _finite(score), breaches, armed, recent)
        entry = {
            "at": when.isoformat(), "subject": subject, "breaches": breaches, "armed": armed,
            "decision": decision.to_json(),
        }  # fmt: skip
        return decision, _state([*before, entry], self._needed(grants, when))

    def _hold(
        self, breaches: int, armed: bool, earlier: list[dt.datetime], when: dt.datetime
    ) -> tuple[str, str | None]:
        """Why a breach is not granted a training, and until when; an empty reason where it is."""
        waits: list[tuple[str, dt.datetime]] = []
        if earlier and when - earlier[-1] < self.cooldown:
            waits.append((f"cool-down since the training of {_day(earlier[-1])}", earlier[-1] + self.cooldown))
        budget = self.budget_per_window
        recent = [grant for grant in earlier if grant > when - self.window]
        if budget is not None and len(recent) >= budget:
            free = recent[-int(budget)] + self.window if budget else dt.datetime.max.replace(tzinfo=dt.timezone.utc)
            waits.append((f"{len(recent)} training(s) in {_text(self.window)}, the budget is {budget}", free))
        if breaches < self.consecutive_breaches:
            return f"{breaches} breach(es) in a row, {self.consecutive_breaches} needed", None
        if not armed:
            text = f"disarmed by the training of {_day(earlier[-1])} until a score is below {self.disarm:g}"
            if not self.rearm_after:
                return "; ".join([text, *(held for held, _ in waits)]), None
            again = earlier[-1] + self.rearm_after
            waits.insert(0, (f"{text}, or until {_day(again)}", again))
        if not waits:
            return "", None
        last = max(end for _, end in waits)
        return "; ".join(text for text, _ in waits), None if last.year == 9999 else last.isoformat()

    def _late(
        self, log: list[dict[str, Any]], grants: list[dt.datetime], when: dt.datetime, score: float | None
    ) -> Decision:
        """The decision on a window older than the newest: its own of before, or none."""
        entry = next((entry for entry in log if entry["at"] == when.isoformat()), None)
        breach = score is not None and score >= self.arm
        if entry is not None and (
            entry["decision"]["score"] == _finite(score) or (breach and entry["decision"]["retrain"])
        ):
            return replace(Decision(**entry["decision"]), score=_finite(score))
        recent = sum(when - self.window < grant <= when for grant in grants)
        newest = log[-1]
        reason = f"a later window, ending {newest['at']}, has been judged before this one" if breach else ""
        return Decision(False, reason, None, _finite(score), 0, newest["armed"], recent)

    def _needed(self, grants: list[dt.datetime], when: dt.datetime) -> list[dt.datetime]:
        """The grants that a later decision can depend on."""
        reach = max(self.window, self.cooldown)
        return [grant for place, grant in enumerate(grants) if grant > when - reach or place >= len(grants) - _KEPT]


def severity(
    drift: DriftReport | None,
    harm: HarmReport | None,
    kinds: Collection[str],
    wanted: bool,
    arm: float = 1.0,
    share: tuple[float, float] | None = None,
) -> float | None:
    """How far the evidence is above what the policies tolerate: 1 at the tolerance, 2 at twice of it.

    Of harm it is the largest of the three tests; of drift the column with which the dataset counts as drifted: the
    ``min_columns``-th by effect. Evidence on which the policies ask for no training is no breach, however large.

    :param kinds: what training is asked for: ``harm``, ``drift``
    :param wanted: whether the policies ask for it
    :param arm: where a breach begins
    :param share: of drifted columns, and its limit, where that decides on the dataset
    :return: None when there is not enough data for an answer
    """
    found = []
    if "harm" in kinds and harm is not None and harm.verdict != "not_enough_data":
        found += [_ratio(test.change, test.tolerance, test.harmful) for test in harm.tests]
    if "drift" in kinds and drift is not None and drift.verdict != "not_enough_data":
        if share is not None:
            found.append(_ratio(*share, wanted))
        else:
            effects = sorted((_effect(column, drift) for column in drift.columns), reverse=True)
            found += effects[drift.policy.min_columns - 1 :][:1] or [0.0]
    if wanted:
        return max([*found, 1.0])
    return max(0.0, min(max(found), 0.99 * arm)) if found else None


def _effect(column: ColumnDrift, drift: DriftReport) -> float:
    """A column's effect in tolerances; 0 for one that does not count."""
    if column.status not in ("drift", "stable") or column.weight == 0:
        return 0.0
    drifted = column.status == "drift"
    if column.effect is None:
        return float(drifted)
    tolerance = drift.policy.least_effect(column.name, _METHODS.get(str(column.method), str(column.method)))
    ratio = _ratio(column.effect, tolerance, drifted)
    return max(ratio, 1.0) if drifted else ratio


# A report's name of a method to a policy's, where they differ.
_METHODS = {"jensenshannon": "js"}


def _ratio(change: float, tolerance: float, over: bool) -> float:
    return change / tolerance if tolerance > 0 else float(over)


def _parts(state: Mapping[str, Any] | None) -> tuple[list[dict[str, Any]], list[dt.datetime]]:
    if state is None:
        return [], []
    try:
        if state["hysteresis_version"] > STATE_VERSION:
            raise InvalidInputError(
                f"the hysteresis state has version {state['hysteresis_version']}, this airflow-mlops reads up to "
                f"{STATE_VERSION}: upgrade airflow-mlops here, or delete the state to start anew"
            )
        log = [dict(entry) for entry in state["log"]]
        for entry in log:
            dt.datetime.fromisoformat(entry["at"])
            Decision(**entry["decision"])
            _ = entry["subject"], entry["breaches"] + 0, entry["armed"]
        return log, [dt.datetime.fromisoformat(grant) for grant in state["granted"]]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InvalidInputError):
            raise
        raise InvalidInputError(f"the hysteresis state is damaged ({error!r}); delete it to start anew") from error


def _state(log: list[dict[str, Any]], grants: list[dt.datetime]) -> dict[str, Any]:
    return {
        "hysteresis_version": STATE_VERSION,
        "granted": [grant.isoformat() for grant in grants],
        "log": log[-_KEPT:],
    }


def _finite(score: float | None) -> float | None:
    return score if score is None or math.isfinite(score) else None


def _instant(at: dt.datetime) -> dt.datetime:
    if at.tzinfo is None:
        raise InvalidInputError(f"the window's end {at.isoformat()} has no time zone; give it one")
    return at.astimezone(dt.timezone.utc)


def span(name: str, value: Any) -> dt.timedelta:
    """A span of time from a :class:`datetime.timedelta`, seconds, or text such as ``"12h"``, ``"30d"``, ``"4w"``.

    :param name: how an error calls it
    """
    if isinstance(value, dt.timedelta):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return dt.timedelta(seconds=value)
    if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", str(value)):
        return dt.timedelta(**{_UNITS[match[2]]: float(match[1])})
    raise InvalidInputError(f"{name} is {value!r}; expected seconds, or text such as '12h', '30d', '4w'")


def _text(span: dt.timedelta) -> str:
    return f"{span.days} days" if not span.seconds else str(span)


def _day(when: dt.datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}" if (when.hour, when.minute) != (0, 0) else f"{when:%Y-%m-%d}"
