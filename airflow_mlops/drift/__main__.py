"""``python -m airflow_mlops.drift SPEC``: the profile of a dataset, built on the Ray cluster that this runs on.

``SPEC`` is JSON with ``uri``, ``columns``, ``categorical``, ``num_cpus``, ``job`` and ``output``, the URI that gets
``{"job", "profile"}``, or ``{"job", "error"}`` where the data cannot be profiled.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from airflow_mlops import storage
from airflow_mlops.drift.profile import Profile
from airflow_mlops.exceptions import InvalidInputError


def main(arguments: Sequence[str], build: Callable[..., Profile]) -> int:
    """Do what ``arguments`` say with ``build``; the exit code."""
    spec = json.loads(arguments[0])
    output, job = spec.pop("output"), spec.pop("job")
    try:
        found: dict[str, Any] = {"profile": build(spec.pop("uri"), **spec).to_json()}
    except InvalidInputError as error:
        found = {"error": str(error)}
    storage.write_json(output, {"job": job, **found})
    return 0


if __name__ == "__main__":
    from airflow_mlops.drift.distributed import RETRIES, profile_on_ray

    # Ray would else try a part of the data for ever that needs more memory than there is.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    sys.exit(main(sys.argv[1:], profile_on_ray))
