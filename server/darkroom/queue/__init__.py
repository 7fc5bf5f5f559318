"""Jobs in Redis: accepted once, owned by one worker at a time, ended exactly once."""

from darkroom.queue.admission import MemorySample
from darkroom.queue.dead_letters import DeadLetter
from darkroom.queue.embedded import EmbeddedRedis
from darkroom.queue.events import is_event_id
from darkroom.queue.queue import JobQueue
from darkroom.queue.records import Cards, Enqueued, JobEvent, QueueStats, Reaped, Renewal, WorkerInfo

__all__ = [
    "Cards",
    "DeadLetter",
    "EmbeddedRedis",
    "Enqueued",
    "JobEvent",
    "JobQueue",
    "MemorySample",
    "QueueStats",
    "Reaped",
    "Renewal",
    "WorkerInfo",
    "is_event_id",
]
