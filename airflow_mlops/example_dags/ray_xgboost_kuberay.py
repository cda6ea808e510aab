"""
### XGBoost on several machines, in a Ray cluster of its own inside Kubernetes

Four workers boost together, each on its share of the rows, and start together or not at all: the queue `team-a` of
Kueue admits the whole cluster, and while it does not the task waits as queued. The result is an MLflow model.

Needs KubeRay, Kueue with a LocalQueue, an image with Ray and this package (`docker/training.Dockerfile`), a connection
of type `kuberay`, rights in the namespace (`docker/kubernetes/rbac.yaml`), and object storage that pods and Airflow
reach; the pods get their keys from the Secret `s3-credentials`.
"""

from __future__ import annotations

import datetime as dt

from airflow.sdk import DAG, Param

from airflow_mlops.operators.ray import RayTrainOperator

with DAG(
    dag_id="ray_xgboost_kuberay",
    description="Distributed XGBoost in an ephemeral Ray cluster, admitted by a queue.",
    doc_md=__doc__,
    schedule=None,
    start_date=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc),
    catchup=False,
    tags=["mlops", "ray", "kuberay"],
    params={
        "image": Param("registry.example.com/training:ray2.60.0-cpu", type="string"),
        "storage_path": Param("s3://ml-runs/xgboost", type="string", description="Runs lie below it."),
        "data": Param("s3://ml-data/flights/train/", type="string", description="Parquet, read by every worker."),
        "validation": Param("s3://ml-data/flights/validation/", type="string"),
    },
) as dag:
    RayTrainOperator(
        task_id="train",
        mode="kuberay",
        k8s_conn_id="kubernetes_default",
        train_fn="airflow_mlops.examples.xgboost_loop:train_loop_per_worker",
        trainer="xgboost",
        config={
            "data": "{{ params.data }}",
            "validation": "{{ params.validation }}",
            "features": ["dep_delay", "distance", "hour"],
            "label": "late",
            "rounds": 300,
            "params": {"eta": 0.1, "max_depth": 8},
            "checkpoint_every": 25,
        },
        num_workers=4,
        resources_per_worker={"CPU": 3},
        storage_path="{{ params.storage_path }}",
        cluster={
            "namespace": "ml-training",
            "image": "{{ params.image }}",
            "ray_version": "2.60.0",
            "gang": {"scheduler": "kueue", "queue": "team-a"},
            "head_resources": {"cpu": "1", "memory": "4Gi"},
            "worker_resources": {"cpu": "4", "memory": "16Gi"},
            "env_from": ["s3-credentials"],
            "cost_tags": {"team": "ml-platform"},
        },
        max_restarts=3,
        startup_timeout=15 * 60,
        queue_timeout=6 * 60 * 60,
        attempt_timeout=2 * 60 * 60,
        total_timeout=12 * 60 * 60,
        logs="tail",
        deferrable=True,
    )
