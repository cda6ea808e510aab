"""The Job in the cluster that ends a canary when nobody renews its claim any more."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.rollout.targets.kube import JOB, MANAGED_BY, KubernetesClient, Object, ensure
from airflow_mlops.rollout.targets.lease import Claim

#: What the Job's process reads.
CONFIG_VARIABLE = "MLOPS_ROLLOUT_TARGET"
NUMBER_VARIABLE = "MLOPS_ROLLOUT_CLAIM"
DEADLINE = 14 * 24 * 3600


@dataclass(frozen=True)
class Watchdog:
    """Starts one Job per claim, which follows the claim's Lease and ends when it is freed.

    :param client: of the cluster
    :param config: of the target, as :func:`airflow_mlops.rollout.targets.factory.target_of` takes it
    :param image: with this package in it
    :param service_account: that may read and patch the Lease and what splits the traffic
    :param deadline: seconds after which the Job ends whatever happens; longer than any rollout
    :param template: what else the pod has: ``resources``, ``imagePullSecrets``, ``nodeSelector``, ``tolerations``
    """

    client: KubernetesClient
    config: Mapping[str, Any]
    image: str
    service_account: str
    namespace: str | None = None
    deadline: int = DEADLINE
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.image or not self.service_account:
            raise InvalidInputError(
                f"watchdog has image {self.image!r} and service_account {self.service_account!r}; expected an image "
                "that has airflow-mlops in it, and an account with the Role airflow-mlops-rollout-watchdog"
            )
        if not isinstance(self.deadline, int) or self.deadline < 60:
            raise InvalidInputError(f"deadline of the watchdog is {self.deadline!r}; expected at least 60 seconds")

    def name(self, number: int) -> str:
        """Of the Job for a claim."""
        stem = f"rollout-{self.config['kind']}-{self.config['name']}"[:48].rstrip("-")
        return f"{stem}-dog-{number}"

    async def watch(self, claim: Claim) -> None:
        """Have the claim watched; nothing happens if it is."""
        await ensure(self.client, JOB, self.manifest(claim), self.namespace)

    def manifest(self, claim: Claim) -> Object:
        """The Job."""
        pod = dict(self.template)
        container = {
            "name": "watchdog",
            "image": self.image,
            "command": ["python", "-m", "airflow_mlops.rollout.watchdog"],
            "env": [
                {"name": CONFIG_VARIABLE, "value": json.dumps(dict(self.config), sort_keys=True)},
                {"name": NUMBER_VARIABLE, "value": str(claim.number)},
            ],
            "resources": pod.pop("resources", {"requests": {"cpu": "10m", "memory": "64Mi"}}),
        }
        labels = {**MANAGED_BY, "mlops.airflow.org/part": "rollout-watchdog"}
        spec = {
            **pod,
            "restartPolicy": "OnFailure",
            "serviceAccountName": self.service_account,
            "containers": [container],
        }
        return {
            "apiVersion": JOB.api_version,
            "kind": JOB.kind,
            "metadata": {"name": self.name(claim.number), "labels": labels},
            "spec": {
                # It must outlive nodes and long absences of the API server.
                "backoffLimit": 1000,
                "activeDeadlineSeconds": math.ceil(self.deadline),
                "ttlSecondsAfterFinished": 3600,
                "template": {"metadata": {"labels": labels}, "spec": spec},
            },
        }
