"""A real Airflow keeps a real model trained, on this machine, in one folder."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from airflow_mlops.embedded import page, stack, summary
from airflow_mlops.embedded.months import BOOTSTRAP_MONTH, YEAR, MonthRunner, parse_months
from airflow_mlops.embedded.progress import Progress
from airflow_mlops.embedded.stack import Stack
from airflow_mlops.embedded.summary import MonthSummary
from airflow_mlops.exceptions import InvalidInputError, MlopsError

_SOURCE = Path(__file__).resolve().parents[2]
_TABLE_WIDTH = 150


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="airflow-mlops-demo", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(".demo"), help="folder of everything it writes (.demo)")
    parser.add_argument("--months", default="4-7", help=f"months of {YEAR} after the first champion (4-7)")
    parser.add_argument("--port", type=int, help="of Airflow's UI; a free one by default")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for all months together (3600)")
    parser.add_argument("--keep", action="store_true", help="leave everything running until Ctrl-C, with MLflow's UI")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier demo in the folder did")
    parser.add_argument("--clean", action="store_true", help="stop what runs in the folder and delete it")
    parser.add_argument("--dags", type=Path, default=_SOURCE / "dags", help="folder of Dag files")
    parser.add_argument("--dag-id", default="continuous_training", help="the Dag that is backfilled")
    parser.add_argument("--feature-repo", type=Path, default=_SOURCE / "feature_repo", help="Feast repository")
    parser.add_argument("--no-ray", action="store_true", help="start no Ray, for Dags that need none")
    return parser


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    root = args.root.absolute()
    # A shell starts background jobs with SIGINT ignored, and all children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.signal(signal.SIGHUP, _on_sigterm)
    try:
        if args.clean:
            stack.clean(root)
            _say(f"{root} is gone")
            return 0
        return _run(args, root)
    except KeyboardInterrupt:
        _say("\nstopped; nothing is left running. Starting again goes on where this ended.")
        return 130
    except MlopsError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        if root.exists():
            print(f"Nothing is left running; the folder {root} is kept for a look.", file=sys.stderr, flush=True)
        return 1


def _run(args: argparse.Namespace, root: Path) -> int:
    months = [f"{YEAR}-{BOOTSTRAP_MONTH:02d}", *parse_months(args.months)]
    if not args.dags.is_dir():
        raise InvalidInputError(f"there is no folder of Dags at {args.dags}; give it with --dags")
    if args.fresh:
        stack.clean(root)
    _say(f"Everything below is written to {root} and listens on 127.0.0.1 only.")
    begin = time.monotonic()
    whole = Stack(
        root,
        dags_folder=args.dags,
        feature_repo=args.feature_repo if args.feature_repo.is_dir() else None,
        port=args.port,
        with_ray=not args.no_ray,
        report=lambda line: _say(f"  {line}"),
    )
    with _stopping(whole):
        whole.start()
        _say(f"  Airflow's UI needs no login: whoever is on this machine is admin. {whole.airflow.url}")
        try:
            _train_through(args, whole, months)
        except MlopsError as error:
            if not args.keep:
                raise
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
            _wait_for_user(whole)
            return 1
        _show(whole.project, months)
        peak = sum(whole.memory_mb().values())
        _say(f"{len(months)} months in {time.monotonic() - begin:.0f} s; the stack holds {peak / 1024:.1f} GiB")
        if args.keep:
            _wait_for_user(whole)
    _say(f"Everything is stopped. The folder can be deleted: {root}")
    return 0


@contextlib.contextmanager
def _stopping(whole: Stack) -> Iterator[None]:
    """Stop the stack at the end, whatever ended it; a second Ctrl-C does not leave it half stopped."""
    try:
        yield
    finally:
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sig, signal.SIG_IGN)
        try:
            whole.stop()
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for sig in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(sig, _on_sigterm)


def _train_through(args: argparse.Namespace, whole: Stack, months: list[str]) -> None:
    with Progress() as progress:
        runner = MonthRunner(
            whole.client(),
            args.dag_id,
            months,
            on_update=progress.update,
            check=whole.check,
            timeout=args.timeout,
        )
        kept = runner.run()
    if kept:
        _say(f"An earlier start had finished {', '.join(kept)}; nothing was done twice. --fresh begins anew.")


def _wait_for_user(whole: Stack) -> None:
    """Keep everything running until Ctrl-C."""
    _say(f"\nAirflow  {whole.airflow.url}  (no login)")
    _say(f"MLflow   {whole.start_mlflow_server()}")
    if whole.ray is not None:
        _say(f"Ray      {whole.ray.dashboard_url}  (asks for the token: 'ray' in {whole.root / 'secrets.json'})")
    _say("Ctrl-C stops everything.")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
            whole.check()


def _show(project: Path, months: list[str]) -> None:
    summaries = summary.read(project, months)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_TABLE_WIDTH)
    console.print(_table(summaries))
    lacking = sorted(set(months) - {entry.month for entry in summaries})
    if lacking:
        _say(f"no ledger entry for {', '.join(lacking)} in {project / 'ledger'}: the Dag's last task writes them")
    if card := summary.card_of(summaries):
        _say(f"Model card of the champion: {card}")
    _say(f"Page with plots and the evidence of every decision: {page.write(project.parent / 'demo.html', summaries)}")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(summaries: list[MonthSummary]) -> Table:
    table = Table(title="Champion kept by the loop against the model frozen in March", title_justify="left")
    for heading in ("month", "drift verdict", "retrained"):
        table.add_column(heading)
    for heading in ("AUC champion", "frozen", "log loss champion", "frozen"):
        table.add_column(heading, justify="right")
    for heading in ("gate", "canary"):
        table.add_column(heading)
    table.add_column("CPU/GPU s", justify="right")
    for entry in summaries:
        columns = f" ({', '.join(entry.columns[:2])})" if entry.columns else ""
        scores = [entry.champion, entry.frozen]
        better = entry.gain is not None and entry.gain > 0
        losses = [_number(score.log_loss if score else None, 4) for score in scores]
        table.add_row(
            entry.month,
            entry.verdict + columns,
            "yes" if entry.retrained else "no",
            *[_number(score.auc if score else None, 4) for score in scores],
            f"[bold]{losses[0]}[/bold]" if better else losses[0],
            losses[1],
            entry.gate,
            entry.canary,
            f"{_number(entry.cpu_seconds, 1)}/{_number(entry.gpu_seconds, 1)}" if entry.retrained else "-",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
