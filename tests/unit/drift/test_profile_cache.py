"""Profiles found by the hash of their data, and what a killed writer leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import Profile
from airflow_mlops.drift.cache import data_key, profile_of
from airflow_mlops.exceptions import DataError


@pytest.fixture
def data(tmp_path):
    """Two Parquet files."""
    rng = np.random.default_rng(7)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        frame = pd.DataFrame({"x": rng.normal(size=2_000), "hour": rng.integers(0, 24, 2_000), "late": 1})
        frame.to_parquet(tmp_path / "data" / f"{name}.parquet")
    return tmp_path / "data"


def _counting(monkeypatch):
    """How often data are profiled."""
    calls = []
    monkeypatch.setattr(Profile, "of", lambda *args, of=Profile.of, **kwargs: calls.append(1) or of(*args, **kwargs))
    return calls


def test_unchanged_data_are_profiled_once(data, tmp_path, monkeypatch):
    calls, cache = _counting(monkeypatch), str(tmp_path / "cache")
    first = profile_of(str(data), cache)
    assert profile_of(str(data), cache, threads=2).digest == first.digest and len(calls) == 1
    shutil.copytree(data, tmp_path / "moved")
    (tmp_path / "moved" / "a.parquet").rename(tmp_path / "moved" / "z.parquet")
    assert profile_of([f"{tmp_path}/moved/*.parquet"], cache).digest == first.digest and len(calls) == 1
    assert list(profile_of(str(data), cache, columns=["late", "x"]).columns) == ["late", "x"] and len(calls) == 2
    assert list(profile_of(str(data), cache, columns=["x", "late"]).columns) == ["x", "late"] and len(calls) == 2
    assert profile_of(str(data), cache, categorical=["hour"]).columns["hour"].kind == "categorical" and len(calls) == 3


def test_changed_data_are_profiled_again(data, tmp_path, monkeypatch):
    calls, cache = _counting(monkeypatch), str(tmp_path / "cache")
    first = profile_of(str(data), cache)
    content = bytearray((data / "a.parquet").read_bytes())
    stat = os.stat(data / "a.parquet")
    content[1_000] ^= 1
    (data / "a.parquet").write_bytes(content)
    os.utime(data / "a.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert profile_of(str(data), cache).digest != first.digest and len(calls) == 2
    (data / "b.parquet").unlink()
    assert profile_of(str(data), cache).rows == 2_000
    (data / "a.parquet").unlink()
    with pytest.raises(DataError, match="no Parquet or CSV file"):
        profile_of(str(data), cache)


def test_equal_bytes_that_are_read_otherwise_are_other_data(tmp_path, monkeypatch):
    calls, cache = _counting(monkeypatch), str(tmp_path / "cache")
    content = b"a\tb,c\n1\t2,3\n4\t5,6\n"
    for name in ("x.csv", "x.tsv", "y.csv"):
        (tmp_path / name).write_bytes(content)
    assert list(profile_of(f"{tmp_path}/x.csv", cache).columns) == ["a\tb", "c"]
    assert list(profile_of(f"{tmp_path}/x.tsv", cache).columns) == ["a", "b,c"]
    assert list(profile_of(f"{tmp_path}/y.csv", cache).columns) == ["a\tb", "c"] and len(calls) == 2, "found again"
    with pytest.raises(DataError, match=r"cannot read .*x\.parquet"):
        (tmp_path / "x.csv").rename(tmp_path / "x.parquet")
        profile_of(f"{tmp_path}/x.parquet", cache)


def test_a_folder_does_not_say_how_its_files_are_read(tmp_path):
    (tmp_path / "from.tsv").mkdir()
    (tmp_path / "from.tsv" / "x.csv").write_text("a,b\n1,2\n")
    assert list(Profile.of(f"{tmp_path}/from.tsv/x.csv").columns) == ["a", "b"]


@pytest.mark.parametrize("damage", ["", "{", "{}", None], ids=["empty", "torn", "foreign", "newer"])
def test_a_damaged_profile_is_made_again(data, tmp_path, damage):
    cache = tmp_path / "cache"
    expected = profile_of(str(data), str(cache)).digest
    (place,) = cache.iterdir()
    newer = json.dumps({**json.loads(place.read_text()), "profile_version": 99})
    place.write_text(newer if damage is None else damage)
    assert profile_of(str(data), str(cache)).digest == expected
    assert Profile.from_json(json.loads(place.read_text())).digest == expected


KILLED = """
import os, sys, time

def replace(source, target):
    print(os.path.getsize(source), flush=True)
    time.sleep(600)

os.replace = replace
from airflow_mlops.drift.cache import profile_of
profile_of(sys.argv[1], sys.argv[2])
"""


def test_a_check_killed_while_it_writes_leaves_no_profile(data, tmp_path):
    cache = tmp_path / "cache"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(data), str(cache)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert int(child.stdout.readline()) > 1_000  # all is written, only its name is not yet
    finally:
        child.kill()
        child.wait()
    place = cache / f"{data_key(str(data), [2, None, [], None])}.json"
    assert not place.exists()
    assert profile_of(str(data), str(cache)).digest == Profile.of(str(data)).digest
    assert place.exists()
