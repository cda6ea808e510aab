"""What no run can tell about the flights model: what it is for, and what it is not."""

from __future__ import annotations

from typing import Any

#: For :mod:`airflow_mlops.provenance.card`.
DOCUMENTATION: dict[str, Any] = {
    "description": "Probability that a flight from New York arrives more than 15 minutes late, two hours before its "
    "scheduled departure.",
    "purpose": "binary classification",
    "approach": "supervised",
    "family": "gradient-boosted trees",
    "architecture": "XGBoost, binary:logistic",
    "domain": "air traffic",
    "supplier": "airflow-mlops examples",
    "license": "Apache-2.0",
    "autonomy": "advisory: it gives a probability, a person or another system decides",
    "standards": "CycloneDX 1.6 ML-BOM; conformity with a regulation has not been assessed",
    "users": ["people who learn how a model is kept trained"],
    "intended_use": ["to show continuous training on data that drift"],
    "application": "an example on public data of 2013; not for the planning of real flights",
    "limitations": [
        "learned from flights of 2013 that left EWR, JFK or LGA; says nothing of other airports or years",
        "cancelled and diverted flights have no label and are left out, so it speaks of flights that arrive",
        "delays of a kind that the months before did not have are not foreseen",
    ],
    "ethics": [
        {
            "name": "carriers and airports are features, so a prediction can follow a carrier's past",
            "mitigation": "the gate judges each airport of departure by itself",
        }
    ],
    "safety": "a wrong prediction costs nothing but the example's score; it must steer nothing that people rely on",
    "explainability": "trees on named columns: XGBoost's own gain and SHAP values explain each prediction",
    "preprocessing": "point-in-time join of feature views as of two hours before departure; missing values stay so",
    "decision_threshold": "the probability is used as it is; a class, where one is wanted, is late from 0.5 on",
    "personal_data": "no: flights, aircraft and weather; a tail number is not a feature",
    "links": {
        "website": "https://pypi.org/project/airflow-mlops/",
        "documentation": "https://doi.org/10.1145/2939672.2939785",
    },
    # Busy power assumed, as Green Algorithms does where the hardware is not known; no meter was read.
    "energy": {"cpu_watts": 12.0, "gpu_watts": 200.0},
}
