"""RayTrainOperator, its trigger and its hook against an HTTP server that answers as Ray 2.60's Jobs API does."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import structlog
from airflow.sdk.exceptions import AirflowFailException, AirflowTaskTimeout, TaskDeferred
from airflow.triggers.base import TaskSuccessEvent

from airflow_mlops import storage
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError, TrainingError
from airflow_mlops.hooks.ray import RayJobsHook
from airflow_mlops.hooks.ray_serve import RayServeHook
from airflow_mlops.links import RAY_ATTEMPT, GrafanaLink, MlflowRunLink, RayDashboardLink, ReportLink
from airflow_mlops.operators.ray import RayTrainOperator
from airflow_mlops.training.result import TrainingResult, write_result
from airflow_mlops.training.runs import begin_attempt
from airflow_mlops.training.spec import TrainingSpec
from airflow_mlops.triggers.ray import RayJobTrigger

TOKEN = "secret-token"


class FakeRay(ThreadingHTTPServer):
    """Jobs that do what ``play`` says: a status, or a function called when the job is submitted."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict] = {}
        self.submitted: list[dict] = []
        self.stopped: list[str] = []
        self.play = lambda body: {"status": "RUNNING"}
        self.lose_answers = 0
        self.down = False
        self.requests = 0
        self.answer: threading.Event | None = None
        self.waiting = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeRay

    def log_message(self, *_):
        pass

    def reply(self, code: int, value) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        self.server.requests += 1
        if self.server.answer is not None:
            self.server.waiting += 1
            self.server.answer.wait(5)
            self.server.waiting -= 1
        given = self.headers.get("Authorization")
        if self.server.down:
            self.reply(503, "starting")
        elif given is None:
            self.reply(401, "no token")
        elif given != f"Bearer {TOKEN}":
            self.reply(403, "wrong token")
        else:
            return False
        return True

    def do_GET(self) -> None:
        if self.refused():
            return
        if self.path == "/api/version":
            return self.reply(200, {"ray_version": "2.60.0"})
        name, _, what = self.path.removeprefix("/api/jobs/").partition("/")
        if name not in self.server.jobs:
            return self.reply(404, f"Job {name} does not exist")
        if what == "logs":
            return self.reply(200, {"logs": "\n".join(f"line {i}" for i in range(500))})
        return self.reply(200, self.server.jobs[name])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refused():
            return
        if self.path.endswith("/stop"):
            name = self.path.split("/")[-2]
            if name not in self.server.jobs:
                return self.reply(404, f"Job {name} does not exist")
            self.server.stopped.append(name)
            if self.server.jobs[name]["status"] in ("PENDING", "RUNNING"):
                self.server.jobs[name] = {"status": "STOPPED", "message": "Job was intentionally stopped."}
            return self.reply(200, {"stopped": True})
        asked = json.loads(body)
        if asked["submission_id"] in self.server.jobs:
            return self.reply(500, f"ValueError: Job with submission_id {asked['submission_id']} already exists.")
        self.server.submitted.append(asked)
        self.server.jobs[asked["submission_id"]] = self.server.play(asked)
        if self.server.lose_answers:
            self.server.lose_answers -= 1
            return self.reply(500, "No available agent to submit job, please try again later.")
        return self.reply(200, {"submission_id": asked["submission_id"]})


@pytest.fixture
def ray(monkeypatch):
    server = FakeRay()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = {"conn_type": "ray", "host": server.address, "password": TOKEN}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
    yield server
    server.shutdown()
    server.server_close()


class Task:
    """What the operator uses of a task instance."""

    dag_id, task_id, run_id, map_index = "dag", "train", "run-1", -1

    def __init__(self) -> None:
        self.pushed: dict[str, object] = {}

    def xcom_push(self, key: str, value: object) -> None:
        self.pushed[key] = value


def operator(tmp_path, **changes) -> RayTrainOperator:
    values = {
        "task_id": "train",
        "mode": "jobs",
        "train_fn": "pkg.mod:loop",
        "storage_path": str(tmp_path),
        "run_key": "r1",
        "poll_interval": 0.02,
        "stop_timeout": 1.0,
        "fence_timeout": 0.2,
        "unreachable_timeout": 0.2,
    }
    return RayTrainOperator(**{**values, **changes})


