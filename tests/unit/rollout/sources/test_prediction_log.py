"""Prediction logs: every row counted once, only new files read, labels whenever they come, faults by name."""

from __future__ import annotations

import math
import os
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.judge import Judge
from airflow_mlops.rollout.observation import arm_problem
from airflow_mlops.rollout.policy import RolloutPolicy
from airflow_mlops.rollout.sources.log_files import LogFiles
from airflow_mlops.rollout.sources.prediction_log import PredictionLogSource

NOW = 1_760_000_000.0
COLUMNS = {
    "time": "at",
    "version": "version",
    "replica": "pod",
    "request_id": "id",
    "status": "status",
    "latency_seconds": "seconds",
    "prediction": "score",
}


def rows(start, end, *, share=0.25, n=200, seed=0, prefix="r", **changes):
    """Requests between two times: a quarter of version 2, on two pods each."""
    rng = np.random.default_rng(seed)
    version = np.where(rng.random(n) < share, "2", "1")
    frame = pd.DataFrame(
        {
            "at": pd.to_datetime(np.sort(rng.uniform(start, end, n)), unit="s", utc=True),
            "version": version,
            "pod": [f"{v}-{i % 2}" for i, v in enumerate(version)],
            "id": [f"{prefix}-{seed}-{i}" for i in range(n)],
            "status": np.where(rng.random(n) < 0.05, 500, 200),
            "seconds": rng.lognormal(-4, 0.5, n),
            "score": rng.random(n),
            "noise": "not needed",
        }
    )
    return frame.assign(**changes)


def write(frame, path, written=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False, **options)
    stamp = frame["at"].max().timestamp() if written is None else written
    os.utime(path, (stamp, stamp))
    return frame


def source(path, **options):
    options = {"columns": COLUMNS, "start": NOW, "delay": 10.0, **options}
    return PredictionLogSource(str(path), **options)


async def look(reader, target, now, **changes):
    """A look in an epoch that began long ago."""
    state = target(**changes)
    reader._epoch, reader._since = state.epoch, 0.0
    seen = await reader.observe(state, now)
    arms = [seen.canary, *([seen.stable] if state.weight < 100 else [])]
    assert seen.problem or not any(map(arm_problem, arms))
    return seen


def totals(arm, name="requests"):
    return sum(each["counts"][name] for each in arm.values())


async def test_each_row_is_counted_once_by_arm_and_replica(tmp_path, target):
    first = write(rows(NOW, NOW + 60), tmp_path / "a.parquet")
    reader = source(tmp_path)
    seen = await look(reader, target, NOW + 100)
    assert seen.problem is None and seen.boot == f"log:{NOW:.3f}" and seen.time == NOW + 100
    for arm, version in ((seen.stable, "1"), (seen.canary, "2")):
        mine = first[first.version == version]
        assert set(arm) == set(mine.pod)
        for pod, counters in arm.items():
            of = mine[mine.pod == pod]
            assert counters["counts"] == {"requests": len(of), "errors": int((of.status >= 500).sum())}
            assert sum(counters["histograms"]["latency"]["counts"]) == len(of)
            n, total, squares = counters["moments"]["prediction"]
            assert (n, total, squares) == (len(of), pytest.approx(of.score.sum()), pytest.approx((of.score**2).sum()))
    again = await look(reader, target, NOW + 110)
    assert (again.stable, again.canary) == (seen.stable, seen.canary)
    second = write(rows(NOW + 60, NOW + 120, seed=1), tmp_path / "b.parquet")
    seen = await look(reader, target, NOW + 200)
    assert totals(seen.stable) + totals(seen.canary) == len(first) + len(second)


async def test_rows_count_when_delay_has_passed_and_none_from_before_the_start(tmp_path, target):
    frame = write(rows(NOW - 50, NOW + 100), tmp_path / "a.parquet", row_group_size=20)
    at = frame["at"].map(lambda moment: moment.timestamp())
    reader = source(tmp_path)
    for now in (NOW + 30, NOW + 61.5, NOW + 90, NOW + 200):
        seen = await look(reader, target, now)
        assert totals(seen.stable) + totals(seen.canary) == int(((at >= NOW) & (at <= now - 10)).sum())


