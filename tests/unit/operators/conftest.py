from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def rendered() -> Any:
    """``rendered(operator, name=value...)``: the operator after Airflow rendered its templates with these names."""

    def render(operator: Any, **names: Any) -> Any:
        operator.render_template_fields(names)
        return operator

    return render


@pytest.fixture
def untemplated() -> Any:
    """``untemplated(operator_class)``: arguments of its own that are not rendered."""
    import inspect

    def find(operator: type) -> set[str]:
        own: set[str] = set()
        for base in operator.__mro__:
            if base.__module__.startswith("airflow_mlops"):
                own |= {
                    name
                    for name, given in inspect.signature(base.__init__).parameters.items()
                    if given.kind is given.KEYWORD_ONLY
                }
        return own - set(operator.template_fields)

    return find
