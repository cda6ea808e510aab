"""Functions that a training names: found, or missed before anything is created, and never imported."""

from __future__ import annotations

import sys

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.callables import check_callables
from airflow_mlops.training.spec import TrainingSpec

LOOPS = """
raise AssertionError("imported")
from json import loads as reader
import os.path
here = also, [this] = 1, [2]
annotated: int = 3
async def coming(): pass
class Loop: pass
if True:
    try:
        def nested(): inside = 1
    except ImportError:
        fallback = None
with open("x") as handle: pass
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    for name, text in {
        "team_pkg/__init__.py": "raise AssertionError('imported')",
        "team_pkg/loops.py": LOOPS,
        "team_pkg/stars.py": "from os import *",
        "team_pkg/lazy.py": "def __getattr__(name): return print",
        "team_pkg/made.py": "globals()['train'] = print",
        "team_pkg/broken.py": "def train(:",
        "team_loose/deep/loops.py": "def train(): pass",
        "team_single.py": "def train(): pass",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))


def check(train_fn, exporter=None, **options):
    spec = TrainingSpec(train_fn, "torch", "/runs", "r", exporter=exporter)
    check_callables(spec, **options)


@pytest.mark.parametrize(
    "name", ["reader", "os", "here", "also", "this", "annotated", "coming", "Loop", "nested", "fallback", "handle"]
)
def test_what_the_top_of_a_module_defines_is_found(name):
    check(f"team_pkg.loops:{name}")
    assert "team_pkg" not in sys.modules


@pytest.mark.parametrize(
    "reference",
    [
        "team_pkg.stars:train",
        "team_pkg.lazy:train",
        "team_pkg.made:train",
        "team_loose.deep.loops:train",
        "team_single:train",
        "only_in_the_image.loops:train",
        "sys:exit",
        "math:sqrt",
        "pickle:s3://runs/f",
    ],
)
def test_what_cannot_be_told_is_left_to_the_driver(reference):
    check(reference)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("team_pkg.lops:train", r"'team_pkg' is installed here without a module 'team_pkg.lops'"),
        ("team_pkg.loops:inside", r"loops.py has no 'inside'"),
        ("team_pkg.loops:tarin", r"loops.py has no 'tarin'"),
        ("team_pkg.broken:train", r"broken.py cannot be read"),
        ("team_single:tarin", r"team_single.py has no 'tarin'"),
    ],
)
def test_what_is_not_there_is_named(reference, says):
    with pytest.raises(InvalidInputError, match=f"train_fn is {reference!r}.*{says}"):
        check(reference)
    with pytest.raises(InvalidInputError, match=f"exporter is {reference!r}"):
        check("team_pkg.loops:coming", exporter=reference)


def test_code_that_travels_with_the_job_is_left_to_the_driver():
    check("team_pkg.loops:tarin", runtime_env={"working_dir": "s3://code/v2.zip"})
    check("team_pkg.loops:tarin", runtime_env={"py_modules": ["s3://code/v2.whl"]})
