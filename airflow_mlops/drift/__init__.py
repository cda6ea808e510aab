"""Profiles of datasets, distances between two of them, and the verdicts on drift and on harm."""

from airflow_mlops.drift.cache import profile_of
from airflow_mlops.drift.compare import ColumnDrift, DriftPolicy, DriftReport, compare
from airflow_mlops.drift.harm import HarmPolicy, HarmReport, LossReference, assess_harm
from airflow_mlops.drift.hysteresis import Decision, Hysteresis, severity
from airflow_mlops.drift.performance import CalibratedEstimate, MetricEstimate, PerformanceEstimate
from airflow_mlops.drift.profile import Profile
from airflow_mlops.drift.seasons import CalendarColumn, calendar_bound, same_season
from airflow_mlops.drift.sequential import LossTest, LossVerdict

__all__ = [
    "CalendarColumn",
    "CalibratedEstimate",
    "ColumnDrift",
    "Decision",
    "DriftPolicy",
    "DriftReport",
    "HarmPolicy",
    "HarmReport",
    "Hysteresis",
    "LossReference",
    "LossTest",
    "LossVerdict",
    "MetricEstimate",
    "PerformanceEstimate",
    "Profile",
    "assess_harm",
    "calendar_bound",
    "compare",
    "profile_of",
    "same_season",
    "severity",
]