def spec_of(body: dict) -> TrainingSpec:
    return TrainingSpec.from_json(storage.read_json(body["entrypoint"].split("--spec ")[1].strip("'")))


def finishes(body: dict) -> dict:
    spec = spec_of(body)
    write_result(spec, TrainingResult("SUCCEEDED", spec.attempt, spec.fingerprint, metrics={"auc": 0.7}, model_uri="m"))
    return {"status": "SUCCEEDED", "driver_exit_code": 0}


def fails(body: dict) -> dict:
    spec = spec_of(body)
    write_result(
        spec, TrainingResult("FAILED", spec.attempt, spec.fingerprint, exit_class="app", error="ValueError: bad label")
    )
    return {"status": "FAILED", "driver_exit_code": 1, "message": "exit code 1"}


def run(op: RayTrainOperator, task: Task) -> dict:
    """Execute, and where it defers let the trigger run and resume on a fresh instance, as Airflow does."""
    try:
        return op.execute({"ti": task})
    except TaskDeferred as deferred:
        while True:
            path, kwargs = deferred.trigger.serialize()
            assert path == f"{RayJobTrigger.__module__}.{RayJobTrigger.__name__}"
            event = asyncio.run(first_event(RayJobTrigger(**json.loads(json.dumps(kwargs)))))
            if isinstance(event, TaskSuccessEvent):
                return event.xcoms["return_value"]
            fresh = RayTrainOperator(
                task_id="train", mode="jobs", train_fn="x:y", storage_path="/nowhere", deferrable=True
            )
            fresh.poll_interval, fresh.stop_timeout = op.poll_interval, op.stop_timeout
            try:
                return getattr(fresh, deferred.method_name)({"ti": task}, json.loads(json.dumps(event.payload)))
            except TaskDeferred as again:
                deferred = again


async def first_event(trigger: RayJobTrigger):
    return await asyncio.wait_for(anext(trigger.run()), 20)


both = pytest.mark.parametrize("deferrable", [False, True], ids=["blocking", "deferrable"])


