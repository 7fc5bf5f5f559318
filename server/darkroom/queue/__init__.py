"""Jobs in Redis: accepted once, owned by one worker at a time, ended exactly once."""

from darkroom.queue.admission import MemorySample
from darkroom.queue.api_keys import SCOPES, ApiKey, KeyStore, Rate, new_key
from darkroom.queue.dead_letters import DeadLetter
from darkroom.queue.embedded import EmbeddedRedis, redis_of
from darkroom.queue.events import is_event_id
from darkroom.queue.queue import JobQueue
from darkroom.queue.records import Cards, Enqueued, JobEvent, QueueStats, Reaped, Renewal, WorkerInfo

__all__ = [
    "SCOPES",
    "ApiKey",
    "Cards",
    "DeadLetter",
    "EmbeddedRedis",
    "Enqueued",
    "JobEvent",
    "JobQueue",
    "KeyStore",
    "MemorySample",
    "QueueStats",
    "Rate",
    "Reaped",
    "Renewal",
    "WorkerInfo",
    "is_event_id",
    "new_key",
    "redis_of",
]
