"""How complete an ML-BOM is, by the published scoring of the OWASP AIBOM Generator.

Fields, categories, tiers, points of the categories and penalties are those of its field registry and scorer
(github.com/GenAI-Security-Project/aibom-generator, ``src/models/field_registry.json`` at 7ea9a6c and
``src/models/scoring.py`` at 74cde08): a category gives its points times the share of its fields that are present, and
the sum is reduced where critical or important fields are missing. Its ten fields of GGUF files count only where present
and are left out here. Two things are stricter here: a field counts as present only with a value that says something
(not ``unknown``, not ``NOASSERTION``), and only in a place that a valid CycloneDX document can have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: Points of each category.
CATEGORIES = {
    "required_fields": 20.0,
    "metadata": 20.0,
    "component_basic": 20.0,
    "component_model_card": 30.0,
    "external_references": 10.0,
}
#: Values that do not make a field present.
SAYS_NOTHING = frozenset({"", "unknown", "noassertion", "not_found", "none", "n/a", "null"})

_MODEL: tuple[Any, ...] = ("components", 0)
_CARD = (*_MODEL, "modelCard")
_PARAMETERS = (*_CARD, "modelParameters")
_CONSIDERATIONS = (*_CARD, "considerations")


def _property(name: str) -> tuple[Any, ...]:
    return ("metadata", "properties", {"name": name}, "value")


def _of_card(name: str) -> tuple[Any, ...]:
    return (*_CARD, "properties", {"name": f"genai:aibom:modelcard:{name}"}, "value")


def _link(kind: str) -> tuple[Any, ...]:
    return (*_MODEL, "externalReferences", {"type": kind}, "url")


@dataclass(frozen=True)
class Field:
    """One field of the registry.

    :param name: the registry's
    :param category: one of :data:`CATEGORIES`
    :param tier: ``critical``, ``important`` or ``supplementary``
    :param places: where it may be, each a path of keys, indices and, in lists, what an entry must have
    """

    name: str
    category: str
    tier: str
    places: tuple[tuple[Any, ...], ...]


def _fields(category: str, tier: str, **places: tuple[tuple[Any, ...], ...]) -> list[Field]:
    return [Field(name, category, tier, where) for name, where in places.items()]


FIELDS: tuple[Field, ...] = (
    *_fields(
        "required_fields",
        "critical",
        bomFormat=(("bomFormat",),),
        specVersion=(("specVersion",),),
        serialNumber=(("serialNumber",),),
        version=(("version",),),
    ),
    *_fields(
        "metadata",
        "critical",
        primaryPurpose=((*_PARAMETERS, "task"), _property("primaryPurpose")),
        suppliedBy=((*_MODEL, "supplier", "name"), _property("suppliedBy")),
    ),
    *_fields(
        "metadata",
        "supplementary",
        standardCompliance=(_property("standardCompliance"),),
        domain=(_property("domain"),),
        autonomyType=(_property("autonomyType"),),
    ),
    *_fields(
        "component_basic",
        "critical",
        name=((*_MODEL, "name"),),
        type=((*_MODEL, "type"),),
        component_version=((*_MODEL, "version"),),
    ),
    *_fields(
        "component_basic",
        "important",
        purl=((*_MODEL, "purl"),),
        description=((*_MODEL, "description"),),
        licenses=((*_MODEL, "licenses"),),
    ),
    *_fields("component_basic", "supplementary", external_references=((*_MODEL, "externalReferences"),)),
    *_fields(
        "component_model_card",
        "important",
        datasets=((*_PARAMETERS, "datasets"),),
        ethicalConsiderations=((*_CONSIDERATIONS, "ethicalConsiderations"),),
        energyConsumption=(
            (*_CONSIDERATIONS, "environmentalConsiderations", "energyConsumptions"),
            _property("energyConsumption"),
        ),
        hyperparameter=(_of_card("hyperparameter"),),
        technicalLimitations=((*_CONSIDERATIONS, "technicalLimitations"),),
        safetyRiskAssessment=(_property("safetyRiskAssessment"),),
        intendedUse=((*_CONSIDERATIONS, "useCases"),),
        typeOfModel=((*_PARAMETERS, "modelArchitecture"),),
    ),
    *_fields(
        "component_model_card",
        "supplementary",
        modelExplainability=(_of_card("modelCardExplainability"),),
        energyQuantity=(_property("energyQuantity"),),
        energyUnit=(_property("energyUnit"),),
        informationAboutTraining=(_property("informationAboutTraining"),),
        informationAboutApplication=(_property("informationAboutApplication"),),
        metric=(_property("metric"),),
        metricDecisionThreshold=(_property("metricDecisionThreshold"),),
        modelDataPreprocessing=(_property("modelDataPreprocessing"),),
        useSensitivePersonalInformation=(_property("useSensitivePersonalInformation"),),
    ),
    *_fields("external_references", "important", downloadLocation=(_link("distribution"),)),
    *_fields(
        "external_references",
        "supplementary",
        paper=(_link("documentation"),),
        vcs=(_link("vcs"),),
        website=(_link("website"),),
    ),
)


@dataclass(frozen=True)
class Completeness:
    """A score of 0 to 100, and what it is made of.

    :param score: points, after the penalty
    :param categories: points of each category
    :param missing: names of the fields that say nothing
    :param penalty: factor for missing critical and important fields, 1 for none
    """

    score: float
    categories: Mapping[str, float]
    missing: tuple[str, ...]
    penalty: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def completeness(bom: Mapping[str, Any]) -> Completeness:
    """Score a CycloneDX document whose first component is the model."""
    absent = [field for field in FIELDS if not any(_says(_at(bom, place)) for place in field.places)]
    points = {}
    for category, most in CATEGORIES.items():
        own = [field for field in FIELDS if field.category == category]
        lost = sum(field.category == category for field in absent)
        points[category] = round(most * (len(own) - lost) / len(own), 1)
    critical = sum(field.tier == "critical" for field in absent)
    important = sum(field.tier == "important" for field in absent)
    penalty = 0.8 if critical > 3 else 0.9 if critical >= 2 else 1.0
    penalty *= 0.95 if important >= 5 else 1.0
    score = round(sum(points.values()) * penalty, 1)
    return Completeness(score, points, tuple(field.name for field in absent), penalty)


def _says(value: Any) -> bool:
    if isinstance(value, Mapping | list):
        return bool(value)
    return value is not None and str(value).strip().lower() not in SAYS_NOTHING


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    """What is at a place of a document; None where there is nothing."""
    for part in place:
        if isinstance(part, Mapping):
            entries = value if isinstance(value, list) else []
            value = next((entry for entry in entries if part.items() <= entry.items()), None)
        elif isinstance(part, int):
            value = value[part] if isinstance(value, list) and len(value) > part else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            return None
    return value
