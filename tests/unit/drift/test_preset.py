"""Evidently's preset as the verdict: its own numbers, on the columns that it can compare."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from airflow_mlops.drift import DriftPolicy, Profile, compare
from airflow_mlops.drift.preset import judge
from airflow_mlops.exceptions import DataError, InvalidInputError


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def frame(rng, rows=2_000, shift=0.0):
    return pd.DataFrame(
        {
            "x": rng.normal(shift, 1, rows),
            "y": rng.normal(0, 1, rows),
            "n": pd.array(rng.integers(0, 9, rows), dtype="Int64"),
            "c": rng.choice(list("abc"), rows),
        }
    )


def run(reference, current, policy=None, **options):
    profiles = Profile.of(reference), Profile.of(current)
    ours = compare(*profiles, policy)
    return judge(reference, current, profiles, ours, options), ours


def test_its_numbers_are_evidentlys_own(rng):
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    reference, current = frame(rng), frame(rng, shift=0.5)
    found, ours = run(reference, current)
    definition = DataDefinition(numerical_columns=["x", "y", "n"], categorical_columns=["c"])
    plain = [data.assign(n=data["n"].astype(float)) for data in (current, reference)]
    snapshot = Report([DataDriftPreset()], include_tests=True).run(
        *(Dataset.from_pandas(data, definition) for data in plain)
    )
    theirs = {m["config"]["column"]: m for m in snapshot.dict()["metrics"] if "column" in m["config"]}
    assert {c.name: c.distance for c in found.report.columns} == {name: m["value"] for name, m in theirs.items()}
    assert {c.name: c.method for c in found.report.columns} == {n: m["config"]["method"] for n, m in theirs.items()}
    assert found.report.drifted == ["x"] and (found.share, found.limit, found.drifted) == (0.25, 0.5, False)
    assert found.report.verdict == "stable", "a quarter of the columns is below its own limit"
    assert "0.250 < 0.500" in found.report.reasons[0]
    assert found.report.rows == ours.rows and type(found.report).from_json(found.report.to_json()) == found.report


def test_its_test_of_the_dataset_decides(rng):
    found, _ = run(frame(rng), frame(rng, shift=0.5), drift_share=0.2)
    assert (found.report.verdict, found.drifted, found.limit) == ("drift", True, 0.2)
    found, _ = run(frame(rng), frame(rng), drift_share="0.2")
    assert (found.report.verdict, found.drifted) == ("stable", False)


def test_small_samples_are_tested_by_p_values(rng):
    found, _ = run(frame(rng, 800), frame(rng, 800, shift=0.5))
    x = found.report.columns[0]
    assert (x.name, x.status, x.method) == ("x", "drift", "K-S p_value") and x.p_value == x.distance < 1e-6


def test_what_it_passes_over_in_silence_keeps_our_verdict(rng):
    current = frame(rng).assign(y=np.nan, when=pd.Timestamp("2013-01-01")).drop(columns="c")
    found, _ = run(frame(rng).assign(when=pd.Timestamp("2013-01-01")), current)
    status = {column.name: column.status for column in found.report.columns}
    assert status == {"c": "broken", "y": "broken", "x": "stable", "n": "stable", "when": "stable"}
    assert found.report.verdict == "drift" and not found.drifted, "broken data are never stable"
    assert set(found.report.breaks) == {"c", "y"}


def test_calendar_columns_do_not_count(rng):
    found, _ = run(frame(rng), frame(rng, shift=2), DriftPolicy(calendar_columns=("x",)), drift_share=0.1)
    assert not found.drifted and found.report.columns[0].status == "calendar"


def test_missing_values_infinities_and_missing_names_are_taken(rng):
    current = frame(rng)
    current.loc[:40, "x"] = np.inf
    current.loc[:40, "c"] = None
    found, _ = run(frame(rng), current)
    assert found.report.verdict == "stable" and len(found.report.columns) == 4


def test_few_rows_are_not_enough_data(rng):
    found, _ = run(frame(rng), frame(rng, 100, shift=3), drift_share=0.1)
    assert (found.report.verdict, found.drifted) == ("not_enough_data", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drift_shar": 0.1}, "unexpected keyword"),
        ({"num_method": "nope"}, "No stattest found"),
        ({"drift_share": "x"}, "not a valid float"),
        ({"columns": ["x"]}, "leave it out"),
    ],
)
def test_options_it_does_not_take_are_refused(rng, options, message):
    with pytest.raises(InvalidInputError, match=message):
        run(frame(rng), frame(rng), **options)


def test_a_reference_without_the_columns_is_refused(rng):
    reference, current = frame(rng), frame(rng)
    profiles = Profile.of(reference), Profile.of(current)
    with pytest.raises(DataError, match=r"lack x.*point reference_uri at"):
        judge(reference.drop(columns="x"), current, profiles, compare(*profiles), {})