@both
def test_success(ray, tmp_path, deferrable):
    ray.play = lambda body: {"status": "RUNNING"}
    task = Task()

    def later() -> None:
        while not ray.submitted:
            time.sleep(0.01)
        body = ray.submitted[0]
        time.sleep(0.1)
        ray.jobs[body["submission_id"]] = finishes(body)

    threading.Thread(target=later, daemon=True).start()
    result = run(operator(tmp_path, deferrable=deferrable, num_workers="2"), task)
    assert result["status"] == "SUCCEEDED" and result["attempts"] == 1 and result["model_uri"] == "m"
    assert result["metrics"] == {"auc": 0.7} and result["run_dir"] == f"{tmp_path}/r1"
    assert set(result) == {
        "status",
        "run_key",
        "run_dir",
        "attempt",
        "attempts",
        "metrics",
        "checkpoint_uri",
        "model_uri",
        "resumed_from",
        "wall_seconds",
        "cpu_seconds",
        "gpu_seconds",
    }
    (body,) = ray.submitted
    assert spec_of(body).num_workers == 2
    assert body["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "1"
    assert TOKEN not in json.dumps(body)
    assert task.pushed[RAY_ATTEMPT]["submission_id"] == body["submission_id"]


@both
def test_application_error_is_not_restarted_and_carries_its_cause_and_the_log(ray, tmp_path, deferrable):
    ray.play = fails
    with pytest.raises(TrainingError, match=r"(?s)ValueError: bad label.*line 499$") as caught:
        run(operator(tmp_path, deferrable=deferrable), Task())
    assert caught.value.retryable and len(ray.submitted) == 1


@both
def test_lost_jobs_restart_as_the_next_attempt_after_the_old_one_is_stopped(ray, tmp_path, deferrable):
    def play(body: dict) -> dict:
        attempt = spec_of(body).attempt
        return {1: {"status": "FAILED", "driver_exit_code": -9}, 2: {"status": "FAILED"}}.get(attempt) or finishes(body)

    ray.play = play
    result = run(operator(tmp_path, deferrable=deferrable), Task())
    assert (result["attempt"], result["attempts"]) == (3, 3)
    names = [body["submission_id"] for body in ray.submitted]
    assert [name[-3:] for name in names] == ["-a1", "-a2", "-a3"] and ray.stopped == names[:2]


@both
def test_restarts_end_and_airflow_does_not_retry(ray, tmp_path, deferrable):
    ray.play = lambda body: {"status": "FAILED", "driver_exit_code": 137}
    with pytest.raises(AirflowFailException, match="all 2 restarts are used up"):
        run(operator(tmp_path, deferrable=deferrable, max_restarts=2), Task())
    assert len(ray.submitted) == 3


@both
def test_stopped_job_is_not_a_success_and_not_restarted(ray, tmp_path, deferrable):
    ray.play = lambda body: {"status": "STOPPED"}
    with pytest.raises(AirflowFailException, match="was stopped"):
        run(operator(tmp_path, deferrable=deferrable), Task())
    assert len(ray.submitted) == 1


@both
def test_job_that_vanishes_is_restarted_unless_its_result_is_there(ray, tmp_path, deferrable):
    def play(body: dict) -> dict:
        if spec_of(body).attempt == 2:
            finishes(body)
        threading.Timer(0.1, lambda: ray.jobs.pop(body["submission_id"])).start()
        return {"status": "RUNNING"}

    ray.play = play
    assert run(operator(tmp_path, deferrable=deferrable), Task())["attempts"] == 2


@both
def test_dashboard_that_is_away_for_a_moment_is_waited_for(ray, tmp_path, deferrable):
    def play(body: dict) -> dict:
        def away() -> None:
            ray.down = True
            time.sleep(0.3)
            ray.jobs[body["submission_id"]] = finishes(body)
            ray.down = False

        threading.Timer(0.1, away).start()
        return {"status": "RUNNING"}

    ray.play = play
    assert run(operator(tmp_path, deferrable=deferrable, unreachable_timeout=30.0), Task())["status"] == "SUCCEEDED"


@both
def test_dashboard_that_stays_away_fails_for_a_retry(ray, tmp_path, deferrable):
    def play(body: dict) -> dict:
        threading.Timer(0.1, lambda: setattr(ray, "down", True)).start()
        return {"status": "RUNNING"}

    ray.play = play
    with pytest.raises(ExternalSystemError, match="cannot be followed"):
        run(operator(tmp_path, deferrable=deferrable), Task())


def test_submission_whose_answer_is_lost_is_adopted(ray, tmp_path):
    ray.play, ray.lose_answers = finishes, 1
    assert run(operator(tmp_path), Task())["attempts"] == 1
    assert len(ray.submitted) == 1


def test_next_try_follows_the_job_of_a_lost_worker(ray, tmp_path):
    first = operator(tmp_path, deferrable=True)
    with pytest.raises(TaskDeferred):
        first.execute({"ti": Task()})
    (body,) = ray.submitted
    threading.Timer(0.2, lambda: ray.jobs.update({body["submission_id"]: finishes(body)})).start()
    assert run(operator(tmp_path), Task())["attempts"] == 1
    assert len(ray.submitted) == 1


@both
def test_cleared_task_goes_on_after_the_stop_of_its_earlier_try(ray, tmp_path, deferrable):
    """Clearing a deferred task ends its trigger, which stops the job, while the next try may already follow it."""
    with pytest.raises(TaskDeferred) as first:
        operator(tmp_path, deferrable=True).execute({"ti": Task()})
    old = first.value.trigger
    ray.play = finishes

    def kill() -> None:
        asyncio.run(old.on_kill())

    threading.Timer(0.3, kill).start()
    assert run(operator(tmp_path, deferrable=deferrable), Task())["attempts"] == 2
    assert [spec_of(body).attempt for body in ray.submitted] == [1, 2]


@both
def test_stop_of_the_attempt_that_followed_is_one(ray, tmp_path, deferrable):
    with pytest.raises(TaskDeferred):
        operator(tmp_path, deferrable=True).execute({"ti": Task()})
    first = ray.submitted[0]["submission_id"]
    ray.play = lambda body: {"status": "STOPPED"}
    threading.Timer(0.3, lambda: ray.jobs.update({first: {"status": "STOPPED"}})).start()
    with pytest.raises(AirflowFailException, match="attempt 2 was stopped"):
        run(operator(tmp_path, deferrable=deferrable), Task())
    assert len(ray.submitted) == 2


def test_deferred_task_is_held_to_its_execution_timeout_over_restarts(ray, tmp_path):
    import datetime as dt

    def play(body: dict) -> dict:
        return {"status": "FAILED", "driver_exit_code": -9} if spec_of(body).attempt == 1 else {"status": "RUNNING"}

    ray.play = play
    task = operator(tmp_path, deferrable=True, execution_timeout=dt.timedelta(seconds=0.5))
    with pytest.raises(AirflowTaskTimeout, match="took longer than"):
        run(task, Task())
    assert ray.stopped == [body["submission_id"] for body in ray.submitted] and len(ray.submitted) == 2


def test_kill_while_an_attempt_is_being_started_stops_it(ray, tmp_path):
    op = operator(tmp_path)

    def play(body: dict) -> dict:
        op.on_kill()
        return {"status": "RUNNING"}

    ray.play = play
    with pytest.raises(AirflowFailException, match="was stopped"):
        op.execute({"ti": Task()})
    assert len(ray.submitted) == 1 and ray.jobs[ray.submitted[0]["submission_id"]]["status"] == "STOPPED"


def test_kill_between_two_attempts_starts_no_other(ray, tmp_path, monkeypatch):
    op = operator(tmp_path)
    ray.play = lambda body: {"status": "FAILED", "driver_exit_code": -9}
    stop = RayJobsHook.stop

    def killed_meanwhile(hook: RayJobsHook, name: str) -> None:
        stop(hook, name)
        op._killed = True

    monkeypatch.setattr(RayJobsHook, "stop", killed_meanwhile)
    with pytest.raises(AirflowFailException, match="killed before attempt 2"):
        op.execute({"ti": Task()})
    assert len(ray.submitted) == 1


def test_next_try_after_an_application_error_is_the_next_attempt(ray, tmp_path):
    ray.play = fails
    with pytest.raises(TrainingError):
        run(operator(tmp_path), Task())
    ray.play = finishes
    assert run(operator(tmp_path), Task())["attempts"] == 2


def test_running_job_of_other_inputs_is_stopped_before_its_directory_is_emptied(ray, tmp_path):
    with pytest.raises(TaskDeferred):
        operator(tmp_path, deferrable=True, config={"a": 1}).execute({"ti": Task()})
    ray.play = finishes
    result = run(operator(tmp_path, config={"a": 2}), Task())
    assert ray.stopped == [ray.submitted[0]["submission_id"]] and result["attempts"] == 2
    assert spec_of(ray.submitted[1]).config == {"a": 2}


def test_job_of_a_removed_run_directory_is_not_taken_for_this_one(ray, tmp_path):
    import shutil

    ray.play = finishes
    run(operator(tmp_path), Task())
    shutil.rmtree(tmp_path / "r1")
    assert run(operator(tmp_path), Task())["attempts"] == 2


def test_finished_run_asks_nobody(ray, tmp_path):
    ray.play = finishes
    first = run(operator(tmp_path), Task())
    before = ray.requests
    assert run(operator(tmp_path), Task()) == first and ray.requests == before
    assert run(operator(tmp_path, fresh="true"), Task())["attempts"] == 2


def test_on_kill_stops_the_job_and_the_task_does_not_start_another(ray, tmp_path):
    op = operator(tmp_path)
    threading.Timer(0.3, op.on_kill).start()
    with pytest.raises(AirflowFailException, match="was stopped"):
        op.execute({"ti": Task()})
    assert len(ray.submitted) == 1 and ray.stopped


def test_trigger_stops_the_job_on_a_users_kill_only(ray, tmp_path):
    with pytest.raises(TaskDeferred) as deferred:
        operator(tmp_path, deferrable=True).execute({"ti": Task()})
    kwargs = deferred.value.trigger.serialize()[1]
    asyncio.run(RayJobTrigger(**kwargs).cleanup())
    asyncio.run(RayJobTrigger(**{**kwargs, "cancel_on_kill": False}).on_kill())
    assert ray.stopped == []
    asyncio.run(RayJobTrigger(**kwargs).on_kill())
    assert len(ray.stopped) == 1


def test_trigger_leaves_the_event_loop_free_while_ray_takes_its_time(ray):
    ray.jobs["j"] = {"status": "RUNNING"}
    ray.answer = threading.Event()
    kwargs = {"submission_id": "j", "ray_conn_id": "ray_default", "address": None, "poll_interval": 0.01}
    trigger = RayJobTrigger(**kwargs, unreachable_timeout=60.0, cancel_on_kill=True, state={})

    async def watch() -> None:
        waiting = asyncio.create_task(anext(trigger.run()))
        # Seen only by a loop that runs while the request waits for its answer.
        while not ray.waiting:
            await asyncio.sleep(0.01)
        ray.jobs["j"] = {"status": "SUCCEEDED"}
        ray.answer.set()
        assert (await waiting).payload["seen"]["status"] == "SUCCEEDED"

    asyncio.run(asyncio.wait_for(watch(), 30))


@pytest.mark.parametrize(("password", "words"), [(None, "wants a token"), ("wrong", "refuses the token")])
def test_token_errors_say_where_to_put_it(ray, monkeypatch, tmp_path, password, words):
    connection = {"conn_type": "ray", "host": ray.address, "password": password}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
    with pytest.raises(AirflowFailException, match=words):
        run(operator(tmp_path), Task())
    ok, message = RayJobsHook().test_connection()
    assert not ok and words in message


def test_token_revoked_during_the_wait_ends_it(ray, tmp_path, monkeypatch):
    with pytest.raises(TaskDeferred) as deferred:
        operator(tmp_path, deferrable=True).execute({"ti": Task()})
    monkeypatch.setenv(
        "AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", "host": ray.address, "password": "x"})
    )
    event = asyncio.run(first_event(deferred.value.trigger))
    with pytest.raises(AirflowFailException, match="refuses the token"):
        operator(tmp_path).execute_complete({"ti": Task()}, event.payload)


