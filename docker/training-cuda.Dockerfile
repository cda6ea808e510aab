# What Ray's head and workers run on NVIDIA GPUs; training.Dockerfile is the same for CPUs.
# Build from the repository's root:
#   docker build -f docker/training-cuda.Dockerfile -t registry.example.com/training:ray2.60.0-cuda .
# RayTrainOperator reads the Ray version from such a tag. It has to be that of constraints.txt, which the tests ran with.
# PyTorch's and XGBoost's wheels bring the CUDA libraries they use; the nodes bring the driver.
ARG RAY_IMAGE=rayproject/ray:2.60.0-py311-gpu

FROM ${RAY_IMAGE} AS wheel
COPY --chown=ray:users . /tmp/airflow-mlops
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /tmp/wheels /tmp/airflow-mlops

FROM ${RAY_IMAGE}
ARG TORCH=torch==2.13.0
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
COPY --from=wheel --chown=ray:users /tmp/wheels /tmp/wheels
COPY --chown=ray:users constraints.txt /tmp/constraints.txt
# The driver and the training code need the package, storage and MLflow's model formats, not Airflow.
RUN pip install --no-deps /tmp/wheels/*.whl \
    && pip install --constraint /tmp/constraints.txt \
        "${TORCH}" \
        "ray[default,train,tune]" \
        fsspec mlflow-skinny optuna pandas psutil pyarrow s3fs scikit-learn \
        lightgbm xgboost \
    && rm -rf /tmp/wheels /tmp/constraints.txt