async def test_a_file_that_comes_late_is_counted_then(tmp_path, target):
    write(rows(NOW + 20, NOW + 40, n=100), tmp_path / "b.parquet")
    reader = source(tmp_path)
    assert totals((await look(reader, target, NOW + 60)).stable) < 100
    write(rows(NOW, NOW + 20, n=60, seed=2), tmp_path / "a.parquet", written=NOW + 61)
    seen = await look(reader, target, NOW + 70)
    assert totals(seen.stable) + totals(seen.canary) == 160


async def test_only_new_files_are_read_and_what_is_remembered_does_not_grow(tmp_path, target, monkeypatch):
    reader, read = source(tmp_path, grace=100.0), []
    original = LogFiles._read
    monkeypatch.setattr(LogFiles, "_read", lambda self, uri, *rest: read.append(uri) or original(self, uri, *rest))
    for index in range(40):
        now = NOW + 20 * (index + 1)
        write(rows(now - 20, now, n=10, seed=index, share=0.5), tmp_path / f"{index:03}.parquet")
        seen = await look(reader, target, now + 10)
        assert len(reader._rows._files) <= 8
    assert totals(seen.stable) + totals(seen.canary) == 400
    assert len(read) == len(set(read)) == 40


async def test_row_groups_of_other_times_are_not_read(tmp_path, target, monkeypatch):
    write(rows(NOW, NOW + 100, n=1000), tmp_path / "a.parquet", row_group_size=100)
    reader, groups = source(tmp_path), []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **options: groups.append(group) or original(self, group, **options),
    )
    await look(reader, target, NOW + 10 + 25)
    assert groups == [0, 1, 2]
    groups.clear()
    await look(reader, target, NOW + 10 + 45)
    assert groups == [2, 3, 4]


async def test_another_process_counts_the_same(tmp_path, target):
    for index in range(5):
        write(rows(NOW + 20 * index, NOW + 20 * (index + 1), seed=index), tmp_path / f"{index}.parquet")
    reader = source(tmp_path, start=None)
    first = await look(reader, target, NOW)
    assert "no rows" in first.problem
    for now in (NOW + 30, NOW + 70):
        old = await look(reader, target, now)
    resumed = await look(source(tmp_path, start=None), target, NOW + 70, rollout={"judge": {"started": NOW}})
    assert (resumed.boot, resumed.stable, resumed.canary) == (old.boot, old.stable, old.canary)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns", "naive", "number"])
async def test_times_of_every_kind(tmp_path, target, unit):
    frame = rows(NOW, NOW + 60)
    if unit == "number":
        frame["at"] = [int(moment.timestamp() * 1000) for moment in frame["at"]]
    elif unit == "naive":
        frame["at"] = frame["at"].dt.tz_localize(None)
    else:
        frame["at"] = frame["at"].astype(f"datetime64[{unit}, UTC]")
    path = tmp_path / "a.parquet"
    frame.to_parquet(path, index=False)
    os.utime(path, (NOW + 60, NOW + 60))
    seen = await look(source(tmp_path, **({"time_unit": "ms"} if unit == "number" else {})), target, NOW + 40)
    share = (totals(seen.stable) + totals(seen.canary)) / len(frame)
    assert 0.35 < share < 0.65


async def test_what_counts_as_an_error(tmp_path, target):
    frame = rows(NOW, NOW + 10, n=8, version=["1", "2"] * 4, pod="p", status=200.0, score=0.5, late=[True, False] * 4)
    frame.loc[1, "status"], frame.loc[3, "status"] = 503, math.nan
    frame.loc[5, "score"], frame.loc[7, "score"] = math.nan, math.inf
    frame["bad"] = ["", "", "", "", "ValueError", "", "", ""]
    write(frame, tmp_path / "a.parquet")
    reader = source(tmp_path, columns={**COLUMNS, "error": "bad"}, counts={"timeouts": "late"})
    seen = await look(reader, target, NOW + 60)
    assert seen.canary["p"]["counts"] == {"requests": 4, "errors": 4, "timeouts": 0}
    assert seen.canary["p"]["moments"]["prediction"][0] == 2
    assert seen.stable["p"]["counts"] == {"requests": 4, "errors": 1, "timeouts": 4}


async def test_other_versions_do_not_count_and_numbers_match_the_registrys_text(tmp_path, target):
    versions = pd.Series([1.0, 2.0, math.nan, 7.0] * 25)
    write(rows(NOW, NOW + 10, n=100, version=versions, pod="p"), tmp_path / "a.parquet")
    seen = await look(source(tmp_path), target, NOW + 60)
    assert (totals(seen.stable), totals(seen.canary)) == (25, 25)