def test_connection_test(ray):
    assert RayJobsHook().test_connection() == (True, f"Ray 2.60.0 at {ray.address}")


@pytest.mark.parametrize(
    ("connection", "address"),
    [
        ({"host": "http://ray:8265"}, "http://ray:8265"),
        ({"host": "ray", "port": 8265}, "http://ray:8265"),
        ({"host": "ray", "port": 443, "schema": "https"}, "https://ray:443"),
        ({"host": "https://proxy/namespaces/x/"}, "https://proxy/namespaces/x"),
        ({"host": "https://proxy:8443/x", "port": 8443}, "https://proxy:8443/x"),
        ({"host": "ray"}, "http://ray:8265"),
        ({"host": "http://[::1]:8265"}, "http://[::1]:8265"),
        ({"host": "https://user:secret@ray"}, "https://ray"),
    ],
)
def test_address_of_a_connection_is_the_same_for_jobs_and_for_serve(monkeypatch, connection, address):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", **connection}))
    assert RayJobsHook().endpoint.address == address
    assert asyncio.run(RayJobsHook().aendpoint()).address == address
    assert RayServeHook().get_conn().dashboard_url == address


@pytest.mark.parametrize("host", ["ray://head:10001", "http://", "http://ray:port"])
def test_address_that_is_none_names_the_fix(monkeypatch, host):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", "host": host}))
    for ask in (lambda: RayJobsHook().endpoint, RayServeHook().get_conn):
        with pytest.raises(InvalidInputError, match="expected http://host:port"):
            ask()


