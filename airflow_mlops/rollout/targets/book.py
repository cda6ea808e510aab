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
from airflow_mlops.rollout.observation import BUCKET_EDGES, MOMENTS

SLOTS = ("a", "b")
LOSS_CLIP = 1e-6
ENDED = "the rollout {} was ended from outside: its task was killed, or another one took the route"


def new_counters() -> dict[str, Any]:
    """Counters of a version that has had no request."""
    return {
        "requests": 0,
        "errors": 0,
        "buckets": [0] * (len(BUCKET_EDGES) + 1),
        **{name: [0, 0.0, 0.0] for name in MOMENTS},
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
        self.counters: dict[str, dict[str, Any]] = {}
        self.labels_unknown = 0
        self._remembered: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._max_remembered = max_remembered
        self._key: tuple[Any, ...] = ()

    def configure(self, config: Mapping[str, Any]) -> None:
        """Take the desired state.

        :param config: ``stable`` and ``canary`` slot, ``weight`` in percent, ``versions``, ``rollout``, and the
            ``revision`` that tells who changed it last that the change has arrived
        """
        self.config = dict(config)
        self.stopped = False
        rollout = config.get("rollout") or {}
        if not self.owner or rollout.get("owner") != self.annotation.get("owner") or rollout.get("finished"):
            self.annotation = dict(rollout)
        if rollout.get("finished") and rollout.get("owner") == self.owner:
            self.owner, self.lease_until = None, 0.0

    def weight(self, now: float) -> float:
        """Share of requests that really goes to the canary now, in percent; a change starts a new epoch."""
        rollout = self.config.get("rollout") or {}
        leased = self.owner is not None and self.owner == rollout.get("owner") and now < self.lease_until
        leased = leased and not self.stopped
        weight = float(self.config.get("weight") or 0.0) if leased and self.config.get("canary") else 0.0
        key = (weight, self.config.get("stable"), self.config.get("canary"), str(self.config.get("versions")))
        if key != self._key:
            self._key = key
            self.epoch += 1
            self.routed = dict.fromkeys(SLOTS, 0)
        return weight

    def route(self, request_id: str, now: float) -> str:
        """The slot that serves this request: the same id goes to the same arm, and stays in the canary as it grows."""
        stable, canary, weight = self.config.get("stable"), self.config.get("canary"), self.weight(now)
        if not stable:
            raise InvalidInputError("no version serves on this route yet")
        salt = str((self.config.get("versions") or {}).get(canary)) if canary else ""
        slot = canary if canary and weight > 0 and share_of(request_id, salt) < weight else stable
        self.routed[slot] += 1
        return slot

    def _counters(self, version: str) -> dict[str, Any]:
        if version not in self.counters:
            self.counters[version] = new_counters()
        return self.counters[version]

    @staticmethod
    def _add(moments: list[float], value: float) -> None:
        moments[0] += 1
        moments[1] += value
        moments[2] += value * value

    def record(self, version: str, request_id: str, prediction: float | None, seconds: float | None) -> None:
        """Count one answered request.

        :param prediction: the score, remembered for its label; ``None`` when the version failed
        :param seconds: time to the answer; ``None`` in a batch, whose time says nothing about one request
        """
        counters = self._counters(version)
        counters["requests"] += 1
        if seconds is not None:
            counters["buckets"][bisect.bisect_left(BUCKET_EDGES, seconds)] += 1
            self._add(counters["latency"], seconds)
        if prediction is None:
            counters["errors"] += 1
            return
        self._add(counters["prediction"], prediction)
        self._remembered[request_id] = (version, prediction)
        self._remembered.move_to_end(request_id)
        while len(self._remembered) > self._max_remembered:
            self._remembered.popitem(last=False)

    def feedback(self, request_id: str, label: float) -> bool:
        """Join a label with its prediction; ``False`` when that is not, or no longer, remembered."""
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise InvalidInputError(f"the label of request {request_id!r} is {label!r}; expected a number from 0 to 1")
        version, prediction = self._remembered.pop(request_id, (None, 0.0))
        if version is None:
            self.labels_unknown += 1
            return False
        counters = self._counters(version)
        chance = min(max(prediction, LOSS_CLIP), 1 - LOSS_CLIP)
        self._add(counters["log_loss"], -label * math.log(chance) - (1 - label) * math.log(1 - chance))
        self._add(counters["brier"], (prediction - label) ** 2)
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
        weight = self.weight(now)
        versions = self.config.get("versions") or {}
        return {
            "boot": self.boot,
            "time": now,
            "epoch": self.epoch,
            "weight": weight,
            "configured_weight": float(self.config.get("weight") or 0.0),
            "revision": self.config.get("revision", 0),
            "stable": self.config.get("stable"),
            "canary": self.config.get("canary"),
            "versions": {slot: versions.get(slot) for slot in SLOTS},
            "routed": self.routed,
            "counters": {v: self.counters.get(v) or new_counters() for v in versions.values() if v is not None},
            "labels_unknown": self.labels_unknown,
            "owner": self.owner if now < self.lease_until else None,
            "lease_seconds": max(self.lease_until - now, 0.0),
            "rollout": self.annotation,
        }

    def prometheus(self, route: str) -> str:
        """The counters as Prometheus text."""
        lines = []
        for metric in ("requests", "errors"):
            name = f"mlops_route_{metric}_total"
            lines.append(f"# TYPE {name} counter")
            lines += [f'{name}{{route="{route}",version="{v}"}} {c[metric]}' for v, c in self.counters.items()]
        name = "mlops_route_latency_seconds"
        lines.append(f"# TYPE {name} histogram")
        for version, counters in self.counters.items():
            labels, total = f'route="{route}",version="{version}"', 0
            for edge, count in zip([*BUCKET_EDGES, "+Inf"], counters["buckets"], strict=True):
                total += count
                lines.append(f'{name}_bucket{{{labels},le="{edge}"}} {total}')
            lines += [f"{name}_sum{{{labels}}} {counters['latency'][1]}", f"{name}_count{{{labels}}} {total}"]
        for metric in ("prediction", "log_loss", "brier"):
            name = f"mlops_route_{metric}"
            lines.append(f"# TYPE {name} summary")
            for version, counters in self.counters.items():
                labels = f'{{route="{route}",version="{version}"}}'
                lines += [f"{name}_sum{labels} {counters[metric][1]}", f"{name}_count{labels} {counters[metric][0]}"]
        return "\n".join(lines) + "\n"
