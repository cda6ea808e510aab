"""What is concluded from the answers of an API server, step by step, without one."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.hooks import _kubernetes as api
from airflow_mlops.hooks._kubernetes import RAYJOB, AlreadyExists, Answer, Pause, Unanswered
from airflow_mlops.hooks._pod_log import LogCursor, LogReader

BODY = {"metadata": {"name": "a", "labels": {"run": "r1"}, "annotations": {"try": "2"}}, "spec": {}}
OURS = {"metadata": {**BODY["metadata"], "uid": "u1", "labels": {"run": "r1", "queue": "q"}}}
THEIRS = {"metadata": {**OURS["metadata"], "annotations": {"try": "1"}}}
CUT = Unanswered("cut")


def answer(code, body=None, **kwargs):
    return Answer(code, body if isinstance(body, str) else json.dumps(body or {}), **kwargs)


def status(code, reason="", message="no", **details):
    return answer(code, {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details})


NOT_FOUND = status(404, "NotFound", 'rayjobs.ray.io "a" not found', name="a", kind="rayjobs")
EXISTS = status(409, "AlreadyExists", name="a")
CONFLICT = status(409, "Conflict", name="a")


def take(steps, *script):
    """Take ``steps`` with these answers, all of them; the calls made, the pauses taken, and the result."""
    script, calls, pauses = list(script), [], []
    step = next(steps)
    while True:
        try:
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                step = steps.send(None)
                continue
            calls.append(step)
            reply = script.pop(0)
            step = steps.throw(reply) if isinstance(reply, Exception) else steps.send(reply)
        except StopIteration as end:
            assert not script
            return calls, pauses, end.value


def methods(calls):
    return [call.method for call in calls]


def create():
    return api.create(RAYJOB, BODY, "ml", patience=100.0)


def test_create_refuses_unknown_fields():
    calls, pauses, made = take(create(), answer(201, OURS))
    assert (made, pauses) == (OURS, [])
    assert calls[0].path == "/apis/ray.io/v1/namespaces/ml/rayjobs"
    assert calls[0].query == {"fieldValidation": "Strict"}


@pytest.mark.parametrize("failure", [CUT, answer(500), answer(503), answer(504)])
def test_a_create_that_may_have_worked_is_looked_for(failure):
    calls, _, made = take(create(), failure, answer(200, OURS))
    assert made == OURS
    assert methods(calls) == ["POST", "GET"]


def test_a_create_that_did_not_work_is_made_again():
    calls, pauses, made = take(create(), CUT, NOT_FOUND, answer(201, OURS))
    assert made == OURS
    assert methods(calls) == ["POST", "GET", "POST"]
    assert len(pauses) == 1


def test_a_create_that_worked_after_the_look_is_ours_too():
    calls, _, made = take(create(), CUT, NOT_FOUND, EXISTS, answer(200, OURS))
    assert made == OURS
    assert methods(calls) == ["POST", "GET", "POST", "GET"]


def test_a_busy_server_has_done_nothing():
    calls, pauses, _ = take(create(), answer(429, retry_after="7"), answer(201, OURS))
    assert methods(calls) == ["POST", "POST"]
    assert pauses == [7.0]
    with pytest.raises(AlreadyExists):
        take(create(), answer(429), EXISTS)


@pytest.mark.parametrize(
    "script", [[EXISTS], [CUT, answer(200, THEIRS)], [CUT, NOT_FOUND, EXISTS, answer(200, THEIRS)]]
)
def test_what_another_try_made_is_not_ours(script):
    with pytest.raises(AlreadyExists, match="'a'"):
        take(create(), *script)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (status(400, "BadRequest", 'strict decoding error: unknown field "spec.foo"'), "spec.foo"),
        (status(422, "Invalid", "spec.x: Required value"), "Required value"),
        (status(401, "Unauthorized", "Unauthorized"), "token"),
        (
            status(403, "Forbidden", 'User "u" cannot create resource "rayjobs"', name="a"),
            "lacks the verb 'create' on rayjobs in 'ml'",
        ),
        (answer(404, "404 page not found\n"), "CRD installed .*KubeRay 1.6 or newer.*Kueue 0.15 or newer"),
        (status(404, "NotFound", 'namespaces "ml" not found', name="ml", kind="namespaces"), 'namespaces "ml"'),
    ],
)
def test_what_no_retry_mends_says_what_to_do(reply, words):
    with pytest.raises(InvalidInputError, match=words) as error:
        take(create(), reply)
    assert error.value.retryable is False


def test_a_quota_that_is_used_up_may_have_room_later():
    told = (
        'rayjobs.ray.io "a" is forbidden: exceeded quota: team-quota, requested: count/rayjobs.ray.io=1, used: '
        "count/rayjobs.ray.io=4, limited: count/rayjobs.ray.io=4; cannot be admitted"
    )
    with pytest.raises(ExternalSystemError, match=r"The quota 'team-quota' of the namespace is used up") as error:
        take(create(), status(403, "Forbidden", told, name="a"))
    assert error.value.retryable is not False and "limited: count/rayjobs.ray.io=4" in str(error.value)
    assert "Role" not in str(error.value)


def test_patience_ends():
    now = iter(range(0, 1000, 10))
    call = api.Call("GET", "/version")
    steps = api.persist(call, patience=35.0, clock=lambda: next(now))
    with pytest.raises(ExternalSystemError, match="HTTP 503"):
        take(steps, *[answer(503)] * 4)


def test_a_longer_wait_than_patience_is_not_begun():
    with pytest.raises(ExternalSystemError):
        take(api.get(RAYJOB, "a", "ml", 30.0), answer(429, retry_after="31"))


def test_retry_after_comes_from_the_status_too():
    _, pauses, _ = take(api.get(RAYJOB, "a", "ml", 30.0), status(429, retryAfterSeconds=9), answer(200, OURS))
    assert pauses == [9.0]


def test_get_tells_a_missing_object_from_a_missing_kind():
    assert take(api.get(RAYJOB, "a", "ml", 1.0), NOT_FOUND)[2] is None
    with pytest.raises(InvalidInputError, match=r"ray\.io/v1"):
        take(api.get(RAYJOB, "a", "ml", 1.0), answer(404, "404 page not found\n"))


def patch(version="5"):
    return api.patch(RAYJOB, "a", {"metadata": {"annotations": {"try": "2", "old": None}}}, "ml", 100.0, version)


def test_patch_is_guarded_by_the_version():
    calls, _, _ = take(patch(), answer(200, OURS))
    assert calls[0].body["metadata"] == {"annotations": {"try": "2", "old": None}, "resourceVersion": "5"}
    assert calls[0].query == {"fieldValidation": "Strict"}
    for reply in (CONFLICT, NOT_FOUND):
        with pytest.raises(ConcurrentChangeError):
            take(patch(), reply)


def test_a_conflict_with_our_own_first_try_is_none():
    done = {"metadata": {**OURS["metadata"], "resourceVersion": "6"}}
    assert take(patch(), CUT, CONFLICT, answer(200, done))[2] == done
    for other in ({"try": "3"}, {"try": "2", "old": "x"}):
        with pytest.raises(ConcurrentChangeError):
            take(patch(), CUT, CONFLICT, answer(200, {"metadata": {"annotations": other}}))


def delete(**kwargs):
    return api.delete(RAYJOB, "a", "ml", 100.0, **kwargs)


def test_delete_is_guarded_by_uid_and_version():
    calls, _, done = take(delete(uid="u1", resource_version="5", grace=0), answer(200))
    assert done is True
    assert calls[0].body["preconditions"] == {"uid": "u1", "resourceVersion": "5"}
    assert calls[0].body["gracePeriodSeconds"] == 0
    assert "preconditions" not in take(delete(), answer(200))[0][0].body
    with pytest.raises(ConcurrentChangeError):
        take(delete(uid="u1"), CONFLICT, answer(200, {"metadata": {"name": "a", "uid": "u2"}}))


def test_delete_of_what_is_gone():
    assert take(delete(), NOT_FOUND)[2] is False
    # Gone after a try whose answer was lost: it was that try.
    assert take(delete(), CUT, NOT_FOUND)[2] is True
    assert take(delete(uid="u1"), CONFLICT, NOT_FOUND)[2] is False


def test_a_delete_whose_answer_was_lost_waits_for_its_finalizers():
    going = {"metadata": {"name": "a", "uid": "u1", "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    steps = {"uid": "u1", "resource_version": "5"}
    assert take(delete(**steps), CUT, CONFLICT, answer(200, going))[2] is True
    # Some HTTP clients send a DELETE again without a word.
    assert take(delete(**steps), CONFLICT, answer(200, going))[2] is True
    with pytest.raises(ConcurrentChangeError):
        take(delete(**steps), CUT, CONFLICT, answer(200, {"metadata": {"name": "a", "uid": "u1"}}))
    with pytest.raises(ConcurrentChangeError):
        take(delete(**steps), CUT, CONFLICT, answer(200, {"metadata": {**going["metadata"], "uid": "u2"}}))


def test_a_list_whose_pages_are_forgotten_starts_again():
    def page(names, proceed=None):
        return answer(
            200,
            {"items": [{"name": name} for name in names], "metadata": {"continue": proceed, "resourceVersion": "9"}},
        )

    calls, _, (items, version) = take(
        api.list_all(RAYJOB, "ml", {"labelSelector": "x"}, 100.0),
        page("ab", "next"),
        status(410, "Expired"),
        page("ac", "more"),
        page("d"),
    )
    assert [item["name"] for item in items] == ["a", "c", "d"]
    assert items[0]["kind"] == "RayJob"
    assert version == "9"
    assert [call.query.get("continue") for call in calls] == [None, "next", None, "more"]


@pytest.mark.parametrize("kept", ["", "pod is gone"])
def test_no_log_is_no_error(kept):
    waiting = status(400, "BadRequest", 'container "c" in pod "a" is waiting to start: ContainerCreating')
    steps = api.pod_log("a", {}, "ml", 1.0)
    assert take(steps, NOT_FOUND if kept else waiting)[2] == ""


def test_a_container_must_be_named():
    refusal = status(400, "BadRequest", "a container name must be specified for pod a, choose one of: [x y]")
    with pytest.raises(InvalidInputError, match=r"\[x y\]"):
        take(api.pod_log("a", {}, "ml", 1.0), refusal)


def test_backoff_grows_up_to_a_limit_and_starts_anew():
    random.seed(1)
    backoff = api.Backoff(first=1.0, most=8.0)
    pauses = [backoff.after() for _ in range(8)]
    assert all(0.5 * full <= pause <= full for pause, full in zip(pauses, [1, 2, 4, 8, 8, 8, 8, 8]))
    assert len({round(pause, 3) for pause in pauses[3:]}) > 1
    backoff.reset()
    assert backoff.after() <= 1.0


def test_lines_survive_any_chunks():
    text = "".join(f"line {number} äöü\n" for number in range(200)).encode()
    for seed in range(20):
        rng = random.Random(seed)
        lines, found, place = api.Lines(), [], 0
        while place < len(text):
            size = rng.randint(1, 40)
            found += lines.feed(text[place : place + size])
            place += size
        assert b"\n".join([*found, b""]) == text
        assert [*lines.end()] == []
    assert [*lines.feed(b"a\nb"), *lines.end()] == [b"a", b"b"]


def log_of(seed):
    """A log with bursts, silences, and time stamps that are not quite in order."""
    rng = random.Random(seed)
    nanos, lines = 1_700_000_000 * 10**9, []
    for number in range(300):
        nanos += rng.choice([0, 1, 1000, 10**8, 3 * 10**9])
        stamp = nanos - rng.choice([0, 0, 0, 500])
        lines.append((stamp, f"line {number}"))
    return lines


def served(lines, since):
    """What a kubelet answers: all lines since a whole second, as they stand in the file."""
    from datetime import datetime, timezone

    first = int(datetime.strptime(since, "%Y-%m-%dT%H:%M:%S%z").timestamp()) * 10**9 if since else 0
    for nanos, text in lines:
        if nanos >= first:
            whole = datetime.fromtimestamp(nanos // 10**9, timezone.utc)
            yield f"{whole:%Y-%m-%dT%H:%M:%S}.{nanos % 10**9:09}Z {text}\n"


@pytest.mark.parametrize("seed", range(20))
def test_a_log_read_over_cut_connections_has_each_line_once(seed):
    lines, rng, read, cursor = log_of(seed), random.Random(seed), [], None
    while len(read) < len(lines):
        reader = LogReader(LogCursor.parse(cursor))
        text = "".join(served(lines, reader.cursor.query.get("sinceTime"))).encode()
        # Cut anywhere, in the middle of a line too, but get at least one line further.
        shown = text[: rng.randint(1, len(text))] if rng.random() < 0.9 else text
        for line in reader.feed(shown):
            read.append(line.text)
            cursor = str(line.cursor)
    assert read == [text for _, text in lines]


def test_a_cursor_that_is_none_says_so():
    with pytest.raises(InvalidInputError, match="yesterday"):
        LogCursor.parse("yesterday")


def test_time_stamps_of_any_zone():
    assert LogCursor().after("2026-01-01T02:00:00.123456789+02:00").query["sinceTime"] == "2026-01-01T00:00:00Z"
    assert LogCursor().after("2026-01-01T00:00:01Z").query["sinceTime"] == "2026-01-01T00:00:01Z"


def test_what_dag_files_may_import_brings_no_client():
    heavy = "{'kubernetes', 'kubernetes_asyncio', 'aiohttp', 'pandas', 'urllib3'}"
    code = (
        "import sys, airflow_mlops.triggers._watch, airflow_mlops.hooks._kubernetes; "
        f"sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
