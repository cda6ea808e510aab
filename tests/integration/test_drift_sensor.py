"""DriftSensor against a real MLflow registry on SQLite, real Parquet and real Evidently."""

from __future__ import annotations

import datetime as dt
import json
import re

import numpy as np
import pandas as pd
import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowSensorTimeout, AirflowSkipException, TaskDeferred

from airflow_mlops import storage
from airflow_mlops.drift import DriftPolicy, DriftReport, HarmPolicy, HarmReport, LossReference, Profile
from airflow_mlops.links import ReportLink
from airflow_mlops.sensors.drift import DriftSensor
from airflow_mlops.triggers.drift import DataReadyTrigger

MODEL = "flights_delay"


class TaskInstance:
    def __init__(self):
        self.xcoms = {}

    def xcom_push(self, key, value):
        self.xcoms[key] = value


@pytest.fixture
def context():
    start, end = (dt.datetime(2013, month, 1, tzinfo=dt.timezone.utc) for month in (4, 5))
    return {"ti": TaskInstance(), "run_id": "manual", "data_interval_start": start, "data_interval_end": end}


def features(rng, rows=4_000, shift=0.0):
    return pd.DataFrame(
        {
            "temp": rng.normal(shift, 1, rows),
            "delay": rng.normal(shift, 2, rows),
            "carrier": rng.choice(["AA", "UA", "DL"], rows),
            "hour": rng.integers(5, 23, rows),
            "event_timestamp": pd.Timestamp("2013-04-01", tz="UTC")
            + pd.to_timedelta(rng.integers(0, 30 * 24, rows), "h"),
        }
    )


def predictions(rng, frame, bias=0.0):
    logit = rng.normal(-1, 1, len(frame))
    label = (rng.uniform(size=len(frame)) < 1 / (1 + np.exp(-logit))).astype("int8")
    return pd.DataFrame(
        {
            "event_timestamp": frame["event_timestamp"],
            "label": label,
            "champion": 1 / (1 + np.exp(-(logit + bias))),
        }
    )


@pytest.fixture
def root(tmp_path, mlflow_uri):
    """The folder in which ``mlflow_uri`` keeps its store, and everything else is put."""
    return tmp_path


@pytest.fixture
def rng():
    return np.random.default_rng(4)


@pytest.fixture
def client(root):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db", registry_uri=f"sqlite:///{root}/mlflow.db")


@pytest.fixture
def champion(root, rng, client):
    """A registered version with its profile and loss reference, as the gate and the register operator leave it."""
    reference = features(rng, 9_000)
    profile = Profile.of(reference, columns=["temp", "delay", "carrier", "hour"], categorical=["hour"])
    storage.write_json(f"{root}/profile.json", profile.to_json())
    held_out = predictions(rng, reference)
    losses = LossReference.of(held_out["label"], held_out["champion"], held_out["event_timestamp"].dt.date)
    storage.write_json(f"{root}/loss.json", losses.to_json())
    client.create_registered_model(MODEL)
    tags = {"mlops.profile_uri": f"{root}/profile.json", "mlops.loss_reference_uri": f"{root}/loss.json"}
    version = client.create_model_version(MODEL, source=f"{root}/model", tags=tags)
    client.set_registered_model_alias(MODEL, "champion", version.version)
    return version


@pytest.fixture
def month(root, rng):
    """Writes a month's features and the champion's predictions on it."""

    def write(shift=0.0, bias=0.0, rows=4_000, change=lambda frame: frame, predict=lambda frame: frame):
        frame = features(rng, rows, shift)
        change(frame).to_parquet(root / "month.parquet", index=False)
        predict(predictions(rng, frame, bias)).to_parquet(root / "predictions.parquet", index=False)

    return write


@pytest.fixture
def sensor(root):
    def make(**kwargs):
        defaults = {
            "task_id": "drift",
            "current_uri": f"{root}/month.parquet",
            "predictions_uri": f"{root}/predictions.parquet",
            "model_name": MODEL,
            "tracking_uri": f"sqlite:///{root}/mlflow.db",
            "report_dir": f"{root}/reports",
            "evidently": False,
            "poke_interval": 0.05,
            "timeout": 0.2,
        }
        return DriftSensor(**{**defaults, **kwargs})

    return make


def test_a_stable_month_skips_with_its_verdict_on_record(champion, month, sensor, context):
    month()
    with pytest.raises(AirflowSkipException, match="flights_delay stable: no retraining"):
        sensor().execute(context)
    result = context["ti"].xcoms["return_value"]
    assert (result["verdict"], result["retrain"], result["columns"]) == ("stable", False, [])
    assert result["harm"]["verdict"] == result["drift"] == "stable"
    # Tasks after it read single keys too, as of a sensor that returned.
    assert {key: value for key, value in context["ti"].xcoms.items() if key != "return_value"} == result


