"""Rollouts: the evidence on two arms, the judge, the traffic targets.

Nothing here imports Airflow; :class:`Judge` is plain Python and runs in a notebook, a worker or a triggerer.
"""

from airflow_mlops.rollout.judge import Judge, Verdict
from airflow_mlops.rollout.observation import Observation
from airflow_mlops.rollout.policy import Guardrail, RolloutPolicy, Step

__all__ = ["Guardrail", "Judge", "Observation", "RolloutPolicy", "Step", "Verdict"]
