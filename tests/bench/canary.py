"""The judge of a canary against the rules of Kayenta, Argo Rollouts and Flagger, on the same simulated traffic.

Every share of runs comes with its 95 % Wilson interval; seeds are fixed. Argo and Flagger watch the errors alone
("99 % succeed", per minute), which spares them the false alarms of the other nine metrics; Kayenta looks every half
hour at ten. ``python -m tests.bench.canary --full`` takes about ten times the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from airflow_mlops.rollout import Guardrail, Judge, Observation, RolloutPolicy
from tests.support import rivals
from tests.support.rollout_sim import CELLS, FAULTS, FAULTY_WORLDS, Noise, World, faulty, watch

LOOKS = 240
#: Ten guardrails; margins of the means are relative, as those of the rates are.
GUARDRAILS = (
    *(Guardrail.rate(name) for name in ("errors", "timeouts", "fallbacks")),
    replace(Guardrail.latency(quantile=0.95), name="latency p95"),
    replace(Guardrail.latency(quantile=0.99), name="latency p99"),
    *(Guardrail.mean(name, margin=0.5, harm_margin=0.25, relative=True) for name in ("log_loss", "brier")),
    Guardrail.mean("value", margin=0.5, harm_margin=0.25, relative=True, higher_is_better=True),
    Guardrail.score(),
    Guardrail.drift(),
)
ERRORS = GUARDRAILS[:1]
#: Promotes as soon as it can, and gives up with the traffic.
PROMPT = RolloutPolicy(steps=(10, 100), deadline_seconds=60.0 * LOOKS)
#: Watches all looks: promotes none, rolls back for harm only.
PATIENT = RolloutPolicy(steps=(10, 100), bake_seconds=1e6, deadline_seconds=1e7)
NONE = "none looks"
RIVALS = ("Kayenta", "Argo", "Flagger")


@dataclass(frozen=True)
class Runs:
    """How many runs each figure rests on."""

    cell: int = 8
    speed: int = 15
    ratio: int = 50
    fault: int = 1


FULL = Runs(cell=80, speed=101, ratio=500, fault=5)


@dataclass
class Outcome:
    """How one judge's run ended."""

    decision: str
    looks: int
    mismatch: bool


def measure(runs: Runs = Runs()) -> list[dict[str, object]]:
    """Error rates in every cell, minutes to find harm, the sample ratio, the fault matrix."""
    return [*_cells(runs.cell), *_speed(runs.speed), *_sample_ratio(runs.ratio), *_faults(runs.fault)]


def judged(
    policy: RolloutPolicy, observations: Iterable[Observation], guardrails: Sequence[Guardrail] = GUARDRAILS
) -> Outcome:
    """The judge's last verdict, the minutes until then, and whether the sample ratio was ever wrong."""
    judge, mismatch = Judge(policy, guardrails), False
    for observation in observations:
        verdict = judge.observe(observation)
        mismatch = mismatch or "sample ratio" in " ".join(verdict.reasons)
        if verdict.final or verdict.decision == "PROMOTE_STEP":
            break
    return Outcome(verdict.decision, verdict.look - 1, mismatch)


def decided(observations: Iterable[Observation]) -> dict[str, rivals.Decision]:
    """What the others decide."""
    observations = list(observations)
    control, experiment = rivals.readings(observations)
    succeeded = [None if o.problem else 1 - share for o, share in zip(observations[1:], experiment["errors"])]
    return {
        "Kayenta": rivals.kayenta(control, experiment, rivals.DIRECTIONS),
        "Argo": rivals.argo(succeeded),
        "Flagger": rivals.flagger(succeeded),
    }


def wilson(hits: int, runs: int) -> str:
    """Percent with its 95 % interval."""
    z, share = 1.96, hits / runs
    middle = (share + z * z / (2 * runs)) / (1 + z * z / runs)
    half = z / (1 + z * z / runs) * math.sqrt(share * (1 - share) / runs + z * z / (4 * runs * runs))
    return f"{100 * share:.1f} ({100 * max(middle - half, 0):.1f} to {100 * min(middle + half, 1):.1f})"


