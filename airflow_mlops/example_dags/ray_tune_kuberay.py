"""
### A hyper-parameter search with Ray Tune and Optuna, in a Ray cluster of its own inside Kubernetes

Forty trials, four at a time, each an XGBoost training of its own on two workers. The task returns the best trial as any
other training does: its metrics, checkpoint and MLflow model, and its `params`. A search whose cluster is lost goes on
in the next one: Optuna is told what has been found, unfinished trials continue at their last checkpoints.

Needs KubeRay, an image with Ray and this package (`docker/training.Dockerfile`), a connection of type `kuberay`, rights
in the namespace (`docker/kubernetes/rbac.yaml`), and object storage that pods and Airflow reach; the pods get their
keys from the Secret `s3-credentials`.
"""

from __future__ import annotations

import datetime as dt

from airflow.sdk import DAG, Param

from airflow_mlops.operators.ray import RayTrainOperator

with DAG(
    dag_id="ray_tune_kuberay",
    description="A search for hyper-parameters in an ephemeral, autoscaled Ray cluster.",
    doc_md=__doc__,
    schedule=None,
    start_date=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc),
    catchup=False,
    tags=["mlops", "ray", "kuberay", "tune"],
    params={
        "image": Param("registry.example.com/training:ray2.60.0-cpu", type="string"),
        "storage_path": Param("s3://ml-runs/tune", type="string", description="Runs lie below it."),
        "data": Param("s3://ml-data/flights/train/", type="string", description="Parquet, read by every worker."),
        "validation": Param("s3://ml-data/flights/validation/", type="string"),
    },
) as dag:
    RayTrainOperator(
        task_id="search",
        mode="kuberay",
        k8s_conn_id="kubernetes_default",
        train_fn="airflow_mlops.examples.xgboost_loop:train_loop_per_worker",
        trainer="tune",
        config={
            "trainer": "xgboost",
            "metric": "validation-logloss",
            "mode": "min",
            "num_samples": 40,
            "max_concurrent": 4,
            "seed": 7,
            # A dot leads into the loop's config: these are entries of its "params".
            "space": {
                "params.eta": {"type": "float", "low": 0.01, "high": 0.5, "log": True},
                "params.max_depth": {"type": "int", "low": 3, "high": 12},
                "params.subsample": {"type": "float", "low": 0.5, "high": 1.0},
                "params.grow_policy": ["depthwise", "lossguide"],
            },
            "config": {
                "data": "{{ params.data }}",
                "validation": "{{ params.validation }}",
                "features": ["dep_delay", "distance", "hour"],
                "label": "late",
                "rounds": 200,
                "checkpoint_every": 50,
            },
        },
        num_workers=2,
        resources_per_worker={"CPU": 1},
        storage_path="{{ params.storage_path }}",
        cluster={
            "namespace": "ml-training",
            "image": "{{ params.image }}",
            "ray_version": "2.60.0",
            "autoscale": {"min_workers": 2, "max_workers": 8, "idle_timeout": 60},
            # Each trial has a process of about 0.5 GiB on the head, which waits for its workers.
            "head_resources": {"cpu": "2", "memory": "8Gi"},
            "worker_resources": {"cpu": "2", "memory": "8Gi"},
            "env_from": ["s3-credentials"],
            "cost_tags": {"team": "ml-platform"},
        },
        max_restarts=3,
        startup_timeout=15 * 60,
        stall_timeout=60 * 60,
        total_timeout=12 * 60 * 60,
        logs="tail",
        deferrable=True,
    )
