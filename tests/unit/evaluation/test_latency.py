"""The fresh process's own numbers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np


def test_memory_is_that_of_the_fresh_process_and_not_of_the_one_that_started_it():
    ballast = np.ones(60_000_000)
    code = "from airflow_mlops.evaluation.latency import _peak_memory; print(_peak_memory())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(found.stdout) < ballast.nbytes / 2