async def test_arms_by_name(tmp_path, target):
    arms = ["stable", "canary", None, "shadow"] * 25
    write(rows(NOW, NOW + 10, n=100, arm=arms), tmp_path / "a.parquet")
    columns = {"time": "at", "arm": "arm"}
    seen = await look(source(tmp_path, columns=columns), target, NOW + 60)
    assert seen.stable == {"": {"counts": {"requests": 25, "errors": 0}, "histograms": {}, "moments": {}}}
    assert totals(seen.canary) == 25


@pytest.mark.parametrize("early", [False, True])
async def test_labels_are_joined_whenever_they_come(tmp_path, target, early):
    frame = write(rows(NOW, NOW + 60), tmp_path / "log" / "a.parquet")
    labels = pd.DataFrame({"id": frame.id, "label": (frame.score > 0.3).astype(float), "gain": 2.0})
    labels.loc[0, "label"] = math.nan
    (tmp_path / "labels").mkdir()
    options = {"path": str(tmp_path / "labels"), "columns": {"request_id": "id"}, "values": {"value": "gain"}}
    reader = source(tmp_path / "log", labels=options)

    def bring(part, name):
        labels.iloc[part].to_parquet(tmp_path / "labels" / name, index=False)
        os.utime(tmp_path / "labels" / name, (NOW + 1, NOW + 1))

    if early:
        bring(slice(0, 150), "a.parquet")
    seen = await look(reader, target, NOW + 40)
    seen = await look(reader, target, NOW + 100)
    if not early:
        assert all("log_loss" not in each["moments"] for each in seen.canary.values())
        bring(slice(0, 150), "a.parquet")
    bring(slice(150, 200), "b.parquet")
    seen = await look(reader, target, NOW + 110)
    joined = frame.assign(label=labels.label)[labels.label.notna()]
    for pod, counters in {**seen.stable, **seen.canary}.items():
        of = joined[joined.pod == pod]
        loss = -of.label * np.log(of.score) - (1 - of.label) * np.log(1 - of.score)
        assert counters["moments"]["log_loss"] == [len(of), pytest.approx(loss.sum()), pytest.approx((loss**2).sum())]
        assert counters["moments"]["brier"][1] == pytest.approx(((of.score - of.label) ** 2).sum())
        assert counters["moments"]["value"] == [len(of), 2 * len(of), 4 * len(of)]
    again = await look(reader, target, NOW + 120)
    assert (again.stable, again.canary) == (seen.stable, seen.canary)


async def test_predictions_that_wait_for_labels_are_bounded(tmp_path, target):
    frame = write(rows(NOW, NOW + 60, n=300), tmp_path / "log" / "a.parquet")
    (tmp_path / "labels").mkdir()
    options = {"path": str(tmp_path / "labels"), "columns": {"request_id": "id"}}
    reader = source(tmp_path / "log", labels=options, max_remembered=100)
    await look(reader, target, NOW + 100)
    assert len(reader._waiting) == 100
    pd.DataFrame({"id": frame.id, "label": 1.0}).to_parquet(tmp_path / "labels" / "a.parquet")
    seen = await look(reader, target, NOW + 110)
    assert sum(each["moments"].get("brier", [0])[0] for each in {**seen.stable, **seen.canary}.values()) == 100
    assert len(reader._early) == 100 and reader.labels_unknown == 100


async def test_a_label_outside_its_range_is_a_problem(tmp_path, target):
    frame = write(rows(NOW, NOW + 60), tmp_path / "log" / "a.parquet")
    (tmp_path / "labels").mkdir()
    pd.DataFrame({"id": frame.id, "label": 7.0}).to_parquet(tmp_path / "labels" / "a.parquet")
    options = {"path": str(tmp_path / "labels"), "columns": {"request_id": "id"}}
    seen = await look(source(tmp_path / "log", labels=options), target, NOW + 100)
    assert "labels outside 0 to 1" in seen.problem and "a.parquet" in seen.problem
    regression = source(tmp_path / "log", labels=options, losses=["squared_error", "absolute_error"])
    assert (await look(regression, target, NOW + 100)).problem is None


