"""What the README and the pages beside it name is there: modules, what is in them, files and headings."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re
from typing import Any

import pytest

import airflow_mlops.drift

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = "operators|sensors|triggers|hooks|notifications|decorators"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def find(name: str) -> Any:
    """The module, or what is in one, that a dotted name (an entry point's colon is a dot) stands for."""
    parts = name.replace(":", ".").split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def imports(text: str) -> set[str]:
    """What the Python blocks of a page import from the package."""
    found = set()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for module, names in re.findall(r"^from (airflow_mlops[\w.]*) import ([\w, ]+)$", block, re.MULTILINE):
            found |= {f"{module}.{name.strip()}" for name in names.split(",")}
    return found


@pytest.mark.parametrize("name", airflow_mlops.drift.__all__)
def test_every_public_name_of_drift_is_there(name):
    found = getattr(airflow_mlops.drift, name)
    assert found.__name__ == name and found.__module__.startswith("airflow_mlops.drift.") and found.__doc__


def test_the_public_names_of_drift_are_in_order_and_all_that_is_imported():
    names = airflow_mlops.drift.__all__
    assert names == sorted(set(names))
    assert names == sorted(
        name
        for name, value in vars(airflow_mlops.drift).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    )


@pages
def test_names_of_the_package_resolve(page):
    text = page.read_text()
    names = set(re.findall(r"\bairflow_mlops(?:\.\w+)+(?::\w+)?", text)) | imports(text)
    names |= {f"airflow_mlops.{name}" for name in re.findall(rf"`((?:{SHELL})\.\w+\.\w+)`", text)}
    assert names or page.name == "CONTRIBUTING.md"
    for name in sorted(names):
        find(name)


@pages
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
        assert not heading or heading in anchors, target
