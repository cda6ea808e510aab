# What Ray's head and workers run. CPU by default; for GPUs build with
#   docker build -f docker/training.Dockerfile --build-arg RAY_IMAGE=rayproject/ray:2.60.0-py311-gpu -t ray-mlops:gpu .
# The Ray version of the image has to be the one the driver was tested with (constraints.txt).
ARG RAY_IMAGE=rayproject/ray:2.60.0-py311-cpu
FROM ${RAY_IMAGE}

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0

COPY --chown=ray:users . /home/ray/airflow-mlops
WORKDIR /home/ray/airflow-mlops
# The driver and the training code need the package and MLflow's model formats, not Airflow.
RUN pip install --no-deps . \
    && pip install --constraint constraints.txt "fsspec" "mlflow-skinny" "pandas<3" "pyarrow" "s3fs" "scikit-learn" "xgboost"
WORKDIR /home/ray