def _row(what: str, ours: object, otherwise: object, goal: str, met: object) -> dict[str, object]:
    against = "rules of Kayenta, Argo Rollouts and Flagger on the same traffic"
    return {"what": what, "ours": ours, "otherwise": otherwise, "against": against, "goal": goal, "met": met}


def _others(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in shares.items())


def _cells(runs: int) -> list[dict[str, object]]:
    """Equal versions, and one with half as many errors more, in every kind of noise."""
    back, worse, promoted, mismatches = [], [], [], 0
    for cell, noise in CELLS.items():
        equal = [_equal(noise, seed) for seed in range(runs)]
        regressed = [_regressed(noise, 10_000 + seed) for seed in range(runs)]
        mismatches += sum(run["patient"].mismatch for run in equal)
        traffic = f"{cell}, 100 canary requests/min, {runs} runs"
        count = sum(run["patient"].decision == "ROLLBACK" for run in equal)
        what = f"equal canary rolled back within {LOOKS} looks of 10 guardrails, %: {traffic}"
        back.append(_row(what, wilson(count, runs), _shares(equal, False), "<= 5", count <= 0.05 * runs))
        count = sum(run["prompt"].decision == "PROMOTE" for run in regressed)
        what = f"1.5 times the errors promoted within {LOOKS} looks of 10 guardrails, %: {traffic}"
        worse.append(_row(what, wilson(count, runs), _shares(regressed, True), "<= 5", count <= 0.05 * runs))
        for judge, guardrails in (("errors", "errors alone"), ("prompt", "10 guardrails")):
            good = [run[judge].looks for run in equal if run[judge].decision == "PROMOTE"]
            median = f", median {statistics.median(good):g} min" if good else ""
            what = f"equal canary promoted within {LOOKS} looks of {guardrails}, %: {traffic}"
            ours = wilson(len(good), runs) + median
            goal = (">= 97", len(good) >= 0.97 * runs) if not noise.replicas else ("", "")
            promoted.append(_row(what, ours, _shares(equal, True), *goal))
    what = f"sample ratio called wrong though it is right, within {LOOKS} looks, %: {runs * len(CELLS)} runs"
    wrong = _row(what, wilson(mismatches, runs * len(CELLS)), NONE, "<= 1", mismatches <= 0.01 * runs * len(CELLS))
    return [*back, *worse, *promoted, wrong]


def _equal(noise: Noise, seed: int) -> dict[str, Any]:
    observations = list(watch(World(noise), seed))
    return {
        "patient": judged(PATIENT, observations),
        "prompt": judged(PROMPT, observations),
        "errors": judged(PROMPT, observations, ERRORS),
        **decided(observations),
    }


def _regressed(noise: Noise, seed: int) -> dict[str, Any]:
    observations = list(watch(World(noise, {"errors": 1.5}), seed))
    return {"prompt": judged(PROMPT, observations), **decided(observations)}


def _shares(runs: Sequence[Mapping[str, Any]], promoted: bool) -> str:
    """Percent of the runs that the others promoted, or did not."""
    return _others({name: 100 * sum(run[name].promoted == promoted for run in runs) / len(runs) for name in RIVALS})