def test_a_harmed_champion_is_retrained(champion, month, sensor, context):
    month(bias=-1.0)
    result = sensor().execute(context)
    assert (result["verdict"], result["retrain"]) == ("harm", True)
    assert any(reason.startswith("harm: calibration") for reason in result["reasons"])
    assert result["model"] == {"name": MODEL, "version": "1", "alias": "champion"}
    assert result["window"] == {"start": "2013-04-01T00:00:00+00:00", "end": "2013-05-01T00:00:00+00:00"}
    json.dumps(result, allow_nan=False)
    written = storage.read_json(result["report_uri"])
    assert written["verdict"] == "harm" and written["retrain"] is True
    assert HarmReport.from_json(written["harm"]).verdict == "harm"
    assert DriftReport.from_json(written["drift"]).verdict == "stable"


def test_drift_without_harm_is_evidence_unless_asked_for(champion, month, sensor, context):
    month(shift=2.0)
    result = sensor(on_stable="proceed").execute(context)
    assert (result["verdict"], result["retrain"], result["columns"]) == ("drift", False, ["temp", "delay"])
    assert result["drifted"] == 2
    result = sensor(retrain_on=["harm", "drift"]).execute(context)
    assert (result["verdict"], result["retrain"]) == ("drift", True)
    result = sensor(retrain_on=["drift"], predictions_uri=None).execute(context)
    assert (result["retrain"], result["harm"]) == (True, None)


def test_calendar_columns_are_shown_and_do_not_retrain(champion, month, sensor, context):
    month(shift=2.0)
    policy = {"calendar_columns": ["temp", "delay"]}
    result = sensor(policy=policy, retrain_on=["harm", "drift"], on_stable="proceed").execute(context)
    assert (result["verdict"], result["retrain"]) == ("stable", False)
    assert result["calendar_columns"] == ["temp", "delay"]


def test_no_version_at_all_trains_the_first(month, sensor, context):
    month()
    result = sensor().execute(context)
    assert (result["verdict"], result["retrain"], result["model"]["version"]) == ("no_champion", True, None)
    assert storage.read_json(result["report_uri"])["verdict"] == "no_champion"


def test_a_cleared_first_run_finds_no_champion_though_it_made_one_since(champion, month, sensor, context):
    """The run knows from its start that there was none, and scored none."""
    month(predict=lambda frame: frame.drop(columns="champion"))
    result = sensor(model_version="").execute(context)
    assert (result["verdict"], result["retrain"], result["model"]["version"]) == ("no_champion", True, None)
    with pytest.raises(AirflowFailException, match="lacks champion"):
        sensor(model_version="None").execute(context)


def test_lists_and_numbers_may_be_text_as_templates_render_them(champion, month, sensor, context):
    month(shift=1.0)
    result = sensor(
        columns="['temp', 'delay', 'hour']",
        categorical="['hour']",
        retrain_on='["drift"]',
        policy="{'min_effect': '0.2', 'calendar_columns': ['temp']}",
        harm_policy={"alpha": "0.001"},
    ).execute(context)
    assert (result["retrain"], result["columns"], result["calendar_columns"]) == (True, ["delay"], ["temp"])
    assert result["compared"] == 3


def test_labels_that_are_still_out_are_not_enough_data(champion, month, sensor, context):
    month(predict=lambda frame: frame.assign(label=frame["label"].astype("Int8").mask(frame.index % 2 == 0)))
    with pytest.raises(AirflowSkipException):
        sensor().execute(context)
    result = context["ti"].xcoms["return_value"]
    assert result["verdict"] == "not_enough_data"
    assert "2000 of 4000 rows have a label" in result["reasons"][0]


def test_a_lost_champion_is_an_error_that_says_how_to_restore_it(champion, month, sensor, context, client):
    month()
    client.delete_registered_model_alias(MODEL, "champion")
    with pytest.raises(AirflowFailException, match="set_registered_model_alias"):
        sensor().execute(context)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c, root: c.delete_model_version_tag(MODEL, "1", "mlops.profile_uri"), "has no training profile"),
        (lambda c, root: c.delete_model_version_tag(MODEL, "1", "mlops.loss_reference_uri"), "has no loss reference"),
        (lambda c, root: (root / "profile.json").unlink(), "is not at .*profile.json any more"),
        (lambda c, root: (root / "profile.json").write_text("{"), "is no JSON"),
        (lambda c, root: (root / "profile.json").write_text("{}"), "not a drift profile"),
        (lambda c, root: (root / "loss.json").write_text('{"loss_reference_version": 9}'), "version 9"),
    ],
)
def test_a_champion_without_its_references_is_an_error(champion, month, sensor, context, client, root, spoil, message):
    month()
    spoil(client, root)
    with pytest.raises(AirflowFailException, match=message):
        sensor().execute(context)


def test_references_can_be_artifacts_of_a_run(champion, month, sensor, context, client, root):
    month(bias=-1.0)
    experiment = client.create_experiment("e", artifact_location=f"{root}/artifacts")
    run = client.create_run(experiment)
    client.log_artifact(run.info.run_id, f"{root}/profile.json")
    client.set_model_version_tag(MODEL, "1", "mlops.profile_uri", f"runs:/{run.info.run_id}/profile.json")
    assert sensor().execute(context)["verdict"] == "harm"
    client.set_model_version_tag(MODEL, "1", "mlops.profile_uri", f"runs:/{run.info.run_id}/absent.json")
    with pytest.raises(AirflowFailException, match="any more"):
        sensor().execute(context)


