"""The champion's losses over all windows since it serves, with labels that come after their window was checked.

What a day says is read anew at every check until its labels have matured, from wherever ``predictions_uri`` still has
it; then it is judged, once. The state has the test, and what waits by day for the case that the next check does not
find it any more.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from airflow_mlops import storage
from airflow_mlops.exceptions import DataError, InvalidInputError
from airflow_mlops.sensors._drift_state import change

if TYPE_CHECKING:
    from airflow_mlops.drift import LossReference, LossTest
    from airflow_mlops.drift.sequential import LossVerdict
    from airflow_mlops.windows import Window

Spans = list[tuple[dt.datetime, dt.datetime]]


@dataclass(frozen=True)
class Predictions:
    """The champion's predictions, with their labels as far as they are known.

    :param uri: Parquet or CSV
    :param label: column of the label
    :param probability: column of the prediction
    """

    uri: str
    label: str
    probability: str

    def read(self, since: dt.datetime | None = None, until: dt.datetime | None = None) -> tuple[Any, Any]:
        """The rows of a span, as :func:`read_rows` gives them."""
        hint = "Set label_column and prediction_column."
        return read_rows(self.uri, [self.label, self.probability], since, until, hint)


def read_rows(
    uri: str, columns: list[str], since: dt.datetime | None = None, until: dt.datetime | None = None, hint: str = ""
) -> tuple[Any, Any]:
    """The rows from ``since`` and before ``until`` as a ``pandas.DataFrame``, and the first time of all rows or None.

    :param columns: beside ``event_timestamp``, which is in UTC
    :param hint: what to do where one is absent
    """
    import pandas as pd
    import pyarrow as pa

    from airflow_mlops.drift.page import together
    from airflow_mlops.drift.profile import batches, column_names

    wanted = ["event_timestamp", *columns]
    absent = [name for name in wanted if name not in (present := column_names(uri))]
    if absent:
        raise DataError(f"{uri} lacks {', '.join(absent)}; it has {', '.join(present)}. {hint}".strip())
    found, first = [], None
    for batch in batches(uri, wanted):
        times = pd.to_datetime(batch.column("event_timestamp").to_pandas(), utc=True)
        outside = pd.Series(False, index=times.index)
        if since is not None:
            outside |= times < since
        if until is not None:
            outside |= times >= until
        if times.notna().any():
            first = times.min() if first is None else min(first, times.min())
        if not outside.all():
            found.append(batch.filter(pa.array(~outside)))
    frame = together(found).select(wanted).to_pandas() if found else pd.DataFrame(columns=wanted)
    frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], utc=True)
    return frame, first


def losses_over_windows(
    context: Mapping[str, Any],
    champion: Any,
    window: Window,
    reference: LossReference,
    predictions: Predictions,
    read: tuple[Any, Any],
    given: Mapping[str, Any],
    state_dir: str,
) -> LossVerdict:
    """The test over all windows of this champion; a window that is judged again starts from what was before it.

    :param read: what ``predictions`` gave for the window
    """
    from airflow_mlops.drift.hysteresis import span
    from airflow_mlops.drift.limits import number_of
    from airflow_mlops.drift.sequential import LossTest

    fields = dict(given)
    delay = span("label_delay", number_of(fields.pop("label_delay", 0)))
    if delay < dt.timedelta(0):
        raise InvalidInputError(f"label_delay is {delay}; expected a span of time such as '3d'")
    fresh = LossTest.from_fields(reference.log_loss, fields)
    name = re.sub(r"[^\w.+-]", "_", champion.name)
    served = change(
        context,
        f"mlops_drift_serving.{name}",
        storage.join(state_dir, f"{name}.serving.json"),
        lambda state: _serving(state, str(champion.version), window),
    )
    judge = _Judge(fresh, window, window.end - delay, served, predictions, read)
    name = re.sub(r"[^\w.+-]", "_", f"{champion.name}-{champion.version}")
    return change(context, f"mlops_drift_losses.{name}", storage.join(state_dir, f"{name}.losses.json"), judge.step)


def _serving(state: Mapping[str, Any] | None, version: str, window: Window) -> tuple[dt.datetime, dict[str, Any]]:
    """The start of the first window that this version was checked on with no other version in between.

    A version that serves again after another, as after a rollback, must not answer for the other's predictions.
    """
    if state is not None and dt.datetime.fromisoformat(state["batch"]) > window.start:
        return (dt.datetime.fromisoformat(state["from"]) if state["version"] == version else window.start), dict(state)
    batch = window.start.isoformat()
    since = state["from"] if state is not None and state["version"] == version else batch
    return dt.datetime.fromisoformat(since), {"version": version, "from": since, "batch": batch}


@dataclass(frozen=True)
class _Judge:
    """One check.

    :param fresh: the test without a window
    :param matured: labels of rows before this are all there that will be
    :param served: since when the champion serves without a break
    :param predictions: for rows before the window
    :param read: the window's rows, and the first time of all
    """

    fresh: LossTest
    window: Window
    matured: dt.datetime
    served: dt.datetime
    predictions: Predictions
    read: tuple[Any, Any]

    def step(self, state: Mapping[str, Any] | None) -> tuple[LossVerdict, dict[str, Any]]:
        """The verdict, and the state to keep: that before the window, and that after it."""
        from airflow_mlops.drift.sequential import LossTest

        if state is not None and "now" not in state:
            raise InvalidInputError("the state of loss_test cannot be read; delete it to start anew")
        batch = self.window.start.isoformat()
        if state is not None and dt.datetime.fromisoformat(state["batch"]) > self.window.start:
            # A later window has been judged, and has read this one's days, or the next one will.
            test = LossTest.from_json(state["now"]["test"])
            until = dt.datetime.fromisoformat(str(test.state.matured_until))
            return test.update([], [], matured_until=until, batch="")[0], dict(state)
        before = None if state is None else state["before"] if state["batch"] == batch else state["now"]
        verdict, after = self._judge(before)
        return verdict, {"batch": batch, "before": before, "now": after}

    def _judge(self, before: Mapping[str, Any] | None) -> tuple[LossVerdict, dict[str, Any]]:
        from airflow_mlops.drift.sequential import LossTest

        anew = ""
        if before is not None and (changed := self.fresh.differs(LossTest.from_json(before["test"]))):
            anew = f"begun anew with this window, since its settings have changed: {', '.join(changed)}"
            before = None
        test = self.fresh if before is None else LossTest.from_json(before["test"])
        spans = self._spans([] if before is None else before["spans"])
        begin = spans[0][0] if test.open_from is None else max(test.open_from, spans[0][0])
        frame, since = self._rows(begin, test)
        mine = sum((frame["event_timestamp"] >= a) & (frame["event_timestamp"] < b) for a, b in spans) > 0
        frame = frame[mine | frame["event_timestamp"].isna()]
        losses = _log_loss(frame[self.predictions.label], frame[self.predictions.probability])
        verdict, after = test.update_from(
            frame["event_timestamp"], losses, since=since, until=self.window.end, matured_until=self.matured
        )
        if lost := test.unlabelled(since):
            reason = (
                f"{lost} cluster(s) before {since.isoformat()} wait for labels, and predictions_uri does not have them "
                f"any more: labels that come after their window was checked need one that goes back to "
                f"{begin.isoformat()}"
            )
            verdict = replace(verdict, reasons=(reason, *verdict.reasons))
        if anew:
            verdict = replace(verdict, reasons=(anew, *verdict.reasons))
        kept = [[a.isoformat(), b.isoformat()] for a, b in spans if b > (after.open_from or a)]
        return verdict, {
            "test": after.to_json(),
            "spans": kept or [[spans[-1][0].isoformat(), spans[-1][1].isoformat()]],
        }

    def _spans(self, before: list[list[str]]) -> Spans:
        """The spans in which the champion has served, this window included."""
        spans = [(dt.datetime.fromisoformat(a), dt.datetime.fromisoformat(b)) for a, b in before]
        if spans and spans[-1][1] >= self.served:
            return [*spans[:-1], (spans[-1][0], max(spans[-1][1], self.window.end))]
        return [*spans, (self.served if spans else self.window.start, self.window.end)]

    def _rows(self, begin: dt.datetime, test: LossTest) -> tuple[Any, dt.datetime]:
        """What there is from ``begin`` on, or from where the predictions begin; and from when on that is."""
        from airflow_mlops.drift.clusters import day_of

        frame, first = self.read
        if first is None or first >= self.window.start:
            return frame, max(begin, self.window.start)
        if begin < self.window.start:
            frame, _ = self.predictions.read(begin, self.window.end)
        return frame, max(begin, day_of(first.floor("us").to_pydatetime(), test.zone))


def _log_loss(label: Any, probability: Any) -> Any:
    """Log loss by row, missing where the label or the prediction is."""
    import numpy as np

    from airflow_mlops.drift.harm import as_floats, log_losses

    labels = as_floats(label)
    return np.where(np.isnan(labels), np.nan, log_losses(labels, as_floats(probability))[0])
