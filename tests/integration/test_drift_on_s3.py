"""Profiles and drift checks of data on S3: boto3's own settings, s3fs, and moto's server behind them."""

from __future__ import annotations

import asyncio
import gzip
import io
import os

import numpy as np
import pandas as pd
import pytest
import requests
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops import storage
from airflow_mlops.drift import DriftReport, LossReference, Profile
from airflow_mlops.drift.cache import profile_of
from airflow_mlops.drift.profile import Plan
from airflow_mlops.drift.sources import open_source
from airflow_mlops.exceptions import DataError, ExternalSystemError
from airflow_mlops.sensors.drift import DriftSensor
from airflow_mlops.triggers.drift import DataReadyTrigger, DriftEventTrigger, data_ready

COLUMNS = ["temp", "carrier", "hour"]
AWAY = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
UNKNOWN = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


@pytest.fixture
def rng():
    return np.random.default_rng(4)


@pytest.fixture
def put(s3):
    """Writes a frame, or bytes, to a key of the bucket ``runs``; returns the bytes."""

    def put(key: str, content: pd.DataFrame | bytes, **options) -> bytes:
        if isinstance(content, pd.DataFrame):
            buffer = io.BytesIO()
            content.to_parquet(buffer, index=False, **options)
            content = buffer.getvalue()
        s3.put_object(Bucket="runs", Key=key, Body=content)
        return content

    return put


@pytest.fixture
def elsewhere(monkeypatch):
    """Changes the environment for all S3 clients that are made from then on."""
    import s3fs

    def change(**environment: str | None) -> None:
        for name, value in environment.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    # One try is enough of a store that is not there.
    change(AWS_MAX_ATTEMPTS="1", AWS_EC2_METADATA_DISABLED="true", AWS_CONFIG_FILE=os.devnull)
    return change


def features(rng, rows: int = 4_000, shift: float = 0.0) -> pd.DataFrame:
    when = pd.Timestamp("2013-04-01", tz="UTC") + pd.to_timedelta(rng.integers(0, 30 * 24, rows), "h")
    frame = pd.DataFrame({"temp": rng.normal(shift, 1, rows), "carrier": rng.choice(["AA", "UA", "DL"], rows)})
    return frame.assign(hour=rng.integers(5, 23, rows), event_timestamp=when)


def predictions(rng, frame: pd.DataFrame, bias: float = 0.0) -> pd.DataFrame:
    logit = rng.normal(-1, 1, len(frame))
    label = (rng.uniform(size=len(frame)) < 1 / (1 + np.exp(-logit))).astype("int8")
    champion = 1 / (1 + np.exp(-(logit + bias)))
    return pd.DataFrame({"event_timestamp": frame["event_timestamp"], "label": label, "champion": champion})


def test_a_prefix_a_glob_and_a_list_are_the_files_below(put, rng):
    frame = features(rng)
    put("month/day=1/1.parquet", frame[:1_500], row_group_size=400)
    put("month/day=2/2.parquet", frame[1_500:])
    put("month/day=2/_SUCCESS", b"")
    put("month/.tmp-3.parquet", b"half a fi")
    put("text/1.csv", frame[:1_500].to_csv(index=False).encode())
    put("text/2.csv.gz", gzip.compress(frame[1_500:].to_csv(index=False).encode()))
    expected = Profile.of(frame)
    parquet = ["s3://runs/month", "s3://runs/month/", "s3://runs/month/*/*.parquet"]
    parquet += [["s3://runs/month/day=1/1.parquet", "s3://runs/month/day=2"]]
    for uri in parquet:
        assert Profile.of(uri).digest == expected.digest
        assert Profile.of(uri, threads=3).digest == expected.digest
    for uri in ("s3://runs/text", "s3://runs/text/*.csv*"):
        found = Profile.of(uri)
        found.columns["event_timestamp"].type = expected.columns["event_timestamp"].type
        assert found.digest == expected.digest
    cached = [profile_of("s3://runs/month", "s3://runs/cache") for _ in range(2)]
    assert [profile.digest for profile in cached] == [expected.digest] * 2
    assert len(storage.list_files("s3://runs/cache")) == 1


