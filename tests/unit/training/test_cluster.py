"""What a user may ask of a cluster, and what is refused before anything is created."""

from __future__ import annotations

import json
import re
import sys

import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.cluster import KubeCluster, check_storage, fitted, room, warnings
from airflow_mlops.training.overrides import merged
from airflow_mlops.training.parts import Autoscale, Gang, Gpu, Rdma, Spot
from airflow_mlops.training.spec import TrainingSpec

IMAGE = "rayproject/ray:2.60.0-py311-gpu"


def cluster(given=None, /, **values) -> KubeCluster:
    return KubeCluster.from_mapping({"image": IMAGE, **(given or {}), **values})


def spec(**values) -> TrainingSpec:
    given = {"train_fn": "pkg.mod:loop", "trainer": "torch", "storage_path": "s3://bucket/runs", "run_key": "r1"}
    return TrainingSpec(**{**given, **values})


def container(name="ray-worker", **fields):
    return {"spec": {"containers": [{"name": name, **fields}]}}


def groups(number):
    pod = {"spec": {"containers": [{"name": "c", "image": "i"}]}}
    group = {"minReplicas": 0, "maxReplicas": 1, "template": pod}
    return {"rayClusterSpec": {"workerGroupSpecs": [{"groupName": f"g{index}", **group} for index in range(number)]}}


