"""What can be known before anything starts is said before anything starts, with the way to mend it."""

from __future__ import annotations

import collections
import json
import os
import shutil
import socket
import stat
import sys
from pathlib import Path

import pytest

from airflow_mlops.embedded import demo, postgres, processes, ray_head, stack
from airflow_mlops.embedded.months import parse_months
from airflow_mlops.exceptions import InvalidInputError


def test_a_usable_folder_passes(tmp_path: Path) -> None:
    stack.preflight(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidInputError, match=r"cannot be written to.*--root"):
        stack.preflight(tmp_path / "file" / "root")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInputError, match="Permission denied"):
        stack.preflight(tmp_path)


def test_a_disk_that_is_almost_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**30))
    with pytest.raises(InvalidInputError, match=r"only 1\.0 GiB are free.*3 GiB are needed"):
        stack.preflight(tmp_path)


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stack._REQUIRED, "no-such-distribution", "airflow-mlops[demo]")
    with pytest.raises(InvalidInputError, match=r"missing: no-such-distribution.*pip install 'airflow-mlops\[demo\]'"):
        stack.preflight(tmp_path)


def test_a_python_that_is_not_supported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    with pytest.raises(InvalidInputError, match=r"Python 3\.14.*need 3\.11 to 3\.13"):
        stack.preflight(tmp_path)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInputError, match=f"port {port}, asked for Airflow's API server and UI"):
            stack.preflight(tmp_path, port=port)


def test_the_demo_ends_with_one_and_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--root", str(tmp_path / "demo"), "--months", "7-4", "--dags", str(tmp_path)]) == 1
    assert "error: months are '7-4'; expected" in capsys.readouterr().err
    assert demo.main(["--root", str(tmp_path / "demo"), "--dags", str(tmp_path / "none")]) == 1
    assert "there is no folder of Dags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "last"), [("4-7", "2013-07"), ("4", "2013-04"), ("4-12", "2013-12"), (" 4-5 ", "2013-05")]
)
def test_months_are_a_chain_from_april(text: str, last: str) -> None:
    months = parse_months(text)
    assert months[0] == "2013-04" and months[-1] == last and months == sorted(set(months))


@pytest.mark.parametrize("text", ["", "x", "3-7", "7-4", "4-13", "4-", "-4", "4-5-6", "4.5"])
def test_months_that_are_none(text: str) -> None:
    with pytest.raises(InvalidInputError, match="expected a month or a range from 4 to 12"):
        parse_months(text)


def test_secrets_are_made_once_and_only_for_their_owner(tmp_path: Path) -> None:
    first = stack.load_secrets(tmp_path)
    assert first == stack.load_secrets(tmp_path)
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    # HS512 signs Airflow's tokens; a shorter key is weaker than the signature.
    assert len(first["jwt"]) >= 64
    assert len(set(first.values())) == len(first)


def test_an_older_stack_whose_versions_are_unsigned_goes_on_without_signatures(tmp_path: Path) -> None:
    whole = stack.Stack(tmp_path, dags_folder=tmp_path, with_ray=False)
    (tmp_path / "secrets.json").write_text('{"postgres": "mine"}')
    old = whole._connections(stack.load_secrets(tmp_path))
    assert not [name for name in old if "SIGNING" in name]
    (tmp_path / "secrets.json").unlink()
    new = whole._connections(stack.load_secrets(tmp_path))
    assert new["AIRFLOW__MLOPS__SIGNING_CONN_ID"] == "model_signing_default"
    assert "PRIVATE KEY" in json.loads(new["AIRFLOW_CONN_MODEL_SIGNING_DEFAULT"])["password"]


def test_tasks_get_the_stack_and_nothing_of_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", "elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://production")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    whole = stack.Stack(tmp_path, dags_folder=tmp_path, feature_repo=tmp_path / "repo", with_ray=False)
    env = whole._base_env() | whole._connections({"ray": "token"})
    assert "RAY_ADDRESS" not in env and "AIRFLOW_CONN_RAY_DEFAULT" not in env
    assert env["PYTHONPATH"] == "/mine"
    assert env["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert json.loads(env["AIRFLOW_CONN_MLFLOW_DEFAULT"])["extra"]["tracking_uri"] == env["MLFLOW_TRACKING_URI"]
    assert env["MLOPS_ROOT"] == env["AIRFLOW__MLOPS__ROOT"] == f"{tmp_path}/project"
    assert env["MLOPS_FEATURE_REPO"] == f"{tmp_path}/repo"
    assert env["OMP_NUM_THREADS"] == "1"


def test_clean_deletes_only_what_the_demo_made(tmp_path: Path) -> None:
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "letters.txt").write_text("precious")
    with pytest.raises(InvalidInputError, match="was not made by the demo"):
        stack.clean(foreign)
    assert (foreign / "letters.txt").exists()
    mine = tmp_path / "demo"
    mine.mkdir()
    stack.load_secrets(mine)
    stack.clean(mine)
    assert not mine.exists()
    stack.clean(mine)


def test_a_folder_in_use_is_not_cleaned(tmp_path: Path) -> None:
    stack.load_secrets(tmp_path)
    with processes.folder_lock(tmp_path):
        with pytest.raises(InvalidInputError, match="another demo"):
            stack.clean(tmp_path)
    assert (tmp_path / "secrets.json").exists()


def test_ray_gets_a_short_folder_that_is_cleaned_with_the_long_one(tmp_path: Path) -> None:
    short, long = Path("/tmp") / f"r{os.getpid()}", tmp_path / ("x" * 100)
    for root in (short, long):
        root.mkdir()
    try:
        heads = [ray_head.RayHead(root, env={}, token="t") for root in (short, long)]
        assert heads[0]._temp_dir() == short / "ray"
        outside = heads[1]._temp_dir()
        assert len(str(outside)) < 40 and outside == heads[1]._temp_dir() == (long / "ray").resolve()
        ray_head.remove_files(long)
        assert not outside.exists() and not (long / "ray").is_symlink()
    finally:
        shutil.rmtree(short)


def test_postgres_starts_again_with_its_data_and_refuses_a_wrong_password(tmp_path: Path) -> None:
    psycopg2 = pytest.importorskip("psycopg2", reason="the demo's database driver")

    def run(sql: str, password: str) -> list[tuple[object, ...]]:
        server = postgres.Postgres(tmp_path, port=processes.free_port(), password=password)
        server.start()
        try:
            server.wait_healthy()
            url = server.sql_alchemy_conn.replace("+psycopg2", "")
            with psycopg2.connect(url) as connection, connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall()
        finally:
            server.stop()

    assert run("create table kept (x int); insert into kept values (42) returning x", "right") == [(42,)]
    assert run("select x, current_user from kept", "right") == [(42, "airflow")]
    with pytest.raises(InvalidInputError, match=r"another password than secrets\.json"):
        run("select 1", "wrong")