def test_a_given_version_is_compared_in_place_of_the_champion(champion, month, sensor, context, client):
    month(bias=-1.0)
    client.delete_registered_model_alias(MODEL, "champion")
    assert sensor(model_version="1").execute(context)["model"]["version"] == "1"
    with pytest.raises(AirflowFailException, match="has no version 7"):
        sensor(model_version="7").execute(context)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (lambda frame: frame.drop(columns="delay"), "delay"),
        (lambda frame: frame.assign(delay=np.nan), "delay"),
        (lambda frame: frame.assign(delay="late"), "delay"),
    ],
)
def test_broken_data_are_never_stable_and_are_not_trained_on(champion, month, sensor, context, change, column):
    month(change=change)
    result = sensor(on_stable="proceed", retrain_on=["harm", "drift"]).execute(context)
    assert (result["verdict"], result["retrain"], result["broken_columns"]) == ("drift", False, [column])


def test_missing_predictions_and_short_months_are_never_stable(champion, month, sensor, context):
    month(predict=lambda frame: frame.assign(champion=np.nan))
    result = sensor(on_stable="proceed").execute(context)
    assert (result["verdict"], result["retrain"]) == ("not_enough_data", False)
    month(rows=100)
    assert sensor(on_stable="proceed").execute(context)["verdict"] == "not_enough_data"
    with pytest.raises(AirflowSkipException, match=r"not_enough_data: no retraining.*rows"):
        sensor().execute(context)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"on_stable": "shrug"}, "expected wait, skip or proceed"),
        ({"retrain_on": "harm"}, "expected a list"),
        ({"retrain_on": []}, "expected a list"),
        ({"retrain_on": ["harm", "loss"]}, "expected a list"),
        ({"model_name": "None"}, "empty after templating: model_name"),
        ({"predictions_uri": "None"}, "needs predictions_uri"),
        ({"prediction_column": "challenger"}, "lacks challenger; it has event_timestamp, label, champion"),
        ({"columns": ["wind"]}, "wind are neither in the champion's profile nor in the data"),
        ({"policy": {"min_efect": 1}}, "unknown field"),
        ({"harm_policy": {"alpha": 2}}, "alpha is 2"),
        ({"window_start": "2013-04-01"}, "only one end"),
    ],
)
def test_wrong_parameters_fail_at_once_and_say_why(champion, month, sensor, context, kwargs, message):
    month()
    with pytest.raises(AirflowFailException, match=message):
        sensor(**kwargs).execute(context)


def spoilt_parquet(root, of):
    """The month in three files, of which ``of`` spoils the second."""
    content = (root / "month.parquet").read_bytes()
    (root / "month.parquet").unlink()
    (root / "month.parquet").mkdir()
    for i in range(3):
        (root / f"month.parquet/{i}.parquet").write_bytes(of(content) if i == 1 else content)


def two_zones(root):
    for zone in ("UTC", None):
        when = pd.Series(pd.date_range("2013-04-01", periods=600, freq="h", tz=zone))
        pd.DataFrame({"temp": 0.0, "when": when}).to_parquet(root / f"{zone}.parquet")
    spoilt_parquet(root, lambda content: (root / "None.parquet").read_bytes())
    for i in (0, 2):
        (root / f"month.parquet/{i}.parquet").write_bytes((root / "UTC.parquet").read_bytes())


def rewrite(path, **changes):
    storage.write_json(str(path), {**storage.read_json(str(path)), **changes})