RULES = {"deletionStrategy": {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED"}}]}}
KUEUE = {"scheduler": "kueue", "queue": "team"}


def test_parts_are_made_of_plain_values_and_templated_strings():
    made = cluster(
        gpu={"kind": "full", "count": "2"},
        gang={"scheduler": "volcano", "queue": "q"},
        spot={"provider": "eks", "grace_seconds": 100},
        autoscale={"min_workers": "1", "max_workers": "4"},
        rdma={"rdma/ib": "1", "host_network": True},
        ttl_after_finished="60",
        namespace=None,
    )
    assert (made.gpu, made.gang) == (Gpu(count=2), Gang("volcano", "q"))
    assert made.spot == Spot("eks", grace_seconds=100) and made.spot.drain == 90
    assert made.autoscale == Autoscale(1, 4)
    assert made.rdma == Rdma({"rdma/ib": 1}, host_network=True)
    assert (made.ttl_after_finished, made.namespace) == (60, None)


def test_round_trip_through_json():
    made = cluster(gpu={"kind": "mig", "profile": "1g.10gb"}, spot={"provider": "gke"})
    again = KubeCluster.from_mapping(json.loads(json.dumps(made.to_json())))
    assert again.to_json() == json.loads(json.dumps(made.to_json()))


def test_an_empty_text_of_a_template_is_none():
    texts = {"ray_version": "", "service_account": "", "auth_secret": "", "gpu": {"profile": "", "claim_template": ""}}
    made = cluster(gang={"scheduler": "volcano", "queue": "q", "priority": ""}, **texts)
    assert made.gpu.resource_name == "nvidia.com/gpu"


def test_false_leaves_a_part_out():
    assert cluster(spot=False, autoscale=False) == cluster()


@pytest.mark.parametrize(
    ("gpu", "resource"),
    [
        ({}, "nvidia.com/gpu"),
        ({"resource": "amd.com/gpu"}, "amd.com/gpu"),
        ({"kind": "mig", "profile": "1g.10gb"}, "nvidia.com/mig-1g.10gb"),
        ({"kind": "mig", "profile": "1g.10gb+me"}, "nvidia.com/mig-1g.10gb.me"),
        ({"kind": "mig", "profile": "1g.10gb.me"}, "nvidia.com/mig-1g.10gb.me"),
        ({"kind": "mig", "resource": "nvidia.com/mig-9g.999gb"}, "nvidia.com/mig-9g.999gb"),
        ({"kind": "shared"}, "nvidia.com/gpu.shared"),
        ({"kind": "shared", "resource": "nvidia.com/gpu"}, "nvidia.com/gpu"),
        ({"kind": "dra", "claim_template": "one-gpu"}, None),
    ],
)
def test_each_kind_of_gpu_asks_for_its_resource(gpu, resource):
    assert cluster(gpu=gpu).gpu.resource_name == resource


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image": ""}, "image is missing"),
        ({"image": "a b"}, "image is 'a b'"),
        ({"imgae": "x"}, "cluster has no field 'imgae'; did you mean 'image'?"),
        ({"foo": 1}, "cluster has unknown fields foo; expected image, ray_version"),
        ({"namespace": "Team_A"}, "namespace is 'Team_A'; expected a DNS label"),
        ({"submission_mode": "Bogus"}, "submission_mode is 'Bogus'; expected one of K8sJobMode, HTTPMode"),
        ({"submission_mode": "SidecarMode"}, "a lost head would look like an error of the training code"),
        ({"submission_mode": "InteractiveMode"}, "waits for a job that somebody else submits"),
        ({"image_pull_policy": "always"}, "expected one of Always, IfNotPresent, Never"),
        ({"submitter_backoff": -1}, "submitter_backoff is -1"),
        ({"ttl_after_finished": "soon"}, "ttl_after_finished is 'soon'"),
        ({"workers_per_pod": 0}, "workers_per_pod is 0"),
        ({"attempt_timeout": 60}, "cluster has attempt_timeout; give attempt_timeout to the operator"),
        ({"startup_timeout": None}, "cluster has startup_timeout; give startup_timeout to the operator"),
        # Values of another type than the field's
        (
            {"env": [{"name": "A", "value": "b"}]},
            'env is a list of name and value, as in a pod; expected a dict such as {"',
        ),
        ({7: "x"}, "cluster has unknown fields 7; expected image"),
        ({"entrypoint_resources": {7: 1}}, "entrypoint_resources has 7; expected cpu, gpu, resources"),
        ({"env": "A=b"}, "env is 'A=b'; expected a dict"),
        ({"env": {"A B": "c"}}, "env has 'A B'; expected names of letters, digits and '_'"),
        ({"runtime_env": {1: 2}}, "runtime_env has the field 1 (int); expected strings as names"),
        ({"affinity": {"a": [{"b": {2.5: 1}}]}}, "affinity has the field 2.5 (float); expected strings as names"),
        ({"runtime_env": ["torch"]}, "runtime_env is ['torch']; expected a dict"),
        ({"runtime_env": {"pip": {"torch"}}}, "runtime_env cannot be written into a manifest"),
        ({"runtime_env": {"env_vars": [1]}}, "runtime_env['env_vars'] is a list; expected a dict"),
        (
            {"runtime_env": {"env_vars": {"A": {"b": 1}}}},
            "runtime_env['env_vars']['A'] is a dict; expected a name and a",
        ),
        ({"ray_start_params": ["--block"]}, "ray_start_params is ['--block']; expected a dict"),
        ({"ray_start_params": {"head": {"labels": ["a"]}}}, "ray_start_params['head']['labels'] is a list"),
        ({"ray_version": 2.6}, "ray_version is 2.6 (float); expected a string such as '2.60.0'"),
        ({"submission_mode": ["HTTPMode"]}, "submission_mode is ['HTTPMode'] (list); expected a string"),
        ({"namespace": 7}, "namespace is 7; expected a DNS label"),
        ({"head_resources": [1]}, "head_resources is [1]; expected a dict"),
        ({"tolerations": {"key": "gpu"}}, "tolerations is {'key': 'gpu'}; expected a list of dicts"),
        ({"tolerations": ["gpu"]}, "tolerations[0] is 'gpu'; expected a dict"),
        ({"affinity": []}, "affinity is []; expected a dict"),
        ({"affinity": {"nodeAffinity": {1, 2}}}, "affinity cannot be written into a manifest"),
        ({"annotations": ["a=b"]}, "annotations is ['a=b']; expected a dict"),
        ({"annotations": {"a": {}}}, "annotations['a'] is a dict; expected a name and a plain value"),
        ({"labels": ["team"]}, "labels is ['team']; expected a dict"),
        (
            {"cost_tags": [{"name": "team", "value": "a"}]},
            "cost_tags is [{'name': 'team', 'value': 'a'}]; expected a dict",
        ),
        ({"node_selector": "pool=gpu"}, "node_selector is 'pool=gpu'; expected a dict"),
        ({"service_account": ["a"]}, "service_account is ['a']; expected the name of a ServiceAccount"),
        ({"auth_secret": {"name": "a"}}, "auth_secret is {'name': 'a'}; expected the name of a Secret"),
        ({"image_pull_secrets": [{"name": "a"}]}, "image_pull_secrets has {'name': 'a'}; expected names of Kubernetes"),
        ({"image_pull_secrets": "a"}, "image_pull_secrets is 'a'; expected a list of names"),
        ({"entrypoint_resources": [1]}, "entrypoint_resources is [1]; expected a dict"),
        ({"entrypoint_resources": {"cpu": "one"}}, "entrypoint_resources['cpu'] is 'one'; expected a number"),
        ({"job_overrides": ["suspend"]}, "job_overrides is ['suspend']; expected a dict"),
        ({"job_overrides": {"deletionStrategy": [1]}}, "job_overrides['deletionStrategy'] is [1]; expected a dict"),
        ({"job_overrides": {"rayClusterSpec": None}}, "job_overrides['rayClusterSpec'] is None; expected a dict"),
        ({"job_overrides": {"rayClusterSpec": {"headGroupSpec": [1]}}}, "headGroupSpec is [1]; expected a dict"),
        (
            {"job_overrides": {"rayClusterSpec": {"headGroupSpec": {"template": None}}}},
            "template is None; expected a dict",
        ),
        ({"job_overrides": {"rayClusterSpec": {"workerGroupSpecs": {"groupName": "g"}}}}, "expected a list of dicts"),
        (
            {"job_overrides": {"rayClusterSpec": {"workerGroupSpecs": None}}},
            "workerGroupSpecs is None; expected a list",
        ),
        ({"pod_template_overrides": [1]}, "pod_template_overrides is [1]; expected a dict"),
        ({"pod_template_overrides": {"head": {"metadata": []}}}, "metadata is a list; expected a dict"),
        ({"pod_template_overrides": {"head": {"metadata": {"labels": ["a"]}}}}, "labels is ['a']; expected a dict"),
        (
            {"pod_template_overrides": {"worker": {"spec": {"volumes": {"a": 1}}}}},
            "spec.volumes is a dict; expected a list",
        ),
        (
            {"pod_template_overrides": {"worker": {"spec": {"containers": [None]}}}},
            "containers[0] is None; expected a dict",
        ),
        ({"pod_template_overrides": {"worker": container(env={"A": "b"})}}, "env is a dict; expected a list of dicts"),
        ({"gpu": {"resource": 5}}, "gpu.resource is 5 (int); expected a string such as 'nvidia.com/gpu'"),
        ({"gpu": {"count": 1.5}}, "gpu.count is 1.5; expected a whole number"),
        ({"gpu": {"kind": "dra", "claim_template": {"name": "x"}}}, "gpu.claim_template is {'name': 'x'} (dict)"),
        ({"gang": {"scheduler": ["volcano"], "queue": "q"}}, "gang.scheduler is ['volcano'] (list); expected a string"),
        ({"gang": {"scheduler": "volcano", "queue": 5}}, "gang.queue is 5; expected the name"),
        ({"gang": {"scheduler": "volcano", "queue": "q", "priority": 5}}, "gang.priority is 5; expected the name"),
        ({"spot": {"selector": [{"pool": "spot"}]}}, "spot.selector is [{'pool': 'spot'}]; expected a dict"),
        ({"spot": {"provider": ["gke"]}}, "spot.provider is ['gke']; expected one of"),
        (
            {"spot": {"provider": "gke", "tolerations": {"key": "a"}}},
            "spot.tolerations is {'key': 'a'}; expected a list",
        ),
        ({"spot": {"provider": "gke", "grace_seconds": 20.5}}, "spot.grace_seconds is 20.5; expected a whole number"),
        (
            {"autoscale": {"min_workers": 1, "max_workers": None}},
            "autoscale.max_workers is None; expected a whole number",
        ),
        ({"rdma": {"resources": ["rdma/ib"]}}, "rdma.resources is ['rdma/ib']; expected a dict"),
        ({"rdma": {"host_network": "yes"}}, "rdma.host_network is 'yes'; expected True or False"),
        ({"rdma": {"rdma/ib": 1, "annotations": ["a"]}}, "rdma.annotations is ['a']; expected a dict"),
        ({"suspend": "yes"}, "suspend is 'yes'; expected True or False"),
        # GPUs
        ({"gpu": {"kind": "half"}}, "gpu.kind is 'half'; expected one of full, mig, shared, dra"),
        ({"gpu": {"count": 0}}, "gpu.count is 0"),
        ({"gpu": {"cont": 1}}, "gpu has no field 'cont'; did you mean 'count'?"),
        ({"gpu": "full"}, "gpu is 'full'; expected a dict"),
        ({"gpu": {"kind": "mig"}}, "gpu.profile is None; expected a MIG profile"),
        (
            {"gpu": {"kind": "mig", "profile": "9g.999gb"}},
            "gpu.profile is '9g.999gb'; expected a MIG profile (A30: 1g.",
        ),
        ({"gpu": {"kind": "mig", "profile": "1g.10gb", "count": 2}}, "a process can use one such device only"),
        ({"gpu": {"kind": "shared", "count": 2}}, "a process can use one such device only"),
        ({"gpu": {"profile": "1g.10gb"}}, "gpu.profile is for kind 'mig', not for 'full'"),
        ({"gpu": {"claim_template": "x"}}, "gpu.claim_template is for kind 'dra'"),
        ({"gpu": {"kind": "dra"}}, "gpu of kind 'dra' needs claim_template"),
        ({"gpu": {"resource": "gpu"}}, "gpu.resource is 'gpu'; expected a name such as nvidia.com/gpu"),
        ({"gpu": {}, "worker_resources": {"nvidia.com/gpu": 1}}, "which gpu asks for already"),
        # Gang
        ({"gang": {"scheduler": "scheduler-plugins", "queue": "q"}}, "accepts RayClusters only"),
        ({"gang": {"scheduler": "coscheduling", "queue": "q"}}, "cannot run a RayJob"),
        ({"gang": {"scheduler": "slurm", "queue": "q"}}, "expected one of volcano, yunikorn, kueue, kai"),
        ({"gang": {"scheduler": "volcano"}}, "gang is incomplete"),
        ({"gang": {"scheduler": "volcano", "queue": ""}}, "gang.queue is ''"),
        ({"gang": {"scheduler": "volcano", "queue": "a b"}}, "gang.queue is 'a b'"),
        ({"gang": {"scheduler": "kai", "queue": "q"}}, "'kai' rejects submission_mode 'K8sJobMode'; set 'HTTPMode'"),
        ({"gang": KUEUE, "job_overrides": RULES}, "Kueue cannot run a RayJob with deletionStrategy.deletionRules"),
        ({"gang": KUEUE, "job_overrides": groups(17)}, "18 worker groups; Kueue takes at most 17"),
        ({"suspend": True, "job_overrides": RULES}, "suspend needs shutdownAfterJobFinishes"),
        # Spot
        ({"spot": True}, "spot needs a provider (gke, eks, karpenter, aks) or the selector"),
        ({"spot": {"provider": "ibm"}}, "spot.provider is 'ibm'"),
        ({"spot": {"provider": "gke", "grace_seconds": 60}}, "gke takes a node 30 s after the notice"),
        ({"spot": {"provider": "gke", "grace_seconds": 10}}, "spot.grace_seconds is 10"),
        ({"spot": {"provider": "gke", "drain_seconds": 30}}, "expected less than grace_seconds (30)"),
        ({"spot": {"provider": "gke", "drain_seconds": 0}}, "spot.drain_seconds is 0"),
        ({"spot": {"selector": {"a": "b c"}}}, "spot.selector['a'] is 'b c'"),
        ({"spot": {"provider": "gke"}, "entrypoint_resources": {"cpu": 1}}, "let the driver leave the head"),
        # Autoscaling
        ({"autoscale": {"min_workers": 3, "max_workers": 2}}, "autoscale.max_workers is 2"),
        ({"autoscale": {"min_workers": 1}}, "autoscale is incomplete"),
        ({"autoscale": {"min_workers": 0, "max_workers": 0}}, "autoscale.max_workers is 0"),
        # RDMA
        ({"rdma": {}}, "rdma is empty"),
        ({"rdma": {"rdma/ib": 0}}, "rdma['rdma/ib'] is 0; expected"),
        ({"rdma": {"hostnetwork": True}}, "rdma has no field 'hostnetwork'; did you mean 'host_network'?"),
        # Resources, labels
        ({"head_resources": {"cpu": "two"}}, "head_resources['cpu'] is 'two'; expected a quantity"),
        ({"worker_resources": {"limits": {"cpu": 1}}}, "both requests and limits"),
        ({"worker_resources": {"memroy": "1Gi"}}, "did you mean 'memory'?"),
        ({"entrypoint_resources": {"gpus": 1}}, "did you mean 'gpu'?"),
        ({"cost_tags": {"team": "a b"}}, "cost_tags['team'] is 'a b'; expected a Kubernetes label value"),
        ({"cost_tags": {"team": "x" * 64}}, "of at most 63"),
        ({"cost_tags": {"-team": "x"}}, "cost_tags has the key '-team'"),
        ({"labels": {"mlops.airflow.org/run": "x"}}, "this package's own"),
        # Secrets
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x1"}}, "env has AWS_SECRET_ACCESS_KEY in plain text"),
        ({"env": {"DB_PASSWORD": "x"}}, "name that in env_from"),
        ({"env": {"HF_TOKEN": "x"}}, "env has HF_TOKEN"),
        ({"env": {"WANDB_API_KEY": "x"}}, "env has WANDB_API_KEY"),
        ({"env": {"ENDPOINT": "https://me:pass@host/"}}, "env has ENDPOINT in plain text"),
        ({"env": {"THING": "AKIAABCDEFGHIJKLMNOP"}}, "env has THING in plain text"),
        ({"runtime_env": {"env_vars": {"MLFLOW_TRACKING_PASSWORD": "x"}}}, "runtime_env has MLFLOW_TRACKING_PASSWORD"),
        (
            {"pod_template_overrides": {"worker": container(env=[{"name": "API_TOKEN", "value": "x"}])}},
            "containers[0].env has API_TOKEN in plain text",
        ),
        ({"ray_start_params": {"head": {"redis-password": "x"}}}, "redis-password in plain text"),
        ({"env": {"A": None}}, "env['A'] is a NoneType"),
        ({"env_from": "secret"}, "env_from is 'secret'; expected a list"),
        ({"env_from": ["a b"]}, "env_from has 'a b'; expected names of Kubernetes Secrets"),
        # Overrides
        ({"pod_template_overrides": {"workers": {}}}, "expected one of head, worker, submitter"),
        ({"pod_template_overrides": {"head": {"containers": []}}}, "put them below 'spec'"),
        ({"pod_template_overrides": {"head": {"sepc": {}}}}, "unknown fields sepc; expected 'metadata' and 'spec'"),
        (
            {"pod_template_overrides": {"worker": {"spec": {"nodeSelecter": {}}}}},
            "pod_template_overrides['worker'].spec has no field 'nodeSelecter'; did you mean 'nodeSelector'?",
        ),
        ({"pod_template_overrides": {"worker": {"metadata": {"label": {}}}}}, "did you mean 'labels'?"),
        ({"pod_template_overrides": {"worker": container(imagePullPolcy="Always")}}, "did you mean 'imagePullPolicy'?"),
        ({"pod_template_overrides": {"worker": container("ray-wroker")}}, "Ray's container is called 'ray-worker'"),
        ({"pod_template_overrides": {"worker": {"spec": {"containers": [{"image": "x"}]}}}}, "has no name"),
        ({"pod_template_overrides": {"worker": {"spec": []}}}, "spec is a list; expected a dict"),
        (
            {"pod_template_overrides": {"head": {"metadata": {"labels": {"mlops.airflow.org/run": "x"}}}}},
            "this package's own",
        ),
        (
            {"submission_mode": "HTTPMode", "pod_template_overrides": {"submitter": {}}},
            "pod_template_overrides['submitter'] needs submission_mode 'K8sJobMode'",
        ),
        ({"job_overrides": {"backoffLimit": 3}}, "must leave backoffLimit alone"),
        ({"job_overrides": {"clusterSelector": {}}}, "must leave clusterSelector alone"),
        ({"job_overrides": {"deletionStrateg": {}}}, "did you mean 'deletionStrategy'?"),
        ({"job_overrides": {"rayClusterSpec": {"rayVerson": "2"}}}, "did you mean 'rayVersion'?"),
        ({"job_overrides": {"rayClusterSpec": {"workerGroupSpecs": [{}]}}}, "workerGroupSpecs[0] has no groupName"),
    ],
)
def test_bad_input_is_named_with_what_was_expected(values, words):
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        cluster(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gpu": {"kind": "full"}}, "gpu is {'kind': 'full'}; expected Gpu(...), or give the whole cluster as a dict"),
        ({"spot": True}, "spot is True; expected Spot(...)"),
        ({"autoscale": Autoscale("1", "4")}, "autoscale.min_workers is '1'; expected a whole number"),  # type: ignore[arg-type]
        ({"workers_per_pod": "2"}, "workers_per_pod is '2'; expected a whole number"),
        ({"tolerations": None}, "tolerations is None; expected a list of dicts"),
    ],
)
def test_a_cluster_that_was_made_by_hand_is_checked_too(values, words):
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        KubeCluster(IMAGE, **values).validate()


