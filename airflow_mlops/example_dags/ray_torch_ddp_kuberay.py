"""
### PyTorch with distributed data parallelism on GPUs, in a Ray cluster of its own inside Kubernetes

Every run gets a cluster: a head on demand, workers with one GPU each on spot nodes. A preempted worker has time for one
more checkpoint, a lost cluster is replaced, and both go on from the last checkpoint. `num_workers=(2, 4)` lets training
start with two GPUs and use four as soon as there are that many.

Needs KubeRay, an image with Ray and this package (`docker/training.Dockerfile`), a connection of type `kuberay`,
rights in the namespace (`docker/kubernetes/rbac.yaml`), and object storage that pods and Airflow reach; the pods get
their keys from the Secret `s3-credentials`.
"""

from __future__ import annotations

import datetime as dt

from airflow.sdk import DAG, Param

from airflow_mlops.operators.ray import RayTrainOperator

with DAG(
    dag_id="ray_torch_ddp_kuberay",
    description="PyTorch DDP on spot GPUs in an ephemeral Ray cluster.",
    doc_md=__doc__,
    schedule=None,
    start_date=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc),
    catchup=False,
    tags=["mlops", "ray", "kuberay", "gpu"],
    params={
        "image": Param("registry.example.com/training:ray2.60.0-cuda", type="string"),
        "storage_path": Param("s3://ml-runs/torch-ddp", type="string", description="Runs lie below it."),
        "data": Param("s3://ml-data/flights/train/", type="string", description="Parquet, read by every worker."),
        "epochs": Param(20, type="integer", minimum=1),
    },
) as dag:
    RayTrainOperator(
        task_id="train",
        mode="kuberay",
        k8s_conn_id="kubernetes_default",
        # What trains
        train_fn="airflow_mlops.examples.torch_loop:train_loop_per_worker",
        trainer="torch",
        config={
            "data": "{{ params.data }}",
            "features": ["dep_delay", "distance", "hour"],
            "label": "late",
            "hidden": 256,
            "batch": 8192,
            "epochs": "{{ params.epochs }}",
        },
        num_workers=(2, 4),
        storage_path="{{ params.storage_path }}",
        # Where it trains
        cluster={
            "namespace": "ml-training",
            "image": "{{ params.image }}",
            "ray_version": "2.60.0",
            "gpu": {"kind": "full", "count": 1},
            "spot": {"provider": "gke", "grace_seconds": 30},
            "autoscale": {"min_workers": 2, "max_workers": 4, "idle_timeout": 120},
            "head_resources": {"cpu": "2", "memory": "8Gi"},
            "worker_resources": {"cpu": "8", "memory": "32Gi"},
            "env_from": ["s3-credentials"],
            # DDP passes tensors between processes of a node through shared memory, of which a container has 64 MiB.
            "pod_template_overrides": {
                "worker": {
                    "spec": {
                        "containers": [
                            {"name": "ray-worker", "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}]}
                        ],
                        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}],
                    }
                }
            },
            # With InfiniBand or RoCE, by the device plugin's name of the resource:
            # "rdma": {
            #     "resources": {"rdma/hca_shared_devices_a": 1},
            #     "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
            # },
            "cost_tags": {"team": "ml-platform"},
        },
        # How long it may take, and what it may cost
        max_failures=3,
        max_restarts=3,
        startup_timeout=20 * 60,
        stall_timeout=60 * 60,
        total_timeout=12 * 60 * 60,
        budget={"max_cost": 200, "price_per_gpu_hour": 2.5},
        logs="tail",
        deferrable=True,
    )
