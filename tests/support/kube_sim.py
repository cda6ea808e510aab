"""KubeRay for the stand-in API server: RayJobs get clusters, pods and submitters, and statuses as the recorded ones.

What is simulated: the states of KubeRay 1.7 in K8sJobMode and HTTPMode, finalizer, time to live, suspension, deadlines,
the events that name a cause, the Jobs API of each cluster's dashboard behind the API server's service proxy, Volcano's
PodGroup, YuniKorn's scheduler name and Kueue's Workload. What a RayJob's entrypoint does is a Python callable.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from support.kube_api import KubeApi
from support.kube_http import ProxyRequest
from support.kube_objects import ApiError, timestamp
from support.kube_pods import LIVE_PHASES, Driver, Kubelet, Stop, Trouble, recorded
from support.kube_ray import GoneError, Job, answer_jobs_api, invalid, owner_name
from support.kube_store import Object

__all__ = ["RayJobSimulator", "Stop"]

CONTROLLER = "ray.io/kuberay-operator"
FINALIZER = "ray.io/rayjob-finalizer"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
#: KubeRay gives up a dashboard that does not answer after these seconds.
STATUS_CHECK_TIMEOUT = 300.0
FINAL_JOB = ("SUCCEEDED", "FAILED", "STOPPED")
FINAL_DEPLOYMENT = ("Complete", "Failed", "ValidationFailed")


def _succeed(rayjob: Object, stop: Stop) -> int:
    return 0


class RayJobSimulator:
    """A thread that acts as KubeRay, the nodes and the schedulers; a context manager that starts and stops it.

    :param api: the server it works on
    :param scale: real seconds per recorded second: at 0.01 a RayJob takes about 0.6 s from create to Complete
    :param script: what an entrypoint does: called with the RayJob and a :class:`~support.kube_pods.Stop`, in a thread;
        returns the exit code. It has to look at ``stop``: set means SIGTERM, ``stop.killed`` that nothing may be saved.
    :param schedulers: those installed: ``volcano``, ``yunikorn``, ``kueue``
    :ivar max_overlap: per value of the run label: how many RayJobs had live pods at one time
    :ivar max_running: per value of the run label: how many entrypoints ran at one time
    :ivar started: names of RayJobs whose entrypoint was started, in order
    :ivar outputs: by ``namespace/name``: the lines that the entrypoint wrote
    """

    def __init__(
        self,
        api: KubeApi,
        *,
        scale: float = 0.01,
        script: Callable[[Object, Stop], int] = _succeed,
        schedulers: Iterable[str] = (),
        run_label: str = "mlops.airflow.org/run",
    ) -> None:
        self.api, self.scale, self.script, self.schedulers = api, scale, script, tuple(schedulers)
        self.run_label = run_label
        self.max_overlap: dict[str, int] = {}
        self.max_running: dict[str, int] = {}
        self.started: list[str] = []
        self.outputs: dict[str, list[str]] = {}
        self.kubelet = Kubelet(api, scale)
        self._drivers: dict[str, Driver] = {}
        self._held: set[str] = set()
        self._lost: dict[str, str] = {}
        self._submitter_dead: set[str] = set()
        self._submitter_lost: dict[str, tuple[str, ...]] = {}
        self._submitters: dict[str, str] = {}
        self._writing = threading.Lock()
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._labels: dict[str, str] = {}
        self._suspends: dict[str, asyncio.Event] = {}
        self._seen = {"rayjobs": 0, "pods": 0}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()

    # Life

    def start(self) -> RayJobSimulator:
        """Begin with the RayJobs that are there."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="kuberay", daemon=True)
        self._thread.start()
        if not self._ready.wait(20):
            raise RuntimeError("the simulator did not start")
        return self

    def stop(self) -> None:
        """Stop acting; objects stay as they are."""
        if self._loop and self._thread and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(20)

    def __enter__(self) -> RayJobSimulator:
        return self.start()

    def __exit__(self, *args: object) -> None:
        self.stop()

    async def _main(self) -> None:
        self._loop, self._stopping, self._wake = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self.api.store.listeners.append(self._nudge)
        self.api.proxied = self._dashboard
        try:
            self._look()
            self._ready.set()
            stopping = asyncio.create_task(self._stopping.wait())
            while not stopping.done():
                waking = asyncio.create_task(self._wake.wait())
                await asyncio.wait({waking, stopping}, return_when=asyncio.FIRST_COMPLETED)
                waking.cancel()
                self._wake.clear()
                self._look()
        finally:
            self.api.store.listeners.remove(self._nudge)
            tasks = list(self._lives.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.kubelet.close()

    def _nudge(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake.set)

    def _look(self) -> None:
        store = self.api.store
        for kind in ("rayjobs", "pods"):
            changes, self._seen[kind] = store.changes(store.named(kind), self._seen[kind])
            for change in changes:
                if kind == "pods":
                    self.kubelet.observe(change.new, change.type == "DELETED")
                else:
                    self._observe(change.new, change.type == "DELETED")
            if changes and kind == "pods":
                self._measure()

    def _observe(self, rayjob: Object, gone: bool) -> None:
        uid = rayjob["metadata"]["uid"]
        labels = rayjob["metadata"].get("labels") or {}
        self._labels[f"{rayjob['metadata']['namespace']}/{rayjob['metadata']['name']}"] = labels.get(self.run_label, "")
        task = self._lives.get(uid)
        suspend = self._suspends.setdefault(uid, asyncio.Event())
        suspend.set() if rayjob["spec"].get("suspend") else suspend.clear()
        if gone:
            if task:
                self._lives.pop(uid).cancel()
        elif rayjob["metadata"].get("deletionTimestamp"):
            if FINALIZER in rayjob["metadata"].get("finalizers", []) and not (task and task.get_name() == "delete"):
                if task:
                    task.cancel()
                self._lives[uid] = asyncio.create_task(self._delete(rayjob), name="delete")
        elif task is None and rayjob["spec"].get("managedBy", CONTROLLER) == CONTROLLER:
            self._lives[uid] = asyncio.create_task(self._life(rayjob), name="life")

    # What tests see and do

    def live_attempts(self, run: str | None = None) -> list[str]:
        """Names of the RayJobs that have pods which are not finished, of one run label or of all."""
        return sorted({name for label, name in self._live() if run in (None, label)})

    def running_attempts(self) -> list[str]:
        """Names of the RayJobs whose entrypoint runs at this moment."""
        return sorted(key.split("/", 1)[1] for key, driver in list(self._drivers.items()) if driver.running)

    def driver(self, name: str, namespace: str = "default") -> Driver | None:
        """A RayJob's entrypoint, None before it was started."""
        return self._drivers.get(f"{namespace}/{name}")

    def kill_head(
        self, name: str, *, namespace: str = "default", reason: str = "JobStatusCheckTimeoutExceeded"
    ) -> None:
        """Lose the head pod with its node: the entrypoint is killed.

        :param reason: how KubeRay reports it: ``JobStatusCheckTimeoutExceeded`` (jobStatus stays RUNNING) or
            ``AppFailed`` (jobStatus FAILED, the job is not known to the cluster any more)
        """
        self._lost[f"{namespace}/{name}"] = reason
        for pod in self._pods_of(name, namespace):
            if pod["metadata"]["labels"].get("ray.io/node-type") == "head":
                if driver := self._drivers.get(f"{namespace}/{name}"):
                    driver.kill()
                self.kubelet.drop(pod)

    def kill_submitter(self, name: str, *, namespace: str = "default") -> None:
        """Let the submitter fail for good while the entrypoint goes on."""
        self._submitter_dead.add(f"{namespace}/{name}")

    def replace_submitter(self, name: str, *last_words: str, namespace: str = "default") -> None:
        """Let the submitter's pod fail, and its Job start another, which tells the driver's log from its start.

        :param last_words: lines that it writes before it ends
        """
        self._submitter_lost[f"{namespace}/{name}"] = last_words

    def pods_linger(self, seconds: float) -> None:
        """Let the containers of pods that are deleted end only so many recorded seconds later."""
        self.kubelet.linger = seconds

    def suspend(self, name: str, *, namespace: str = "default", value: bool = True) -> None:
        """Set ``spec.suspend``, as a human or a queue does."""
        self.api.patch("RayJob", namespace, name, {"spec": {"suspend": value}})

    def image_pull_error(self, name: str = "", *, role: str = "head", message: str = "") -> None:
        """Let no image be found for RayJobs whose name contains ``name``, from now on."""
        text = message or 'Failed to pull image "nowhere/ray:1": not found'
        self.kubelet.troubles.append(Trouble("image", name, role, text))

    def unschedulable(self, name: str = "", *, role: str = "worker", message: str = "") -> None:
        """Let no node fit pods of RayJobs whose name contains ``name``, from now on."""
        text = message or "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        self.kubelet.troubles.append(Trouble("unschedulable", name, role, text))

    def quota_exceeded(self, name: str = "", *, message: str = "") -> None:
        """Let the namespace's quota refuse the pods of RayJobs whose name contains ``name``, from now on."""
        text = message or "pods is forbidden: exceeded quota: team, requested: requests.nvidia.com/gpu=8"
        self.kubelet.troubles.append(Trouble("quota", name, "", text))

    def heal(self) -> None:
        """Take back all troubles."""
        self.kubelet.troubles.clear()

    def hold_queue(self, name: str) -> None:
        """Let Kueue not admit RayJobs of this name until :meth:`admit`."""
        self._held.add(name)

    def admit(self, name: str) -> None:
        """Let Kueue admit a RayJob."""
        self._held.discard(name)

    # Measures

    def _live(self) -> set[tuple[str, str]]:
        store, found = self.api.store, set()
        for pod in store.items(store.named("pods"), None)[0]:
            name = owner_name(pod)
            if name and pod.get("status", {}).get("phase", "Pending") in LIVE_PHASES:
                found.add((self._labels.get(f"{pod['metadata']['namespace']}/{name}", ""), name))
        return found

    def _measure(self) -> None:
        counts: dict[str, int] = {}
        for label, _ in self._live():
            counts[label] = counts.get(label, 0) + 1
        for label, count in counts.items():
            self.max_overlap[label] = max(count, self.max_overlap.get(label, 0))

    def _pods_of(self, name: str, namespace: str) -> list[Object]:
        store = self.api.store
        items, _ = store.items(store.named("pods"), namespace)
        return [pod for pod in items if owner_name(pod) == name]

    # A RayJob's life

    async def _life(self, rayjob: Object) -> None:
        job = Job(self.api, rayjob)
        try:
            if not rayjob["metadata"].get("finalizers"):
                await self.kubelet.sleep(0.02)
                await self._kueue(job)
                job.edit({"metadata": {"finalizers": [FINALIZER]}})
            if problem := invalid(rayjob):
                job.status(jobDeploymentStatus="ValidationFailed", reason="ValidationFailed", message=problem)
                job.event("InvalidRayJobSpec", problem, "Warning")
                return
            while True:
                work = asyncio.create_task(self._attempt(job))
                changed = asyncio.create_task(self._suspends.setdefault(job.uid, asyncio.Event()).wait())
                try:
                    while not work.done():
                        if job.suspended() and job.deployment() in ("Initializing", "Running"):
                            break
                        await asyncio.wait({work, changed}, return_when=asyncio.FIRST_COMPLETED)
                        if changed.done():
                            await self.kubelet.pause()
                    if work.done():
                        work.result()
                        return
                finally:
                    work.cancel()
                    changed.cancel()
                    await asyncio.gather(work, changed, return_exceptions=True)
                await self._suspend(job)
        except GoneError:
            return

    async def _suspend(self, job: Job) -> None:
        job.status(jobDeploymentStatus="Suspending")
        job.drop_cluster()
        job.drop("Job", job.name)
        while [pod for pod in self._pods_of(job.name, job.namespace) if pod["metadata"].get("deletionTimestamp")]:
            await self.kubelet.pause()
        status = job.get().get("status") or {}
        kept = {key: status[key] for key in ("failed", "succeeded", "startTime") if key in status}
        job.replace_status({**kept, "jobDeploymentStatus": "Suspended", "rayJobInfo": {}})
        await self._kueue(job)
        while job.suspended():
            await self.kubelet.pause()
        job.replace_status({"jobDeploymentStatus": ""})

    async def _attempt(self, job: Job) -> None:
        now = timestamp(self.api.store.now())
        cluster = f"{job.name}-{uuid.uuid4().hex[:5]}"
        job.replace_status(
            {
                "jobDeploymentStatus": "Initializing",
                "jobId": job.spec.get("jobId") or f"{job.name}-{uuid.uuid4().hex[:5]}",
                "rayClusterName": cluster,
                "rayJobInfo": {},
                "startTime": now,
                "failed": 0,
                "succeeded": 0,
            }
        )
        began = asyncio.get_running_loop().time()
        await self.kubelet.sleep(0.02)
        if job.suspended():
            await asyncio.sleep(3600)
        pods = self._create_cluster(job, cluster)
        while not pods or not all(self.kubelet.ready(pod) for pod in pods):
            self._check_deadline(job, began, "preRunningDeadlineSeconds", "PreRunningDeadlineExceeded")
            self._check_deadline(job, began, "activeDeadlineSeconds", "DeadlineExceeded")
            if job.deployment() == "Failed":
                return await self._clean_up(job)
            await self.kubelet.pause()
            pods = pods or self._create_pods(job, cluster)
        job.cluster_ready(cluster)
        with_submitter = job.spec.get("submissionMode", "K8sJobMode") == "K8sJobMode"
        submitter = job.create_submitter() if with_submitter else None
        job.status(
            jobDeploymentStatus="Running", dashboardURL=f"{cluster}-head-svc.{job.namespace}.svc.cluster.local:8265"
        )
        await self._follow(job, cluster, pods[0], submitter, began)
        await self._clean_up(job)

    def _check_deadline(self, job: Job, began: float, field: str, reason: str) -> None:
        limit = job.spec.get(field)
        if limit is not None and asyncio.get_running_loop().time() - began > limit * self.scale:
            message = f"The RayJob has passed the {field}. StartTime: {job.get()['status'].get('startTime')}"
            job.fail(reason, message)

    async def _follow(self, job: Job, cluster: str, head: Object, submitter: Object | None, began: float) -> None:
        """From a cluster that is ready to the end of the job."""
        while submitter and not self.kubelet.ready(submitter) and job.key not in self._submitter_dead:
            self._check_deadline(job, began, "activeDeadlineSeconds", "DeadlineExceeded")
            if job.deployment() == "Failed":
                return
            await self.kubelet.pause()
        submitted = ("submitter", "Running") if submitter else ("rayjob", "Running")
        await self.kubelet.sleep(recorded("rayjob", "Running", "PENDING", since=submitted))
        driver = Driver(self.script, job.get(), lambda: None)
        driver.stop.log = lambda line: self._log(job, line)
        if submitter:
            self._connect(job, submitter)
        if job.key in self._lost or self.kubelet.find(head) is None:
            return await self._head_lost(job)
        self._drivers[job.key] = driver
        self.kubelet.drivers[head["metadata"]["uid"]] = driver
        started = timestamp(self.api.store.now())
        job.status(jobStatus="PENDING", message="Job has not started yet.", rayJobInfo={"startTime": started})
        await self.kubelet.sleep(recorded("rayjob", "Running", "RUNNING", since=("rayjob", "Running", "PENDING")))
        if job.key in self._lost or self.kubelet.find(head) is None or driver.stop.is_set():
            return await self._head_lost(job)
        driver.stop.log(f"Running entrypoint for job {job.get()['status']['jobId']}: {job.spec.get('entrypoint')}")
        driver.start()
        self.started.append(job.name)
        self._count_running(job)
        job.status(jobStatus="RUNNING", message="Job is currently running.")
        while driver.running:
            await self.kubelet.pause()
            if job.key in self._lost or self.kubelet.find(head) is None:
                return await self._head_lost(job)
            if submitter and job.key in self._submitter_lost:
                submitter = await self._replaced(job, submitter)
            if submitter and job.key in self._submitter_dead:
                self.kubelet.finish(submitter, "Failed")
                message = "Job submission has failed. Reason: BackoffLimitExceeded"
                return job.fail("SubmissionFailed", message)
            self._check_deadline(job, began, "activeDeadlineSeconds", "DeadlineExceeded")
            if job.deployment() == "Failed":
                return
        if driver.stop.killed or self.kubelet.find(head) is None:
            return await self._head_lost(job)
        await self.kubelet.sleep(1.0)
        info = {"startTime": started, "endTime": timestamp(self.api.store.now())}
        job.status(jobStatus=driver.status, message=_job_message(driver), rayJobInfo=info)
        await self._finish(job, driver, submitter)

    async def _finish(self, job: Job, driver: Driver, submitter: Object | None) -> None:
        ended = ("rayjob", "Running", "SUCCEEDED")
        if submitter:
            await self.kubelet.sleep(recorded("submitter", "Succeeded", since=ended))
            self.kubelet.finish(submitter, "Succeeded")
            done = {"type": "Complete", "status": "True", "reason": "CompletionsReached"}
            self.api.put_status("Job", job.namespace, job.name, {"succeeded": 1, "conditions": [done]})
            await self.kubelet.sleep(recorded("rayjob", "Complete", since=("submitter", "Succeeded")))
        end = timestamp(self.api.store.now())
        if driver.status == "FAILED":
            job.status(jobDeploymentStatus="Failed", reason="AppFailed", failed=1, endTime=end)
        else:
            job.status(jobDeploymentStatus="Complete", succeeded=int(driver.status == "SUCCEEDED"), endTime=end)

    async def _head_lost(self, job: Job) -> None:
        reason = self._lost.pop(job.key, "JobStatusCheckTimeoutExceeded")
        if reason == "AppFailed":
            await self.kubelet.sleep(5)
            message = "Submitter completed but Ray job not found in RayCluster."
            job.status(jobStatus="FAILED")
        else:
            await self.kubelet.sleep(STATUS_CHECK_TIMEOUT)
            message = "Timed out waiting for the Ray job's status: the dashboard does not answer"
        job.fail(reason, message)

    async def _clean_up(self, job: Job) -> None:
        """The cluster goes after its time to live, the RayJob and its submitter stay."""
        if job.spec.get("shutdownAfterJobFinishes"):
            await self.kubelet.sleep(float(job.spec.get("ttlSecondsAfterFinished") or 0) + 1.5)
            job.drop_cluster()
        # A submitter that follows a job of which nothing is left fails.
        for pod in self._pods_of(job.name, job.namespace):
            if "job-name" in pod["metadata"]["labels"] and pod["status"]["phase"] in LIVE_PHASES:
                self.kubelet.finish(pod, "Failed")

    async def _delete(self, rayjob: Object) -> None:
        job = Job(self.api, rayjob)
        driver = self._drivers.get(job.key)
        if driver and driver.running:
            # KubeRay asks Ray to stop the job and does not wait for it.
            driver.stop.set()
        await self.kubelet.sleep(0.1)
        with contextlib.suppress(GoneError):
            kept = [item for item in job.get()["metadata"].get("finalizers", []) if item != FINALIZER]
            job.edit({"metadata": {"finalizers": kept}})

    def _dashboard(self, request: ProxyRequest) -> tuple[int, Any] | None:
        """The dashboard of a cluster, as long as its head pod is ready."""
        cluster = self.api.get("RayCluster", request.namespace, request.service.removesuffix("-head-svc"))
        name = cluster and cluster["metadata"]["labels"].get("ray.io/originated-from-cr-name")
        pods = self._pods_of(name, request.namespace) if name else []
        heads = [pod for pod in pods if pod["metadata"]["labels"].get("ray.io/node-type") == "head"]
        rayjob = self.api.get("RayJob", request.namespace, name) if name else None
        if not heads or not self.kubelet.ready(heads[0]) or not rayjob:
            return None
        key = f"{request.namespace}/{name}"
        return answer_jobs_api(request, rayjob, self._drivers.get(key), self.outputs.get(key, []))

    async def _replaced(self, job: Job, submitter: Object) -> Object:
        with self._writing:
            pod = self._submitters.pop(job.key)
            self.api.add_pod_log(pod, self._submitter_lost.pop(job.key), namespace=job.namespace)
        self.kubelet.finish(submitter, "Failed")
        await self.kubelet.sleep(10)
        # A Job waits for seconds, and creation times are as exact as that.
        while timestamp(self.api.store.now()) == submitter["metadata"]["creationTimestamp"]:
            await self.kubelet.pause()
        made = self.api.get("Job", job.namespace, job.name)
        if made is None:
            raise GoneError
        found = job.create_submitter_pod(made)
        while not self.kubelet.ready(found):
            await self.kubelet.pause()
        self._connect(job, found)
        return found

    def _connect(self, job: Job, submitter: Object) -> None:
        """Let a submitter tell the driver's log, what there is of it first."""
        name = submitter["metadata"]["name"]
        with self._writing, contextlib.suppress(ApiError):
            lines = [f"Job submission server address: {job.name}:8265", *self.outputs.get(job.key, [])]
            self.api.add_pod_log(name, lines, namespace=job.namespace)
            self._submitters[job.key] = name

    def _log(self, job: Job, line: str) -> None:
        with self._writing, contextlib.suppress(ApiError):
            self.outputs.setdefault(job.key, []).append(line)
            if job.key in self._submitters and job.key not in self._submitter_dead:
                self.api.add_pod_log(self._submitters[job.key], [line], namespace=job.namespace)

    def _count_running(self, job: Job) -> None:
        label = self._labels.get(job.key, "")
        running = sum(driver.running and self._labels.get(key) == label for key, driver in self._drivers.items())
        self.max_running[label] = max(running, self.max_running.get(label, 0))

    # Clusters

    def _create_cluster(self, job: Job, cluster: str) -> list[Object]:
        job.create_cluster(cluster)
        if "volcano" in self.schedulers and "volcano.sh/queue-name" in job.labels:
            replicas = sum(group.get("replicas", 1) for group in job.groups())
            queue = job.labels["volcano.sh/queue-name"]
            spec = {"minMember": replicas + 1, "queue": queue}
            group = {"kind": "PodGroup", "metadata": {"name": f"ray-{job.name}-pg", "ownerReferences": [job.owner()]}}
            self.api.create({**group, "spec": spec, "status": {"phase": "Running"}}, job.namespace)
        return self._create_pods(job, cluster)

    def _create_pods(self, job: Job, cluster: str) -> list[Object]:
        for trouble in self.kubelet.troubles:
            if trouble.kind == "quota" and trouble.job in job.name:
                job.event("FailedToCreateHeadPod", f"Failed to create head Pod: {trouble.message}", "Warning", cluster)
                return []
        scheduler = "yunikorn" if "yunikorn" in self.schedulers and _gang(job.labels) else ""
        scheduler = "volcano" if "volcano" in self.schedulers and "volcano.sh/queue-name" in job.labels else scheduler
        pods = [job.create_pod(cluster, "head", "headgroup", job.cluster_spec()["headGroupSpec"], scheduler)]
        for group in job.groups():
            for _ in range(int(group.get("replicas", 1) or 0)):
                pods.append(job.create_pod(cluster, "worker", group["groupName"], group, scheduler))
        return pods

    async def _kueue(self, job: Job) -> None:
        """Suspend a RayJob with a queue's name until Kueue admits it."""
        if "kueue" not in self.schedulers or QUEUE_LABEL not in job.labels:
            return
        job.edit({"spec": {"suspend": True}})
        name = f"rayjob-{job.name}-{uuid.uuid4().hex[:5]}"
        meta = {"name": name, "labels": {"kueue.x-k8s.io/job-uid": job.uid}, "ownerReferences": [job.owner()]}
        spec = {"queueName": job.labels[QUEUE_LABEL], "active": True}
        created = self.api.create({"kind": "Workload", "metadata": meta, "spec": spec}, job.namespace)
        if job.deployment() in ("", "Suspended"):
            job.status(jobDeploymentStatus="Suspended")
        while job.name in self._held:
            await self.kubelet.pause()
        with contextlib.suppress(ApiError):
            condition = {"type": "Admitted", "status": "True", "reason": "Admitted", "message": "admitted"}
            condition["lastTransitionTime"] = timestamp(self.api.store.now())
            self.api.put_status("Workload", job.namespace, created["metadata"]["name"], {"conditions": [condition]})
        job.edit({"spec": {"suspend": False}})


def _gang(labels: Mapping[str, str]) -> bool:
    return "yunikorn.apache.org/queue" in labels or "yunikorn.apache.org/app-id" in labels


def _job_message(driver: Driver) -> str:
    if driver.status == "SUCCEEDED":
        return "Job finished successfully."
    if driver.status == "STOPPED":
        return "Job was intentionally stopped."
    message = f"Job entrypoint command failed with exit code {driver.exit_code}, last available logs"
    return f"{message} (truncated to 20,000 chars):\n{driver.error}\n"
