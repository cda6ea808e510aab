"""What Airflow reads about this provider while it starts: metadata only, nothing imported."""

from __future__ import annotations

from typing import Any

_SYSTEMS = {
    "Ray": "https://docs.ray.io/",
    "KubeRay": "https://docs.ray.io/en/latest/cluster/kubernetes/index.html",
    "Feast": "https://docs.feast.dev/",
    "MLflow": "https://mlflow.org/docs/latest/",
    "DVC": "https://dvc.org/doc",
    "Evidently": "https://docs.evidentlyai.com/",
    "Ray Serve": "https://docs.ray.io/en/latest/serve/",
    "Prometheus": "https://prometheus.io/docs/",
    "Model Signing": "https://github.com/sigstore/model-transparency",
}


def _modules(kind: str, names: dict[str, list[str]]) -> list[dict[str, Any]]:
    return [
        {"integration-name": system, "python-modules": [f"airflow_mlops.{kind}.{name}" for name in modules]}
        for system, modules in names.items()
    ]


def _field(label: str, description: str, *, secret: bool = False, kind: str = "string") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": [kind, "null"]}
    if secret:
        schema["format"] = "password"
    return {"label": label, "description": description, "schema": schema}


def get_provider_info() -> dict[str, Any]:
    """The provider's metadata, in the form of Airflow's ``provider_info.schema.json``."""
    return {
        "package-name": "airflow-mlops",
        "name": "MLOps",
        "description": "Continuous training: drift, features, training on Ray, gate, registry, canary.",
        "integrations": [
            {"integration-name": system, "external-doc-url": url, "tags": ["ml"]} for system, url in _SYSTEMS.items()
        ],
        "operators": _modules(
            "operators",
            {
                "Ray": ["ray"],
                "Feast": ["feast"],
                "MLflow": ["mlflow", "gate", "provenance"],
                "DVC": ["dvc"],
                "Ray Serve": ["canary", "rollback"],
            },
        ),
        "sensors": _modules("sensors", {"Evidently": ["drift"]}),
        "hooks": _modules(
            "hooks",
            {
                "Ray": ["ray"],
                "KubeRay": ["kubernetes", "kuberay"],
                "Feast": ["feast"],
                "MLflow": ["mlflow"],
                "DVC": ["dvc"],
                "Ray Serve": ["ray_serve"],
                "Prometheus": ["prometheus"],
                "Model Signing": ["signing"],
            },
        ),
        "triggers": _modules(
            "triggers", {"Ray": ["ray"], "KubeRay": ["kuberay"], "Evidently": ["drift"], "Ray Serve": ["canary"]}
        ),
        "task-decorators": [{"name": "ray_train", "class-name": "airflow_mlops.decorators.ray.ray_train_task"}],
        "notifications": [
            "airflow_mlops.notifications.drift.DriftNotifier",
            "airflow_mlops.notifications.rollout.RolloutNotifier",
        ],
        "extra-links": [
            "airflow_mlops.links.RayDashboardLink",
            "airflow_mlops.links.GrafanaLink",
            "airflow_mlops.links.MlflowRunLink",
            "airflow_mlops.links.ReportLink",
            "airflow_mlops.links.RolloutReportLink",
        ],
        "connection-types": [
            {
                "connection-type": "ray",
                "hook-class-name": "airflow_mlops.hooks.ray.RayJobsHook",
                "hook-name": "Ray cluster",
                "conn-fields": {
                    "serve_url": _field("Serve URL", "Where Ray Serve answers requests, for example http://ray:8000"),
                    "verify": _field("TLS verification", "true, false or the path of a CA bundle; true if empty"),
                    "proxy_service": _field(
                        "Service behind the API server",
                        "namespace/service:port, reached through the Kubernetes API server, without a dashboard URL",
                    ),
                    "kubernetes_conn_id": _field(
                        "Kubernetes connection", "Of that API server; kubernetes_default if empty"
                    ),
                },
                "ui-field-behaviour": {
                    "hidden-fields": ["schema", "login", "extra"],
                    "relabeling": {"host": "Dashboard URL", "password": "Token"},
                    "placeholders": {
                        "host": "http://127.0.0.1:8265",
                        "password": "RAY_AUTH_TOKEN, if the cluster has one",
                    },
                },
            },
            {
                "connection-type": "kuberay",
                "hook-class-name": "airflow_mlops.hooks.kubernetes.CustomResourceHook",
                "hook-name": "KubeRay",
                "conn-fields": {
                    "in_cluster": _field(
                        "In-cluster", "Use the service account of the pod that Airflow runs in", kind="boolean"
                    ),
                    "kube_config_path": _field("Kubeconfig path", "On workers and triggerers"),
                    "kube_config": _field("Kubeconfig", "Its content as JSON, instead of a path", secret=True),
                    "cluster_context": _field("Context", "Of the kubeconfig; its current one if empty"),
                    "namespace": _field("Namespace", "Where clusters are made, unless the task names one"),
                    "disable_verify_ssl": _field(
                        "Trust any certificate", "Do not verify the API server's", kind="boolean"
                    ),
                    "disable_tcp_keepalive": _field(
                        "No TCP keepalive", "Do not keep idle connections alive", kind="boolean"
                    ),
                },
                "ui-field-behaviour": {
                    "hidden-fields": ["host", "schema", "login", "password", "port", "extra"],
                    "placeholders": {"namespace": "ml-training"},
                },
            },
            {
                "connection-type": "feast",
                "hook-class-name": "airflow_mlops.hooks.feast.FeastHook",
                "hook-name": "Feast repository",
                "conn-fields": {
                    "repo_path": _field("Repository", "Folder with feature_store.yaml, on the worker"),
                    "feature_store": _field("Overrides", "JSON object laid over feature_store.yaml", secret=True),
                },
                "ui-field-behaviour": {"hidden-fields": ["host", "schema", "login", "password", "port", "extra"]},
            },
            {
                "connection-type": "mlflow",
                "hook-class-name": "airflow_mlops.hooks.mlflow.MlflowHook",
                "hook-name": "MLflow",
                "conn-fields": {
                    "tracking_uri": _field("Tracking URI", "A server or database URI; wins over the host"),
                    "token": _field("Token", "Bearer token, instead of user and password", secret=True),
                    "artifact_root": _field("Artifact root", "Where new experiments keep artifacts"),
                },
                "ui-field-behaviour": {
                    "hidden-fields": ["schema", "extra"],
                    "relabeling": {"host": "Tracking server", "login": "User", "password": "Password or token"},
                    "placeholders": {"host": "https://mlflow.example.com"},
                },
            },
            {
                "connection-type": "dvc_remote",
                "hook-class-name": "airflow_mlops.hooks.dvc.DvcHook",
                "hook-name": "DVC remote",
                "conn-fields": {
                    "url": _field("Remote URL", "A folder or s3://bucket/prefix"),
                    "endpointurl": _field("S3 endpoint", "Of an S3 store that is not AWS"),
                    "region": _field("S3 region", "For example eu-central-1"),
                    "session_token": _field("S3 session token", "With temporary keys", secret=True),
                    "profile": _field("AWS profile", "On the worker, instead of keys"),
                },
                "ui-field-behaviour": {
                    "hidden-fields": ["schema", "port", "extra"],
                    "relabeling": {"login": "S3 access key", "password": "S3 secret key"},
                },
            },
            {
                "connection-type": "prometheus",
                "hook-class-name": "airflow_mlops.hooks.prometheus.PrometheusHook",
                "hook-name": "Prometheus",
                "conn-fields": {
                    "path_prefix": _field("Path", "Before /api/v1, for example prometheus of a Mimir"),
                    "org_id": _field("Tenant", "X-Scope-OrgID of Mimir, Cortex or Thanos"),
                    "verify": _field("TLS verification", "true, false or the path of a CA bundle; true if empty"),
                    "headers": _field("Headers", "JSON object of further request headers", secret=True),
                    "timeout": _field("Timeout", "Seconds for one query; 10 if empty"),
                },
                "ui-field-behaviour": {
                    "hidden-fields": ["extra"],
                    "relabeling": {
                        "host": "Server URL",
                        "schema": "http or https",
                        "login": "User",
                        "password": "Password or bearer token",
                    },
                    "placeholders": {
                        "host": "http://prometheus.monitoring:9090",
                        "password": "A bearer token if there is no user",
                    },
                },
            },
            {
                "connection-type": "model_signing",
                "hook-class-name": "airflow_mlops.hooks.signing.SigningHook",
                "hook-name": "Model signing",
                "conn-fields": {
                    "method": _field("Method", "key (if empty), certificate or sigstore"),
                    "passphrase": _field("Passphrase", "Of an encrypted private key", secret=True),
                    "public_key": _field("Public key", "PEM; to verify without the private key"),
                    "certificate": _field("Certificate", "PEM, of the signer"),
                    "certificate_chain": _field("Certificate chain", "PEM, the authorities to trust"),
                    "identity": _field("Identity", "Who must have signed: a name of the certificate, or of Sigstore"),
                    "oidc_issuer": _field("OIDC issuer", "Who vouches for the identity, with sigstore"),
                    "trust_config": _field("Trust configuration", "Path on the worker, for a Sigstore of one's own"),
                },
                "ui-field-behaviour": {
                    "hidden-fields": ["host", "schema", "login", "port", "extra"],
                    "relabeling": {"password": "Private key or identity token"},
                    "placeholders": {"password": "PEM; none in a connection that only verifies"},
                },
            },
        ],
        "config": {
            "mlops": {
                "description": "Settings of the airflow-mlops provider and of the Dags that come with it.",
                "options": {
                    "root": {
                        "description": "Folder under which the example Dags keep data, features, runs and reports.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "/data/mlops",
                        "default": "~/airflow-mlops",
                    },
                    "ray_dashboard_url": {
                        "description": "Address of an attempt in the Ray dashboard of its own cluster in Kubernetes, "
                        "with {namespace} and {submission_id}; no link if empty.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "https://ray.example.com/{namespace}/{submission_id}",
                        "default": "",
                    },
                    "grafana_url": {
                        "description": "Address of a Grafana dashboard for an attempt, with {namespace}, "
                        "{submission_id}, {attempt} and {run_dir}; no link if empty.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "https://grafana.example.com/d/ray?var-SessionName={submission_id}",
                        "default": "",
                    },
                    "signing_conn_id": {
                        "description": "Connection of type model_signing with which the Dags that come with the "
                        "provider sign what they register; they then load only versions that it vouches for. If empty, "
                        "signatures are neither made nor asked for.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "model_signing_default",
                        "default": "",
                    },
                    "audit_uri": {
                        "description": "Folder, or s3://bucket/prefix with boto3's own settings, of the append-only "
                        "log of every decision: drift, gate, register, canary, promote, rollback; none if empty. A "
                        "task whose decision cannot be logged fails.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "s3://ml-audit/decisions",
                        "default": "",
                    },
                    "audit_retain_days": {
                        "description": "Days that S3 Object Lock keeps an entry of the audit log, in compliance mode; "
                        "0 for the bucket's own default.",
                        "version_added": "0.1.0",
                        "type": "integer",
                        "example": "2555",
                        "default": "0",
                    },
                    "prometheus_textfile_dir": {
                        "description": "Folder on the workers that a node exporter's textfile collector reads: every "
                        "DriftSensor leaves the metrics of its last check there; none if empty.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "/var/lib/node_exporter/textfile",
                        "default": "",
                    },
                    "pushgateway_url": {
                        "description": "Prometheus push gateway that gets the metrics of every DriftSensor's last "
                        "check; none if empty. May hold user and password.",
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "http://pushgateway:9091",
                        "default": "",
                        "sensitive": True,
                    },
                },
            }
        },
    }
