"""Evidence from prediction logs: Parquet files that whatever serves the models writes, labels joined as they come."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import DataError, InvalidInputError, MlopsError
from airflow_mlops.rollout.observation import LATENCY_EDGES, Observation
from airflow_mlops.rollout.sources.log_files import TIME_UNITS, LogFiles
from airflow_mlops.rollout.sources.protocol import ARMS
from airflow_mlops.rollout.targets.protocol import TargetState

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

COLUMNS = ("time", "arm", "version", "replica", "request_id", "status", "error", "latency_seconds", "prediction")
LABEL_COLUMNS = ("request_id", "label")
LOSSES = ("log_loss", "brier", "squared_error", "absolute_error")
PREDICTION_EDGES = tuple(round(0.05 * i, 2) for i in range(1, 20))
LOSS_CLIP = 1e-6
MAX_REPLICAS = 500


class PredictionLogSource:
    """Counts the rows of a prediction log, one per request, from the rollout's start to ``delay`` seconds ago.

    Each look reads only what is new: files and row groups that hold later times, found by their statistics. What is
    kept in memory does not grow with the log: counters, how far the files of the last ``grace`` seconds were read, and
    at most ``max_remembered`` predictions that wait for labels. Another process that goes on counts again from the
    start, which is that of the judge's state on the target.

    A row is an error when ``error`` says so, its ``status`` is 500 or more or missing, or its prediction is missing or
    not finite.

    :param path: folder, file or pattern, see :class:`LogFiles`
    :param columns: this source's names (:data:`COLUMNS`) to the log's own; of ``arm`` and ``version`` one is needed.
        Without it: ``time``, ``version``, ``latency_seconds`` and ``prediction`` under these names. None as a name
        leaves a column out
    :param counts: further counts, name to a boolean column, for example ``{"timeouts": "timed_out"}``
    :param values: further means, name to a numeric column
    :param labels: a second dataset, ``{"path", "columns": {"request_id", "label"}, "values": {...}}``; needs
        ``request_id`` in both
    :param losses: what of :data:`LOSSES` to take of predictions and labels
    :param metrics: names that the guardrails read; what needs none of them is not computed
    :param start: Unix time from which rows count; None: the rollout's start
    :param delay: seconds after which a row has been written
    :param settle: seconds from a change of the weights until all traffic follows it
    :param prediction_edges: upper edges of the histogram of predictions
    """

    def __init__(
        self,
        path: str,
        *,
        columns: Mapping[str, str | None] | None = None,
        counts: Mapping[str, str] | None = None,
        values: Mapping[str, str] | None = None,
        labels: Mapping[str, Any] | None = None,
        losses: Sequence[str] = ("log_loss", "brier"),
        metrics: Iterable[str] | None = None,
        start: float | None = None,
        delay: float = 30.0,
        settle: float = 0.0,
        time_unit: str = "s",
        grace: float = 3600.0,
        max_remembered: int = 200_000,
        prediction_edges: Sequence[float] = PREDICTION_EDGES,
    ) -> None:
        self._columns = _columns(columns)
        self._counts, self._values = dict(counts or {}), dict(values or {})
        self._losses = tuple(losses)
        label_columns, self._label_values = _label_columns(labels)
        self._check(labels, time_unit, delay, settle, max_remembered, prediction_edges)
        self._path, self._start, self._delay, self._settle = path, start, float(delay), float(settle)
        self._edges = {"latency": LATENCY_EDGES, "prediction": tuple(map(float, prediction_edges))}
        self._rows = LogFiles(path, self._columns["time"], time_unit=time_unit, grace=grace, open_seconds=delay)
        self._label_columns = label_columns
        self._label_rows = LogFiles(labels["path"], None, grace=grace, open_seconds=delay) if labels else None
        self._needed = None if metrics is None else set(metrics) | {"requests"}
        self._available()
        self._arms: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in ARMS}
        self._versions: tuple[str | None, str | None] | None = None
        self._waiting: OrderedDict[str, tuple[str, str, float]] = OrderedDict()
        self._early: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._max_remembered = max_remembered
        self.labels_unknown = 0
        self._epoch: str | None = None
        self._since = 0.0
        self._lock = threading.Lock()

    def _check(
        self,
        labels: Mapping[str, Any] | None,
        time_unit: str,
        delay: float,
        settle: float,
        max_remembered: int,
        edges: Sequence[float],
    ) -> None:
        if labels and not self._columns.get("request_id"):
            raise InvalidInputError("labels are joined by request_id; name its column in columns")
        if labels and not self._columns.get("prediction"):
            raise InvalidInputError("labels are compared with predictions; name the prediction's column in columns")
        unknown = [loss for loss in self._losses if loss not in LOSSES]
        if unknown or time_unit not in TIME_UNITS:
            raise InvalidInputError(
                f"losses are {self._losses} and time_unit {time_unit!r}; expected losses of {', '.join(LOSSES)} and a "
                f"unit of {', '.join(TIME_UNITS)}"
            )
        if not (0 <= delay < math.inf and 0 <= settle < math.inf and max_remembered >= 1):
            raise InvalidInputError(
                f"delay is {delay!r}, settle {settle!r} and max_remembered {max_remembered!r}; expected seconds of at "
                "least 0, and at least 1 prediction"
            )
        if not edges or list(edges) != sorted(set(edges)) or not all(map(math.isfinite, edges)):
            raise InvalidInputError(f"prediction_edges are {edges!r}; expected finite numbers that rise")

    def _available(self) -> None:
        """:raises InvalidInputError: a guardrail reads what these columns do not give"""
        has = {"requests", "errors", *self._counts, *self._values, *self._label_values}
        has |= {
            name
            for name, column in (("latency", "latency_seconds"), ("prediction", "prediction"))
            if self._columns.get(column)
        }
        has |= set(self._losses) if self._label_rows else set()
        missing = sorted((self._needed or set()) - has)
        if missing:
            raise InvalidInputError(
                f"the prediction log gives no {', '.join(missing)}, which a guardrail reads; it gives "
                f"{', '.join(sorted(has))}. Name the column in columns, counts, values or labels"
            )

    async def check(self, state: TargetState, now: float) -> None:
        """Read what there is already.

        :raises InvalidInputError: a file is no Parquet, or lacks a column
        """
        try:
            await asyncio.to_thread(self._advance, state, now)
        except InvalidInputError:
            raise
        except MlopsError:
            return

    async def observe(self, state: TargetState, now: float) -> Observation:
        """Counters of both arms as of ``delay`` seconds before ``now``; never raises."""
        if state.epoch != self._epoch:
            self._epoch, self._since = state.epoch, now
        common: dict[str, Any] = {"time": now, "epoch": state.epoch, "weight": state.weight, "shadow": state.shadow}
        if state.problem:
            return Observation(**common, problem=state.problem)
        try:
            await asyncio.to_thread(self._advance, state, now)
        except MlopsError as error:
            return Observation(**common, problem=str(error))
        waiting = self._since + self._settle - (now - self._delay)
        if waiting > 0:
            problem = (
                f"the weights have changed, and rows are complete {self._delay:g} s later (missing {waiting:.1f} s)"
            )
            return Observation(**common, problem=problem)
        missing = [arm for arm in ARMS if not self._arms[arm] and not (arm == "stable" and state.weight >= 100)]
        if missing:
            versions = " and ".join(f"{arm} version {getattr(state, arm)}" for arm in missing)
            return Observation(**common, problem=f"{self._path} has no rows of the {versions} yet")
        arms = {arm: {name: _copied(each) for name, each in self._arms[arm].items()} or None for arm in ARMS}
        boot = f"log:{self._start:.3f}"
        return Observation(**common, boot=boot, stable=arms["stable"], canary=arms["canary"], routed=state.routed)

    def _advance(self, state: TargetState, now: float) -> None:
        with self._lock:
            if self._start is None:
                judged = (state.rollout or {}).get("judge") or {}
                self._start = float(judged.get("started") or now)
            if self._versions is None:
                self._versions = (state.stable, state.canary)
            if self._versions != (state.stable, state.canary):
                raise InvalidInputError(
                    f"the arms are versions {state.stable} and {state.canary}, but rows of {self._versions[0]} and "
                    f"{self._versions[1]} were counted; a rollout needs a source of its own"
                )
            columns = sorted(
                {name for name in self._columns.values() if name} | {*self._counts.values(), *self._values.values()}
            )
            upto = now - self._delay
            for uri, table in self._rows.new_rows(columns, self._start, upto, now):
                self._add(uri, table.to_pandas())
            if self._label_rows is not None:
                columns = sorted({*self._label_columns.values(), *self._label_values.values()})
                for uri, table in self._label_rows.new_rows(columns, self._start, upto, now):
                    self._label(uri, table.to_pandas())

    def _add(self, uri: str, frame: pd.DataFrame) -> None:
        """Count the rows of one file; a file with an impossible row counts not at all."""
        import numpy as np

        frame = frame.assign(_arm=self._arm_of(frame))
        frame = frame[frame["_arm"].notna()]
        replica = self._columns.get("replica")
        frame["_replica"] = frame[replica].astype(str) if replica else ""
        groups = []
        for (arm, name), rows in frame.groupby(["_arm", "_replica"], sort=True):
            groups.append((str(arm), str(name), self._look(uri, rows)))
        for arm, name, look in groups:
            known = self._arms[arm]
            if name not in known and len(known) >= MAX_REPLICAS:
                raise DataError(f"{uri} has more than {MAX_REPLICAS} replicas of the {arm} arm; name a column of fewer")
            known[name] = _sum(known.get(name), look)
        if self._label_rows is not None:
            request, prediction = self._columns["request_id"], self._columns["prediction"]
            for arm, name, key, value in zip(frame["_arm"], frame["_replica"], frame[request], frame[prediction]):
                if value is not None and np.isfinite(value):
                    self._remember(str(key), (arm, name, float(value)))

    def _arm_of(self, frame: pd.DataFrame) -> Any:
        assert self._versions is not None
        if column := self._columns.get("arm"):
            return frame[column].where(frame[column].isin(ARMS))
        versions = {version: arm for version, arm in zip(self._versions, ARMS) if version is not None}
        column = self._columns["version"]
        # 3.0 where a file has rows without a version, and "3" in the registry.
        return frame[column].map(lambda value: versions.get(_text(value)))

    def _look(self, uri: str, rows: pd.DataFrame) -> dict[str, Any]:
        """The counters of these rows alone."""
        import numpy as np

        failed = np.zeros(len(rows), dtype=bool)
        if column := self._columns.get("error"):
            failed |= _truth(rows[column])
        if column := self._columns.get("status"):
            status = _numbers(uri, rows, column)
            failed |= ~(status < 500)
        counters: dict[str, Any] = {"counts": {}, "histograms": {}, "moments": {}}
        if column := self._columns.get("prediction"):
            predictions = _numbers(uri, rows, column)
            usable = np.isfinite(predictions)
            failed |= ~usable
            self._distribution(counters, "prediction", predictions[usable])
        if column := self._columns.get("latency_seconds"):
            seconds = _numbers(uri, rows, column)
            seconds = seconds[~rows[column].isna().to_numpy()]
            if (~np.isfinite(seconds) | (seconds < 0)).any():
                raise DataError(f"{uri} has rows whose {column} is negative or not finite")
            self._distribution(counters, "latency", seconds)
        counters["counts"] |= {"requests": len(rows), "errors": int(failed.sum())}
        for name, column in self._counts.items():
            counters["counts"][name] = int(_truth(rows[column]).sum())
        for name, column in self._values.items():
            values = _numbers(uri, rows, column)[~rows[column].isna().to_numpy()]
            if not np.isfinite(values).all():
                raise DataError(f"{uri} has rows whose {column} is not finite")
            counters["moments"][name] = _moments(values)
        return counters

    def _distribution(self, counters: dict[str, Any], name: str, values: np.ndarray) -> None:
        import numpy as np

        if self._needed is not None and name not in self._needed:
            return
        edges = self._edges[name]
        counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
        counters["histograms"][name] = {"edges": list(edges), "counts": [int(count) for count in counts]}
        counters["moments"][name] = _moments(values)

    def _remember(self, key: str, prediction: tuple[str, str, float]) -> None:
        early = self._early.pop(key, None)
        if early is not None:
            self._judge_label(*prediction, early)
            return
        self._waiting[key] = prediction
        if len(self._waiting) > self._max_remembered:
            self._waiting.popitem(last=False)

    def _label(self, uri: str, frame: pd.DataFrame) -> None:
        """Join the labels of one file; those that come before their row wait for it."""
        import numpy as np

        columns = {"label": self._label_columns["label"], **self._label_values}
        numbers = {name: _numbers(uri, frame, column) for name, column in columns.items()}
        labels = numbers["label"][np.isfinite(numbers["label"])]
        if {"log_loss", "brier"} & set(self._losses) and ((labels < 0) | (labels > 1)).any():
            raise DataError(f"{uri} has labels outside 0 to 1; for these take losses squared_error or absolute_error")
        for index, key in enumerate(frame[self._label_columns["request_id"]].astype(str)):
            found = {name: float(values[index]) for name, values in numbers.items() if np.isfinite(values[index])}
            if "label" not in found:
                continue  # Not known yet: it comes in a later row.
            known = self._waiting.pop(key, None)
            if known is not None:
                self._judge_label(*known, found)
                continue
            self._early[key] = found
            if len(self._early) > self._max_remembered:
                self._early.popitem(last=False)
                self.labels_unknown += 1

    def _judge_label(self, arm: str, replica: str, prediction: float, found: Mapping[str, float]) -> None:
        label, chance = found["label"], min(max(prediction, LOSS_CLIP), 1 - LOSS_CLIP)
        losses = {
            "log_loss": lambda: -label * math.log(chance) - (1 - label) * math.log(1 - chance),
            "brier": lambda: (prediction - label) ** 2,
            "squared_error": lambda: (prediction - label) ** 2,
            "absolute_error": lambda: abs(prediction - label),
        }
        values = {name: losses[name]() for name in self._losses}
        values |= {name: value for name, value in found.items() if name != "label"}
        moments = self._arms[arm][replica]["moments"]
        for name, value in values.items():
            n, total, squares = moments.get(name, (0, 0.0, 0.0))
            moments[name] = [n + 1, total + value, squares + value * value]


def _columns(given: Mapping[str, str | None] | None) -> dict[str, str]:
    if given is None:
        given = {name: name for name in ("time", "version", "latency_seconds", "prediction")}
    unknown = sorted(set(given) - set(COLUMNS))
    if unknown:
        raise InvalidInputError(
            f"the prediction log has the unknown columns {', '.join(unknown)}; expected {', '.join(COLUMNS)}; further "
            "ones go under counts and values"
        )
    columns = {name: column for name, column in given.items() if column}
    columns.setdefault("time", "time")
    if ("arm" in columns) == ("version" in columns):
        raise InvalidInputError("columns must name either arm (stable, canary) or version, which tells the arms apart")
    return columns


def _label_columns(labels: Mapping[str, Any] | None) -> tuple[dict[str, str], dict[str, str]]:
    if not labels:
        return {}, {}
    unknown = sorted(set(labels) - {"path", "columns", "values"})
    columns = {name: name for name in LABEL_COLUMNS} | dict(labels.get("columns") or {})
    unknown += sorted(set(columns) - set(LABEL_COLUMNS))
    if unknown or not labels.get("path"):
        raise InvalidInputError(
            f"labels are {dict(labels)!r}; expected path, and where the names differ columns of "
            f"{', '.join(LABEL_COLUMNS)}, and values"
        )
    return columns, dict(labels.get("values") or {})


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _truth(column: pd.Series) -> np.ndarray:
    """Where a column says yes: true, a number but 0, or a text that is not empty, such as an exception's name."""
    if column.dtype == object:
        return column.map(lambda value: bool(value) and value == value and str(value).lower() != "false").to_numpy(bool)
    return (column.fillna(0) != 0).to_numpy(bool)