@pytest.mark.parametrize(
    ("spoil", "kwargs", "message"),
    [
        (
            lambda root, client: pd.DataFrame({"temp": pd.Series([], dtype=float)}).to_parquet(root / "month.parquet"),
            {},
            r"month\.parquet has no rows; a profile needs data\. Check the window that was asked for",
        ),
        (
            lambda root, client: pd.DataFrame({"z": [1.0]}).to_parquet(root / "month.parquet"),
            {},
            "month.parquet has none of the columns of the champion's profile: it has z, the profile carrier, delay, "
            "hour, temp. Point current_uri at the feature set the model reads",
        ),
        (
            lambda root, client: pd.DataFrame({"temp": [[1.0], [2.0]]}).to_parquet(root / "month.parquet"),
            {},
            "column temp has type list.*a profile takes numbers, text, booleans and times. Leave it out with columns=",
        ),
        (
            lambda root, client: two_zones(root),
            {"columns": ["temp", "when"]},
            r"column when is timestamp\[.s, tz=UTC\] in .*0\.parquet, and timestamp\[.s\] in .*1\.parquet: times in "
            "different zones, or with a zone and without, are not one column. Convert it to UTC everywhere",
        ),
        (
            lambda root, client: spoilt_parquet(root, lambda content: content[:-400]),
            {},
            r"cannot read .*month\.parquet/1\.parquet: .*magic bytes.* Write it again, or leave it out of the window",
        ),
        (
            lambda root, client: rewrite(root / "profile.json", profile_version=99),
            {},
            "the profile has version 99, this airflow-mlops reads up to 2: upgrade airflow-mlops here, or build the "
            "profile again with this version",
        ),
        (
            lambda root, client: client.delete_model_version_tag(MODEL, "1", "mlops.profile_uri"),
            {},
            r"flights_delay version 1 has no training profile \(tag mlops\.profile_uri\); register the version with "
            "MlflowRegisterOperator, or write the JSON and set it: ",
        ),
    ],
    ids=["empty", "nothing in common", "nested", "zones", "corrupt", "newer profile", "no profile"],
)
def test_what_cannot_be_compared_says_what_is_wrong_and_how_to_mend_it(
    champion, month, sensor, context, root, client, spoil, kwargs, message
):
    month()
    spoil(root, client)
    with pytest.raises(AirflowFailException, match=message):
        sensor(retrain_on=["drift"], predictions_uri=None, **kwargs).execute(context)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda frame: frame.drop(columns="delay"), "delay: missing: the current data lack this column"),
        (lambda frame: frame.assign(delay="late"), "delay: type changed: double in the reference, string now"),
        (lambda frame: frame.assign(delay=np.nan), "delay: all missing: the current data have no usable value"),
        (lambda frame: frame.assign(delay=np.inf), "delay: all missing: the current data have no usable value"),
        (
            lambda frame: frame.assign(delay=frame["delay"].mask(frame.index % 4 == 0, -np.inf)),
            "delay: missing values: 0.0% in the reference, 25.0% now, 1000 of them infinite",
        ),
        (lambda frame: frame.assign(delay=3.5), r"delay: wasserstein 1.*\(at least 0\.1\), adjusted p below 1e-16"),
    ],
    ids=["gone", "type", "missing", "infinite", "partly infinite", "constant"],
)
def test_the_verdict_on_spoilt_columns_says_what_is_wrong(champion, month, sensor, context, change, reason):
    month(change=change)
    result = sensor(on_stable="proceed", retrain_on=["drift"], predictions_uri=None).execute(context)
    assert result["verdict"] == "drift" and re.match(f"drift: {reason}", result["reasons"][0])


def test_data_that_do_not_come_time_out(champion, sensor, context):
    with pytest.raises(AirflowSensorTimeout):
        sensor().execute(context)


def test_waiting_ends_when_other_data_ask_for_retraining(champion, month, sensor, context, monkeypatch):
    month()
    waiting = sensor(on_stable="wait", timeout=30)
    monkeypatch.setattr("airflow.sdk.bases.sensor.time.sleep", lambda seconds: month(bias=-1.0))
    assert waiting.execute(context)["verdict"] == "harm"
    assert "return_value" not in context["ti"].xcoms


def test_deferral_waits_in_the_trigger_and_computes_in_a_fresh_worker(champion, month, sensor, context, root):
    with pytest.raises(TaskDeferred) as deferred:
        sensor(deferrable=True, timeout=60).execute(context)
    trigger = deferred.value.trigger
    assert isinstance(trigger, DataReadyTrigger) and trigger.uri == f"{root}/month.parquet"
    assert deferred.value.timeout <= dt.timedelta(seconds=60)
    month(bias=-1.0)
    resume = getattr(sensor(deferrable=True, timeout=60), deferred.value.method_name)
    kwargs = json.loads(json.dumps(deferred.value.kwargs))
    assert resume(context, event={"status": "ready"}, **kwargs)["verdict"] == "harm"


def test_deferred_waiting_keeps_its_first_deadline(champion, month, sensor, context):
    month()
    started = (dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=50)).isoformat()
    waiting = sensor(deferrable=True, on_stable="wait", timeout=60)
    with pytest.raises(TaskDeferred) as deferred:
        waiting.execute_complete(context, {"status": "ready"}, started)
    assert deferred.value.timeout < dt.timedelta(seconds=11) and deferred.value.trigger.delay > 0
    with pytest.raises(AirflowSensorTimeout):
        sensor(deferrable=True, on_stable="wait", timeout=40).execute_complete(context, {"status": "ready"}, started)


def test_the_same_window_gives_the_same_report_bit_for_bit(champion, month, sensor, context, root):
    month(shift=1.0, bias=-1.0)
    first = sensor().execute(context)
    content = storage.read_bytes(first["report_uri"])
    assert sensor().execute(context) == first and storage.read_bytes(first["report_uri"]) == content
    assert first["report_uri"] == f"{root}/reports/flights_delay-20130401T0000-20130501T0000.drift.json"


def test_a_run_without_a_window_names_its_report_by_the_run(champion, month, sensor, root):
    month(bias=-1.0)
    context = {"ti": TaskInstance(), "run_id": "manual__2013-04-01T00:00:00+00:00"}
    result = sensor().execute(context)
    assert result["window"] is None
    assert result["report_uri"].endswith("flights_delay-manual__2013-04-01T00_00_00+00_00.drift.json")


def test_evidentlys_page_is_written_and_linked(champion, month, sensor, context, monkeypatch):
    month(shift=2.0, bias=-1.0, change=lambda frame: frame.drop(columns="temp").assign(new=1.0))
    result = sensor(evidently=True).execute(context)
    page = storage.read_bytes(result["html_uri"]).decode()
    assert "delay" in page and "carrier" in page and len(page) > 100_000
    monkeypatch.setattr("airflow_mlops.links.XCom.get_value", lambda **kwargs: result)
    assert ReportLink().get_link(None, ti_key=None) == f"file://{result['html_uri']}"


