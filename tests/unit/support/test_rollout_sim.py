"""The simulated canary: its noise is what it says, its counters add up, its faults are faults."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from support.rollout_sim import CELLS, FAULTS, FAULTY_WORLDS, RATES, SHAPES, Canary, Noise, World, faulty, watch


def requests(arm):
    return sum(counters["counts"]["requests"] for counters in arm.values())


def share(arm, name):
    return sum(counters["counts"][name] for counters in arm.values()) / requests(arm)


def factors(noise, looks=4000, replicas=10):
    return np.log(noise.factors(np.random.default_rng(1), looks, replicas))


def test_shared_noise_is_the_same_in_both_arms_and_of_the_stated_size():
    logs = factors(Noise(looks=1.0))
    assert np.ptp(logs, axis=(1, 2)).max() == 0
    assert logs.std() == pytest.approx(1, abs=0.05) and np.exp(logs).mean() == pytest.approx(1, abs=0.1)
    series = factors(Noise(looks=0.5, memory=0.8))[:, 0, 0]
    assert series.std() == pytest.approx(0.5, abs=0.05)
    assert np.corrcoef(series[1:], series[:-1])[0, 1] == pytest.approx(0.8, abs=0.03)


def test_an_arms_own_noise_differs_between_arms_not_between_its_replicas():
    logs = factors(Noise(arms=0.3, memory=0.8))
    assert np.ptp(logs, axis=2).max() == 0
    assert abs(np.corrcoef(logs[:, 0, 0], logs[:, 1, 0])[0, 1]) < 0.1


def test_replicas_differ_for_the_whole_run():
    logs = factors(Noise(replicas=0.2), looks=3, replicas=2000)
    assert np.ptp(logs, axis=0).max() == 0
    assert logs.std() == pytest.approx(0.2, abs=0.01) and np.exp(logs).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("cell", CELLS)
def test_counters_rise_add_up_and_follow_the_versions(cell):
    world = World(CELLS[cell], {"errors": 3.0, "latency": 2.0, "value": 0.5}, traffic=20_000, looks=90)
    first, *_, last = watch(world, 1)
    assert requests(first.stable) == requests(first.canary) == 0 and first.routed == (0, 0)
    assert (requests(last.stable), requests(last.canary)) == last.routed
    assert last.routed[1] / sum(last.routed) == pytest.approx(0.1, abs=0.001)
    assert share(last.canary, "errors") / share(last.stable, "errors") == pytest.approx(3, rel=0.4)
    assert share(last.canary, "timeouts") / share(last.stable, "timeouts") == pytest.approx(1, rel=0.4)
    for counters in last.stable.values():
        n = counters["counts"]["requests"]
        assert all(sum(histogram["counts"]) == n for histogram in counters["histograms"].values())
        assert all(values[0] == n for values in counters["moments"].values())
    mean = {
        (arm, name): sum(c["moments"][name][1] for c in getattr(last, arm).values()) / requests(getattr(last, arm))
        for arm in ("stable", "canary")
        for name in ("value", "prediction")
    }
    assert mean["canary", "value"] / mean["stable", "value"] == pytest.approx(0.5, rel=0.3)
    assert mean["canary", "prediction"] / mean["stable", "prediction"] == pytest.approx(1, rel=0.3)
    json.dumps(dataclasses.asdict(last), allow_nan=False)


def test_without_noise_the_metrics_have_their_stated_values():
    *_, last = watch(World(traffic=100_000, looks=10), 2)
    for name, rate in RATES.items():
        assert share(last.stable, name) == pytest.approx(rate, rel=0.05)
    counts = np.sum([counters["histograms"]["latency"]["counts"] for counters in last.stable.values()], axis=0)
    edges = SHAPES["latency"].edges
    assert counts[: np.searchsorted(edges, 0.05)].sum() / counts.sum() == pytest.approx(0.5, abs=0.15)
    slowest = edges[np.searchsorted(counts.cumsum(), 0.95 * counts.sum())]
    assert slowest == pytest.approx(0.05 * math.exp(0.6 * 1.645), rel=0.25)


def test_the_same_seed_gives_the_same_traffic_and_another_another():
    looks = [list(watch(World(CELLS["shared shocks"], looks=70), seed)) for seed in (1, 1, 2)]
    assert looks[0] == looks[1] != looks[2]


def test_a_new_weight_only_shows_the_counters_and_starts_a_new_epoch():
    canary = Canary(World(looks=5), 3)
    looks = [canary.look(weight) for weight in (10, 10, 50, 50)]
    assert requests(looks[2].canary) == requests(looks[1].canary) > 0
    assert looks[2].routed == (0, 0) and looks[2].epoch != looks[1].epoch == looks[0].epoch
    assert looks[3].routed[1] / sum(looks[3].routed) == pytest.approx(0.5, abs=0.08)
    assert [look.time for look in looks] == sorted({look.time for look in looks})


def test_traffic_ends():
    canary = Canary(World(looks=2), 3)
    with pytest.raises(RuntimeError, match="2 minutes"):
        for _ in range(4):
            canary.look(10)


@pytest.mark.parametrize("fault", [*FAULTS, *FAULTY_WORLDS])
def test_each_fault_is_in_every_later_look_and_different_from_sound_traffic(fault):
    world = World(looks=4)
    sound, wrong = list(watch(world, 5)), list(faulty(world, 5, fault))
    assert len(sound) == len(wrong) == 5
    assert all(repr(a) != repr(b) for a, b in list(zip(sound, wrong))[2:])


def test_counters_that_start_anew_hold_one_minute():
    wrong = list(faulty(World(looks=4), 5, "counters reset each look"))
    assert [requests(look.stable) for look in wrong[1:]] == pytest.approx([900] * 4, rel=0.15)
    assert wrong[1].boot == wrong[2].boot and wrong[1].stable.keys() == wrong[2].stable.keys()
