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

from airflow_mlops.rollout import Guardrail, Judge, Observation, RolloutPolicy, Verdict
from tests.support import rivals
from tests.support.rollout_sim import CELLS, FAULTS, FAULTY_WORLDS, World, faulty, watch

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
#: Promotes as soon as it can, and gives up with the traffic.
PROMPT = RolloutPolicy(steps=(10, 100), deadline_seconds=60.0 * LOOKS)
#: Watches all looks: promotes none, rolls back for harm only.
PATIENT = RolloutPolicy(steps=(10, 100), bake_seconds=1e6, deadline_seconds=1e7)
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

    verdict: Verdict
    looks: int
    requests: int
    mismatch: bool


def measure(runs: Runs = Runs()) -> list[dict[str, object]]:
    """Error rates in every cell, minutes to find harm, the sample ratio, the fault matrix."""
    return [*_cells(runs.cell), *_speed(runs.speed), *_sample_ratio(runs.ratio), *_faults(runs.fault)]


def judged(
    policy: RolloutPolicy, observations: Iterable[Observation], guardrails: Sequence[Guardrail] = GUARDRAILS
) -> Outcome:
    """The judge's last verdict, the minutes and requests until then, and whether the sample ratio was ever wrong."""
    judge, mismatch = Judge(policy, guardrails), False
    for observation in observations:
        verdict = judge.observe(observation)
        mismatch = mismatch or "sample ratio" in " ".join(verdict.reasons)
        if verdict.final or verdict.decision == "PROMOTE_STEP":
            break
    return Outcome(verdict, verdict.look - 1, sum(verdict.requests.values()), mismatch)


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


def _row(what: str, ours: object, otherwise: object, goal: str, met: bool, ratio: object = "") -> dict[str, object]:
    against = "rules of Kayenta, Argo Rollouts and Flagger on the same traffic; ratio: the nearest of them"
    return {"what": what, "ours": ours, "otherwise": otherwise, "ratio": ratio, "against": against} | {
        "goal": goal,
        "met": met,
    }


def _others(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in shares.items())


def _cells(runs: int) -> list[dict[str, object]]:
    """Equal versions, and one with half as many errors more, in every kind of noise."""
    rows: dict[str, list[dict[str, object]]] = {"back": [], "promoted": [], "worse": []}
    mismatches = 0
    for cell, noise in CELLS.items():
        patient, prompt, others = [], [], []
        for seed in range(runs):
            observations = list(watch(World(noise), seed))
            patient.append(judged(PATIENT, observations))
            prompt.append(judged(PROMPT, observations))
            others.append(decided(observations))
        worse, others_worse = [], []
        for seed in range(runs):
            observations = list(watch(World(noise, {"errors": 1.5}), 10_000 + seed))
            worse.append(judged(PROMPT, observations))
            others_worse.append(decided(observations))
        mismatches += sum(outcome.mismatch for outcome in patient)
        traffic = f"{cell}, 100 canary requests/min, 10 guardrails, {runs} runs"
        back = sum(outcome.verdict.decision == "ROLLBACK" for outcome in patient)
        rows["back"].append(
            _row(
                f"equal canary rolled back within {LOOKS} looks, %: {traffic}",
                wilson(back, runs),
                _others({name: 100 * sum(not o[name].promoted for o in others) / runs for name in RIVALS}),
                "<= 5",
                back <= 0.05 * runs,
            )
        )
        good = [outcome for outcome in prompt if outcome.verdict.decision == "PROMOTE"]
        median = f", median {statistics.median(o.looks for o in good):.0f} min" if good else ""
        rows["promoted"].append(
            _row(
                f"equal canary promoted within {LOOKS} looks, %: {traffic}",
                wilson(len(good), runs) + median,
                _others({name: 100 * sum(o[name].promoted for o in others) / runs for name in RIVALS}),
                ">= 97",
                len(good) >= 0.97 * runs,
            )
        )
        bad = sum(outcome.verdict.decision == "PROMOTE" for outcome in worse)
        rows["worse"].append(
            _row(
                f"1.5 times the errors promoted within {LOOKS} looks, %: {traffic}",
                wilson(bad, runs),
                _others({name: 100 * sum(o[name].promoted for o in others_worse) / runs for name in RIVALS}),
                "<= 5",
                bad <= 0.05 * runs,
            )
        )
    false_alarm = _row(
        f"sample ratio called wrong though it is right, % of {runs * len(CELLS)} runs of {LOOKS} looks",
        wilson(mismatches, runs * len(CELLS)),
        "none looks",
        "<= 1",
        mismatches <= 0.01 * runs * len(CELLS),
    )
    return [*rows["back"], *rows["worse"], *rows["promoted"], false_alarm]


