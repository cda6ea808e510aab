"""Every rendered RayJob against KubeRay's schema, and what must be in it for the attempt to survive."""

from __future__ import annotations

import copy
import itertools
import json
import re
from typing import Any

import pytest
from support.crd import CrdSchemas, crd_dir, label_errors

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.training.checks import check_ray_version
from airflow_mlops.training.cluster import CLUSTER_FIELDS, JOB_FIELDS, OWN_JOB_FIELDS, KubeCluster
from airflow_mlops.training.manifest import Owner, label_value, render_rayjob, run_label, run_selector
from airflow_mlops.training.overrides import CONTAINER_FIELDS, METADATA_FIELDS, POD_FIELDS
from airflow_mlops.training.spec import TrainingSpec, submission_id_of

SPEC = TrainingSpec("pkg.mod:loop", "torch", "s3://bucket/runs", "train-0123456789ab", num_workers=4)
OWNER = Owner("flights", "group.train", "scheduled__2026-01-01T00:00:00+00:00", map_index=3, try_number=2)
URI = "s3://bucket/runs/train-0123456789ab/_mlops/spec-a1.json"

GPUS: tuple[Any, ...] = (
    None,
    {"kind": "full", "count": 2},
    {"kind": "mig", "profile": "1g.10gb"},
    {"kind": "mig", "profile": "1g.10gb+me"},
    {"kind": "shared"},
    {"kind": "dra", "claim_template": "one-gpu"},
)
GANGS: tuple[Any, ...] = (
    None,
    {"scheduler": "volcano", "queue": "team", "priority": "high"},
    {"scheduler": "yunikorn", "queue": "root.team", "priority": "high"},
    {"scheduler": "kueue", "queue": "team", "priority": "high"},
    {"scheduler": "kai", "queue": "team", "priority": "high"},
)
SPOTS = (None, {"provider": "gke"}, {"selector": {"pool": "spot"}, "tolerations": [{"operator": "Exists"}]})
SCALES = (None, {"min_workers": 4, "max_workers": 8})
MODES = ("K8sJobMode", "HTTPMode")
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {
        "namespace": "team",
        "head_resources": {"cpu": 1.5, "memory": "4Gi", "ephemeral-storage": "10G"},
        "env": {"A": 1, "B": True, "C": "x"},
        "env_from": ["s3", "mlflow"],
        "service_account": "trainer",
        "image_pull_secrets": ["registry"],
        "image_pull_policy": "IfNotPresent",
        "node_selector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "rdma": {"rdma/ib": 1, "host_network": True, "annotations": {"k8s.v1.cni.cncf.io/networks": "ib"}},
        "cost_tags": {"team": "fraud"},
        "labels": {"app": "training"},
        "annotations": {"example.org/note": "x"},
        "auth_secret": "ray-token",
        "runtime_env": {"pip": ["x"], "env_vars": {"A": "b"}},
        "ray_start_params": {"head": {"block": "true"}, "worker": {"num-cpus": 1}},
        "pod_template_overrides": {
            "head": {"metadata": {"annotations": {"a": "b"}}, "spec": {"nodeSelector": {"pool": "cpu"}}},
            "worker": {
                "spec": {
                    "containers": [
                        {
                            "name": "ray-worker",
                            "env": [{"name": "A", "value": "2"}],
                            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                        },
                        {"name": "sidecar", "image": "busybox"},
                    ],
                    "volumes": [{"name": "data", "emptyDir": {}}],
                    "tolerations": [{"key": "more", "operator": "Exists"}],
                }
            },
        },
        "job_overrides": {
            "managedBy": "ray.io/kuberay-operator",
            "rayClusterSpec": {"headServiceAnnotations": {"a": "b"}, "workerGroupSpecs": [{"groupName": "workers"}]},
        },
    },
)
GRID = [
    {"gpu": gpu, "gang": gang, "spot": spot, "autoscale": scale, "submission_mode": mode, **extra}
    for gpu, gang, spot, scale, mode, extra in itertools.product(GPUS, GANGS, SPOTS, SCALES, MODES, EXTRAS)
    if not (gang and gang["scheduler"] == "kai" and mode == "K8sJobMode")
]


