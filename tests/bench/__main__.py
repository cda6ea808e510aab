"""``make bench``: one table of ratios against what a user would otherwise run, and the same as JSON.

Not a test: nothing here fails on a slow machine. Each row is measured in one run of this program, ours and theirs.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from tests.bench import canary, drift, gate, imports, month, overhead, signing, waiting

PARTS = {
    "imports": imports,
    "waiting": waiting,
    "overhead": overhead,
    "month": month,
    "drift": drift,
    "canary": canary,
    "gate": gate,
    "signing": signing,
}


def main() -> None:
    """Measure what was asked for, print the table, write ``bench.json``."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--only", choices=list(PARTS), action="append", help="measure just this; repeatable")
    parser.add_argument("--json", default="bench.json", help="where to write the rows")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name, part in PARTS.items():
        if arguments.only is None or name in arguments.only:
            print(f"measuring {name} ...", flush=True)
            rows += part.measure()
    pathlib.Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    header = ["what", "ours", "otherwise", "ratio", "goal", "met"]
    table = [[str(row.get(column, "")) for column in header] for row in rows]
    widths = [max(len(line[i]) for line in [header, *table]) for i in range(len(header))]
    print()
    for line in [header, ["-" * width for width in widths], *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print(f"\nas JSON: {arguments.json}")


if __name__ == "__main__":
    main()
