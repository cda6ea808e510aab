"""Real models of every format, made once, and keys."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

OPTIONS = {"pip_requirements": []}
FROM_CODE = """
import mlflow
class Model(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input.iloc[:, 0] * 0 + 0.5
mlflow.models.set_model(Model())
"""


@pytest.fixture(scope="session")
def rows() -> pd.DataFrame:
    return pd.DataFrame({"a": np.arange(40.0), "b": np.arange(40.0)[::-1]})


@pytest.fixture(scope="session")
def _saved(tmp_path_factory, rows) -> Path:
    import mlflow
    import xgboost
    from mlflow.models import infer_signature
    from sklearn.linear_model import LogisticRegression

    folder = tmp_path_factory.mktemp("saved")
    label = (rows["a"] > 20).astype(int)
    booster = xgboost.train({"objective": "binary:logistic", "nthread": 1}, xgboost.DMatrix(rows, label), 3)
    signature = infer_signature(rows, np.array([0.5]))
    for kind in ("ubj", "json"):
        mlflow.xgboost.save_model(booster, folder / kind, model_format=kind, signature=signature, **OPTIONS)
    classifier = LogisticRegression().fit(rows, label)
    mlflow.sklearn.save_model(
        classifier,
        folder / "pickled",
        serialization_format="cloudpickle",
        pyfunc_predict_fn="predict_proba",
        signature=signature,
        **OPTIONS,
    )
    (folder / "model_code.py").write_text(FROM_CODE)
    mlflow.pyfunc.save_model(folder / "code", python_model=str(folder / "model_code.py"), **OPTIONS)
    return folder


@pytest.fixture
def model(_saved, tmp_path):
    """``model("ubj")``: a copy of a saved model that a test may spoil."""

    def copy(kind: str = "ubj", name: str = "model") -> Path:
        return Path(shutil.copytree(_saved / kind, tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def private_key() -> str:
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()).decode()