def _speed(runs: int) -> list[dict[str, object]]:
    """Minutes until a doubling and a fivefold of 0.5 % errors are found."""
    rows = []
    for per_minute, times, goal in ((100, 2, 40), (100, 5, 3), (1000, 2, 5), (1000, 5, 1)):
        ours, others = [], []
        looks = LOOKS if times == 2 else 60
        for seed in range(runs):
            observations = list(watch(World(worse={"errors": times}, traffic=10 * per_minute, looks=looks), seed))
            outcome = judged(PATIENT, observations)
            ours.append(outcome.looks if outcome.verdict.decision == "ROLLBACK" else math.inf)
            decisions = decided(observations)
            others.append({name: math.inf if d.promoted else d.after for name, d in decisions.items()})
        median = statistics.median(ours)
        medians = {name: statistics.median(other[name] for other in others) for name in RIVALS}
        missed = sum(math.isinf(minutes) for minutes in ours)
        rows.append(
            _row(
                f"median minutes to find {times} times the errors, {per_minute} canary requests/min, {runs} runs",
                f"{median:g}" + (f" (not in {missed})" if missed else ""),
                _others(medians),
                f"<= {goal}",
                median <= goal,
                round(min(medians.values()) / median, 1),
            )
        )
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
    return [
        _row(f"median requests to find 8 % for 10 %, {runs} runs", f"{median:g}", "none looks", goal, median <= 5000)
    ]


def _faults(runs: int) -> list[dict[str, object]]:
    """Promotions although a fault was there from the first look to the last."""
    sets = {"10 guardrails": GUARDRAILS, "errors alone": GUARDRAILS[:1]}
    versions: dict[str, Mapping[str, float]] = {"equal": {}, "twice the errors": {"errors": 2.0}}
    traffic = World(traffic=10_000, looks=60)
    rows = []
    for version, worse in versions.items():
        world = replace(traffic, worse=worse)
        ours: list[str] = []
        others: dict[str, list[str]] = {name: [] for name in RIVALS}
        for fault in [*FAULTS, *FAULTY_WORLDS]:
            for seed in range(runs):
                observations = list(faulty(world, seed, fault))
                ours += [
                    f"{fault} ({name})"
                    for name, guardrails in sets.items()
                    if judged(PROMPT, observations, guardrails).verdict.decision == "PROMOTE"
                ]
                for name, decision in decided(observations).items():
                    others[name] += [fault] * decision.promoted
        sound = [judged(PROMPT, watch(world, seed)).verdict.decision for seed in range(runs)]
        count = runs * len(FAULTS | FAULTY_WORLDS)
        expected = "PROMOTE" if version == "equal" else "ROLLBACK"
        rows.append(
            _row(
                f"{version}, promoted despite a fault, of {count} runs (x 2 for ours: ten guardrails, one); "
                f"without one {expected} in {sound.count(expected)} of {runs}",
                len(ours),
                _others({name: len(faults) for name, faults in others.items()}),
                "0",
                not ours and sound.count(expected) == runs,
            )
            | {"promoted": {"ours": sorted(set(ours)), **{n: sorted(set(f)) for n, f in others.items()}}}
        )
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
