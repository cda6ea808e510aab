"""Where the evidence on a rollout's two arms comes from: the target itself, Prometheus, or prediction logs.

Every source gives cumulative counters by arm and replica and never a ratio, for only counts can be tested.
"""

from airflow_mlops.rollout.sources.config import source_of
from airflow_mlops.rollout.sources.prometheus import PrometheusSource
from airflow_mlops.rollout.sources.protocol import EvidenceSource, TargetCounters
from airflow_mlops.rollout.sources.query_sets import QUERY_SETS

__all__ = ["QUERY_SETS", "EvidenceSource", "PrometheusSource", "TargetCounters", "source_of"]
