from __future__ import annotations

import math
import os

import pytest

from airflow_mlops import storage
from airflow_mlops.exceptions import ExternalSystemError, InvalidInputError


@pytest.mark.parametrize("scheme", ["", "file:", "file://", "memory://"])
def test_what_is_written_is_read_and_listed(tmp_path, scheme):
    folder = f"{scheme}{tmp_path}/a"
    storage.write_json(storage.join(folder, "b", "x.json"), {"n": 1})
    storage.write_bytes(storage.join(folder, "b", "y.bin"), b"12")
    assert storage.read_json(f"{folder}/b/x.json") == {"n": 1}
    assert storage.list_files(f"{folder}/b", ".json") == [f"{folder}/b/x.json"]
    assert storage.exists(f"{folder}/b/y.bin") and not storage.exists(f"{folder}/b/z")
    assert storage.list_files(f"{folder}/nowhere") == []


def test_equal_values_are_equal_bytes(tmp_path):
    first = storage.write_json(f"{tmp_path}/1.json", {"a": 1, "b": 2})
    second = storage.write_json(f"{tmp_path}/2.json", {"b": 2, "a": 1})
    assert storage.read_bytes(first) == storage.read_bytes(second)


def test_a_value_that_json_has_not_leaves_the_old_file(tmp_path):
    uri = storage.write_json(f"{tmp_path}/x.json", {"n": 1})
    with pytest.raises(ValueError):
        storage.write_json(uri, {"n": math.nan})
    assert storage.read_json(uri) == {"n": 1}


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path, monkeypatch):
    uri = storage.write_bytes(f"{tmp_path}/x", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExternalSystemError, match=r"No space left on device.*Free space"):
        storage.write_bytes(uri, b"new")
    assert os.listdir(tmp_path) == ["x"] and storage.read_bytes(uri) == b"old"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExternalSystemError, match=r"cannot write .*file/x"):
        storage.write_bytes(f"{tmp_path}/file/x", b"")


def test_an_object_store_is_asked_again_for_what_others_have_written(s3):
    """s3fs remembers listings; a driver would never see its workers' files."""
    storage.write_json("s3://runs/w/1.json", {"n": 1})
    assert storage.list_files("s3://runs/w") == ["s3://runs/w/1.json"]
    assert not storage.exists("s3://runs/w/2.json")
    s3.put_object(Bucket="runs", Key="w/2.json", Body=b"{}")
    assert storage.list_files("s3://runs/w", ".json") == ["s3://runs/w/1.json", "s3://runs/w/2.json"]
    assert storage.exists("s3://runs/w/2.json") and storage.read_json("s3://runs/w/1.json") == {"n": 1}


@pytest.mark.parametrize("uri", ["/a/b", "a/b", "./a:b/c", "C:/a", "file:/a", "file:///a", "a b:/c"])
def test_what_lies_on_this_machine(uri):
    assert storage.is_local(uri)


@pytest.mark.parametrize(
    "uri",
    ["models:/late/3", "models:/m-0123", "runs:/0123/model", "mlflow-artifacts:/0/a", "dbfs:/a"],
)
def test_what_only_mlflow_can_resolve_is_no_folder_of_the_process(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not storage.is_local(uri)
    for use in (lambda: storage.write_bytes(f"{uri}/x", b""), lambda: storage.read_bytes(uri)):
        with pytest.raises(InvalidInputError, match="only MLflow can resolve"):
            use()
    assert not os.listdir(tmp_path)


def test_a_chain_of_filesystems_is_no_path():
    assert not storage.is_local("simplecache::s3://runs/a")