@pytest.mark.parametrize(
    ("value", "verify"), [(None, True), ("", True), ("true", True), (False, False), ("False", False), ("/ca", "/ca")]
)
def test_certificates_are_checked_unless_it_says_false(monkeypatch, value, verify):
    """The connection form gives text: an empty field must not be taken for "do not check"."""
    connection = {"conn_type": "ray", "host": "https://ray", "extra": {"verify": value}}
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(connection))
    assert RayJobsHook().endpoint.verify == verify


def test_connection_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "local token")
    for endpoint in (RayJobsHook().endpoint, asyncio.run(RayJobsHook().aendpoint())):
        assert (endpoint.address, endpoint.token) == ("http://127.0.0.1:8265", "local token")
    with pytest.raises(InvalidInputError, match="'nowhere' does not exist; create one of type ray"):
        _ = RayJobsHook("nowhere").endpoint
    with pytest.raises(InvalidInputError, match="'nowhere' does not exist"):
        asyncio.run(RayJobsHook("nowhere").aendpoint())


def test_page_of_a_proxy_is_not_taken_for_ray(ray):
    ray.jobs["j"] = "<html>please log in</html>"
    with pytest.raises(ExternalSystemError, match="no Ray dashboard but perhaps a proxy's page"):
        RayJobsHook().observe("j")


