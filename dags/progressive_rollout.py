"""
### Roll out a registered model step by step, and back

`progressive_rollout` takes any registered model from its champion to another version: the challenger gets a rising
share of the traffic, every look is judged with stated error rates, and it becomes champion or loses its traffic.
Trigger it from the UI; the form has the steps, the guardrails, where traffic is split and where the numbers come from.

`roll_back` is a person's decision after the fact: all traffic, and the alias, go back to the version before.
"""

from __future__ import annotations

import datetime as dt
import os
from typing import Any

from airflow.sdk import DAG, Param, task
from airflow.sdk.configuration import conf

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.operators.canary import CanaryPromoteOperator
from airflow_mlops.operators.rollback import RollbackOperator
from airflow_mlops.shell import permanent_errors_fail

ROOT = os.path.abspath(os.path.expanduser(conf.get("mlops", "root")))
# Where a connection is named, a version without its signature gets no traffic.
SIGNING = conf.get("mlops", "signing_conn_id") or None
TARGET = Param(
    None, type=["null", "object"], title="Where traffic is split", section="Place",
    description=(
        "Empty: Ray Serve, on the route named after the model. Else for example "
        '{"kind": "kserve", "mode": "knative", "name": "fraud", "namespace": "serving"} or '
        '{"kind": "gateway", "name": "fraud", "service": "fraud-{version}"}.'
    ),
)  # fmt: skip
MODEL_NAME = Param("flights_delay", type="string", minLength=1, title="Registered model", section="Model")

with DAG(
    dag_id="progressive_rollout",
    description="Takes a registered model from its champion to another version, step by step, or back.",
    doc_md=__doc__,
    schedule=None,
    start_date=dt.datetime(2013, 1, 1, tzinfo=dt.timezone.utc),
    max_active_runs=16,
    render_template_as_native_obj=True,
    tags=["mlops", "rollout"],
    params={
        "model_name": MODEL_NAME,
        "version": Param("", type="string", title="Version", section="Model", description="Empty: the newest."),
        "steps": Param(
            [1, 5, 25, 50, 100], type="array", title="Steps in percent", section="Plan",
            description=(
                'Shares of the traffic, rising to 100. 0 first: copies of the traffic. A step can be {"weight": 25, '
                '"bake_seconds": 600, "min_requests": 1000, "approval": true}.'
            ),
        ),
        "min_requests": Param(
            200, type="integer", minimum=1, title="Requests per arm and step", section="Plan",
        ),
        "bake_seconds": Param(
            60, type="number", minimum=0, title="Seconds per step", section="Plan",
            description="Above 0 the version is also watched at 100 % for so long before the alias moves.",
        ),
        "deadline_seconds": Param(
            86_400, type="number", minimum=60, title="Deadline in seconds", section="Plan",
            description="What has not been shown to be no worse by then is rolled back.",
        ),
        "guardrails": Param(
            ["errors", "latency"], type="array", title="Guardrails", section="Evidence",
            description="Names (errors, timeouts, latency, log_loss, brier, score), or objects with margins.",
        ),
        "evidence": Param(
            None, type=["null", "object", "string"], title="Where the numbers come from", section="Evidence",
            description=(
                "Empty: what Ray Serve's route counts. Else the name of a query set (knative, kserve, istio, "
                'envoy_gateway, ray_serve), or {"type": "prometheus", "set": "istio", "conn_id": "..."}.'
            ),
        ),
        "target": TARGET,
    },
) as rollout_dag:  # fmt: skip

    @task(doc_md="Resolves the version to roll out and the champion it is compared with.")
    def resolve(**context: Any) -> dict[str, Any]:
        from airflow_mlops.hooks.mlflow import MlflowHook

        params, hook = context["params"], MlflowHook()
        name = params["model_name"]
        with permanent_errors_fail():
            champion = hook.version_by_alias(name, "champion", missing_ok=True)
            if params["version"]:
                version = str(hook.version(name, params["version"]).version)
            elif newest := hook.newest_version(name):
                version = str(newest.version)
            else:
                raise InvalidInputError(f"{name} has no version to roll out; register one first")
        stable = str(champion.version) if champion else ""
        return {
            "version": version,
            "model_uri": f"models:/{name}/{version}",
            "stable_version": stable,
            "stable_uri": f"models:/{name}/{stable}" if stable else "",
        }

    resolved = resolve()
    CanaryPromoteOperator(
        task_id="roll_out",
        model_name="{{ params.model_name }}",
        version=resolved["version"],
        model_uri=resolved["model_uri"],
        stable_version=resolved["stable_version"],
        stable_uri=resolved["stable_uri"],
        policy={
            "steps": "{{ params.steps }}",
            "min_requests": "{{ params.min_requests }}",
            "bake_seconds": "{{ params.bake_seconds }}",
            "deadline_seconds": "{{ params.deadline_seconds }}",
        },
        guardrails="{{ params.guardrails }}",
        target="{{ params.target }}",
        evidence="{{ params.evidence }}",
        alias="champion",
        report_dir=f"{ROOT}/rollouts",
        experiment="{{ params.model_name }}/rollouts",
        signing_conn_id=SIGNING,
        deferrable=True,
        retries=3,
        retry_delay=dt.timedelta(seconds=10),
        doc_md="Shifts the traffic, judges, promotes or rolls back; a retry goes on where it was.",
    )

with DAG(
    dag_id="roll_back",
    description="Gives all traffic of a registered model, and its alias, back to the version before.",
    doc_md=__doc__,
    schedule=None,
    start_date=dt.datetime(2013, 1, 1, tzinfo=dt.timezone.utc),
    render_template_as_native_obj=True,
    tags=["mlops", "rollout"],
    params={
        "model_name": MODEL_NAME,
        "version": Param("", type="string", title="Version to leave", description="Empty: the champion."),
        "reason": Param("", type="string", title="Why"),
        "target": TARGET,
    },
) as rollback_dag:
    RollbackOperator(
        task_id="roll_back",
        model_name="{{ params.model_name }}",
        version="{{ params.version }}",
        reason="{{ params.reason }}",
        target="{{ params.target }}",
        signing_conn_id=SIGNING,
        retries=2,
        retry_delay=dt.timedelta(seconds=10),
    )
