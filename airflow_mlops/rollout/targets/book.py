"""The books of one route: which request goes where, what came of it, and who may change that.

Plain Python with the clock passed in; the Serve application in :mod:`.ray_serve` gives it a network.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from airflow_mlops.exceptions import ConcurrentChangeError, InvalidInputError
from airflow_mlops.rollout.observation import LATENCY_EDGES
from airflow_mlops.rollout.targets.protocol import ENDED

SLOTS = ("a", "b")
COUNTS = ("requests", "errors", "timeouts", "fallbacks")
MOMENTS = ("latency", "prediction", "log_loss", "brier")
PREDICTION_EDGES = tuple(round(i / 20, 2) for i in range(1, 20))
LOSS_CLIP = 1e-6


def new_counters() -> dict[str, Any]:
    """Counters of a version's replica that has had no request, as the judge reads them."""
    edges = {"latency": LATENCY_EDGES, "prediction": PREDICTION_EDGES}
    return {
        "counts": dict.fromkeys(COUNTS, 0),
        "histograms": {name: {"edges": list(e), "counts": [0] * (len(e) + 1)} for name, e in edges.items()},
        "moments": {name: [0, 0.0, 0.0] for name in MOMENTS},
    }


def share_of(request_id: str, salt: str) -> float:
    """A number in [0, 100) that depends on nothing but its arguments, uniform over request ids."""
    digest = hashlib.blake2b(f"{salt}\0{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 * 100


class Book:
    """Routing, counters and ownership of one route.

    A canary has traffic only while somebody renews its lease: when nobody does for the agreed time, or after the
    router itself was restarted, all traffic goes to stable until the owner is back.

    :param max_remembered: predictions remembered for late labels
    """

    def __init__(self, max_remembered: int = 200_000) -> None:
        self.boot = uuid.uuid4().hex
        self.config: dict[str, Any] = {}
        self.annotation: dict[str, Any] = {}
        self.owner: str | None = None
        self.lease_until = 0.0
        self.stopped = False
        self.epoch = 0
        self.routed = dict.fromkeys(SLOTS, 0)
        self.counters: dict[str, dict[str, dict[str, Any]]] = {}
        self.labels_unknown = 0
        self._remembered: OrderedDict[str, list[tuple[str, str, float]]] = OrderedDict()
        self._max_remembered = max_remembered
        self._key: tuple[Any, ...] = ()

    def configure(self, config: Mapping[str, Any]) -> None:
        """Take the desired state.

        :param config: ``stable`` and ``canary`` slot, ``weight`` in percent, ``shadow`` (the canary gets copies),
            ``versions``, ``rollout``, and the ``revision`` that tells who changed it last that the change has arrived
        """
        self.config = dict(config)
        self.stopped = False
        rollout = config.get("rollout") or {}
        if not self.owner or rollout.get("owner") != self.annotation.get("owner") or rollout.get("finished"):
            self.annotation = dict(rollout)
        if rollout.get("finished") and rollout.get("owner") == self.owner:
            self.owner, self.lease_until = None, 0.0

    def _split(self, now: float) -> tuple[float, bool]:
        """Percent of requests that really goes to the canary, and whether it gets copies; a change starts an epoch."""
        rollout = self.config.get("rollout") or {}
        leased = self.owner is not None and self.owner == rollout.get("owner") and now < self.lease_until
        active = leased and not self.stopped and bool(self.config.get("canary"))
        weight = float(self.config.get("weight") or 0.0) if active else 0.0
        shadow = active and bool(self.config.get("shadow"))
        key = (weight, shadow, self.config.get("stable"), self.config.get("canary"), str(self.config.get("versions")))
        if key != self._key:
            self._key = key
            self.epoch += 1
            self.routed = dict.fromkeys(SLOTS, 0)
        return weight, shadow

    def route(self, request_id: str, now: float) -> str:
        """The slot that serves this request: the same id goes to the same arm, and stays in the canary as it grows."""
        stable, canary, (weight, _) = self.config.get("stable"), self.config.get("canary"), self._split(now)
        if not stable:
            raise InvalidInputError("no version serves on this route yet")
        salt = str((self.config.get("versions") or {}).get(canary)) if canary else ""
        slot = canary if canary and weight > 0 and share_of(request_id, salt) < weight else stable
        self.routed[slot] += 1
        return slot

    def copied_to(self, now: float) -> str | None:
        """The slot that gets a copy of every request, whose answer nobody sees; None when none does."""
        return self.config.get("canary") if self._split(now)[1] else None

    def _counters(self, version: str, replica: str) -> dict[str, Any]:
        return self.counters.setdefault(version, {}).setdefault(replica, new_counters())

    @staticmethod
    def _add(moments: list[float], value: float) -> None:
        moments[0] += 1
        moments[1] += value
        moments[2] += value * value

    @staticmethod
    def _sort(histogram: Mapping[str, Any], value: float) -> None:
        histogram["counts"][bisect.bisect_left(histogram["edges"], value)] += 1

    def record(
        self,
        version: str,
        request_id: str,
        prediction: float | None,
        seconds: float | None,
        *,
        replica: str = "",
        timed_out: bool = False,
        fell_back: bool = False,
    ) -> None:
        """Count one answered request.

        :param prediction: the score, remembered for its label; ``None`` when the version failed
        :param seconds: time to the answer; ``None`` in a batch, whose time says nothing about one request
        :param replica: which replica answered
        :param timed_out: whether the version failed by taking too long
        :param fell_back: whether the other version answered in its place
        """
        counters = self._counters(version, replica)
        counts, histograms, moments = counters["counts"], counters["histograms"], counters["moments"]
        counts["requests"] += 1
        counts["timeouts"] += timed_out
        counts["fallbacks"] += fell_back
        if seconds is not None:
            self._sort(histograms["latency"], seconds)
            self._add(moments["latency"], seconds)
        if prediction is None:
            counts["errors"] += 1
            return
        self._sort(histograms["prediction"], prediction)
        self._add(moments["prediction"], prediction)
        others = [each for each in self._remembered.get(request_id, []) if each[0] != version]
        self._remembered[request_id] = [*others, (version, replica, prediction)]
        self._remembered.move_to_end(request_id)
        while len(self._remembered) > self._max_remembered:
            self._remembered.popitem(last=False)

    def feedback(self, request_id: str, label: float) -> bool:
        """Join a label with its predictions, also a copy's; ``False`` when there is none, or none any more."""
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise InvalidInputError(f"the label of request {request_id!r} is {label!r}; expected a number from 0 to 1")
        remembered = self._remembered.pop(request_id, None)
        if remembered is None:
            self.labels_unknown += 1
            return False
        for version, replica, prediction in remembered:
            moments = self._counters(version, replica)["moments"]
            chance = min(max(prediction, LOSS_CLIP), 1 - LOSS_CLIP)
            self._add(moments["log_loss"], -label * math.log(chance) - (1 - label) * math.log(1 - chance))
            self._add(moments["brier"], (prediction - label) ** 2)
        return True

    def change(self, request: Mapping[str, Any], now: float) -> None:
        """``{"action": "claim" | "renew" | "stop", "owner", "ttl", "annotation"}``.

        ``claim`` takes the route for one rollout, ``renew`` prolongs the lease and stores the rollout's state, also
        after the router was restarted; ``stop`` gives all traffic to stable at once and frees the route.

        :raises ConcurrentChangeError: another rollout holds the route, or the one to renew was ended
        """
        action, owner = request.get("action"), request.get("owner")
        if action not in ("claim", "renew", "stop") or not isinstance(owner, str) or not owner:
            raise InvalidInputError(f"action is {action!r} by {owner!r}; expected claim, renew or stop, and an owner")
        if self.owner not in (None, owner) and now < self.lease_until:
            raise ConcurrentChangeError(
                f"the rollout {self.owner} holds this route for another {self.lease_until - now:.0f} s at most; "
                "two rollouts of one model cannot run at once: wait for it, or end its task"
            )
        if action == "stop":
            self.stopped, self.owner, self.lease_until, self.annotation = True, None, 0.0, {}
            return
        if action == "renew" and (self.owner or self.annotation.get("owner")) != owner:
            raise ConcurrentChangeError(ENDED.format(owner))
        annotation = request.get("annotation")
        if annotation is not None:
            attempts = [int(each.get("attempt", 1)) for each in (annotation, self.annotation)]
            if self.annotation.get("owner") == owner and attempts[0] < attempts[1]:
                raise ConcurrentChangeError(f"attempt {attempts[1]} of {owner} has taken the rollout over")
            self.annotation = dict(annotation)
        self.owner, self.lease_until = owner, now + float(request.get("ttl") or 60.0)

    def state(self, now: float) -> dict[str, Any]:
        """What is really routed, the counters of the versions in the slots, and the rollout."""
        weight, shadow = self._split(now)
        versions = self.config.get("versions") or {}
        return {
            "boot": self.boot,
            "time": now,
            "epoch": self.epoch,
            "weight": weight,
            "configured_weight": float(self.config.get("weight") or 0.0),
            "shadow": shadow,
            "configured_shadow": bool(self.config.get("shadow")),
            "revision": self.config.get("revision", 0),
            "stable": self.config.get("stable"),
            "canary": self.config.get("canary"),
            "versions": {slot: versions.get(slot) for slot in SLOTS},
            "routed": self.routed,
            "counters": {v: self.counters.get(v) or {"": new_counters()} for v in versions.values() if v is not None},
            "labels_unknown": self.labels_unknown,
            "owner": self.owner if now < self.lease_until else None,
            "lease_seconds": max(self.lease_until - now, 0.0),
            "rollout": self.annotation,
        }

    def prometheus(self, route: str) -> str:
        """The counters as Prometheus text."""
        series = [
            (f'route="{route}",version="{version}"' + (f',replica="{replica}"' if replica else ""), counters)
            for version, replicas in self.counters.items()
            for replica, counters in replicas.items()
        ]
        lines = []
        for metric in COUNTS:
            name = f"mlops_route_{metric}_total"
            lines.append(f"# TYPE {name} counter")
            lines += [f"{name}{{{labels}}} {counters['counts'][metric]}" for labels, counters in series]
        for metric, unit in (("latency", "_seconds"), ("prediction", "")):
            name = f"mlops_route_{metric}{unit}"
            lines.append(f"# TYPE {name} histogram")
            for labels, counters in series:
                histogram, total = counters["histograms"][metric], 0
                for edge, count in zip([*histogram["edges"], "+Inf"], histogram["counts"], strict=True):
                    total += count
                    lines.append(f'{name}_bucket{{{labels},le="{edge}"}} {total}')
                lines += [
                    f"{name}_sum{{{labels}}} {counters['moments'][metric][1]}",
                    f"{name}_count{{{labels}}} {total}",
                ]
        for metric in ("log_loss", "brier"):
            name = f"mlops_route_{metric}"
            lines.append(f"# TYPE {name} summary")
            for labels, counters in series:
                count, total, _ = counters["moments"][metric]
                lines += [f"{name}_sum{{{labels}}} {total}", f"{name}_count{{{labels}}} {count}"]
        for metric in MOMENTS:
            name = f"mlops_route_{metric}_squares_total"
            lines.append(f"# TYPE {name} counter")
            lines += [f"{name}{{{labels}}} {counters['moments'][metric][2]}" for labels, counters in series]
        return "\n".join(lines) + "\n"