def test_connection_without_host(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray"}))
    with pytest.raises(InvalidInputError, match="has no host; give the Ray dashboard's address"):
        _ = RayJobsHook().endpoint


def test_token_is_not_shown(monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps({"conn_type": "ray", "host": "h", "password": TOKEN}))
    assert TOKEN not in repr(RayJobsHook().endpoint)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "kuberay"}, "needs the cluster to make"),
        ({"mode": "spark"}, "mode is 'spark'; expected one of local, jobs, kuberay"),
        ({"logs": "all"}, "logs is 'all'; expected one of off, tail, live"),
        ({"total_timeout": -1}, "total_timeout is -1"),
        ({"budget": {"max_cost": 3}}, "max_cost and no price_per_gpu_hour"),
        ({"entrypoint": "python train.py"}, "both entrypoint and train_fn"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"num_workers": "{{ nothing }}"}, "num_workers is"),
        ({"trainer": "sklearn"}, "expected one of xgboost"),
        ({"storage_path": ""}, "storage_path is missing"),
        ({"config": "text"}, "config is a str; expected a dict"),
        ({"fresh": "maybe"}, "fresh is 'maybe'"),
        ({"max_restarts": -1}, "max_restarts is -1"),
        ({"train_fn": "loop"}, "package.module:function"),
    ],
)
def test_bad_input_fails_for_good_before_anything_is_started(ray, tmp_path, changes, words):
    with pytest.raises(AirflowFailException, match=words):
        operator(tmp_path, **changes).execute({"ti": Task()})
    assert ray.requests == 0 and not list(tmp_path.iterdir())


def test_default_run_key_is_one_per_task_instance(ray, tmp_path):
    ray.play = finishes
    mapped = Task()
    mapped.map_index = 1
    keys = {run(operator(tmp_path, run_key=None), task)["run_key"] for task in (Task(), Task(), mapped)}
    assert len(keys) == 2


def test_links_come_from_xcom_alone(monkeypatch):
    store: dict[str, object] = {}
    monkeypatch.setattr("airflow_mlops.links.XCom.get_value", lambda *, ti_key, key: store.get(key))
    links = [RayDashboardLink(), MlflowRunLink(), ReportLink()]
    assert [link.get_link(None, ti_key=None) for link in links] == ["", "", ""]
    store[RAY_ATTEMPT] = {"dashboard_url": "http://ray:8265/", "submission_id": "s-a2"}
    store["return_value"] = {"mlflow_url": "http://mlflow/#/x", "html_uri": "/reports/a.html", "report_uri": "b"}
    assert [link.get_link(None, ti_key=None) for link in links] == [
        "http://ray:8265/#/jobs/s-a2",
        "http://mlflow/#/x",
        "file:///reports/a.html",
    ]


def test_a_loop_that_reports_its_mlflow_run_is_linked_to_it(monkeypatch):
    store = {"return_value": {"metrics": {"auc": 0.7, "mlflow_url": "http://mlflow/#/experiments/1/runs/2"}}}
    monkeypatch.setattr("airflow_mlops.links.XCom.get_value", lambda *, ti_key, key: store.get(key))
    assert MlflowRunLink().get_link(None, ti_key=None) == "http://mlflow/#/experiments/1/runs/2"
    store["return_value"]["mlflow_url"] = "http://mlflow/#/of-the-result"
    assert MlflowRunLink().get_link(None, ti_key=None) == "http://mlflow/#/of-the-result"
    store["mlflow_url"] = "http://mlflow/#/pushed"
    assert MlflowRunLink().get_link(None, ti_key=None) == "http://mlflow/#/pushed"


