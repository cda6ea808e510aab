from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest

from airflow_mlops.examples.flights import quality, source
from airflow_mlops.exceptions import DataError

MONTH = "2013-02"


def _change(root, change, kind="flights"):
    """Rewrite a landed table after ``change`` of its frame, keeping the schema."""
    uri = source.raw_uri(root, kind, MONTH)
    table = source.read_raw(root, kind, MONTH)
    frame = change(table.to_pandas())
    source.write_parquet(uri, pa.Table.from_pandas(frame, schema=table.schema, preserve_index=False))


@pytest.mark.parametrize("month", ["2013-01", "2013-02"])
def test_a_good_month_passes_every_check(landed, month):
    report = quality.check(landed, month)
    assert report["passed"] is True
    assert report["rows"] > 24_000
    assert all(check["ok"] is True and check["detail"] for check in report["checks"])
    assert {"days", "carrier", "origin", "duplicates", "missing", "times", "weather"} <= {
        c["name"] for c in report["checks"]
    }


def _assign(column, value, rows=slice(0, 50)):
    def change(frame):
        frame.iloc[rows, frame.columns.get_loc(column)] = value
        return frame

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f[f["sched_dep"] < pd.Timestamp("2013-02-15", tz="UTC")],
            r"days: .*missing or nearly empty: 2013-02-15",
        ),
        (lambda f: f[f["sched_dep"].dt.day != 9], r"days: 27 of 28 days complete.*2013-02-09"),
        (lambda f: f.iloc[::3], r"rows: 83\d\d rows, expected 15000 to 60000"),
        (_assign("carrier", "ZZ"), r"unknown carrier \['ZZ'\].*CARRIERS"),
        (_assign("origin", "BOS"), r"unknown origin \['BOS'\].*ORIGINS"),
        (lambda f: pd.concat([f, f.head(3)]), r"3 flights appear twice"),
        (
            _assign("arr_delay", float("nan"), slice(0, 12_000)),
            r"missing: too many missing values: \{'arr_delay': 0\.\d+\}",
        ),
        (_assign("carrier", None, slice(0, 1)), r"missing: .*'carrier'"),
        (_assign("distance", -5), r"distance range: -5 to .*50 outside"),
        (_assign("arr_delay", 99_999.0), r"arr_delay range: .*50 outside"),
        (_assign("arr_delay", float("nan"), slice(0, None)), r"arr_delay range: no values"),
        (
            _assign("known_at", pd.Timestamp("2013-01-01", tz="UTC")),
            r"times: 0 flights outside .*, 50 with an outcome known",
        ),
        (_assign("sched_dep", pd.Timestamp("2013-03-05", tz="UTC")), r"times: 50 flights outside"),
    ],
)
def test_what_breaks_the_contract_is_named(landed, change, message):
    _change(landed, change)
    with pytest.raises(DataError, match=message) as failure:
        quality.check(landed, MONTH)
    assert "land the month again" in str(failure.value)


def test_missing_weather(landed):
    _change(landed, lambda f: f[f["origin"] != "JFK"], kind="weather")
    with pytest.raises(DataError, match=r"weather: 66\.\d% of hours"):
        quality.check(landed, MONTH)


@pytest.mark.parametrize("what", ["type", "column"])
def test_schema_change(landed, what):
    table = source.read_raw(landed, "flights", MONTH)
    at = table.schema.get_field_index("distance")
    table = (
        table.set_column(at, "distance", table["distance"].cast(pa.string()))
        if what == "type"
        else table.remove_column(at)
    )
    source.write_parquet(source.raw_uri(landed, "flights", MONTH), table)
    with pytest.raises(DataError, match=r'flights schema: columns differ: \{"distance".*"expected": "int64"'):
        quality.check(landed, MONTH)


def test_not_landed_or_not_parquet(landed):
    with pytest.raises(DataError, match="not landed yet; land 2013-03 first"):
        quality.check(landed, "2013-03")
    with open(source.raw_uri(landed, "flights", MONTH), "wb") as file:
        file.write(b"half a file")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        quality.check(landed, MONTH)
