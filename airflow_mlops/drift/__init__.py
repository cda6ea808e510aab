"""Profiles of datasets, distances between two of them, and the verdicts on drift and on harm."""

from airflow_mlops.drift.compare import ColumnDrift, DriftPolicy, DriftReport, compare
from airflow_mlops.drift.harm import HarmPolicy, HarmReport, LossReference, assess_harm
from airflow_mlops.drift.profile import Profile

__all__ = [
    "ColumnDrift",
    "DriftPolicy",
    "DriftReport",
    "HarmPolicy",
    "HarmReport",
    "LossReference",
    "Profile",
    "assess_harm",
    "compare",
]