def _speed(runs: int) -> list[dict[str, object]]:
    """Minutes until a doubling and a fivefold of 0.5 % errors are found."""
    rows = []
    for per_minute, times, goal in ((100, 2, 40), (100, 5, 3), (1000, 2, 5), (1000, 5, 1)):
        world = World(worse={"errors": times}, traffic=10 * per_minute, looks=LOOKS if times == 2 else 60)
        found: dict[str, list[float]] = {name: [] for name in ("errors", "ten", *RIVALS)}
        for seed in range(runs):
            observations = list(watch(world, seed))
            for name, guardrails in (("errors", ERRORS), ("ten", GUARDRAILS)):
                outcome = judged(PATIENT, observations, guardrails)
                found[name].append(outcome.looks if outcome.decision == "ROLLBACK" else math.inf)
            for name, decision in decided(observations).items():
                found[name].append(math.inf if decision.promoted else decision.after)
        medians = {name: statistics.median(minutes) for name, minutes in found.items()}
        what = f"median minutes to find {times} times the errors, %s, {per_minute} canary requests/min, {runs} runs"
        others = _others({name: medians[name] for name in RIVALS}) + " (and equal ones, see above)"
        rows += [
            _row(what % "errors alone", f"{medians['errors']:g}", others, f"<= {goal}", medians["errors"] <= goal),
            _row(what % "10 guardrails", f"{medians['ten']:g}", others, "", ""),
        ]
    return rows


def _sample_ratio(runs: int) -> list[dict[str, object]]:
    """Requests until 8 % instead of 10 % of them at the canary are noticed."""
    found = []
    for seed in range(runs):
        observations = watch(World(traffic=200, share=0.08, replicas=2), seed)
        judge = Judge(PATIENT, [Guardrail.errors()])
        for observation in observations:
            verdict = judge.observe(observation)
            if any("sample ratio" in reason for reason in verdict.reasons):
                found.append(sum(observation.routed or (0, 0)))
                break
        else:
            found.append(10**9)
    median = statistics.median(found)
    goal = "<= 5000"
    return [_row(f"median requests to find 8 % for 10 %, {runs} runs", f"{median:g}", NONE, goal, median <= 5000)]


def _faults(runs: int) -> list[dict[str, object]]:
    """Promotions although a fault was there from the first look to the last."""
    rows = []
    for version, worse, expected in (("equal", {}, "PROMOTE"), ("twice the errors", {"errors": 2.0}, "ROLLBACK")):
        promoted: dict[str, list[str]] = {name: [] for name in ("ours", *RIVALS)}
        sound: list[str] = []
        for replicas in (1, 10):
            world = World(worse=worse, traffic=10_000, looks=60, replicas=replicas)
            sound += [judged(PROMPT, watch(world, seed)).decision for seed in range(runs)]
            for fault in [*FAULTS, *FAULTY_WORLDS]:
                for seed in range(runs):
                    observations = list(faulty(world, seed, fault))
                    ours = [judged(PROMPT, observations, guardrails).decision for guardrails in (GUARDRAILS, ERRORS)]
                    promoted["ours"] += [fault] * ("PROMOTE" in ours)
                    for name, decision in decided(observations).items():
                        promoted[name] += [fault] * decision.promoted
        right = sound.count(expected)
        what = (
            f"promoted with a fault throughout: {version}, {len(FAULTS | FAULTY_WORLDS)} faults, 1 and 10 replicas, "
            f"{runs * 2 * len(FAULTS | FAULTY_WORLDS)} runs of 10 guardrails and of errors alone; "
            f"{expected} without a fault: {right} of {len(sound)}"
        )
        ours_text = str(len(promoted["ours"])) + "".join(f", {fault}" for fault in sorted(set(promoted["ours"])))
        others = _others({name: len(promoted[name]) for name in RIVALS})
        row = _row(what, ours_text, others, "0", not promoted["ours"] and right == len(sound))
        rows.append(row | {"promoted": {name: sorted(set(faults)) for name, faults in promoted.items()}})
    return rows


def main() -> None:
    """The rows as JSON, and what they took."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.canary", description=__doc__)
    parser.add_argument("--full", action="store_true", help="ten times the runs")
    started = time.process_time()
    rows = measure(FULL if parser.parse_args().full else Runs())
    print(json.dumps(rows, indent=1))
    print(f"{time.process_time() - started:.0f} s of processor time")


if __name__ == "__main__":
    main()