def test_a_page_that_fails_does_not_cost_the_verdict(champion, month, sensor, context, monkeypatch):
    month(bias=-1.0)

    def fail(*args, **kwargs):
        raise RuntimeError("plot")

    monkeypatch.setattr("airflow_mlops.drift.page.write_page", fail)
    result = sensor(evidently=True).execute(context)
    assert (result["verdict"], result["html_uri"]) == ("harm", None)


def test_policies_can_be_objects_or_mappings(champion, month, sensor, context):
    month(shift=0.3)
    loose = {"on_stable": "proceed", "harm_policy": HarmPolicy(alpha=0.001)}
    assert sensor(policy=DriftPolicy(min_effect=1.0), **loose).execute(context)["verdict"] == "stable"
    assert sensor(policy={"min_effect": 0.05}, **loose).execute(context)["verdict"] == "drift"


def test_every_parameter_a_user_would_template_is_templated_and_init_only_assigns():
    made = DriftSensor(task_id="x", current_uri="", model_name="", report_dir="", on_stable="nonsense", retrain_on=[])
    assert all(hasattr(made, name) for name in DriftSensor.template_fields)


# --- hysteresis -------------------------------------------------------------------------------------------------


class AssetStore:
    """What Airflow gives a task with assets: the store of the only one, or a refusal."""

    def __init__(self, assets=1):
        self.content, self.assets = {}, assets

    def get(self, key, default=None):
        if self.assets != 1:
            raise ValueError(f"Task has {self.assets} concrete inlets and outlets")
        return json.loads(self.content[key]) if key in self.content else default

    def set(self, key, value):
        self.content[key] = json.dumps(value)


def of_month(month, **more):
    start, end = (dt.datetime(2013, m, 1, tzinfo=dt.timezone.utc) for m in (month, month + 1))
    return {"ti": TaskInstance(), "run_id": "r", "data_interval_start": start, "data_interval_end": end, **more}


LIMITS = {"cooldown": "45d", "budget_per_window": 2, "window": "365d"}


@pytest.mark.parametrize("kept", ["asset", "file", "two assets"])
def test_a_harmed_champion_is_not_retrained_again_and_again(champion, month, sensor, root, kept):
    more = {} if kept == "file" else {"asset_state_store": AssetStore(1 if kept == "asset" else 2)}
    month(bias=-1.0)
    made = {"hysteresis": {**LIMITS, "rearm_after": "1d"}, "on_stable": "proceed"}
    april = sensor(**made).execute(of_month(4, **more))
    assert (april["retrain"], april["hysteresis"]["granted"]) == (True, 1) and april["hysteresis"]["score"] > 1
    may = sensor(**made).execute(of_month(5, **more))
    assert (may["verdict"], may["retrain"]) == ("harm", False)
    assert may["hysteresis"]["until"] == "2013-06-15T00:00:00+00:00"
    assert may["reasons"][0] == (
        "retraining held back, until 2013-06-15T00:00:00+00:00: cool-down since the training of 2013-05-01"
    )
    written = storage.read_json(may["report_uri"])
    assert written["retrain"] is False and written["hysteresis"] == may["hysteresis"]
    # Again, as a retry or in a backfill out of order: the same answers, and nothing is counted twice.
    for of, before in ((5, may), (4, april)):
        again = sensor(**made).execute(of_month(of, **more))
        assert (again["retrain"], again["hysteresis"]) == (before["retrain"], before["hysteresis"])
    assert sensor(**made).execute(of_month(6, **more))["retrain"] is True
    spent = sensor(**made).execute(of_month(9, **more))
    assert "the budget is 2" in spent["reasons"][0] and spent["retrain"] is False
    late = sensor(**made).execute(of_month(3, **more))
    assert "has been judged before this one" in late["reasons"][0] and late["retrain"] is False
    on_disk = (root / "reports" / "flights_delay.hysteresis.json").exists()
    assert on_disk == (kept != "asset") and (kept != "asset" or more["asset_state_store"].content)


def test_a_skip_says_that_retraining_is_held_back(champion, month, sensor, root):
    month(bias=-1.0)
    made = {"hysteresis": {"consecutive_breaches": 2}, "state_dir": f"{root}/state"}
    with pytest.raises(AirflowSkipException, match=r"harm: no retraining \(retraining held back: 1 breach"):
        sensor(**made).execute(of_month(4))
    assert sensor(**made).execute(of_month(5))["retrain"] is True
    assert (root / "state" / "flights_delay.hysteresis.json").exists()


def test_quiet_windows_are_not_held_back_and_a_first_champion_never_is(champion, month, sensor, client):
    month()
    quiet = sensor(hysteresis=LIMITS, on_stable="proceed").execute(of_month(4))
    assert quiet["hysteresis"]["reason"] == "" and not any("held back" in reason for reason in quiet["reasons"])
    first = sensor(hysteresis={"budget_per_window": 0}, model_version="").execute(of_month(4))
    assert (first["retrain"], first["hysteresis"]) == (True, None)


