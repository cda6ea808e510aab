"""The looks that are kept of a rollout."""

from __future__ import annotations

import itertools
import json

from airflow_mlops.rollout.history import History
from airflow_mlops.rollout.judge import Verdict


def fed(looks, waits="HOLD", steps=(30, 700)):
    history = History()
    for look in range(1, looks + 1):
        decision = "PROMOTE_STEP" if look in steps else "ROLLBACK" if look == looks else waits
        account = {"errors": {"status": "open", "stable": 0.1, "canary": None, "e_harm": look, "e_ok": 0.5}}
        history.add(float(look), Verdict(decision, 10, 0, look, [], account, {"stable": look, "canary": 2 * look}))
        if look % 97 == 0:
            history = History.from_json(json.loads(json.dumps(history.to_json())))
    return history


def test_a_look_is_kept_with_its_numbers_and_requests():
    assert fed(2).looks[0] == [1.0, 10, "HOLD", {"errors": ["open", 0.1, None, 1, 0.5]}, [1, 2]]


def test_few_looks_are_kept_of_many_and_all_that_decided():
    for waits in ("HOLD", "APPROVE"):
        looks = fed(5000, waits).looks
        assert len(looks) <= 60
        assert [look[0] for look in looks] == sorted(look[0] for look in looks)
        assert [look[0] for look in looks if look[2] != waits] == [30.0, 700.0, 5000.0]
        gaps = [after[0] - before[0] for before, after in itertools.pairwise(looks)]
        assert max(gaps) <= 2 * 128


def test_nothing_of_nothing():
    assert History.from_json(None).looks == [] and History.from_json({}).to_json() == {"every": 1, "looks": []}
