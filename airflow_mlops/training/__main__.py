"""``python -m airflow_mlops.training --spec FILE_OR_URI``: the same driver for every mode."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import threading
import time

from airflow_mlops import storage
from airflow_mlops.exceptions import MlopsError
from airflow_mlops.training.decide import EXIT_APP
from airflow_mlops.training.driver import drive
from airflow_mlops.training.spec import TrainingSpec

#: Seconds that a driver whose parent is gone has to end by itself.
ORPHAN_GRACE = 15.0


def main(argv: list[str] | None = None) -> int:
    """Run the attempt that ``--spec`` describes; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m airflow_mlops.training", description=__doc__)
    parser.add_argument("--spec", required=True, help="file or URI of the training spec (JSON)")
    parser.add_argument("--parent", type=int, help="end when this parent process, or its end of stdin, is gone")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if arguments.parent:
        threading.Thread(target=_die_with, args=(arguments.parent,), name="lifeline", daemon=True).start()
    try:
        spec = TrainingSpec.from_json(storage.read_json(arguments.spec))
    except (OSError, ValueError, MlopsError) as error:
        logging.error("the training spec %s cannot be read: %s", arguments.spec, error)
        return EXIT_APP
    return drive(spec)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], 1.0)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
