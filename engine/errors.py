"""Exceptions that cross rooms. Each knows its HTTP status, its gRPC status and, where one is at fault, the field."""

from __future__ import annotations

from collections.abc import Sequence


class RadixmeshError(Exception):
    """Root of every error that a caller may see.

    `field` names the parameter, tensor or configuration key at fault, or is None.
    """

    http = 500
    grpc = "INTERNAL"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class InvalidRequest(RadixmeshError):
    """A request that can't be honoured as written. Raised before anything is enqueued."""

    http = 400
    grpc = "INVALID_ARGUMENT"


class ContextOverflow(InvalidRequest):
    """Prompt and answer do not fit the model's context. Prompts are never cut silently."""

    code = "context_length_exceeded"


class ConfigError(RadixmeshError):
    """An unknown key, a value out of range, a thing not built yet. The message says cause and fix in one line."""

    http = 400
    grpc = "FAILED_PRECONDITION"


class ModelError(RadixmeshError):
    """A model that can't be opened: missing folder, unsupported architecture, a checkpoint that doesn't match."""

    http = 400
    grpc = "FAILED_PRECONDITION"


class Overloaded(RadixmeshError):
    """The queue is full: try again later."""

    http = 503
    grpc = "RESOURCE_EXHAUSTED"


class RequestFailed(RadixmeshError):
    """The engine could not finish this one request (non-finite logits, a step that kills the device)."""


class DeadlineExceeded(RadixmeshError):
    """The request's deadline passed before it ended; what it had made until then was sent."""

    http = 504
    grpc = "DEADLINE_EXCEEDED"
    code = "deadline_exceeded"


class StepRefused(RadixmeshError):
    """A step was refused before anything was enqueued. Touches only `rows` (indices into the step); empty = all."""

    def __init__(self, message: str, *, rows: Sequence[int] = (), field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.rows = tuple(rows)


class DeviceFailed(RadixmeshError):
    """The device failed. All tickets out are void and the caches are empty; the backend accepts the next forward."""


class BackendLost(RadixmeshError):
    """The backend is gone for good. Every open stream is told why."""

    http = 503
    grpc = "UNAVAILABLE"
