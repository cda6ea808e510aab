"""The feature repository of the flights example.

Sources are folders of monthly Parquet files below ``$MLOPS_ROOT``, written by
``airflow_mlops.examples.flights.features``. Their timestamp is ``known_at``, when a value could first be read; when
it happened (a landing, an observation) is older. No view has a TTL: Feast's online store compares it with today, and
the data are of 2013.
"""

from __future__ import annotations

import os
from datetime import timedelta

import pandas as pd
from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64
from feast.value_type import ValueType

from airflow_mlops.examples.flights import features

ROOT = os.environ["MLOPS_ROOT"]


def _entity(name: str, description: str) -> Entity:
    return Entity(name=name, join_keys=[name], value_type=ValueType.STRING, description=description)


# Feast finds what a module names, so each of these has a name of its own.
carrier = _entity("carrier", "two-character airline code")
origin = _entity("origin", "airport of departure: EWR, JFK or LGA")
dest = _entity("dest", "airport of arrival")
tailnum = _entity("tailnum", "tail number of the plane")
_BY_KEY = {entity.name: entity for entity in (carrier, origin, dest, tailnum)}


def _view(name: str, keys: tuple[str, ...], columns: tuple[str, ...], description: str) -> FeatureView:
    return FeatureView(
        name=name,
        entities=[_BY_KEY[key] for key in keys],
        ttl=timedelta(0),
        schema=[Field(name=column, dtype=Float64) for column in columns],
        source=FileSource(name=f"{name}_files", path=f"{ROOT}/features/{name}", timestamp_field="known_at"),
        description=description,
    )


carrier_delays, origin_delays, dest_delays, carrier_origin_delays = (
    _view(name, keys, features.delay_features(name), f"delays of landed flights by {' and '.join(keys)}")
    for name, keys in features.DELAY_VIEWS.items()
)
weather = _view("weather", ("origin",), features.WEATHER_FEATURES, "last published observation at the origin")
planes = _view("planes", ("tailnum",), features.PLANE_FEATURES, "registry of planes, one snapshot a month")

timetable = RequestSource(
    name="timetable", schema=[Field(name=field, dtype=Int64) for field in features.REQUEST_FIELDS]
)


@on_demand_feature_view(
    name="calendar",
    sources=[timetable],
    schema=[Field(name=name, dtype=Float64) for name in features.REQUEST_FEATURES],
    mode="pandas",
    description="what the timetable alone says, from the request",
)
def calendar(inputs: pd.DataFrame) -> pd.DataFrame:
    # Feast stores this function's source and runs it alone, so it brings its own import.
    from airflow_mlops.examples.flights.features import calendar

    return calendar(inputs)


flights_delay_v1 = FeatureService(
    name="flights_delay_v1",
    features=[carrier_delays, origin_delays, dest_delays, carrier_origin_delays, weather, planes, calendar],
    description="what the model flights_delay reads, two hours before the scheduled departure",
)
