"""The content of a model card (Mitchell et al. 2019, Model Cards for Model Reporting) in CycloneDX's form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from airflow_mlops.provenance.record import ModelRecord


def as_list(value: Any) -> list[Any]:
    """One text or several."""
    return [] if value in (None, "") else list(value) if isinstance(value, list | tuple) else [value]


def energy_of(record: ModelRecord) -> float | None:
    """Energy of the training in kWh, estimated: hours times the power that ``documentation["energy"]`` assumes.

    The method is that of Green Algorithms (Lannelongue et al. 2021) without memory and cooling; CPU hours are hours of
    a busy core. None where hours or watts are not known.
    """
    watts = record.documentation.get("energy") or {}
    cpu, gpu = record.get("cost.cpu_hours"), record.get("cost.gpu_hours")
    if cpu is None or gpu is None or watts.get("cpu_watts") is None or (gpu and watts.get("gpu_watts") is None):
        return None
    return float((cpu * watts["cpu_watts"] + gpu * (watts.get("gpu_watts") or 0.0)) / 1000)


def numbers_of(record: ModelRecord) -> Iterator[tuple[str, float, str | None]]:
    """Name, value and slice of every number that the gate or the training has measured."""
    for arm, metrics in (record.get("gate.metrics") or {}).items():
        if arm == "challenger":
            yield from ((name, value, None) for name, value in (metrics or {}).items() if _number(value))
    for one in record.get("gate.slices") or ():
        if _number(one.get("gain")):
            yield "gain_in_log_loss", one["gain"], f"{one.get('column')}={one.get('value')}"
    yield from ((name, value, "training") for name, value in (record.metrics or {}).items() if _number(value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def model_card(record: ModelRecord) -> dict[str, Any]:
    """``modelCard`` of CycloneDX 1.6; what is not known is left out, for the schema has no word for it."""
    told = record.documentation
    card = {
        "modelParameters": _parameters(record),
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {"type": name, "value": f"{value:.6g}", **({"slice": part} if part else {})}
                for name, value, part in numbers_of(record)
            ]
        },
        "considerations": {
            "users": as_list(told.get("users")),
            "useCases": as_list(told.get("intended_use")),
            "technicalLimitations": as_list(told.get("limitations")),
            "ethicalConsiderations": [
                {"name": one}
                if isinstance(one, str)
                else {"name": one["name"], "mitigationStrategy": one["mitigation"]}
                for one in as_list(told.get("ethics"))
            ],
            "environmentalConsiderations": {"energyConsumptions": _energy(record)},
        },
        "properties": [
            {"name": f"genai:aibom:modelcard:{name}", "value": text}
            for name, text in (
                ("hyperparameter", json.dumps(record.parameters, sort_keys=True) if record.parameters else None),
                ("modelCardExplainability", told.get("explainability")),
            )
            if text
        ],
    }
    return _without_empty(card)


def _parameters(record: ModelRecord) -> dict[str, Any]:
    told = record.documentation
    signature = {"format": "application/vnd.apache.parquet"}
    return {
        "approach": {"type": told["approach"]} if told.get("approach") else None,
        "task": told.get("purpose"),
        "architectureFamily": told.get("family"),
        "modelArchitecture": told.get("architecture") or record.get("training.trainer"),
        "datasets": [{"ref": name} for name in ("training_set", "snapshot") if record.get(f"data.{name}.uri")],
        "inputs": [signature] if record.get("data.training_set.features") else None,
    }


def _energy(record: ModelRecord) -> list[dict[str, Any]]:
    spent = energy_of(record)
    if spent is None:
        return []
    amount = {"value": round(spent, 9), "unit": "kWh"}
    # The schema asks for a provider; nothing here knows which.
    provider = {"organization": {"name": "unknown"}, "energySource": "unknown", "energyProvided": amount}
    return [{"activity": "training", "energyProviders": [provider], "activityEnergyCost": amount}]


def properties(record: ModelRecord) -> list[dict[str, str]]:
    """``metadata.properties``, under the names that the OWASP AIBOM Generator reads (those of SPDX 3's AI profile)."""
    told, spent = record.documentation, energy_of(record)
    watts = told.get("energy") or {}
    cost, data = record.cost, record.get("data.training_set") or {}
    measured = ", ".join(f"{name} {value:.4g}" for name, value, part in numbers_of(record) if part is None)
    window = data.get("window") or {}
    training = (
        f"{record.get('training.trainer') or 'a command'}, {record.get('cluster.num_workers')} workers, "
        f"{data.get('rows')} rows of {window.get('start')} to {window.get('end')}, {cost.get('cpu_hours')} CPU hours, "
        f"{cost.get('gpu_hours')} GPU hours, {cost.get('attempts')} attempts"
    )
    found = {
        "primaryPurpose": told.get("purpose"),
        "suppliedBy": told.get("supplier"),
        "standardCompliance": told.get("standards"),
        "domain": told.get("domain"),
        "autonomyType": told.get("autonomy"),
        "external_references": ", ".join(sorted(map(str, (told.get("links") or {}).values()))),
        "intendedUse": "; ".join(map(str, as_list(told.get("intended_use")))),
        "safetyRiskAssessment": told.get("safety"),
        "energyConsumption": None
        if spent is None
        else f"training, estimated at {watts.get('cpu_watts')} W a busy CPU core and {watts.get('gpu_watts')} W a GPU",
        "energyQuantity": None if spent is None else f"{spent:.9f}",
        "energyUnit": None if spent is None else "kWh",
        "informationAboutTraining": training if record.training else None,
        "informationAboutApplication": told.get("application"),
        "metric": measured,
        "metricDecisionThreshold": told.get("decision_threshold"),
        "modelDataPreprocessing": told.get("preprocessing"),
        "useSensitivePersonalInformation": told.get("personal_data"),
    }
    return [{"name": name, "value": str(value)} for name, value in found.items() if value not in (None, "")]


def _without_empty(value: Any) -> Any:
    """Without what is None or holds nothing."""
    if isinstance(value, Mapping):
        kept = {name: _without_empty(entry) for name, entry in value.items()}
        return {name: entry for name, entry in kept.items() if entry not in (None, "", [], {})}
    if isinstance(value, list):
        return [_without_empty(entry) for entry in value]
    return value