def linked(monkeypatch, tmp_path) -> list[str]:
    """The links to Ray and Grafana of a task that has run, and the attempt they are made of."""
    task = Task()
    run(operator(tmp_path), task)
    monkeypatch.setattr("airflow_mlops.links.XCom.get_value", lambda *, ti_key, key: task.pushed.get(key))
    return [link.get_link(None, ti_key=None) for link in (RayDashboardLink(), GrafanaLink())]


def test_the_address_of_grafana_is_configured(ray, tmp_path, monkeypatch):
    ray.play = finishes
    job = f"{ray.address}/#/jobs/{{}}"
    dashboard, grafana = linked(monkeypatch, tmp_path / "without")
    assert dashboard == job.format(ray.submitted[0]["submission_id"]) and grafana == ""
    pattern = "https://grafana.example.com/d/ray?job={submission_id}&attempt={attempt}&run={run_dir}"
    monkeypatch.setenv("AIRFLOW__MLOPS__GRAFANA_URL", pattern)
    # A cluster that is there says its own address.
    monkeypatch.setenv("AIRFLOW__MLOPS__RAY_DASHBOARD_URL", "https://ray.example.com/{submission_id}")
    dashboard, grafana = linked(monkeypatch, tmp_path / "with")
    name = ray.submitted[1]["submission_id"]
    assert dashboard == job.format(name)
    assert grafana == pattern.format(submission_id=name, attempt=1, run_dir=tmp_path / "with" / "r1")


@pytest.mark.parametrize("pattern", ["https://grafana/{job}", "https://grafana/{", "https://grafana/{0}"])
def test_a_malformed_address_only_warns(ray, tmp_path, monkeypatch, pattern):
    ray.play = finishes
    monkeypatch.setenv("AIRFLOW__MLOPS__GRAFANA_URL", pattern)
    with structlog.testing.capture_logs() as logged:
        assert linked(monkeypatch, tmp_path)[1] == ""
    (warned,) = [entry["event"] for entry in logged if "grafana_url" in entry["event"]]
    assert repr(pattern) in warned and "it may name namespace" in warned


def test_decorated_loop_travels_by_value(ray, tmp_path):
    from airflow.sdk import DAG

    from airflow_mlops.decorators.ray import ray_train_task

    def loop(config):
        return helper(config["x"])

    with DAG("d"):
        task = ray_train_task(
            loop, mode="jobs", trainer="data_parallel", storage_path=str(tmp_path), run_key="r1", poll_interval=0.02
        )({"x": 20})
    ray.play = finishes
    result = task.operator.execute({"ti": Task()})
    assert result["status"] == "SUCCEEDED"
    spec = spec_of(ray.submitted[0])
    assert spec.config == {"x": 20} and spec.name.startswith("test_decorated_loop_travels_by_value.<locals>.loop@")
    elsewhere = (
        "import sys; from airflow_mlops.training.spec import load_callable as l; print(l(sys.argv[1])({'x': 20}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", elsewhere, spec.train_fn], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "41"


def helper(x: int) -> int:
    return 2 * x + 1


def test_decorated_loop_called_wrongly(tmp_path):
    from airflow.sdk import DAG

    from airflow_mlops.decorators.ray import ray_train_task

    def loop(config):
        pass

    with DAG("d"):
        task = ray_train_task(loop, mode="local", storage_path=str(tmp_path))(3)
    with pytest.raises(AirflowFailException, match="takes one argument, a dict"):
        task.operator.execute({"ti": Task()})


def test_attempt_is_written_down_before_it_is_submitted(ray, tmp_path):
    # A worker lost between the two leaves a name that nobody has: the next try must not wait for it.
    spec = TrainingSpec("pkg.mod:loop", "xgboost", str(tmp_path), "r1", ray_address="auto", patience=0.2)
    begin_attempt(spec)
    ray.play = finishes
    assert run(operator(tmp_path), Task())["attempts"] == 2
