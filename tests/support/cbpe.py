"""Four seeded data sets, and NannyML's estimates of performance on them, recorded beside this file.

To record them again, in an environment of its own (NannyML does not install beside this package's dependencies)::

    uv venv --python 3.11 nml && VIRTUAL_ENV=nml uv pip install nannyml==0.13.1 statsmodels==0.15.0
    NML_DISABLE_USAGE_LOGGING=1 nml/bin/python tests/support/cbpe.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

RECORDED = Path(__file__).with_name("cbpe.json")
REFERENCE, WINDOW, WINDOWS = 20_000, 5_000, 6
METRICS = ("roc_auc", "accuracy", "precision", "recall")
#: name -> seed, mean logit, what the model makes of a logit, decimals of a score, threshold
DATA = {
    "calibrated": (1, -1.0, (0.0, 1.0), 12, 0.5),
    "overconfident": (2, -0.5, (0.4, 1.8), 12, 0.5),
    "coarse": (3, 0.0, (-0.3, 0.7), 2, 0.6),
    "rare": (4, -4.0, (0.8, 0.8), 12, 0.1),
}


def draw(name: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Scores, labels and true probabilities of the reference, then of each window; features move, their meaning not.

    From ``RandomState``, whose stream NumPy keeps the same in every version.
    """
    seed, mean, (intercept, slope), decimals, _ = DATA[name]
    rng = np.random.RandomState(seed)
    for number in range(WINDOWS + 1):
        rows = WINDOW if number else REFERENCE
        logit = mean + 0.15 * number + (1.2 - 0.12 * number) * rng.standard_normal(rows)
        probability = 1 / (1 + np.exp(-logit))
        label = (rng.random_sample(rows) < probability).astype(int)
        yield np.round(1 / (1 + np.exp(-(intercept + slope * logit))), decimals), label, probability


def record() -> None:
    """Let NannyML estimate, and write what it says."""
    import nannyml
    import pandas as pd

    estimates = {}
    for name, (*_, threshold) in DATA.items():
        reference, *windows = (
            pd.DataFrame({"score": score, "predicted": (score >= threshold).astype(int), "label": label})
            for score, label, _ in draw(name)
        )
        estimator = nannyml.CBPE(
            problem_type="classification_binary",
            y_pred_proba="score",
            y_pred="predicted",
            y_true="label",
            metrics=list(METRICS),
            chunk_size=WINDOW,
        ).fit(reference)
        found = estimator.estimate(pd.concat(windows, ignore_index=True).drop(columns="label")).to_df()
        estimates[name] = {
            metric: [round(value, 6) for value in found[(metric, "value")][-WINDOWS:]] for metric in METRICS
        }
    RECORDED.write_text(json.dumps({"nannyml": nannyml.__version__, "estimates": estimates}, indent=1) + "\n")


if __name__ == "__main__":
    record()
