"""The assets by which Dags name a model in the registry."""

from __future__ import annotations

from urllib.parse import quote

from airflow.sdk import Asset

from airflow_mlops.exceptions import InvalidInputError

#: Group of these assets in Airflow.
GROUP = "mlflow_model"


def model_asset(model_name: str, alias: str = "champion") -> Asset:
    """The asset that changes when ``alias`` of a registered model moves: as an outlet of what promotes or rolls back,
    and as the schedule of Dags that follow.

    :param model_name: registered model
    :param alias: of the version that counts
    :return: of name ``model_name@alias``, as in MLflow's URIs, and URI ``mlflow://models/model_name/alias``
    :raises InvalidInputError: one of the names is empty
    """
    if not model_name or not alias:
        raise InvalidInputError(f"model_name is {model_name!r} and alias {alias!r}; an asset needs both")
    return Asset(name=f"{model_name}@{alias}", uri=f"mlflow://models/{quote(model_name, safe='')}/{alias}", group=GROUP)
