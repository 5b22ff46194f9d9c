"""Errors. One base class, `TinkerError`; each concrete error is also the standard type a caller would expect.

Names and hierarchy follow tinker 0.38; those below `StorageError` are ours. All are picklable.
"""

from __future__ import annotations


class TinkerError(Exception):
    """Base of every error this library raises on purpose."""


class APIError(TinkerError):
    """A request that was understood and refused."""

    def __init__(self, message: str = "", *, body: object | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.body = body


class APIConnectionError(APIError, ConnectionError):
    """Kept for scripts that catch it; an in-process engine has no connection to lose."""


class APITimeoutError(APIConnectionError, TimeoutError):
    """A request did not finish in time."""


class APIResponseValidationError(APIError, ValueError):
    """Kept for scripts that catch it; in-process results are typed already."""


class APIStatusError(APIError):
    """An error with an HTTP status, so that a server can map it to the wire."""

    status_code: int = 500


class BadRequestError(APIStatusError, ValueError):
    """The request itself is wrong: shape, dtype, range, name of an option."""

    status_code = 400


class AuthenticationError(APIStatusError):
    """Kept for scripts that catch it."""

    status_code = 401


class BillingError(APIStatusError):
    """Kept for scripts that catch it."""

    status_code = 402


class PermissionDeniedError(APIStatusError, PermissionError):
    """Kept for scripts that catch it."""

    status_code = 403


class NotFoundError(APIStatusError, LookupError):
    """A model, run, checkpoint or sampler that does not exist."""

    status_code = 404


class ConflictError(APIStatusError, ValueError):
    """The name is taken or the state forbids the request."""

    status_code = 409


class UnprocessableEntityError(APIStatusError, ValueError):
    """Well formed, yet impossible: a checkpoint of another shape, say."""

    status_code = 422


class RateLimitError(APIStatusError):
    """Kept for scripts that catch it."""

    status_code = 429


class InternalServerError(APIStatusError, RuntimeError):
    """The engine failed in a way the caller could not have prevented."""

    status_code = 500


class RequestFailedError(TinkerError, RuntimeError):
    """A request failed after it was accepted.

    Attributes:
        request_id: the request, for the log.
        category: `"user"`, `"server"` or `"unknown"`.
    """

    def __init__(self, message: str = "", request_id: str = "", category: str = "unknown") -> None:
        super().__init__(message, request_id, category)
        self.message = message
        self.request_id = request_id
        self.category = category

    def __str__(self) -> str:
        return self.message


class StorageError(TinkerError, OSError):
    """The checkpoint directory could not be read or written."""


class UnsupportedError(TinkerError, NotImplementedError):
    """Known to Tinker, not available here; the message says why and what to do instead."""


class ArgumentTypeError(BadRequestError, TypeError):
    """A required argument is missing, or of a type that the call does not take."""


class UnknownKeyError(BadRequestError, KeyError):
    """A key whose meaning is not known."""

    def __str__(self) -> str:
        return self.message  # KeyError shows the repr


class UnpairedSpansError(BadRequestError, AssertionError):
    """Provenance spans of a datum's input without those of its loss inputs, or the reverse."""


class StateError(APIError, RuntimeError):
    """The call is not possible now: a closed client or engine, a forked process, the engine's own thread."""


class MissingPackageError(TinkerError, ImportError):
    """An optional package that the call needs is not installed."""


class ExperimentalWarning(FutureWarning):
    """Given by calls that may still change."""