def test_evidence_below_the_level_to_arm_is_held_back(champion, month, sensor):
    month(shift=0.3, bias=0.0)
    made = {"retrain_on": ["drift"], "predictions_uri": None, "on_stable": "proceed"}
    result = sensor(**made, hysteresis={"arm": 50, "disarm": 1}).execute(of_month(4))
    assert result["verdict"] == "drift" and result["retrain"] is False
    assert "below the level to arm" in result["reasons"][0]


def test_hysteresis_without_a_window_is_refused(champion, month, sensor):
    month(bias=-1.0)
    with pytest.raises(AirflowFailException, match="give both ends"):
        sensor(hysteresis=LIMITS).execute({"ti": TaskInstance(), "run_id": "manual"})


def test_runs_at_once_on_one_file_count_one_after_the_other(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from airflow_mlops.sensors._drift_state import change_file

    uri = str(tmp_path / "state.json")

    def count(_):
        return change_file(uri, lambda state: (None, {"n": (state or {"n": 0})["n"] + 1}))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(40)))
    assert storage.read_json(uri) == {"n": 40}


# --- engines, MLflow, Prometheus ----------------------------------------------------------------------------------


def test_evidentlys_own_tests_can_be_the_verdict(champion, month, sensor, context, client, root, rng):
    features(rng, 9_000).to_parquet(root / "training.parquet", index=False)
    month(shift=2.0)
    made = {"engine": "evidently", "retrain_on": ["drift"], "predictions_uri": None, "on_stable": "proceed"}
    with pytest.raises(AirflowFailException, match=r"mlops.dataset_uri does not name them; give reference_uri"):
        sensor(**made).execute(context)
    client.set_model_version_tag(MODEL, "1", "mlops.dataset_uri", f"{root}/training.parquet")
    result = sensor(**made).execute(context)
    assert (result["verdict"], result["retrain"], result["engine"]) == ("drift", True, "evidently")
    assert sorted(result["columns"]) == ["delay", "temp"], "half of the columns: Evidently's own limit"
    drift = DriftReport.from_json(storage.read_json(result["report_uri"])["drift"])
    assert drift.columns[0].method == "Wasserstein distance (normed)"
    options = {"engine_options": {"drift_share": "0.7"}, "reference_uri": f"{root}/training.parquet"}
    result = sensor(**made, **options).execute(context)
    assert (result["verdict"], result["retrain"]) == ("stable", False)
    ours = sensor(**{**made, "engine": "profile"}).execute(context)
    assert set(ours) == set(result), "the same shape, whoever judges"


def test_a_check_is_on_record_in_mlflow_with_its_page(champion, month, sensor, context, client):
    month(bias=-1.0, shift=1.0)
    result = sensor(evidently=True).execute(context)
    run = client.get_run(result["mlflow_run_id"])
    assert client.get_experiment(run.info.experiment_id).name == "drift"
    assert (run.data.tags["mlops.verdict"], run.data.tags["mlops.version"]) == ("harm", "1")
    assert (run.data.metrics["columns_drift"], run.data.metrics["retrain"]) == (2, 1)
    assert run.data.metrics["log_loss_current"] > run.data.metrics["log_loss_reference"]
    assert sorted(file.path for file in client.list_artifacts(run.info.run_id)) == ["evidently.html", "verdict.json"]
    import mlflow

    page = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/evidently.html")
    assert page == storage.read_bytes(result["html_uri"]).decode()
    again = sensor(evidently=True).execute(context)
    assert again == result, "the same check is the same run"
    assert len(client.get_metric_history(run.info.run_id, "columns_drift")) == 1
    assert sensor(experiment="").execute(context)["mlflow_run_id"] is None


def test_a_run_on_a_server_is_linked_without_its_password():
    from types import SimpleNamespace

    from airflow_mlops.hooks.mlflow import MlflowHook

    hook = SimpleNamespace(tracking_uri="https://me:secret@mlflow.example.com/base/", experiment_id=lambda name: "7")
    assert MlflowHook.run_url(hook, "drift", "abc") == "https://mlflow.example.com/base/#/experiments/7/runs/abc"
    hook.tracking_uri = "sqlite:///x.db"
    assert MlflowHook.run_url(hook, "drift", "abc") is None


def test_what_is_only_a_copy_costs_no_verdict(champion, month, sensor, context, root, client):
    month(bias=-1.0)
    client.delete_experiment(client.create_experiment("gone"))
    (root / "file").write_text("")
    broken = {"experiment": "gone", "prometheus_textfile_dir": f"{root}/file", "pushgateway_url": "http://127.0.0.1:9"}
    result = sensor(**broken).execute(context)
    assert (result["verdict"], result["mlflow_run_id"], result["mlflow_url"]) == ("harm", None, None)


