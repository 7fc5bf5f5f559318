"""Every key and channel of the queue, with its type, meaning and expiry.

All names begin with `{darkroom:<shard>}:`. The braces are a Redis Cluster hash tag, so one queue lives in one slot and
a script may touch any of its keys. Scripts get the prefix as `KEYS[1]` and derive the names below from it
(`lua/prelude.lua`); this table is the list they are checked against.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

# The first word after the prefix -> type; meaning; expiry.
KEY_TABLE: dict[str, tuple[str, str, str]] = {
    "job": (
        "hash",
        "job:<id>: encoded job, state, owner, attempt, failures, result manifest",
        "job_ttl_s after the end",
    ),
    "idempotency": ("hash", "idempotency:<sha256>: job id and body hash of a client's key", "job_ttl_s after the end"),
    "ready": (
        "zset",
        "ready:<rank>:<model>: waiting jobs by created µs minus head start; the rank after the last has the suspects",
        "none: empty when idle",
    ),
    "ready_of": (
        "zset",
        "ready_of:<length>:<tenant>:<rank>:<model>: the same of a tenant other than the default one",
        "none: empty when idle",
    ),
    "shares": ("zset", "shares:<model>: tenants with waiting jobs by virtual time", "none: empty when idle"),
    "tenants": (
        "hash",
        "tenants:<model>: cost:<tenant>, jobs:<tenant> and weight:<tenant> of those that wait",
        "none: empty when idle",
    ),
    "debts": (
        "zset",
        "debts:<model>: tenants that have left ahead of the others; '' is the model's own virtual time",
        "10 min after the last claim",
    ),
    "reserved": ("string", "worker that makes itself free for a suspect", "lease_s, or its claim of one"),
    "queued": ("zset", "every waiting job by deadline ms, +inf without one", "none: empty when idle"),
    "abandoned": (
        "zset",
        "jobs that are cancelled when nobody waits for them, by the ms at which nobody was seen for long enough",
        "none: empty when idle",
    ),
    "looked_after": (
        "string",
        "there while somebody reaps what is in `leases` and `abandoned`",
        "lease_s / 2, 5 s or more",
    ),
    "leases": ("zset", "every running job by the ms at which its lease ends", "none: empty when idle"),
    "counters": ("hash", "accepted, one per terminal state, reserved_bytes, stored_bytes", "none: one small hash"),
    "api_keys": ("hash", "key id -> encoded ApiKey, with the hash of its secret", "none: until revoked"),
    "api_keys_used": ("hash", "key id -> ms of its last use, to a minute", "none: until revoked"),
    "rate": ("string", "rate:<key>: µs at which a rate-limited key has its whole burst again", "then"),
    "budget": ("hash", "key id -> cost of its unfinished jobs", "none: a field goes when it holds nothing"),
    "models": ("set", "models that jobs were ever queued for", "none: bounded by the models served"),
    "backlog": ("hash", "model -> cost of its waiting jobs", "none: a field goes when nothing of its model waits"),
    "rates": ("hash", "model -> cost per second that one worker makes of it, as measured", "none: as served"),
    "running": ("hash", "model -> model rows of its running jobs", "none: a field goes when none of its model runs"),
    "spans": ("hash", "model -> ms from claim to end of a lone job by evaluation and latent pixel", "none: as served"),
    "pace": ("hash", "last claim: time, jobs left waiting; means of ms and jobs per claim", "1 h after the last claim"),
    "promises": ("zset", "places promised to refused callers by the ms from which on", "longest promise"),
    "promise": ("zset", "promise:<caller>: the same of one caller, by connection", "longest promise"),
    "claim": ("list", "claim:<worker>: token and jobs of the last claim, for one whose reply was lost", "lease_s"),
    "calls": ("hash", "calls:<sha256 of caller>: job id -> the caller's own name for it", "1 day after the last job"),
    "choices": ("hash", "choices:<sha256 of caller>: what a caller set once for all its calls", "30 days"),
    "input": (
        "string",
        "input:<id>:<name>: a picture that the job begins with, as PNG",
        "the job's end; of a dead letter job_ttl_s after it",
    ),
    "left": (
        "list",
        "left:<sha256 of who asked for what>: idempotency keys of calls that may be repeated",
        "disconnect_grace_s and the time that a refused one was told",
    ),
    "image": ("string", "image:<id>:<index>: encoded picture, unless there is a result store", "result_ttl_s"),
    "staged": (
        "string",
        "staged:<id>:<attempt>:<index or name>: a picture or checkpoint, within the transaction that takes it over",
        "result_ttl_s, job_ttl_s or 60 s",
    ),
    "checkpoint": ("string", "checkpoint:<id>:<index>: packed state of a running image", "the job's end, or job_ttl_s"),
    "preview": (
        "string",
        "preview:<id>:<index>: what a running image looked like lately, made while somebody watches",
        "the job's end, or 1 min",
    ),
    "events": ("stream", "events:<id>: what happened to a job, at most 256 entries", "result_ttl_s after the end"),
    "dead": ("stream", "dead letters with their payload, at most 1000 entries", "none: capped"),
    "notify": ("list", "notify:<model>: wake-up tokens that idle workers block on, at most 64", "60 s"),
    "workers": ("zset", "live workers by the ms until which they count as alive", "10 heartbeats missed"),
    "serving": ("zset", "serving:<model>: the same, per model", "10 heartbeats missed"),
    "worker": ("string", "worker:<id>: encoded WorkerInfo", "one lifetime without a heartbeat"),
    "batch": ("string", "batch:<worker>: encoded BatchView, told while someone looks on", "3 s"),
    "watched": ("string", "there while someone looks on at the batches", "3 s"),
    "served": ("zset", "models by the ms until which a worker of theirs counts as alive", "none: job_ttl_s per model"),
    "cards": ("hash", "model -> encoded ModelCard", "none: as served"),
}

# Publish/subscribe channels; each message is a job id, followed on cancel by keep where what was
# drawn is to be kept, on look by an attempt and what is wanted.
CHANNEL_TABLE: dict[str, str] = {
    "ended": "a job reached a terminal state",
    "progress": "a running job's step count changed",
    "cancel": "cancel:<worker>: a job that this worker runs was asked to be cancelled",
    "look": "look:<worker>: somebody began to watch a job that this worker runs",
}


@dataclass(frozen=True)
class Keys:
    """The key names of one shard that Python uses by itself; all others appear in scripts alone."""

    shard: str

    @property
    def prefix(self) -> str:
        return f"{{darkroom:{self.shard}}}:"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}job:{job_id}"

    def image(self, job_id: str, index: int) -> str:
        return f"{self.prefix}image:{job_id}:{index}"

    def input(self, job_id: str, name: str) -> str:
        return f"{self.prefix}input:{job_id}:{name}"

    def staged(self, job_id: str, attempt: int, index: int | str) -> str:
        return f"{self.prefix}staged:{job_id}:{attempt}:{index}"

    def checkpoint(self, job_id: str, index: int) -> str:
        return f"{self.prefix}checkpoint:{job_id}:{index}"

    def events(self, job_id: str) -> str:
        return f"{self.prefix}events:{job_id}"

    def notify(self, model: str) -> str:
        return f"{self.prefix}notify:{model}"

    def worker(self, worker_id: str) -> str:
        return f"{self.prefix}worker:{worker_id}"

    def preview(self, job_id: str, index: int) -> str:
        return f"{self.prefix}preview:{job_id}:{index}"

    def batch(self, worker_id: str) -> str:
        return f"{self.prefix}batch:{worker_id}"

    def calls(self, caller: str) -> str:
        return f"{self.prefix}calls:{caller}"

    def choices(self, caller: str) -> str:
        return f"{self.prefix}choices:{caller}"

    def left(self, asked: str) -> str:
        return f"{self.prefix}left:{asked}"

    @property
    def counters(self) -> str:
        return f"{self.prefix}counters"

    @property
    def dead(self) -> str:
        return f"{self.prefix}dead"

    @property
    def workers(self) -> str:
        return f"{self.prefix}workers"

    @property
    def api_keys(self) -> str:
        return f"{self.prefix}api_keys"

    @property
    def api_keys_used(self) -> str:
        return f"{self.prefix}api_keys_used"

    def channel(self, name: str) -> str:
        return f"{self.prefix}{name}"


def digest(idempotency_key: str, tenant: str = "default") -> str:
    """A client's key as it is stored: of fixed length, whatever was sent, and not readable in a dump. Tenants that
    choose the same one do not meet."""
    scope = "" if tenant == "default" else f"{tenant}\0"
    return hashlib.sha256(f"{scope}{idempotency_key}".encode("utf-8", "surrogatepass")).hexdigest()
