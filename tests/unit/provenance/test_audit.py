"""The audit log: what is written stays, and whoever changes it is found out."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import multiprocessing
import os
import signal
import threading

import pytest

from airflow_mlops.exceptions import ConcurrentChangeError, DataError, ExternalSystemError, InvalidInputError
from airflow_mlops.provenance._audit_store import S3, Folder
from airflow_mlops.provenance.audit import GENESIS, AuditLog, Entry, verify

NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.timezone.utc)


def log_at(uri, **more):
    return AuditLog(str(uri), clock=lambda: NOON, **more)


@pytest.fixture
def written(tmp_path):
    """A log of five entries, and where they lie."""
    log = log_at(tmp_path / "audit")
    for number in range(1, 6):
        log.append("gate", f"k{number}", {"passed": number % 2 == 0, "loss": 0.5})
    return log, tmp_path / "audit" / "entries"


def place(folder, number):
    return folder / f"{number:012d}.json"


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


def rewritten(path, **changes):
    """An entry changed by somebody who makes its own hash fit."""
    entry, _ = Entry.from_bytes(path.read_bytes())
    replace(path, Entry(**{**vars(entry), **changes}).to_bytes())


def test_what_is_appended_is_linked(written):
    log, _ = written
    entries = list(log.entries())
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[0].previous == GENESIS and entries[0].time == "2026-01-01T12:00:00+00:00"
    assert [entry.previous for entry in entries[1:]] == [entry.sha256 for entry in entries[:-1]]
    found = log.verify()
    assert found.intact and (found.entries, found.head) == (5, entries[-1].sha256)


def test_the_hash_is_of_the_canonical_json(written):
    stored = json.loads(place(written[1], 2).read_bytes())
    digest = stored.pop("sha256")
    text = json.dumps(stored, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest == hashlib.sha256(text.encode()).hexdigest()


def test_an_empty_log_is_intact(tmp_path):
    assert verify(str(tmp_path / "none")).to_json() == {"intact": True, "entries": 0, "head": GENESIS, "broken": None}


def test_a_decision_is_logged_once(written):
    log, _ = written
    again = log.append("gate", "k2", {"passed": True, "loss": 0.5})
    assert again.number == 2 and log.verify().entries == 5


def change(folder):
    path = place(folder, 3)
    replace(path, path.read_bytes().replace(b'"passed":false', b'"passed":true'))


def change_and_rehash(folder):
    rewritten(place(folder, 3), body={"passed": True})


def change_the_last(folder):
    path = place(folder, 5)
    replace(path, path.read_bytes().replace(b"0.5", b"0.4"))


def delete(folder):
    place(folder, 2).unlink()


def reorder(folder):
    two, three = place(folder, 2).read_bytes(), place(folder, 3).read_bytes()
    replace(place(folder, 2), three)
    replace(place(folder, 3), two)


def reorder_and_renumber(folder):
    two, three = (Entry.from_bytes(place(folder, n).read_bytes())[0] for n in (2, 3))
    replace(place(folder, 2), Entry(**{**vars(three), "number": 2}).to_bytes())
    replace(place(folder, 3), Entry(**{**vars(two), "number": 3}).to_bytes())


def truncate(folder):
    place(folder, 4).unlink()
    place(folder, 5).unlink()


def damage(folder):
    replace(place(folder, 4), b"{")


def pad(folder):
    replace(place(folder, 1), place(folder, 1).read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("attack", "number", "problem"),
    [
        (change, 3, "changed"),
        (change_and_rehash, 4, "unlinked"),
        (change_the_last, 5, "changed"),
        (delete, 2, "missing"),
        (reorder, 2, "misplaced"),
        (reorder_and_renumber, 2, "unlinked"),
        (truncate, 4, "truncated"),
        (damage, 4, "unreadable"),
        (pad, 1, "changed"),
    ],
)
def test_the_first_broken_link_is_named(written, attack, number, problem):
    log, folder = written
    attack(folder)
    found = log.verify()
    assert (found.broken.number, found.broken.problem, found.entries) == (number, problem, number - 1)
    assert found.broken.uri.endswith(f"entries/{number:012d}.json") and not found.intact


def test_an_end_that_is_cut_off_with_its_pointer_needs_an_anchor(written):
    log, folder = written
    anchor = list(log.entries())[-1].to_anchor()
    truncate(folder)
    (folder.parent / "head.json").unlink()
    assert log.verify().intact
    broken = log.verify([anchor]).broken
    assert (broken.number, broken.problem) == (4, "truncated")


def test_a_log_written_anew_is_found_by_an_anchor(written, tmp_path):
    log, _ = written
    anchors = [entry.to_anchor() for entry in log.entries()]
    other = log_at(tmp_path / "other")
    for number in range(1, 6):
        other.append("gate", f"k{number}", {"passed": True, "loss": 0.5})
    assert other.verify().intact
    broken = other.verify(anchors[2:]).broken
    assert (broken.number, broken.problem) == (3, "rewritten")
    assert log.verify(anchors).intact


def test_anchors_that_contradict_each_other_are_all_held_against_the_log(written):
    log, folder = written
    old = list(log.entries())[-1].to_anchor()
    place(folder, 5).unlink()
    (folder.parent / "head.json").unlink()
    for key in (folder.parent / "keys").iterdir():
        key.unlink()
    new = log.append("gate", "k6", {"passed": True}).to_anchor()
    assert old["number"] == new["number"] == 5 and log.verify([new]).intact
    for anchors in ([old, new], [new, old]):
        broken = log.verify(anchors).broken
        assert (broken.number, broken.problem) == (5, "rewritten") and old["sha256"] in broken.detail


@pytest.mark.parametrize("value", [b"NaN", b"-Infinity", b'"\\ud800"', b"[" * 100_000 + b"]" * 100_000])
def test_an_entry_that_python_reads_and_would_not_write_is_unreadable(written, value):
    log, folder = written
    replace(place(folder, 5), place(folder, 5).read_bytes().replace(b"0.5", value))
    broken = log.verify().broken
    assert (broken.number, broken.problem) == (5, "unreadable")
    with pytest.raises(DataError, match="verify the log before anything is added"):
        log.append("gate", "k6", {})


@pytest.mark.parametrize(
    ("pointer", "problem"),
    [
        ('{"number": 5}', None),
        ('{"number": Infinity, "sha256": "?"}', None),
        ('{"number": 6}', "truncated"),
        ('{"number": 5, "sha256": "?"}', "rewritten"),
    ],
)
def test_a_pointer_that_was_touched_breaks_no_verification(written, pointer, problem):
    log, folder = written
    replace(folder.parent / "head.json", pointer.encode())
    broken = log.verify().broken
    assert (broken and broken.problem) == problem


@pytest.mark.parametrize(("attack", "error"), [(truncate, ConcurrentChangeError), (damage, DataError)])
def test_nothing_is_added_to_a_log_whose_end_is_broken(written, attack, error):
    log, folder = written
    (folder.parent / "head.json").unlink()
    (folder.parent / "head.json").write_text(json.dumps({"number": 4, "sha256": "?"}))
    attack(folder)
    with pytest.raises(error, match="verify the log before anything is added"):
        log.append("gate", "new", {})


def test_a_writer_that_dies_before_the_pointer_moves_leaves_a_whole_log(written, monkeypatch):
    log, _ = written
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            log.append("gate", "k6", {"passed": True})
    assert log.verify().entries == 6
    assert log.append("gate", "k6", {"passed": True}).number == 6
    assert log.append("gate", "k7", {}).number == 7 and log.verify().intact


def test_a_writer_that_dies_before_the_entry_is_taken_up(written, monkeypatch):
    log, _ = written
    create = Folder.create

    def dying(self, name, content):
        if name.startswith("entries"):
            raise SystemExit
        return create(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "create", dying)
        with pytest.raises(SystemExit):
            log.append("gate", "k6", {})
    log.append("gate", "other", {})
    assert log.append("gate", "k6", {}).number == 7
    assert log.append("gate", "k6", {}).number == 7
    assert [entry.key for entry in log.entries()][5:] == ["other", "k6"] and log.verify().intact


def test_a_write_that_is_cut_off_leaves_no_entry(written, monkeypatch):
    log, folder = written

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ExternalSystemError, match="No space left on device; nothing was logged"):
            log.append("gate", "k6", {})
    assert log.verify().entries == 5 and not list(folder.glob(".tmp-*"))


def _append_many(uri, name, count):
    log = AuditLog(uri)
    for number in range(count):
        log.append("gate", f"{name}-{number}", {"by": name})


def test_writers_at_once_share_one_chain(tmp_path):
    uri = str(tmp_path / "audit")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(uri, name, 40)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    entries = list(AuditLog(uri).entries())
    assert len({entry.key for entry in entries}) == len(entries) == 120 and verify(uri).entries == 120


def test_one_decision_from_two_writers_at_once_is_logged_once(tmp_path):
    uri, seen = str(tmp_path / "audit"), []
    barrier = threading.Barrier(2)

    def append(number):
        barrier.wait()
        seen.append(AuditLog(uri).append("gate", f"same-{number}", {}).number)

    for number in range(30):
        pair = [threading.Thread(target=append, args=(number,)) for _ in range(2)]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join(60)
    assert verify(uri).entries == 30 and sorted(seen) == sorted([*range(1, 31)] * 2)


def test_killed_writers_leave_a_chain_that_holds(tmp_path):
    """SIGKILL in the middle of appending, wherever it hits; then everything is logged again."""
    uri = str(tmp_path / "audit")
    context = multiprocessing.get_context("fork")
    for patience in (0.01, 0.03, 0.05, 0.08):
        writer = context.Process(target=_append_many, args=(uri, "a", 200))
        writer.start()
        writer.join(patience)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(30)
        assert verify(uri).intact
    _append_many(uri, "a", 200)
    keys = [entry.key for entry in AuditLog(uri).entries()]
    assert len(set(keys)) == len(keys) == 200 and verify(uri).intact


@pytest.mark.parametrize("uri", ["gs://bucket/audit", "http://host/audit"])
def test_a_store_that_may_not_refuse_a_second_writer_is_not_used(uri):
    with pytest.raises(InvalidInputError, match="expected a folder, or s3://bucket/prefix"):
        AuditLog(uri)


class TestS3:
    @pytest.fixture
    def locked(self, s3):
        s3.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        return s3

    def test_the_same_log(self, s3):
        log = log_at("s3://runs/audit")
        for number in range(1, 4):
            log.append("gate", f"k{number}", {"n": number})
        assert log.append("gate", "k2", {}).number == 2
        assert log.verify().entries == 3
        s3.delete_object(Bucket="runs", Key="audit/entries/000000000002.json")
        assert (log.verify().broken.number, log.verify().broken.problem) == (2, "missing")

    def test_the_second_writer_of_a_number_goes_on_to_the_next(self, s3, monkeypatch):
        log, create = log_at("s3://runs/audit"), S3.create
        log.append("gate", "first", {})

        def behind(self, name, content):
            if name == "entries/000000000002.json" and not behind.done:
                behind.done = True
                log_at("s3://runs/audit").append("gate", "faster", {})
            return create(self, name, content)

        behind.done = False
        monkeypatch.setattr(S3, "create", behind)
        assert log.append("gate", "slower", {}).number == 3
        assert [entry.key for entry in log.entries()] == ["first", "faster", "slower"] and log.verify().intact

    def test_object_lock_keeps_every_entry(self, locked):
        from botocore.exceptions import ClientError

        log = AuditLog("s3://locked/audit", retain_days=30)
        log.append("gate", "k1", {})
        key = "audit/entries/000000000001.json"
        kept = locked.head_object(Bucket="locked", Key=key)
        assert kept["ObjectLockMode"] == "COMPLIANCE"
        left = kept["ObjectLockRetainUntilDate"] - dt.datetime.now(dt.timezone.utc)
        assert dt.timedelta(days=29) < left <= dt.timedelta(days=30)
        version = locked.list_object_versions(Bucket="locked", Prefix=key)["Versions"][0]["VersionId"]
        with pytest.raises(ClientError, match="AccessDenied"):
            locked.delete_object(Bucket="locked", Key=key, VersionId=version)
        assert log.verify().intact

    @pytest.mark.parametrize("attack", ["delete", "overwrite"])
    def test_a_bucket_with_versions_tells_of_what_was_done(self, locked, attack):
        log = log_at("s3://locked/audit", retain_days=1)
        for number in range(1, 4):
            log.append("gate", f"k{number}", {})
        key = "audit/entries/000000000002.json"
        original = locked.list_object_versions(Bucket="locked", Prefix=key)["Versions"][0]["VersionId"]
        if attack == "delete":
            locked.delete_object(Bucket="locked", Key=key)
        else:
            locked.put_object(Bucket="locked", Key=key, Body=b"{}")
        broken = log.verify().broken
        assert (broken.number, broken.problem) == (2, "tampered")
        assert ("was deleted" if attack == "delete" else "was written over") in broken.detail
        assert original in broken.detail

    def test_a_bucket_without_object_lock_is_not_taken_for_one(self, s3):
        with pytest.raises(InvalidInputError, match="the bucket runs has no Object Lock"):
            AuditLog("s3://runs/audit", retain_days=30).append("gate", "k", {})

    def test_a_bucket_that_is_away_is_an_error_and_no_empty_log(self, s3):
        with pytest.raises(ExternalSystemError, match="s3://nowhere/audit cannot be used"):
            AuditLog("s3://nowhere/audit").append("gate", "k", {})
        with pytest.raises(ExternalSystemError, match="NoSuchBucket"):
            verify("s3://nowhere/audit")

    @pytest.mark.parametrize("reason", ["away", "no credentials"])
    @pytest.mark.parametrize(
        "use",
        [
            lambda store: store.locks,
            lambda store: store.create("entries/1.json", b"{}"),
            lambda store: store.replace("head.json", b"{}"),
            lambda store: store.read("head.json"),
            lambda store: store.names("entries"),
            lambda store: store.tampered("entries"),
        ],
        ids=["locks", "create", "replace", "read", "names", "tampered"],
    )
    def test_an_s3_that_does_not_answer_is_an_external_error(self, monkeypatch, tmp_path, use, reason):
        settings = {
            "ENDPOINT_URL": "http://127.0.0.1:9",
            "MAX_ATTEMPTS": "1",
            "DEFAULT_REGION": "us-east-1",
            "EC2_METADATA_DISABLED": "true",
            "CONFIG_FILE": str(tmp_path / "none"),
            "SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        }
        for name, value in settings.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            if reason == "away":
                monkeypatch.setenv(f"AWS_{name}", "a")
            else:
                monkeypatch.delenv(f"AWS_{name}", raising=False)
        monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it keeps the credentials that it has found
        words = "Could not connect" if reason == "away" else "Unable to locate credentials"
        with pytest.raises(ExternalSystemError, match=f"s3://runs/audit cannot be used: {words}"):
            use(S3("s3://runs/audit"))