def test_metrics_go_where_the_task_or_the_configuration_says(champion, month, sensor, context, root, monkeypatch):
    month(bias=-1.0)
    sensor(prometheus_textfile_dir=f"{root}/a").execute(context)
    assert (
        'mlops_drift_verdict{model="flights_delay",verdict="harm"} 1.0'
        in (root / "a" / "mlops_drift_flights_delay.prom").read_text()
    )
    monkeypatch.setenv("AIRFLOW__MLOPS__PROMETHEUS_TEXTFILE_DIR", f"{root}/b")
    sensor().execute(context)
    assert (root / "b" / "mlops_drift_flights_delay.prom").exists()


def test_the_same_season_of_another_year_is_no_drift(champion, month, sensor, context, root, rng):
    month(shift=2.0)
    columns = ["temp", "delay", "carrier", "hour"]
    season = Profile.of(features(rng, 9_000, shift=2.0), columns=columns, categorical=["hour"])
    storage.write_json(f"{root}/season.json", season.to_json())
    made = {"retrain_on": ["drift"], "predictions_uri": None, "on_stable": "proceed"}
    assert sensor(**made).execute(context)["columns"] == ["temp", "delay"]
    result = sensor(**made, season_uri=f"{root}/season.json").execute(context)
    assert (result["verdict"], sorted(result["calendar_columns"])) == ("stable", ["delay", "temp"])


def test_csv_is_taken_as_parquet_is(champion, month, sensor, context, root):
    month(shift=2.0)
    pd.read_parquet(root / "month.parquet").to_csv(root / "month.csv", index=False)
    made = {"retrain_on": ["drift"], "predictions_uri": None}
    as_csv = sensor(**made, current_uri=f"{root}/month.csv").execute(context)
    assert as_csv["columns"] == sensor(**made).execute(context)["columns"] == ["temp", "delay"]


def test_data_are_fresh_as_of_the_end_of_the_window(champion, month, sensor, context, root, client, rng):
    profile = Profile.of(features(rng, 9_000), columns=["temp", "event_timestamp"])
    storage.write_json(f"{root}/profile.json", profile.to_json())
    month()
    made = {"retrain_on": ["drift"], "predictions_uri": None, "on_stable": "proceed"}
    fresh = sensor(**made, policy={"max_age": {"event_timestamp": 2 * 86400}}).execute(context)
    assert (fresh["verdict"], fresh["broken_columns"]) == ("stable", [])
    stale = sensor(**made, policy={"max_age": {"event_timestamp": 60}}).execute(context)
    assert (stale["verdict"], stale["broken_columns"]) == ("drift", ["event_timestamp"])
    for age, mapped in ((2 * 86400, fresh), (60, stale)):
        assert sensor(**made, policy=DriftPolicy(max_age={"event_timestamp": age})).execute(context) == mapped
    given = DriftPolicy(max_age={"event_timestamp": 60}, as_of="2013-04-20")
    assert sensor(**made, policy=given).execute(context)["broken_columns"] == ["event_timestamp"], "as given"


# --- evidence from scores and losses ------------------------------------------------------------------------------


@pytest.fixture
def estimator(champion, client, root, rng):
    """The estimator of performance that a training would leave beside the model."""
    from airflow_mlops.drift.performance import CalibratedEstimate

    held_out = predictions(rng, features(rng, 9_000))
    stored = CalibratedEstimate.fit(held_out["champion"], held_out["label"])
    storage.write_json(f"{root}/performance.json", stored.to_json())
    client.set_model_version_tag(MODEL, "1", "mlops.performance_uri", f"{root}/performance.json")


def test_performance_is_estimated_without_labels(estimator, month, sensor, context, root):
    month()
    frame = pd.read_parquet(root / "predictions.parquet")
    frame.drop(columns="label").to_parquet(root / "month.parquet")
    made = {"columns": [], "retrain_on": ["drift"], "on_stable": "proceed", "scores_column": "champion"}
    features(np.random.default_rng(1)).assign(champion=frame["champion"]).to_parquet(root / "month.parquet")
    result = sensor(**made, predictions_uri=None).execute(context)
    from sklearn.metrics import roc_auc_score

    found = result["estimate"]
    assert found["verdict"] == "estimated" and found["rows"] == 4_000
    auc = found["metrics"]["roc_auc"] if "roc_auc" in found["metrics"] else found["metrics"]["auc"]
    assert auc["low"] < roc_auc_score(frame["label"], frame["champion"]) < auc["high"]
    assert sensor(**made).execute(context)["estimate"]["metrics"] == found["metrics"], "or from the predictions"
    assert storage.read_json(result["report_uri"])["estimate"]["metrics"] == found["metrics"]
    assert sensor(**{**made, "scores_column": None}).execute(context)["estimate"] is None


def test_an_estimate_without_its_inputs_is_an_error(champion, month, sensor, context):
    month()
    with pytest.raises(AirflowFailException, match="has no estimator of performance"):
        sensor(scores_column="champion").execute(context)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_no_row_with_a_score_is_not_enough_data(estimator, month, sensor, context, root, kind):
    month()
    none = pd.read_parquet(root / "predictions.parquet")[:0]
    uri = f"{root}/none.{kind}"
    none.to_parquet(uri) if kind == "parquet" else none.to_csv(uri, index=False)
    made = {"predictions_uri": uri, "scores_column": "champion", "on_stable": "proceed"}
    result = sensor(**made).execute(context)
    assert (result["verdict"], result["estimate"]["verdict"]) == ("not_enough_data", "not_enough_data")
    assert result["estimate"]["rows"] == 0