def test_data_are_ready_when_they_are_there(put, rng):
    assert not data_ready("s3://runs/month") and not data_ready("s3://none/month")
    put("month/_SUCCESS", b"")
    assert not data_ready("s3://runs/month")
    put("month/1.parquet", features(rng, 10))
    assert all(map(data_ready, ("s3://runs/month", "s3://runs/month/*.parquet", "s3://runs/month/1.parquet")))
    for uri in ("s3://runs/none", "s3://runs/month/*.csv", "s3://none/month"):
        with pytest.raises(DataError, match=f"no Parquet or CSV file at {uri}".replace("*", r"\*")):
            Profile.of(uri)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("3.parquet", lambda content: content[:-500]),
        ("3.parquet", lambda content: content[:4] + bytes(2_000) + content[2_004:]),
        ("3.parquet", lambda content: b""),
        ("3.csv.gz", lambda content: content[: len(content) // 2]),
        ("3.csv.gz", lambda content: content[:500] + bytes(500) + content[1_000:]),
        ("3.csv.gz", lambda content: b"a,b\n1,2\n"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_corrupt_file_among_many_is_named(put, rng, name, spoil, threads):
    frame = features(rng)
    for i in range(1, 6):
        if name.endswith("parquet"):
            content = put(f"month/{i}.parquet", frame, write_page_checksum=True)
        else:
            content = put(f"month/{i}.csv.gz", gzip.compress(frame.to_csv(index=False).encode()))
    put(f"month/{name}", spoil(content))
    with pytest.raises(DataError, match=rf"^cannot read s3://runs/month/{name}: .*[^.]\. Write it again, or leave it"):
        Profile.of("s3://runs/month", threads=threads)


def test_a_check_of_data_on_s3_is_that_of_local_data(put, rng, tmp_path, mlflow_uri, task_context):
    from mlflow import MlflowClient

    training, month = features(rng, 9_000), features(rng, shift=1.0)
    profile = Profile.of(training, columns=COLUMNS, categorical=["hour"])
    held_out, scores = predictions(rng, training), predictions(rng, month, bias=-1.0)
    losses = LossReference.of(held_out["label"], held_out["champion"], held_out["event_timestamp"].dt.date)
    client = MlflowClient(tracking_uri=mlflow_uri, registry_uri=mlflow_uri)
    client.create_registered_model("late")
    for root in (str(tmp_path), "s3://runs/mlops"):
        tags = {"mlops.profile_uri": f"{root}/profile.json", "mlops.loss_reference_uri": f"{root}/loss.json"}
        storage.write_json(tags["mlops.profile_uri"], profile.to_json())
        storage.write_json(tags["mlops.loss_reference_uri"], losses.to_json())
        client.create_model_version("late", source=f"{root}/model", tags=tags)
    (tmp_path / "month").mkdir()
    for i, part in enumerate((slice(0, 1_000), slice(1_000, None))):
        put(f"mlops/month/{i}.parquet", month[part])
        put(f"mlops/scores/{i}.parquet", scores[part])
        month[part].to_parquet(tmp_path / f"month/{i}.parquet", index=False)
    scores.to_parquet(tmp_path / "scores.parquet")

    def check(root: str, version: str, **changes) -> dict:
        made = {
            "task_id": "drift",
            "current_uri": f"{root}/month",
            "predictions_uri": f"{root}/scores{'' if root.startswith('s3') else '.parquet'}",
            "model_name": "late",
            "model_version": version,
            "tracking_uri": mlflow_uri,
            "report_dir": f"{root}/reports",
            "retrain_on": ["harm", "drift"],
            "hysteresis": {"cooldown": "7d"},
            "experiment": "",
        }
        return DriftSensor(**made | changes).execute(task_context())

    here, there = check(str(tmp_path), "1"), check("s3://runs/mlops", "2")
    assert there["report_uri"].startswith("s3://runs/mlops/reports/late-20130401") and there["retrain"] is True
    reports = [storage.read_json(result["report_uri"]) for result in (here, there)]
    for name in ("verdict", "reasons", "drift", "harm"):
        assert reports[1][name] == reports[0][name]
    assert DriftReport.from_json(reports[1]["drift"]).drifted == ["temp"]
    assert b"temp" in storage.read_bytes(there["html_uri"])
    assert storage.exists("s3://runs/mlops/reports/late.hysteresis.json")
    assert check("s3://runs/mlops", "2") == there, "the same window again"

    async def told() -> dict:
        trigger = DriftEventTrigger("s3://runs/mlops/reports", poll_interval=0.05)
        trigger.asset_state_store = Told()
        return (await anext(trigger.run())).payload

    event = asyncio.run(asyncio.wait_for(told(), 30))
    assert (event["report_uri"], event["verdict"]) == (there["report_uri"], "harm")


def test_a_profile_of_the_aws_configuration_serves_as_well_as_the_environment(put, rng, elsewhere, tmp_path):
    put("month/1.parquet", features(rng, 100))
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    (tmp_path / "config").write_text(f"[profile lake]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    (tmp_path / "credentials").write_text("[lake]\naws_access_key_id = a\naws_secret_access_key = b\n")
    files = {"AWS_CONFIG_FILE": f"{tmp_path}/config", "AWS_SHARED_CREDENTIALS_FILE": f"{tmp_path}/credentials"}
    elsewhere(AWS_ENDPOINT_URL=None, **UNKNOWN, **files)
    with pytest.raises(ExternalSystemError, match="NoCredentialsError"):
        Profile.of("s3://runs/month")
    elsewhere(AWS_PROFILE="lake")
    assert Profile.of("s3://runs/month").rows == 100


class Told:
    """An asset's state store of a watcher that has been there before."""

    async def aget(self, key, default=None):
        return {}

    async def aset(self, key, value):
        pass


@pytest.mark.parametrize(
    ("environment", "why"),
    [(AWAY, "EndpointConnectionError: Could not connect"), (UNKNOWN, "NoCredentialsError"), ({}, "PermissionError: ")],
    ids=["away", "no credentials", "refused"],
)
def test_a_store_that_cannot_be_reached_is_no_fault_of_the_data(put, rng, elsewhere, environment, why):
    """The task is tried again, as it is not after an error of the data; the error says what to look at."""
    put("month/1.parquet", features(rng, 100))
    (unit,) = units = open_source("s3://runs/month")
    plan = Plan.of(units, None, (), None)
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    elsewhere(**environment)
    if not environment:
        requests.post(f"{endpoint}/moto-api/reset-auth", data="0", timeout=10)
    message = rf"^s3://runs/month.* cannot be reached \({why}.*\); check the address .*AWS_ENDPOINT_URL"
    try:
        for read in (
            lambda: Profile.of("s3://runs/month"),
            lambda: Profile.of("s3://runs/month/*.parquet"),
            lambda: plan.profile(unit),
            lambda: data_ready("s3://runs/month"),
            lambda: storage.read_bytes("s3://runs/month/1.parquet"),
            lambda: storage.exists("s3://runs/month/1.parquet"),
            lambda: storage.list_files("s3://runs/month"),
            lambda: storage.write_bytes("s3://runs/month/2.parquet", b""),
        ):
            with pytest.raises(ExternalSystemError, match=message):
                read()
    finally:
        requests.post(f"{endpoint}/moto-api/reset-auth", data="inf", timeout=10)


def test_a_file_that_is_gone_while_it_is_read_is_looked_for_again(put, s3, rng):
    put("month/1.parquet", features(rng, 100))
    (unit,) = units = open_source("s3://runs/month")
    s3.delete_object(Bucket="runs", Key="month/1.parquet")
    with pytest.raises(ExternalSystemError, match=r"^s3://runs/month/1\.parquet is gone since it was listed"):
        Plan.of(units, None, (), None).profile(unit)


async def test_who_waits_for_data_outlasts_a_store_that_is_away(put, rng, elsewhere):
    put("month/1.parquet", features(rng, 100))
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    elsewhere(**AWAY)
    waiting = asyncio.create_task(anext(DataReadyTrigger("s3://runs/month", poll_interval=0.05).run()))
    watching = asyncio.create_task(anext(DriftEventTrigger("s3://runs/reports", poll_interval=0.05).run()))
    done, _ = await asyncio.wait([waiting, watching], timeout=2)
    assert not done
    elsewhere(AWS_ENDPOINT_URL=endpoint)
    event = await asyncio.wait_for(waiting, 20)
    assert event.payload == {"status": "ready", "uri": "s3://runs/month"}
    watching.cancel()


def test_a_uri_that_no_filesystem_knows_is_refused(mlflow_uri, task_context, tmp_path):
    sensor = DriftSensor(
        task_id="drift",
        current_uri="s4://runs/month",
        model_name="late",
        report_dir=str(tmp_path),
        retrain_on=["drift"],
    )
    with pytest.raises(AirflowFailException, match=r"s4://runs/month cannot be opened: Protocol not known: s4"):
        sensor.execute(task_context())
