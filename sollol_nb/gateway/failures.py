"""Every error of this package as an HTTP status and a kind; each API writes it in its shape. Pure."""

from __future__ import annotations

from typing import Literal

from sollol_nb import errors

Kind = Literal[
    "invalid",
    "context_length",
    "unauthorized",
    "forbidden",
    "not_found",
    "wrong_method",
    "too_large",
    "busy",
    "unavailable",
    "timeout",
    "cancelled",
    "internal",
]
RETRY_AFTER_S = 5


class ApiError(Exception):
    """An error as the client of a request gets it.

    Attributes:
        status: the HTTP status.
        kind: what went wrong, for the API's own error type.
        message: what happened, to what, and what to do, as one line.
        retry_after_s: after how many seconds a new attempt may succeed; None if this is not known.
        parameter: the field of the body that cannot be used, if one is.
    """

    def __init__(
        self,
        status: int,
        kind: Kind,
        message: str,
        *,
        retry_after_s: int | None = None,
        parameter: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind: Kind = kind
        self.message = message
        self.retry_after_s = retry_after_s
        self.parameter = parameter

    @property
    def headers(self) -> dict[str, str]:
        """The headers of its response."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def invalid(message: str, parameter: str | None = None) -> ApiError:
    """A body or header that cannot be used."""
    return ApiError(400, "invalid", message, parameter=parameter)


# The first matching class counts.
_TABLE: tuple[tuple[type[Exception], int, Kind], ...] = (
    (errors.ContextOverflowError, 400, "context_length"),
    (errors.RequestTimeoutError, 504, "timeout"),
    (errors.RequestCancelledError, 503, "unavailable"),
    (errors.ChatBusyError, 409, "invalid"),
    (errors.RequestError, 400, "invalid"),
    (errors.ConfigError, 400, "invalid"),
    (errors.ModelNotFoundError, 404, "not_found"),
    (errors.ModelFileError, 400, "invalid"),
    (errors.ModelError, 503, "unavailable"),
    (errors.CoordinatorTimeoutError, 504, "timeout"),
    (errors.TransportTimeoutError, 504, "timeout"),
    (errors.WorkerError, 503, "unavailable"),
    (errors.CoordinatorError, 503, "unavailable"),
    (errors.EngineError, 503, "unavailable"),
    (errors.OllamaUnavailableError, 503, "unavailable"),
    (errors.OllamaResponseError, 502, "unavailable"),
    (errors.TransportError, 502, "unavailable"),
    (errors.SollolError, 500, "internal"),
)


def api_error(error: Exception) -> ApiError:
    """The error for the client, with the given one as its cause. Details of an error from outside this package are
    not sent."""
    if isinstance(error, ApiError):
        return error
    failure = _failure(error)
    failure.__cause__ = error
    return failure


def _failure(error: Exception) -> ApiError:
    if isinstance(error, errors.OllamaResponseError) and error.status in (400, 422):
        return ApiError(error.status, "invalid", str(error))
    for kind_of_error, status, kind in _TABLE:
        if isinstance(error, kind_of_error):
            retry_after_s = RETRY_AFTER_S if status in (502, 503) else None
            parameter = "model" if kind == "not_found" else None
            return ApiError(status, kind, str(error), retry_after_s=retry_after_s, parameter=parameter)
    return ApiError(500, "internal", "the gateway failed; its log says why")