async def test_a_broken_file_is_a_problem_that_names_it_until_it_is_gone(tmp_path, target):
    frame = write(rows(NOW, NOW + 60), tmp_path / "a.parquet")
    broken = tmp_path / "b.parquet"
    broken.write_bytes((tmp_path / "a.parquet").read_bytes()[:-200])
    os.utime(broken, (NOW + 60, NOW + 60))
    reader = source(tmp_path)
    for now in (NOW + 100, NOW + 110):
        seen = await look(reader, target, now)
        assert "b.parquet is no readable Parquet file" in seen.problem and seen.canary is None
        with pytest.raises(InvalidInputError, match=r"b\.parquet"):
            await reader.check(target(), now)
    broken.unlink()
    seen = await look(reader, target, NOW + 120)
    assert seen.problem is None and totals(seen.stable) + totals(seen.canary) == len(frame)


async def test_a_damaged_page_counts_nothing_twice(tmp_path, target):
    frame = write(rows(NOW, NOW + 60, n=2000), tmp_path / "a.parquet", row_group_size=100, compression="gzip")
    path = tmp_path / "a.parquet"
    good = path.read_bytes()
    middle = len(good) // 2
    path.write_bytes(good[:middle] + b"\0" * 400 + good[middle + 400 :])
    os.utime(path, (NOW + 60, NOW + 60))
    reader = source(tmp_path)
    assert "a.parquet" in (await look(reader, target, NOW + 100)).problem
    path.write_bytes(good)
    os.utime(path, (NOW + 61, NOW + 61))
    seen = await look(reader, target, NOW + 110)
    assert totals(seen.stable) + totals(seen.canary) == len(frame)