def render(values=None, spec=SPEC, **arguments) -> dict[str, Any]:
    cluster = KubeCluster.from_mapping({"image": "rayproject/ray:2.60.0-py311-gpu", **(values or {})})
    given = {"name": "train-0123456789ab-a1", "owner": OWNER, "spec_uri": URI, **arguments}
    return render_rayjob(spec, cluster, **given)


def pods(job) -> dict[str, Any]:
    ray = job["spec"]["rayClusterSpec"]
    found = {"head": ray["headGroupSpec"]["template"], "worker": ray["workerGroupSpecs"][0]["template"]}
    if "submitterPodTemplate" in job["spec"]:
        found["submitter"] = job["spec"]["submitterPodTemplate"]
    return found


def worker_group(job) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def container(pod) -> dict[str, Any]:
    return pod["spec"]["containers"][0]


def env(pod) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(pod)["env"]}


@pytest.fixture(scope="module")
def schemas() -> CrdSchemas:
    directory = crd_dir()
    if directory is None:
        pytest.skip("needs the CRDs: set KUBE_CRD_DIR")
    return CrdSchemas(directory)


def test_every_rendered_manifest_passes_the_schema_in_strict_mode(schemas):
    assert len(GRID) > 600
    for values in GRID:
        job = render(values, deadline_seconds=3600)
        assert schemas.errors(job) == [], values
        for what, pod in pods(job).items():
            assert label_errors(pod["metadata"]["labels"]) == [], (what, values)
        assert json.loads(json.dumps(job)) == job, values


def test_every_attempt_is_named_labelled_and_left_to_the_operator():
    job = render(EXTRAS[1], deadline_seconds=50.2, startup_seconds=0.5)
    labels, annotations, spec = job["metadata"]["labels"], job["metadata"]["annotations"], job["spec"]
    assert job["metadata"]["namespace"] == "team"
    assert labels["mlops.airflow.org/run"] == run_label(SPEC) and labels["mlops.airflow.org/attempt"] == "1"
    assert labels["mlops.airflow.org/dag"] == "flights" and labels["mlops.airflow.org/task"] == "group.train"
    assert labels["mlops.airflow.org/map-index"] == "3"
    assert labels["mlops.airflow.org/dag-run"].startswith("scheduled__2026-01-01T00-00-00")
    assert (labels["team"], labels["app"]) == ("fraud", "training")
    assert annotations == {
        "example.org/note": "x",
        "mlops.airflow.org/owner": "flights/group.train/scheduled__2026-01-01T00:00:00+00:00/3",
        "mlops.airflow.org/owner-try": "2",
        "mlops.airflow.org/run-dir": SPEC.run_dir,
    }
    assert spec["jobId"] == job["metadata"]["name"]
    assert spec["backoffLimit"] == 0 and spec["submitterConfig"] == {"backoffLimit": 10}
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] == 300
    assert spec["activeDeadlineSeconds"] == 51 and spec["preRunningDeadlineSeconds"] == 1
    assert spec["entrypoint"] == f"exec python -m airflow_mlops.training --spec {URI}"
    assert spec["metadata"] == {
        "dag": "flights",
        "task": "group.train",
        "dag-run": labels["mlops.airflow.org/dag-run"],
        "map-index": "3",
        "team": "fraud",
        "run_key": SPEC.run_key,
        "attempt": "1",
    }
    for pod in pods(job).values():
        assert pod["metadata"]["labels"].items() >= {"team": "fraud", "mlops.airflow.org/run": run_label(SPEC)}.items()
        assert pod["spec"]["serviceAccountName"] == "trainer"
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        assert container(pod)["imagePullPolicy"] == "IfNotPresent"


def test_only_the_attempt_differs_between_attempts():
    first, second = (
        render(spec=SPEC.with_attempt(number), name=submission_id_of(SPEC.with_attempt(number))) for number in (1, 2)
    )
    text = json.dumps(first).replace("-a1", "-a2").replace('attempt": "1"', 'attempt": "2"')
    assert json.loads(text.replace("spec-a2", "spec-a1")) == second
    assert run_selector(SPEC, 2) == f"mlops.airflow.org/run={run_label(SPEC)},mlops.airflow.org/attempt=2"
    assert run_label(SPEC) != run_label(TrainingSpec("a.b:c", "torch", "s3://bucket/runs", "other"))