def test_scores_that_are_not_there_are_named(estimator, month, sensor, context):
    month()
    with pytest.raises(AirflowFailException, match="lacks the scores_column score"):
        sensor(scores_column="score").execute(context)


def shifted_to(root, month, first):
    """A month's predictions, moved to the month that begins with ``first``."""
    month()
    frame = pd.read_parquet(root / "predictions.parquet")
    frame["event_timestamp"] += pd.Timestamp(first, tz="UTC") - pd.Timestamp("2013-04-01", tz="UTC")
    return frame


@pytest.mark.parametrize("kept", ["asset", "file"])
def test_a_loss_that_has_risen_is_found_over_the_windows(champion, month, sensor, root, kept):
    """A rise too small for one month's test to show, and the same month again changes nothing."""
    more = {"asset_state_store": AssetStore()} if kept == "asset" else {}
    loose = {"alpha": 1e-9, "epsilon": 0.2, "calibration_tolerance": 0.5, "excess_epsilon": 0.5}
    made = {"loss_test": {"epsilon": 0.01, "label_delay": "1d"}, "harm_policy": loose, "on_stable": "proceed"}
    found = []
    for of in (4, 5, 6):
        frame = shifted_to(root, month, f"2013-{of:02}-01")
        p = frame["champion"]
        frame.assign(champion=p**4 / (p**4 + (1 - p) ** 4)).to_parquet(root / "predictions.parquet")
        result = sensor(**made).execute(of_month(of, **more))
        again = sensor(**made).execute(of_month(of, **more))
        assert again == result
        found.append(result)
    looks = [result["sequential"]["looks"] for result in found]
    assert looks == sorted(looks) and looks[0] >= 25 and looks[2] > looks[1] > looks[0]
    assert found[0]["harm"]["verdict"] == "stable" and found[2]["sequential"]["verdict"] == "harm"
    assert (found[2]["verdict"], found[2]["retrain"]) == ("harm", True)
    assert any(reason.startswith("harm: over all windows, ") for reason in found[2]["reasons"])
    assert (root / "reports" / "flights_delay-1.losses.json").exists() == (kept == "file")
    late = sensor(**made).execute(of_month(4, **more))
    assert late["sequential"]["looks"] == looks[2], "an earlier window adds nothing"
    assert sensor(**made).execute(of_month(6, **more)) == found[2], "and leaves the newest as it was"


def test_labels_that_come_days_after_their_window_are_counted_once(champion, month, sensor, root):
    """Daily windows, labels three days late, one file that grows: each check counts the day that has matured."""
    month(bias=-1.0)
    april = pd.read_parquet(root / "predictions.parquet").sort_values("event_timestamp")
    made = {"loss_test": {"label_delay": "3d"}, "on_stable": "proceed", "scores_column": None}
    looks = []
    for day in range(1, 9):
        start, end = (dt.datetime(2013, 4, of, tzinfo=dt.timezone.utc) for of in (day, day + 1))
        known = april["event_timestamp"] < end - dt.timedelta(days=3)
        so_far = april[april["event_timestamp"] < end].assign(label=april["label"].astype("Int8").where(known))
        so_far.to_parquet(root / "predictions.parquet")
        context = {"ti": TaskInstance(), "run_id": "r", "data_interval_start": start, "data_interval_end": end}
        result = sensor(**made).execute(context)
        assert sensor(**made).execute(context) == result, "bit for bit"
        looks.append((result["sequential"]["looks"], result["sequential"]["skipped"]))
        assert storage.read_json(result["report_uri"])["harm"]["rows"] == 0, "the window's own labels are not in"
    assert looks == [(0, 0), (0, 0), (0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0)]


def test_numbers_of_a_loss_test_may_be_text(champion, month, sensor, context, root):
    month()
    found = []
    for given in (
        {"epsilon": 0.05, "alpha": 0.02, "days": 7, "label_delay": 86400},
        {"epsilon": "0.05", "alpha": "0.02", "days": "7", "label_delay": "86400"},
        "{'epsilon': '0.05', 'alpha': '0.02', 'days': '7', 'label_delay': '1d'}",
    ):
        made = {"loss_test": given, "on_stable": "proceed", "state_dir": f"{root}/{len(found)}"}
        found.append(sensor(**made).execute(context)["sequential"])
    assert found[0] == found[1] == found[2] and found[0]["looks"] > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss_test": {"epsilonn": 1}}, "unknown field"),
        ({"loss_test": {"state": {}}}, "unknown field"),
        ({"loss_test": {"label_delay": "soon"}}, "label_delay is 'soon'"),
        ({"loss_test": {"alpha": 2}}, "alpha is 2"),
        ({"loss_test": {"alpha": 0.01}, "predictions_uri": None, "retrain_on": ["drift"]}, "needs predictions_uri"),
    ],
)
def test_a_wrong_loss_test_is_refused(champion, month, sensor, context, kwargs, message):
    month()
    with pytest.raises(AirflowFailException, match=message):
        sensor(**kwargs).execute(context)
