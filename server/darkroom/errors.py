"""Every error Darkroom raises on purpose.

DarkroomError                   has a stable `code` and a message that is safe to show to a client
├── ConfigError                 a setting is missing or out of range; start-up stops, exit code 2
├── ModelError                  a model directory cannot be served as it is; start-up stops, exit code 2
├── RequestError                the caller's request cannot be served as written
│   ├── InvalidRequest          a field is wrong: names field, value and accepted range
│   │   └── UnknownModel        no worker has offered that model lately
│   ├── Unauthorized            no key that may be used came with the call
│   ├── Forbidden               the key that came does not allow this
│   ├── PromptRefused           the operator's rules forbid what the prompt asks for
│   ├── JobNotFound             no such job, or its record has expired
│   ├── LetterNotFound          no such dead letter; told to operators alone
│   ├── ImageNotFound           the job has no such image, or it has expired
│   ├── IdempotencyMismatch     the Idempotency-Key was used before with another body
│   └── JobNotFinished          the images were asked for before the job has ended
├── Unavailable                 the service cannot take the request now; `retry_after_s` says when to try again
│   ├── RateLimited             the caller's key has made as many calls as it may
│   ├── BudgetExceeded          the caller's key has as much work unfinished as it may
│   ├── QueueFull               the queue holds as much as it may
│   ├── TenantQueueFull         the caller's own jobs take as much of the queue as they may
│   ├── DeadlineUnmet           the job would be done after its deadline
│   ├── StorageFull             the result store is near its memory limit
│   ├── NoModel                 no worker serves a model, or the one asked for
│   ├── QueueUnavailable        Redis cannot be reached or refuses writes
│   ├── NotReplicated           a job was written, but not by as many replicas as it must survive on
│   ├── ResultStoreUnavailable  the bucket or directory of finished pictures cannot be reached or refuses us
│   └── Draining                this process is shutting down
├── DeviceLost                  a worker's device is gone; the process ends with an exit code of its own
└── JobError                    an accepted job could not be finished; its code is stored with the job

`HTTP_STATUS` is the one place where a code becomes an HTTP status.
"""

from __future__ import annotations

# How a worker's process ends that only a new one can replace: its engine hung, or its device was lost.
EXIT_HUNG, EXIT_DEVICE_LOST = 70, 71


class DarkroomError(Exception):
    """Base of the tree. `code` is stable and machine-readable; `str(error)` is safe to show to a client.

    `job_id` is set where the error concerns a job that was accepted.
    """

    code = "internal"
    job_id: str | None = None

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class ConfigError(DarkroomError):
    code = "config"


class ModelError(DarkroomError):
    code = "model"


class RequestError(DarkroomError):
    code = "invalid_request"


class InvalidRequest(RequestError):
    """One field of a request is wrong.

    `field` is its dotted path, `value` a short rendering of what was sent, `accepted` what would have been right.
    """

    code = "invalid_request"

    def __init__(self, field: str, value: object, accepted: str) -> None:
        self.field, self.accepted = field, accepted
        self.value = shorten(value)
        super().__init__(f"{field}: got {self.value}, expected {accepted}")


class UnknownModel(InvalidRequest):
    code = "unknown_model"


class Unauthorized(RequestError):
    code = "unauthorized"


class Forbidden(RequestError):
    code = "forbidden"


class PromptRefused(RequestError):
    code = "prompt_refused"


class JobNotFound(RequestError):
    code = "job_not_found"


class LetterNotFound(RequestError):
    code = "not_found"


class ImageNotFound(RequestError):
    code = "image_not_found"


class IdempotencyMismatch(RequestError):
    code = "idempotency_mismatch"


class JobNotFinished(RequestError):
    code = "job_not_finished"


class Unavailable(DarkroomError):
    """Try again in `retry_after_s` seconds."""

    code = "unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class RateLimited(Unavailable):
    code = "rate_limited"


class BudgetExceeded(Unavailable):
    code = "budget_exceeded"


class QueueFull(Unavailable):
    code = "queue_full"


class TenantQueueFull(Unavailable):
    code = "tenant_queue_full"


class DeadlineUnmet(Unavailable):
    """`reason` names the field, its value and the time that it would take now."""

    code = "deadline_unmet"

    def __init__(self, field: str, value: object, accepted: str, *, retry_after_s: float) -> None:
        self.reason = InvalidRequest(field, value, accepted)
        super().__init__(str(self.reason), retry_after_s=retry_after_s)


class StorageFull(Unavailable):
    code = "storage_full"


class NoModel(Unavailable):
    code = "no_model"


class QueueUnavailable(Unavailable):
    """Its code is `storage_full` where the server is at its memory limit."""

    code = "queue_unavailable"


class NotReplicated(Unavailable):
    code = "not_replicated"


class ResultStoreUnavailable(Unavailable):
    """Also the code of a job whose pictures could not be stored."""

    code = "storage_unavailable"


class Draining(Unavailable):
    code = "draining"


class DeviceLost(DarkroomError):
    """`job_ids` names the jobs whose ticks or pictures were under way."""

    code = "device_lost"

    def __init__(self, message: str, job_ids: set[str]) -> None:
        super().__init__(message)
        self.job_ids = job_ids


class JobError(DarkroomError):
    """A job ended without pictures; `code` is one of the job error codes of `HTTP_STATUS`."""

    code = "job_failed"


HTTP_STATUS: dict[str, int] = {
    "unauthorized": 401,
    "forbidden": 403,
    "invalid_request": 422,
    "prompt_refused": 422,
    "malformed_json": 400,
    "body_too_large": 413,
    "request_timeout": 408,
    "not_found": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "unsupported_media_type": 415,
    "unknown_model": 404,
    "job_not_found": 404,
    "image_not_found": 404,
    "job_not_finished": 409,
    "idempotency_mismatch": 422,
    "rate_limited": 429,
    "budget_exceeded": 429,
    "queue_full": 429,
    "tenant_queue_full": 429,
    "deadline_unmet": 429,
    "storage_full": 503,
    "no_model": 503,
    "queue_unavailable": 503,
    "not_replicated": 503,
    "storage_unavailable": 503,
    "unavailable": 503,
    "draining": 503,
    "internal": 500,
    # What a finished job can carry as its error code.
    "job_failed": 500,
    "bad_message": 500,
    "dead_letter": 500,
    "prompt_too_long": 422,
    "non_finite": 500,
    "out_of_memory": 507,
    "cancelled": 409,
    "expired": 504,
}


def shorten(value: object, limit: int = 80) -> str:
    """Render a client's value for an error message: quoted, printable ASCII, at most `limit` characters."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