def _numbers(uri: str, rows: pd.DataFrame, column: str) -> np.ndarray:
    """A column as floats, NaN where it has nothing."""
    import pandas as pd

    try:
        return pd.to_numeric(rows[column]).to_numpy(float, na_value=math.nan)
    except (TypeError, ValueError) as error:
        raise DataError(f"{uri} has a column {column} that is not all numbers ({error})") from None


def _moments(values: np.ndarray) -> list[float]:
    return [len(values), float(values.sum()), float((values * values).sum())]


def _sum(old: Mapping[str, Any] | None, look: Mapping[str, Any]) -> dict[str, Any]:
    """Counters with those of a look added."""
    if old is None:
        return _copied(look)
    result = _copied(old)
    for name, count in look["counts"].items():
        result["counts"][name] = result["counts"].get(name, 0) + count
    for name, histogram in look["histograms"].items():
        counts = [a + b for a, b in zip(result["histograms"][name]["counts"], histogram["counts"])]
        result["histograms"][name] = {"edges": histogram["edges"], "counts": counts}
    for name, moments in look["moments"].items():
        result["moments"][name] = [a + b for a, b in zip(result["moments"].get(name, (0, 0.0, 0.0)), moments)]
    return result


def _copied(counters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "counts": dict(counters["counts"]),
        "histograms": {
            name: {"edges": list(each["edges"]), "counts": list(each["counts"])}
            for name, each in counters["histograms"].items()
        },
        "moments": {name: list(each) for name, each in counters["moments"].items()},
    }
