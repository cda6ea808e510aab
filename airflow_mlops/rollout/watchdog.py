"""``python -m airflow_mlops.rollout.watchdog``: ends a canary that nobody renews, from within the cluster.

It follows one claim of one target (both in the environment, see :mod:`airflow_mlops.rollout.targets.watch`). When the
claim has been over for as long as it lasted, traffic goes back to stable; when it was freed, or a new claim has a
watchdog of its own, there is nothing to do. It ends with 0 in either case.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from airflow_mlops.exceptions import InvalidInputError, MlopsError
from airflow_mlops.rollout.targets.base import KubernetesTarget
from airflow_mlops.rollout.targets.factory import cluster_target
from airflow_mlops.rollout.targets.incluster import InClusterClient
from airflow_mlops.rollout.targets.watch import CONFIG_VARIABLE, NUMBER_VARIABLE

log = logging.getLogger("airflow_mlops.rollout.watchdog")
#: Seconds between two looks at most.
LONGEST = 10.0


async def watch(
    target: KubernetesTarget, number: int, sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep
) -> None:
    """Look until there is nothing left to watch; whatever fails is tried again."""
    ttl = 3 * LONGEST
    while True:
        try:
            claim = await target.lease.read()
            ttl = claim.ttl or ttl
            if await target.expire(number, ttl):
                log.info("claim %s of %s needs no watching any more", number, target.name)
                return
        except MlopsError as error:
            log.warning("%s: %s", type(error).__name__, error)
        await sleep(min(max(ttl / 3, 1.0), LONGEST))


def main() -> int:
    """Read the environment and watch."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        config, number = json.loads(os.environ[CONFIG_VARIABLE]), int(os.environ[NUMBER_VARIABLE])
        target = cluster_target(config, InClusterClient())
    except (KeyError, ValueError, InvalidInputError) as error:
        log.error("cannot watch: %s: %s", type(error).__name__, error)
        return 2
    asyncio.run(watch(target, number))
    return 0


if __name__ == "__main__":
    sys.exit(main())
