# What Ray's head and workers run. Build from the repository's root, for CPUs:
#   docker build -f docker/training.Dockerfile -t registry.example.com/training:ray2.60.0-cpu .
# and for NVIDIA GPUs, where PyTorch's and XGBoost's wheels bring the CUDA libraries they use and the nodes the driver:
#   docker build -f docker/training.Dockerfile -t registry.example.com/training:ray2.60.0-cuda \
#     --build-arg RAY_IMAGE=rayproject/ray:2.60.0-py311-gpu --build-arg TORCH_INDEX= .
# RayTrainOperator reads the Ray version from such a tag. It has to be that of constraints.txt, which the tests ran with.
ARG RAY_IMAGE=rayproject/ray:2.60.0-py311-cpu

FROM ${RAY_IMAGE} AS wheel
COPY --chown=ray:users . /tmp/airflow-mlops
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /tmp/wheels /tmp/airflow-mlops

FROM ${RAY_IMAGE}
ARG TORCH=torch==2.13.0
# Besides pip's own index: there a build for CPUs alone, which is smaller; empty: pip's own only.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
COPY --from=wheel --chown=ray:users /tmp/wheels /tmp/wheels
COPY --chown=ray:users constraints.txt /tmp/constraints.txt
# The driver and the training code need the package, storage and MLflow's model formats, not Airflow.
RUN pip install --no-deps /tmp/wheels/*.whl \
    && pip install --constraint /tmp/constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
        "${TORCH}" \
    && pip install --constraint /tmp/constraints.txt \
        "ray[default,train,tune]" \
        fsspec mlflow-skinny optuna pandas psutil pyarrow s3fs scikit-learn \
        lightgbm xgboost \
    && rm -rf /tmp/wheels /tmp/constraints.txt
