"""Snapshots against real DVC, on a folder and on an S3 served by moto."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_mlops.exceptions import ConcurrentChangeError, ExternalSystemError, InvalidInputError
from airflow_mlops.hooks.dvc import DvcHook
from airflow_mlops.operators.dvc import DvcSnapshotOperator


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "raw"
    for name in ("flights/01.bin", "flights/02.bin", "planes.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 5000)
    return folder


def same(one, other):
    found = filecmp.dircmp(one, other)
    return not (found.left_only or found.right_only or found.diff_files) and all(
        same(one / name, other / name) for name in found.common_dirs
    )


def test_the_hash_is_that_of_dvc_add_and_the_bytes_come_back(data, tmp_path):
    from dvc.repo import Repo

    shutil.copytree(data, tmp_path / "checkout" / "raw")
    (out,) = Repo.init(str(tmp_path / "checkout"), no_scm=True).add(str(tmp_path / "checkout" / "raw"))[0].outs
    remote = str(tmp_path / "remote")
    result = DvcSnapshotOperator(task_id="s", path=str(data), remote_url=remote).execute({})
    assert result["md5"] == out.hash_info.value
    assert (result["nfiles"], result["size"]) == (3, out.meta.size)
    assert os.path.isfile(result["uri"])
    again = DvcSnapshotOperator(task_id="s", path=str(data), remote_url=remote).execute({})
    assert again == result
    DvcHook(remote_url=remote).restore(result["md5"], str(tmp_path / "back"))
    assert same(data, tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == ["back", "checkout", "raw", "remote"]


def test_a_single_file(data, tmp_path):
    hook = DvcHook(remote_url=str(tmp_path / "remote"))
    pinned = hook.snapshot(str(data / "planes.bin"))
    assert pinned.nfiles == 1
    hook.restore(pinned.md5, str(tmp_path / "planes"))
    assert (tmp_path / "planes").read_bytes() == (data / "planes.bin").read_bytes()


def test_four_at_once(data, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        pinned = list(
            pool.map(lambda _: DvcHook(remote_url=str(tmp_path / "remote")).snapshot(str(data)).md5, range(4))
        )
    assert len(set(pinned)) == 1
    DvcHook(remote_url=str(tmp_path / "remote")).restore(pinned[0], str(tmp_path / "back"))
    assert same(data, tmp_path / "back")


def test_the_connection_names_the_remote(data, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", f'{{"conn_type": "dvc_remote", "extra": {{"url": "{tmp_path}/lake"}}}}')
    assert DvcHook("lake").snapshot(str(data)).remote == f"{tmp_path}/lake"
    assert DvcHook("lake").test_connection()[0]


def test_bad_input_names_the_fix(data, tmp_path):
    remote = str(tmp_path / "remote")
    with pytest.raises(AirflowFailException, match="nothing is at"):
        DvcSnapshotOperator(task_id="s", path=str(tmp_path / "no"), remote_url=remote).execute({})
    (tmp_path / "empty").mkdir()
    with pytest.raises(AirflowFailException, match="holds no file"):
        DvcSnapshotOperator(task_id="s", path=str(tmp_path / "empty"), remote_url=remote).execute({})
    with pytest.raises(AirflowFailException, match="no DVC remote"):
        DvcSnapshotOperator(task_id="s", path=str(data)).execute({})
    with pytest.raises(InvalidInputError, match="does not hold all of"):
        DvcHook(remote_url=remote).restore("0" * 32 + ".dir", str(tmp_path / "back"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExternalSystemError, match="file/remote"):
        DvcHook(remote_url=str(tmp_path / "file" / "remote")).snapshot(str(data))


def test_a_file_that_changes_while_it_is_read_leaves_nothing_wrong_behind(data, tmp_path, monkeypatch):
    from dvc_data.hashfile import transfer

    original = transfer.transfer

    def after_a_change(*args, **kwargs):
        (data / "planes.bin").write_bytes(b"other")
        return original(*args, **kwargs)

    hook = DvcHook(remote_url=str(tmp_path / "remote"))
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "transfer", after_a_change)
        with pytest.raises(ConcurrentChangeError, match=r"planes\.bin"):
            hook.snapshot(str(data))
    (data / "planes.bin").write_bytes(b"planes.bin" * 5000)
    hook.restore(hook.snapshot(str(data)).md5, str(tmp_path / "back"))
    assert same(data, tmp_path / "back")


def test_s3(data, tmp_path, monkeypatch):
    pytest.importorskip("dvc_s3", reason="needs the extra s3")
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"
        )
        client.create_bucket(Bucket="lake")
        monkeypatch.setenv(
            "AIRFLOW_CONN_S3",
            f'{{"conn_type": "dvc_remote", "login": "k", "password": "s", "extra": {{"url": "s3://lake/dvc", '
            f'"endpointurl": "{url}", "region": "us-east-1"}}}}',
        )
        hook = DvcHook("s3")
        pinned = hook.snapshot(str(data))
        assert pinned.uri.startswith("s3://lake/dvc/files/md5/")
        assert len(client.list_objects_v2(Bucket="lake")["Contents"]) == 4
        hook.restore(pinned.md5, str(tmp_path / "back"))
        assert same(data, tmp_path / "back")
    finally:
        server.stop()


OTHER_DISK = """
import subprocess, sys
from airflow_mlops.exceptions import ExternalSystemError
from airflow_mlops.hooks.dvc import DvcHook
data, remote, back, options = sys.argv[1:]
def mount(*arguments):
    if subprocess.run(["mount", *arguments, remote]).returncode:
        sys.exit(77)
mount("-t", "tmpfs", "-o", options, "tmpfs")
try:
    DvcHook(remote_url=remote).snapshot(data)
    sys.exit("a snapshot was made on " + options)
except ExternalSystemError as error:
    print(error)
mount("-o", "remount,rw,size=10m")
DvcHook(remote_url=remote).restore(DvcHook(remote_url=remote).snapshot(data).md5, back)
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [("size=100k", r"[12] of 3 files of .*Check its free space"), ("ro", "it is read-only; mount it for writing")],
)
def test_a_disk_that_is_full_or_read_only_is_an_error_and_a_retry_ends_well(data, tmp_path, options, message):
    (tmp_path / "remote").mkdir()
    arguments = [str(data), str(tmp_path / "remote"), str(tmp_path / "back"), options]
    command = [sys.executable, "-c", OTHER_DISK, *arguments]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no mount namespace")
    done = subprocess.run(["unshare", "-rm", *command], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this machine mounts no tmpfs")
    assert done.returncode == 0, done.stderr
    assert re.search(f"^DVC remote {tmp_path}/remote.*{message}", done.stdout, re.MULTILINE), done.stdout
    assert same(data, tmp_path / "back")
