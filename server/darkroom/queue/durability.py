"""What `accepted` means on the server that we are connected to, by what its settings say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

SETTINGS = ("appendonly", "appendfsync", "save", "maxmemory", "maxmemory-policy")


class Kept(str, Enum):
    """What a crash of the server's machine leaves of the jobs that it has answered for."""

    FSYNC = "fsync"
    RELAXED = "relaxed"
    RARELY = "rarely"
    NOTHING = "nothing"
    UNKNOWN = "unknown"


_ENOUGH = {"fsync": {Kept.FSYNC}, "relaxed": {Kept.FSYNC, Kept.RELAXED}}


@dataclass(frozen=True)
class Promise:
    """`sentence` is for people; `num_replicas` follow the server, None where it does not say; `policy` is what it does
    at its memory limit."""

    kept: Kept
    sentence: str
    num_replicas: int | None
    policy: str

    def shortfall(self, durability: str, num_replicas: int) -> str | None:
        """Why this is less than `settings.durability` asks for, None when it is not."""
        if durability == "replicated":
            if self.num_replicas is None or self.num_replicas >= num_replicas:
                return None
            return f"{self.num_replicas} replicas follow this server, and {num_replicas} must have a job to accept it"
        if self.kept is Kept.UNKNOWN or self.kept in _ENOUGH[durability]:
            return None
        return self.sentence


def promise_of(config: Mapping[str, str] | None, replication: Mapping[str, object] | None) -> Promise:
    """The promise of a server by its CONFIG (None where it is not shown) and its INFO replication (the same)."""
    num_replicas = None if replication is None else int(str(replication.get("connected_slaves", 0)))
    if config is None:
        sentence = "unknown: the server cannot be inspected, as it does not show its settings"
        return Promise(Kept.UNKNOWN, sentence, num_replicas, "unknown")
    kept, sentence = _kept_by(config)
    if num_replicas:
        sentence += f"; {num_replicas} replicas follow"
    return Promise(kept, sentence, num_replicas, config.get("maxmemory-policy", "noeviction"))


def _kept_by(config: Mapping[str, str]) -> tuple[Kept, str]:
    if config.get("appendonly") == "yes":
        match config.get("appendfsync"):
            case "always":
                return Kept.FSYNC, "an accepted job survives any crash, the server's and the machine's included"
            case "everysec":
                return (
                    Kept.RELAXED,
                    "an accepted job survives any process's crash; a machine's crash may lose the last second",
                )
        return (
            Kept.RARELY,
            "an accepted job survives any process's crash; a machine's crash may lose the last half minute",
        )
    if config.get("save"):
        return Kept.RARELY, "a crash of the server loses what was accepted since its last snapshot: appendonly is off"
    return Kept.NOTHING, "a crash of the server loses every accepted job: appendonly is off and there are no snapshots"