def test_deadlines_are_whole_seconds_and_only_there_if_given():
    spec = render()["spec"]
    assert not {"activeDeadlineSeconds", "preRunningDeadlineSeconds", "suspend", "managedBy"} & set(spec)
    spec = render(deadline_seconds=60.5, startup_seconds=0.5)["spec"]
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (61, 1)


@pytest.mark.parametrize("labels", [None, {}, {"app.kubernetes.io/managed-by": "me", "team": "ads", "own": "x"}])
def test_no_override_takes_away_the_labels_by_which_pods_are_found(labels):
    container = {"name": "ray-worker", "image": "i"}
    more = [
        {"groupName": "more", "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}}},
        {"groupName": "bare", "template": {"spec": {"containers": [container]}}},
    ]
    job = render(
        {
            "cost_tags": {"team": "fraud"},
            "labels": {"app": "training"},
            "pod_template_overrides": {
                role: {"metadata": {"labels": labels}} for role in ("head", "worker", "submitter")
            },
            "job_overrides": {"rayClusterSpec": {"workerGroupSpecs": more}},
        }
    )
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["workers", "more", "bare"]
    identity = {
        "app.kubernetes.io/managed-by": "airflow-mlops",
        "mlops.airflow.org/attempt": "1",
        "mlops.airflow.org/run": run_label(SPEC),
        **OWNER.labels,
    }
    for template in (*pods(job).values(), *(group["template"] for group in groups)):
        found = template["metadata"]["labels"]
        assert found.items() >= {**identity, "app": "training"}.items()
        assert found["team"] == ("ads" if "own" in found else "fraud")
    assert groups[1]["template"]["metadata"]["labels"].get("own") == (labels or {}).get("own")


def test_the_head_offers_no_cpus_and_runs_the_driver():
    job = render()
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == "2.60.0"
    assert not {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources"} & set(job["spec"])
    assert render(spec_uri="s3://b/a b")["spec"]["entrypoint"].endswith("--spec 's3://b/a b'")
    assert render(spec_uri=None, entrypoint="bash run.sh")["spec"]["entrypoint"] == "bash run.sh"
    away = render({"entrypoint_resources": {"cpu": 1, "gpu": 0.5, "resources": {"disk": 1}}})["spec"]
    assert (away["entrypointNumCpus"], away["entrypointNumGpus"]) == (1, 0.5)
    assert json.loads(away["entrypointResources"]) == {"disk": 1}


def test_the_driver_has_time_for_a_checkpoint_when_it_is_stopped():
    spec = TrainingSpec("a.b:c", "torch", "s3://b/r", "r", stop_timeout=40.5, resources_per_worker={"CPU": 2})
    job = render({"runtime_env": {"env_vars": {"X": "1", "PYTHONUNBUFFERED": "0"}}}, spec)
    runtime = json.loads(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert runtime == {"RAY_JOB_STOP_WAIT_TIME_S": "41", "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "0", "X": "1"}
    plain = render({"runtime_env": {"env_vars": {"N": 3, "ON": True}}})["spec"]["runtimeEnvYAML"]
    assert json.loads(plain)["env_vars"].items() >= {"N": "3", "ON": "true"}.items()
    assert json.loads(render({"runtime_env": {"env_vars": None}})["spec"]["runtimeEnvYAML"])["env_vars"]
    assert env(pods(job)["head"])["RAY_JOB_STOP_WAIT_TIME_S"] == "41"


@pytest.mark.parametrize(
    ("gpu", "limit", "number"),
    [
        ({"kind": "full", "count": 2}, {"nvidia.com/gpu": "2"}, "2"),
        ({"kind": "mig", "profile": "3g.40gb"}, {"nvidia.com/mig-3g.40gb": "1"}, "1"),
        ({"kind": "mig", "profile": "1g.10gb+me"}, {"nvidia.com/mig-1g.10gb.me": "1"}, "1"),
        ({"kind": "shared"}, {"nvidia.com/gpu.shared": "1"}, "1"),
        ({"kind": "dra", "claim_template": "one-gpu"}, {}, "1"),
    ],
)
def test_ray_is_told_of_gpus_that_kuberay_does_not_see(gpu, limit, number):
    job = render({"gpu": gpu})
    worker, head = pods(job)["worker"], pods(job)["head"]
    plain = {"cpu": "2", "memory": "8Gi"}
    assert worker_group(job)["rayStartParams"] == {"num-gpus": number}
    resources = container(worker)["resources"]
    assert resources["limits"] == resources["requests"] == {**plain, **limit}
    assert not any("nvidia" in name for name in container(head)["resources"]["limits"])
    claimed = gpu["kind"] == "dra"
    assert ("claims" in resources) == claimed == ("resourceClaims" in worker["spec"])
    if claimed:
        assert worker["spec"]["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "one-gpu"}]
        assert resources["claims"] == [{"name": "gpu"}]


def test_several_workers_can_share_a_pod():
    group = worker_group(render({"gpu": {"count": 2}, "workers_per_pod": 2, "worker_resources": {"cpu": 8}}))
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    assert group["rayStartParams"]["num-gpus"] == "4"
    assert container(group["template"])["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_a_range_of_workers_starts_with_what_there_is_room_for():
    elastic = TrainingSpec("a.b:c", "torch", "s3://b/r", "r", num_workers=(2, 4))
    group = worker_group(render(spec=elastic))
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 2, 4)
    gang = worker_group(render({"gang": GANGS[2]}, elastic))
    assert (gang["replicas"], gang["minReplicas"]) == (4, 4)


def test_autoscaling_is_version_two():
    job = render({"autoscale": {"min_workers": 1, "max_workers": 8, "idle_timeout": 30}})
    ray, group = job["spec"]["rayClusterSpec"], worker_group(job)
    assert ray["enableInTreeAutoscaling"] is True
    assert ray["autoscalerOptions"] == {"version": "v2", "idleTimeoutSeconds": 30}
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 1, 8)
    assert group["idleTimeoutSeconds"] == 30
    assert "idleTimeoutSeconds" not in worker_group(render())  # only the autoscaler's version 2 allows it


def test_autoscaling_counts_pods():
    scale = {"min_workers": 3, "max_workers": 9}
    group = worker_group(render({"autoscale": scale, "workers_per_pod": 2, "worker_resources": {"cpu": 2}}))
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 4)


def test_spot_workers_drain_and_the_head_stays_off_spot_nodes():
    job = render({"spot": {"provider": "gke"}, "node_selector": {"pool": "gpu"}, "tolerations": [{"key": "own"}]})
    worker = pods(job)["worker"]
    assert worker["spec"]["terminationGracePeriodSeconds"] == 30
    assert env(worker)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "20"
    assert worker["spec"]["nodeSelector"] == {"pool": "gpu", "cloud.google.com/gke-spot": "true"}
    assert [toleration["key"] for toleration in worker["spec"]["tolerations"]] == ["own", "cloud.google.com/gke-spot"]
    for role in ("head", "submitter"):
        pod = pods(job)[role]
        terms = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        expression = {"key": "cloud.google.com/gke-spot", "operator": "NotIn", "values": ["true"]}
        assert terms == {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
        assert not {"nodeSelector", "tolerations", "terminationGracePeriodSeconds"} & set(pod["spec"])
    assert "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" not in env(pods(job)["head"])
    assert "affinity" not in pods(render())["head"]["spec"]


@pytest.mark.parametrize(
    ("provider", "label", "tolerated"),
    [
        ("gke", {"cloud.google.com/gke-spot": "true"}, True),
        ("eks", {"eks.amazonaws.com/capacityType": "SPOT"}, False),
        ("karpenter", {"karpenter.sh/capacity-type": "spot"}, False),
        ("aks", {"kubernetes.azure.com/scalesetpriority": "spot"}, True),
    ],
)
def test_each_provider_marks_its_spot_nodes(provider, label, tolerated):
    worker = pods(render({"spot": {"provider": provider}}))["worker"]["spec"]
    assert worker["nodeSelector"] == label and ("tolerations" in worker) == tolerated


def test_each_scheduler_is_told_in_its_own_words():
    def labels(gang, **values):
        job = render({"gang": gang, **values}, deadline_seconds=60)
        ours = ("mlops.airflow.org/", "app.kubernetes.io/")
        return {key: value for key, value in job["metadata"]["labels"].items() if not key.startswith(ours)}, job

    _, volcano, yunikorn, kueue, kai = GANGS
    assert labels(volcano)[0] == {"volcano.sh/queue-name": "team", "ray.io/priority-class-name": "high"}
    assert labels(yunikorn)[0] == {
        "ray.io/gang-scheduling-enabled": "true",
        "yunikorn.apache.org/app-id": "train-0123456789ab-a1",
        "yunikorn.apache.org/queue": "root.team",
    }
    found, job = labels(kueue, autoscale={"min_workers": 1, "max_workers": 4})
    assert found == {
        "kueue.x-k8s.io/queue-name": "team",
        "kueue.x-k8s.io/priority-class": "high",
        "kueue.x-k8s.io/max-exec-time-seconds": "60",
    }
    assert job["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    assert "kueue.x-k8s.io/elastic-job" not in labels(kueue)[1]["metadata"]["annotations"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    found, job = labels(kai, submission_mode="HTTPMode")
    assert found == {"kai.scheduler/queue": "team"}
    assert {pod["spec"]["priorityClassName"] for pod in pods(job).values()} == {"high"}
    # A scheduler's name on the pods would look as if it acted, even where KubeRay does not know it.
    assert "schedulerName" not in json.dumps([labels(gang, submission_mode="HTTPMode")[1] for gang in GANGS[1:]])


def test_a_submitter_that_ends_is_not_started_by_the_kubelet():
    assert pods(render())["submitter"]["spec"]["restartPolicy"] == "Never"


def test_http_mode_has_no_submitter():
    spec = render({"submission_mode": "HTTPMode"})["spec"]
    assert not {"submitterPodTemplate", "submitterConfig"} & set(spec)


def test_rdma_is_passed_through():
    rdma = {"rdma/ib": 2, "host_network": True, "annotations": {"k8s.v1.cni.cncf.io/networks": "ib"}}
    job = render({"rdma": rdma})
    worker, head = pods(job)["worker"], pods(job)["head"]
    assert container(worker)["resources"]["limits"]["rdma/ib"] == "2"
    assert container(worker)["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert worker["spec"]["hostNetwork"] is True and worker["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert worker["metadata"]["annotations"] == {"k8s.v1.cni.cncf.io/networks": "ib"}
    assert "hostNetwork" not in head["spec"] and "rdma" not in json.dumps(head)


def test_secrets_come_from_secrets_and_plain_values_become_strings():
    job = render(EXTRAS[1])
    worker, head = pods(job)["worker"], pods(job)["head"]
    assert container(head)["envFrom"] == [{"secretRef": {"name": "s3"}}, {"secretRef": {"name": "mlflow"}}]
    assert (env(head)["A"], env(head)["B"], env(worker)["A"]) == ("1", "true", "2")
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}


def test_overrides_are_merged_into_ours():
    job = render(EXTRAS[1])
    worker, head = pods(job)["worker"], pods(job)["head"]
    assert [item["name"] for item in worker["spec"]["containers"]] == ["ray-worker", "sidecar"]
    assert container(worker)["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
    assert container(worker)["image"] == "rayproject/ray:2.60.0-py311-gpu"
    assert [toleration["key"] for toleration in worker["spec"]["tolerations"]] == ["gpu", "more"]
    assert head["spec"]["nodeSelector"] == {"pool": "cpu"} and head["metadata"]["annotations"] == {"a": "b"}
    ray = job["spec"]["rayClusterSpec"]
    assert len(ray["workerGroupSpecs"]) == 1 and ray["headServiceAnnotations"] == {"a": "b"}


def test_deletion_rules_take_the_place_of_the_ttl(schemas):
    rules = [{"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 5}}]
    job = render({"job_overrides": {"deletionStrategy": {"deletionRules": rules}}})
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & set(job["spec"])
    assert schemas.errors(job) == []


def test_rendering_changes_nothing_of_what_it_is_given():
    cluster = KubeCluster.from_mapping({"image": "rayproject/ray:2.60.0", **copy.deepcopy(EXTRAS[1])})
    before = json.dumps(cluster.to_json())
    arguments = {"name": "a-a1", "owner": OWNER, "spec_uri": URI}
    first = render_rayjob(SPEC, cluster, **arguments)
    first["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["tolerations"].clear()
    container(pods(first)["worker"])["env"].clear()
    assert json.dumps(cluster.to_json()) == before
    assert worker_group(render_rayjob(SPEC, cluster, **arguments))["template"]["spec"]["tolerations"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "a" * 48}, "(48 characters); expected at most 47"),
        ({"name": "Train-a1"}, "expected at most 47 lower-case"),
        ({"name": "1-a1"}, "a letter first"),
        ({"name": "a-"}, "expected at most 47"),
        ({"spec_uri": None}, "either spec_uri or entrypoint"),
        ({"entrypoint": "true"}, "either spec_uri or entrypoint"),
        ({"values": {"image": "team/trainer:1.2.3"}}, "does not say which Ray it has; give ray_version"),
        (
            {"values": {"ray_version": "2.59.0"}},
            "ray_version is 2.59.0, the image rayproject/ray:2.60.0-py311-gpu is 2.6",
        ),
        ({"spec": TrainingSpec("a.b:c", "torch", "/runs", "r")}, "local to one machine"),
        ({"spec": TrainingSpec("a.b:c", "torch", "", "r")}, "storage_path is missing"),
        ({"spec": TrainingSpec("a.b:c", "torch", "s3://b", "r", num_workers=0)}, "num_workers is 0"),
        ({"spec": TrainingSpec("a.b:c", "torch", "s3://b", "r", num_workers=(3, 2))}, "num_workers is (3, 2)"),
        ({"spec": TrainingSpec("a.b:c", "torch", "s3://b", "r", entrypoint="x")}, "entrypoint"),
    ],
)
def test_bad_input_is_refused(arguments, words):
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        render(**arguments)


@pytest.mark.parametrize(
    ("image", "given", "version"),
    [
        ("rayproject/ray:2.60.0", None, "2.60.0"),
        ("rayproject/ray-ml:2.60.0-py311-gpu", None, "2.60.0"),
        ("localhost:5000/ray:2.60.0", "2.60.0", "2.60.0"),
        ("rayproject/ray:2.60.0@sha256:abc", None, "2.60.0"),
        ("team/trainer:1.2.3-ray2.60.0", None, "2.60.0"),
        ("team/trainer:1.2.3", "2.60.0", "2.60.0"),
        ("team/xray:1.2.3", "2.60.0", "2.60.0"),
        ("localhost:5000/ray", "2.60.0", "2.60.0"),
        ("rayproject/ray:latest", "2.60.0", "2.60.0"),
        ("rayproject/ray:3.0.0.dev0", "2.60.0", "2.60.0"),
    ],
)
def test_the_ray_version_is_read_from_the_tag_only_where_it_says_it(image, given, version):
    assert check_ray_version(image, given) == version
    with pytest.raises(InvalidInputError, match=re.escape("the driver's Ray is 2.59.0; use one image for all")):
        check_ray_version(image, given, "2.59.0")


def test_a_version_must_look_like_one():
    with pytest.raises(InvalidInputError, match=re.escape("expected a Ray version such as 2.60.0")):
        check_ray_version("a:b", "latest")


@pytest.mark.parametrize(
    "text", ["plain", "a" * 200, "scheduled__2026-01-01T00:00:00+00:00", "ümlaut/x", "---", "::", "a."]
)
def test_any_text_becomes_a_label_value(text):
    value = label_value(text)
    assert label_errors({"x": value}) == [] and value
    assert (value == text) == (text == "plain")
    assert label_value(text + "x") != value


def test_the_known_fields_are_those_of_the_schema(schemas):
    """A field that is missing here could be taken for a misspelt one."""
    root = schemas.find("ray.io/v1", "RayJob").schema("v1")["properties"]["spec"]["properties"]
    ray = root["rayClusterSpec"]["properties"]
    template = ray["headGroupSpec"]["properties"]["template"]["properties"]
    pod = template["spec"]["properties"]
    assert set(root) == JOB_FIELDS | OWN_JOB_FIELDS
    assert set(ray) == CLUSTER_FIELDS
    assert set(template["metadata"]["properties"]) == METADATA_FIELDS
    assert set(pod) == POD_FIELDS
    assert set(pod["containers"]["items"]["properties"]) == CONTAINER_FIELDS


def test_a_misspelt_override_that_looks_like_nothing_known_is_left_to_strict_validation(schemas):
    job = render({"pod_template_overrides": {"worker": {"spec": {"bogus": 1}}}})
    assert schemas.errors(job) == ['unknown field "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.bogus"']