def test_an_error_about_a_secret_does_not_show_it():
    with pytest.raises(InvalidInputError) as caught:
        cluster(env={"DB_PASSWORD": "hunter2"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "env",
    [
        {"GOOGLE_APPLICATION_CREDENTIALS": "/var/run/secret/key.json"},
        {"TOKENIZERS_PARALLELISM": "false"},
        {"MAX_TOKENS": "4096"},
        {"USE_TOKEN": "true"},
        {"NCCL_DEBUG": "INFO", "KEYBOARD": "x", "S3_ENDPOINT": "http://minio:9000/bucket@v1"},
        {"RATE": 0.5, "STEPS": 3, "FLAG": True},
    ],
)
def test_harmless_environment_passes(env):
    assert cluster(env=env).env == env


def test_fields_of_a_newer_kubernetes_are_left_to_the_api_server():
    assert cluster(pod_template_overrides={"head": {"spec": {"quantumEntanglement": True}}})


@pytest.mark.parametrize(
    ("what", "cluster_values", "words"),
    [
        ({"num_workers": 0}, {}, "num_workers is 0"),
        ({"num_workers": (3, 2)}, {}, "num_workers is (3, 2)"),
        ({"use_gpu": True}, {}, "gpu is None; say which"),
        ({"resources_per_worker": {"GPU": 1}}, {}, "gpu is None"),
        ({"resources_per_worker": {"GPU": 2}}, {"gpu": {}}, "has 2 GPUs and gpu.count is 1; make them equal"),
        ({"resources_per_worker": {"GPU": 1}}, {"gpu": {"count": 2}}, "has 1 GPUs and gpu.count is 2"),
        ({"num_workers": 3}, {"workers_per_pod": 2}, "expected multiples of workers_per_pod (2)"),
        ({"num_workers": (2, 3)}, {"workers_per_pod": 2}, "num_workers is (2, 3); expected multiples"),
        ({"resources_per_worker": {"CPU": 3}}, {}, "CPU 3 do not fit into a pod with cpu 2"),
        ({"resources_per_worker": {"CPU": 2}, "num_workers": 2}, {"workers_per_pod": 2}, "2 worker(s) with CPU 2"),
        ({"resources_per_worker": {"memory": 2**34}}, {}, "do not fit into a pod with memory 8Gi"),
        ({"resources_per_worker": {"TPU": 1}}, {}, "'TPU', which no pod offers"),
        ({"num_workers": 5}, {"autoscale": {"min_workers": 1, "max_workers": 4}}, "must be room for 5 workers"),
        ({"num_workers": 2}, {"autoscale": {"min_workers": 3, "max_workers": 4}}, "must be room for 2 workers"),
        (
            {"num_workers": 4},
            {"autoscale": {"min_workers": 2, "max_workers": 4}, "gang": {"scheduler": "yunikorn", "queue": "q"}},
            "counts autoscale.min_workers (2) of 4 workers",
        ),
        ({"max_failures": 0}, {"spot": {"provider": "gke"}}, "the first one would end the training: give at least 1"),
        ({"ray_version": "2.59.0"}, {}, "the driver's Ray is 2.59.0"),
    ],
)
def test_what_no_pod_can_give_is_refused(what, cluster_values, words):
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        fitted(spec(**what), cluster(**cluster_values))


def test_the_driver_asks_for_the_gpus_and_joins_the_cluster():
    made = fitted(spec(num_workers=2), cluster(gpu={"count": 2}, spot={"provider": "gke"}))
    assert made.use_gpu and made.resources_per_worker == {"GPU": 2, "CPU": 1}
    assert (made.ray_address, made.preemptible, made.ray_version) == ("auto", True, "2.60.0")
    assert fitted(made, cluster(gpu={"count": 2}, spot={"provider": "gke"})) == made
    assert fitted(spec(resources_per_worker={"CPU": 1}), cluster(worker_resources={"cpu": "500m"}))  # Ray rounds up
    custom = cluster(ray_start_params={"worker": {"resources": '"{\\"TPU\\": 1}"'}})
    assert fitted(spec(resources_per_worker={"TPU": 1, "accelerator_type:H100": 0.001}), custom)


def test_a_pickled_function_needs_the_same_python():
    own, pickled = f"py3{sys.version_info.minor}", spec(train_fn="pickle:s3://b/f")
    for tag in (f"2.60.0-{own}-gpu", f"2.60.0-{own}", "2.60.0"):
        assert fitted(pickled, cluster(image=f"rayproject/ray:{tag}"))
    other = cluster(image="rayproject/ray:2.60.0-py39-gpu")
    assert fitted(spec(), other)
    with pytest.raises(InvalidInputError, match="use an image with the same Python"):
        fitted(pickled, other)


def test_a_search_has_room_for_its_concurrent_trials():
    search = {"space": {"lr": [0.1, 0.2]}, "metric": "loss", "trainer": "torch", "max_concurrent": 3}
    assert room(spec(trainer="tune", config=search, num_workers=2)) == (2, 6)
    assert room(spec(num_workers=(1, 4))) == (1, 4)


@pytest.mark.parametrize("path", ["", "/runs", "file:///runs", "memory://runs", "local://runs", "runs"])
def test_storage_must_be_shared(path):
    with pytest.raises(InvalidInputError, match="storage_path is"):
        check_storage(spec(storage_path=path), cluster())


def test_a_shared_volume_is_shared_storage():
    mount = {"volumeMounts": [{"name": "runs", "mountPath": "/mnt/runs"}]}
    both = {"head": container("ray-head", **mount), "worker": container(**mount)}
    check_storage(spec(storage_path="/mnt/runs/team"), cluster(pod_template_overrides=both))
    check_storage(spec(storage_path="file:///mnt/runs"), cluster(pod_template_overrides=both))
    for wrong, overrides in (("/mnt/runs2", both), ("/mnt/runs", {"head": both["head"]})):
        with pytest.raises(InvalidInputError, match="local to one machine"):
            check_storage(spec(storage_path=wrong), cluster(pod_template_overrides=overrides))


@pytest.mark.parametrize("path", ["s3://b/a b", "s3://b/$HOME", "s3://b/a&b", "s3://b/a'b", "s3://k:s@b/runs"])
def test_storage_must_survive_a_shell_and_hold_no_secret(path):
    with pytest.raises(InvalidInputError):
        check_storage(spec(storage_path=path), cluster())


def test_warnings_name_what_may_surprise():
    mig = cluster(gpu={"kind": "mig", "profile": "1g.10gb"})
    assert warnings(spec(), mig) == []
    assert "NVLink" in warnings(spec(num_workers=2), mig)[0]
    claims = cluster(gpu={"kind": "dra", "claim_template": "t"}, gang={"scheduler": "volcano", "queue": "q"})
    assert "DRA" in warnings(spec(), claims)[0]
    assert "same ports" in warnings(spec(), cluster(rdma={"host_network": True}))[0]
    assert "stopped jobs" in warnings(spec(), cluster(job_overrides=RULES))[0]


def test_merging_is_by_name_and_leaves_its_inputs_alone():
    base = {
        "containers": [{"name": "a", "env": [{"name": "X", "value": "1"}], "args": ["1", "2"]}],
        "tolerations": [{"key": "one"}],
        "nodeSelector": {"a": "1"},
        "hostNetwork": True,
    }
    patch = {
        "containers": [
            {"name": "a", "env": [{"name": "Y", "value": "2"}, {"name": "X", "value": "3"}], "args": ["9"]},
            {"name": "b", "image": "i", "tty": None},
        ],
        "tolerations": [{"key": "two"}, {"key": "one"}],
        "nodeSelector": {"b": "2"},
        "hostNetwork": None,
    }
    before = json.dumps([base, patch])
    assert merged(base, patch) == {
        "containers": [
            {"name": "a", "env": [{"name": "X", "value": "3"}, {"name": "Y", "value": "2"}], "args": ["9"]},
            {"name": "b", "image": "i"},
        ],
        "tolerations": [{"key": "one"}, {"key": "two"}],
        "nodeSelector": {"a": "1", "b": "2"},
    }
    assert json.dumps([base, patch]) == before
