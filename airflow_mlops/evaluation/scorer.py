"""Load a model artifact without unpickling anything, and turn its answer into probabilities."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import DataError, InvalidInputError
from airflow_mlops.model_files.formats import HOW_TO_STORE, check

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@contextmanager
def pickles(allowed: bool) -> Iterator[None]:
    """While inside, MLflow refuses every flavour that deserialises code, or does not; no bytecode is written either,
    which would add files to the model.
    """
    name = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"
    before, bytecode = os.environ.get(name), sys.dont_write_bytecode
    os.environ[name], sys.dont_write_bytecode = str(allowed).lower(), True
    try:
        yield
    finally:
        sys.dont_write_bytecode = bytecode
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def require_model(folder: str | Path) -> None:
    """Refuse a folder that holds no MLflow model.

    :raises InvalidInputError: it has no file ``MLmodel``
    """
    if not (Path(folder) / "MLmodel").is_file():
        raise InvalidInputError(
            f"{folder} holds no MLflow model (no file MLmodel); give the folder that mlflow's save_model wrote"
        )


def load(model_dir: str | Path, *, allow_pickle: bool = False) -> Any:
    """The ``mlflow.pyfunc`` model stored in the local folder ``model_dir``.

    :param allow_pickle: load pickles, too, which runs what they hold: in a sandbox only
    :raises InvalidInputError: there is no MLflow model, or a file of it is of no allowed format
    """
    require_model(model_dir)
    check(model_dir, allow_pickle=allow_pickle)
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import load_model

    with pickles(allow_pickle):
        try:
            return load_model(str(model_dir))
        except MlflowException as error:
            if "MLFLOW_ALLOW_PICKLE_DESERIALIZATION" in str(error):
                raise InvalidInputError(f"the model in {model_dir} is pickled. {HOW_TO_STORE}") from error
            raise InvalidInputError(f"the model in {model_dir} cannot be loaded: {error}") from error


def answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a process of its own does to predict: rows from one file, probabilities to another.

    :param job: ``model`` (folder), ``rows`` (Parquet), ``features``, ``predictions`` (file for the probabilities, raw
        little-endian float64), ``allow_pickle``
    :return: ``rows``, their number
    """
    import pandas as pd

    model = load(job["model"], allow_pickle=job["allow_pickle"])
    values = predict_proba(model, pd.read_parquet(job["rows"]), job["features"] or None)
    Path(job["predictions"]).write_bytes(values.astype("<f8").tobytes())
    return {"rows": len(values)}


def model_inputs(model: Any) -> list[str] | None:
    """The named inputs of the model's signature, or None when it has none."""
    schema = model.metadata.get_input_schema() if model.metadata is not None else None
    return list(schema.input_names()) if schema is not None and schema.has_input_names() else None


def prepare(
    model: Any, frame: pd.DataFrame, features: Sequence[str] | None = None
) -> tuple[Callable[[pd.DataFrame], Any], pd.DataFrame]:
    """The function that predicts and its input in the model's own columns and types; see :func:`predict_proba`."""
    import numpy as np

    names = model_inputs(model) or (list(features) if features else None)
    if not names:
        raise InvalidInputError("the model has no signature with named inputs; give `features`, or log it with one")
    if missing := [name for name in names if name not in frame.columns]:
        raise DataError(f"the data lacks {missing[:5]}, which the model needs; it has {list(frame.columns)[:20]}")
    try:
        inputs = frame[names].astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"the model's features must be numeric: {error}") from error
    infinite = np.isinf(inputs.to_numpy()).any(axis=0)
    if infinite.any():
        raise DataError(f"{[n for n, bad in zip(names, infinite) if bad][:5]} hold infinite values; make them missing")
    raw = model.get_raw_model() if hasattr(model, "get_raw_model") else None
    if classify := getattr(raw, "predict_proba", None):
        return classify, inputs
    return model.predict, _as_signature(model, inputs)


def predict_proba(model: Any, frame: pd.DataFrame, features: Sequence[str] | None = None) -> np.ndarray:
    """The probability of the positive class for each row of ``frame``.

    :param model: what :func:`load` returned; a classifier with ``predict_proba`` or a model that predicts
        probabilities
    :param frame: (n rows, columns); may hold more columns than the model needs and missing values (NaN)
    :param features: the columns to pass, when the model's signature does not name them
    :return: shape (n,), float64, each finite and in [0, 1]
    :raises DataError: the frame lacks a feature, or holds one that is not numeric or is infinite
    :raises InvalidInputError: neither a signature nor ``features`` names the inputs, or the model answers with
        something else than one finite probability for each row
    """
    import numpy as np
    import pandas as pd

    call, inputs = prepare(model, frame, features)
    if not len(inputs):
        return np.empty(0)
    answer = call(inputs)
    values = answer.to_numpy() if isinstance(answer, pd.DataFrame | pd.Series) else np.asarray(answer)
    if values.ndim == 2 and values.shape[1] in (1, 2):
        values = values[:, -1]
    if values.shape != (len(inputs),):
        raise InvalidInputError(
            f"the model answered with shape {values.shape} for {len(inputs)} rows; expected one probability a row"
        )
    if not np.issubdtype(values.dtype, np.floating):
        raise InvalidInputError(
            f"the model answers with {values.dtype} values, not probabilities; log a Booster, or a classifier with "
            "pyfunc_predict_fn='predict_proba'"
        )
    values = values.astype(np.float64)
    wrong = ~(np.isfinite(values) & (values >= 0) & (values <= 1))
    if wrong.any():
        raise InvalidInputError(
            f"{int(wrong.sum())} of {len(values)} predictions are not probabilities (first: {values[wrong][0]}); "
            "expected finite numbers from 0 to 1"
        )
    return values


def _as_signature(model: Any, inputs: pd.DataFrame) -> pd.DataFrame:
    """``inputs`` in the types the signature asks for: pyfunc refuses a float column where it logged an integer."""
    import numpy as np
    import pandas as pd

    schema = model.metadata.get_input_schema() if model.metadata is not None else None
    if schema is None or not schema.has_input_names():
        return inputs
    wanted = {name: kind.to_numpy() for name, kind in schema.input_types_dict().items()}
    columns = {}
    for name, values in inputs.items():
        kind = np.dtype(wanted[name])
        if kind.kind in "iu" and values.isna().any():
            raise DataError(f"{name} has missing values but the model was logged with integers; log it as float64")
        columns[name] = values.astype(kind)
    return pd.DataFrame(columns, index=inputs.index)
