# Airflow with this provider: scheduler, Dag processor, triggerer, API server and workers all run this image.
# Build from the repository's root: docker build -f docker/airflow.Dockerfile -t airflow-mlops:local .
ARG AIRFLOW_VERSION=3.3.2
ARG PYTHON_VERSION=3.11
FROM apache/airflow:${AIRFLOW_VERSION}-python${PYTHON_VERSION}

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    FEAST_USAGE=False \
    DVC_NO_ANALYTICS=1

COPY --chown=airflow:root . /opt/airflow-mlops
WORKDIR /opt/airflow-mlops
RUN pip install --constraint constraints.txt ".[demo,s3]" "redis<8"
WORKDIR /opt/airflow
ENV AIRFLOW__CORE__DAGS_FOLDER=/opt/airflow-mlops/dags \
    MLOPS_FEATURE_REPO=/opt/airflow-mlops/feature_repo