async def test_a_file_that_is_being_written_is_waited_for(tmp_path, target):
    write(rows(NOW, NOW + 60), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    os.utime(tmp_path / "b.parquet", (NOW + 95, NOW + 95))
    (tmp_path / ".c.parquet").write_bytes(b"PAR1")
    reader = source(tmp_path)
    assert (await look(reader, target, NOW + 100)).problem is None
    assert "b.parquet" in (await look(reader, target, NOW + 106)).problem


BAD = {
    "latency": ({"seconds": -1.0}, "seconds is negative or not finite"),
    "infinite latency": ({"seconds": math.inf}, "seconds is negative or not finite"),
    "text latency": ({"seconds": "fast"}, "column seconds that is not all numbers"),
    "no time": ({"at": pd.NaT}, "rows without at"),
    "text time": ({"at": "yesterday"}, "time column at of type"),
}


@pytest.mark.parametrize("case", BAD)
async def test_columns_that_cannot_be_used(tmp_path, target, case):
    changes, message = BAD[case]
    frame = rows(NOW, NOW + 60)
    frame.loc[3:, list(changes)] = np.nan
    frame = frame.assign(**{name: frame[name].astype(object) for name in changes})
    for name, value in changes.items():
        frame[name] = value if name != "at" or value is not pd.NaT else rows(NOW, NOW + 60)["at"].where(frame.index > 3)
    path = tmp_path / "a.parquet"
    frame.to_parquet(path, index=False)
    os.utime(path, (NOW + 60, NOW + 60))
    seen = await look(source(tmp_path), target, NOW + 100)
    assert message in seen.problem and "a.parquet" in seen.problem


async def test_missing_columns_files_and_arms_are_named(tmp_path, target):
    assert (
        "has no rows of the stable version 1 and canary version 2 yet"
        in (await look(source(tmp_path), target, NOW)).problem
    )
    write(rows(NOW, NOW + 60, version="1"), tmp_path / "a.parquet")
    assert "has no rows of the canary version 2 yet" in (await look(source(tmp_path), target, NOW + 100)).problem
    full = await look(source(tmp_path), target, NOW + 100, stable="2", canary="1", weight=100.0)
    assert full.problem is None and full.stable is None
    missing = source(tmp_path, columns={**COLUMNS, "prediction": "probability"})
    with pytest.raises(InvalidInputError, match=r"a\.parquet has no column probability; it has at, version"):
        await missing.check(target(), NOW + 100)
    gone = await look(source("s4://nowhere/x"), target, NOW + 100)
    assert "cannot list s4://nowhere/x" in gone.problem


async def test_after_the_weights_change_only_rows_from_then_on_are_compared(tmp_path, target):
    write(rows(NOW, NOW + 60), tmp_path / "a.parquet")
    reader = source(tmp_path, settle=5.0)
    assert "missing 15" in (await reader.observe(target(), NOW + 100)).problem
    assert "missing 5" in (await reader.observe(target(), NOW + 110)).problem
    assert (await reader.observe(target(), NOW + 116)).problem is None
    assert "missing 15" in (await reader.observe(target(epoch="2"), NOW + 120)).problem


async def test_hours_in_the_path(tmp_path, target):
    hour = NOW - NOW % 3600
    for index in range(3):
        begin = hour + 3600 * index
        folder = time.strftime("dt=%Y-%m-%d/hour=%H", time.gmtime(begin))
        write(rows(begin, begin + 3600, n=50, seed=index), tmp_path / folder / "a.parquet")
    write(rows(hour - 90_000, hour - 89_000), tmp_path / "dt=2001-01-01" / "hour=00" / "a.parquet")
    reader = source(str(tmp_path / "dt=%Y-%m-%d" / "hour=%H" / "*.parquet"), start=hour)
    listed = []
    reader._rows._read, original = (lambda uri, *rest: listed.append(uri) or original(uri, *rest)), reader._rows._read
    seen = await look(reader, target, hour + 3 * 3600 + 60)
    assert totals(seen.stable) + totals(seen.canary) == 150 and len(listed) == 3


async def test_logs_on_s3(s3, target, tmp_path):
    start = time.time() - 100
    frame = rows(start, start + 60)
    path = tmp_path / "a.parquet"
    frame.to_parquet(path, index=False)
    s3.put_object(Bucket="runs", Key="log/a.parquet", Body=path.read_bytes())
    reader = source("s3://runs/log", start=start)
    seen = await look(reader, target, start + 100)
    assert seen.problem is None and totals(seen.stable) + totals(seen.canary) == len(frame)
    s3.put_object(Bucket="runs", Key="log/b.parquet", Body=path.read_bytes()[:-100])
    assert "s3://runs/log/b.parquet is no readable Parquet" in (await look(reader, target, time.time() + 60)).problem


async def test_the_judge_takes_it(tmp_path, target):
    judge = Judge(RolloutPolicy(steps=(25, 100), min_requests=100, deadline_seconds=3600), ["errors", "log_loss"])
    (tmp_path / "labels").mkdir()
    options = {"path": str(tmp_path / "labels"), "columns": {"request_id": "id"}}
    reader = source(tmp_path / "log", labels=options, metrics=["errors", "log_loss"])
    verdict = None
    for index in range(30):
        now = NOW + 60 * (index + 1)
        frame = write(rows(now - 60, now, n=2000, seed=index, status=200), tmp_path / "log" / f"{index}.parquet")
        label = np.where(frame.version == "2", frame.score < 0.5, frame.score > 0.5).astype(float)
        pd.DataFrame({"id": frame.id, "label": label}).to_parquet(tmp_path / "labels" / f"{index}.parquet")
        verdict = judge.observe(await look(reader, target, now + 10, weight=25.0))
        if verdict.final:
            break
    assert verdict.decision == "ROLLBACK" and "log_loss: the canary is worse" in verdict.reasons[0], verdict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"time": "at", "versoin": "v"}}, "unknown columns versoin"),
        ({"columns": {"time": "at"}}, "must name either arm .* or version"),
        ({"columns": {"time": "at", "arm": "a", "version": "v"}}, "must name either arm .* or version"),
        ({"labels": {"columns": {}}}, "expected path"),
        ({"labels": {"path": "x", "column": {}}}, "expected path"),
        ({"columns": {"version": "v", "prediction": "p"}, "labels": {"path": "x"}}, "joined by request_id"),
        ({"columns": {"version": "v", "request_id": "p"}, "labels": {"path": "x"}}, "compared with predictions"),
        ({"losses": ["hinge"]}, "expected losses of log_loss"),
        ({"time_unit": "h"}, "a unit of s, ms"),
        ({"delay": -1}, "expected seconds"),
        ({"prediction_edges": [0.5, 0.5]}, "finite numbers that rise"),
        ({"metrics": ["log_loss"]}, "gives no log_loss, which a guardrail reads; it gives errors, latency"),
        ({"metrics": ["timeouts"]}, "gives no timeouts"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(InvalidInputError, match=message):
        source("/nowhere", **options)
