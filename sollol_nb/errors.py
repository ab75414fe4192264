"""One exception tree. Every message is one line: what happened, to what, and what to do.

* SollolError
  x ConfigError                    a setting or option that cannot be used
  x StorageError                   (also an OSError) the latency log, or a file that is written from it
  + EngineError                    the llama.cpp binaries
    x EngineNotFoundError
    x EngineIncompatibleError
    x EngineBuildError
  + ModelError                     a model or its file
    x ModelNotFoundError
    x ModelFileError
    x ModelDoesNotFitError
    x ModelPullError
  + WorkerError                    RPC workers
    x WorkerStartError
    x WorkersUnavailableError
    x JoinError                    a join link
  + CoordinatorError               a llama-server over workers
    x CoordinatorStartError
    x CoordinatorTimeoutError      (also a TimeoutError)
    + CoordinatorLostError
      x AnswerInterruptedError     (.partial)
    x AnswerDivergedError
  + TransportError                 HTTP to an engine or node; backends translate it into their own errors
    x ConnectFailedError
    x ConnectionBrokenError
    x TransportTimeoutError        (also a TimeoutError)
    x HttpStatusError              (.status, .reason)
  + OllamaError                    Ollama nodes
    x OllamaUnavailableError
    x OllamaResponseError
  + GatewayError                   a gateway that a notebook uses
    x GatewayUnavailableError
    x GatewayKeyError
    x GatewayBusyError             (.retry_after_s)
  + RequestError                   one chat request
    x RequestTimeoutError          (also a TimeoutError)
    + RequestRejectedError         (.partial)
      x ContextOverflowError       (.prompt_tokens, .context_tokens)
    x RequestCancelledError
    x ChatBusyError
    x StructureError               (.text, .completion)
* BatchInterrupted                 (a KeyboardInterrupt: `except Exception` must not swallow a stop; .partial)
* PullInterrupted                  (a KeyboardInterrupt, too)
"""

from __future__ import annotations

from typing import Any


class SollolError(Exception):
    """Base of all exceptions that this package raises deliberately."""


class ConfigError(SollolError, ValueError):
    """A setting, option or argument has an invalid value."""


class StorageError(SollolError, OSError):
    """The latency log cannot be read, or a file cannot be written from it."""


# --- the llama.cpp binaries -------------------------------------------------------------------


class EngineError(SollolError):
    """A problem with the llama.cpp programs."""


class EngineNotFoundError(EngineError):
    """No llama-server and RPC worker program were found; the message says where they were searched."""


class EngineIncompatibleError(EngineError):
    """A program was found but cannot be used: it does not run, lacks RPC, or does not match the other one."""


class EngineBuildError(EngineError):
    """Fetching or building llama.cpp failed; the message has the end of the build log."""


# --- models -----------------------------------------------------------------------------------


class ModelError(SollolError):
    """A problem with a model or its file."""


class ModelNotFoundError(ModelError):
    """No backend has the model, and no file is known for its name."""


class ModelFileError(ModelError):
    """The model's file is missing, unreadable, truncated or not GGUF."""


class ModelPullError(ModelError):
    """A model could not be downloaded; the message says what to do. What has arrived is kept."""


class ModelDoesNotFitError(ModelError):
    """The layer plan needs more memory than the workers have; the message says how much and where."""


# --- workers ----------------------------------------------------------------------------------


class WorkerError(SollolError):
    """A problem with RPC workers."""


class WorkerStartError(WorkerError):
    """A local worker could not be started; the message has its last log lines."""


class LinkError(WorkerError):
    """Another machine cannot be reached, or cannot run workers; the message has the command that helps."""


class WorkersUnavailableError(WorkerError):
    """Too few workers are free for the request."""


class JoinError(WorkerError):
    """A join link cannot be made or used: it was refused, or its server is not the one that the link names."""


# --- coordinators -----------------------------------------------------------------------------


class CoordinatorError(SollolError):
    """A problem with a coordinator (a llama-server)."""


class CoordinatorStartError(CoordinatorError):
    """The coordinator exited before it was ready; the message has the reason from its log.

    Attributes:
        may_pass: it was killed, stalled or lost a worker, so another attempt may succeed.
        is_crash: its own program failed (an illegal instruction, an invalid access), so it would fail again.
    """

    may_pass: bool = False
    is_crash: bool = False


class CoordinatorTimeoutError(CoordinatorError, TimeoutError):
    """The coordinator was not ready within `coordinator_timeout` seconds."""


class CoordinatorLostError(CoordinatorError):
    """The coordinator's process ended, or its connection broke, during a request."""


class AnswerInterruptedError(CoordinatorLostError):
    """A coordinator was lost during an answer, and no other one could continue it.

    Attributes:
        partial: the completion so far; `router.resume(error)` continues it once workers are available again.
        state: what is needed to continue, as plain data; None if no token had been requested.
        backend: the requested backend, if any.
        schema: what the whole answer must match, if anything.
        answer_id: its id in the journal; "" where it is not journaled.
    """

    partial: Any = None
    state: dict[str, Any] | None = None
    backend: str | None = None
    schema: object = None
    answer_id: str = ""


class AnswerDivergedError(CoordinatorError):
    """An answer had to be repeated on another coordinator, which generated different text."""


# --- HTTP -------------------------------------------------------------------------------------


class TransportError(SollolError):
    """HTTP to an engine or node failed."""


class ConnectFailedError(TransportError):
    """Nothing accepts connections at that address."""


class ConnectionBrokenError(TransportError):
    """The connection ended during an answer."""


class TransportTimeoutError(TransportError, TimeoutError):
    """The peer accepted the connection, then sent nothing for longer than the limit."""


class HttpStatusError(TransportError):
    """The peer answered with an error status.

    Attributes:
        status: the HTTP status code.
        reason: the peer's own message.
        body: the beginning of what it sent, as text.
    """

    def __init__(self, message: str, *, status: int, reason: str, body: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.body = body


# --- Ollama -----------------------------------------------------------------------------------


class OllamaError(SollolError):
    """A problem with an Ollama node."""


class OllamaUnavailableError(OllamaError):
    """No Ollama node answers, or none has the model."""


class OllamaResponseError(OllamaError):
    """An Ollama node answered with an error; the message is Ollama's own.

    Attributes:
        status: the HTTP status with which it refused the request; None where the node failed.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


# --- gateways ---------------------------------------------------------------------------------


class GatewayError(SollolError):
    """A gateway refused a request, or the server at its address is not a gateway."""


class GatewayUnavailableError(GatewayError):
    """No gateway answers at its address, or its connection was lost."""


class GatewayKeyError(GatewayError):
    """The gateway needs a key, or does not know the given one."""


class GatewayBusyError(GatewayError):
    """The gateway, or this key, has as many requests as it may have.

    Attributes:
        retry_after_s: after how many seconds a new request may succeed.
    """

    retry_after_s: float = 5.0


# --- requests ---------------------------------------------------------------------------------


class RequestError(SollolError):
    """A problem with one chat request."""


class RequestTimeoutError(RequestError, TimeoutError):
    """The request was not finished within its `timeout` seconds; it was cancelled on the engine."""


class RequestRejectedError(RequestError):
    """The engine refused the request (an HTTP 4xx) or failed on it; the message is the engine's own.

    Attributes:
        partial: the completion so far; None if no text had been received.
    """

    partial: Any = None


class ContextOverflowError(RequestRejectedError):
    """The messages do not fit the context of the server that should answer; nothing was dropped silently.

    Attributes:
        prompt_tokens: of the messages; None if the server does not report it.
        context_tokens: the server's limit for one request, answer included; None if it does not report it.
    """

    def __init__(
        self, message: str, *, prompt_tokens: int | None = None, context_tokens: int | None = None
    ) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


class RequestCancelledError(RequestError):
    """The request was cancelled before it finished."""


class ChatBusyError(RequestError):
    """The chat is still answering another question."""


class StructureError(RequestError):
    """The answer does not match its schema.

    Attributes:
        text: the answer's text, unchanged.
        completion: the answer with its timings, if it came from a request.
    """

    def __init__(self, message: str, *, text: str, completion: Any = None) -> None:
        super().__init__(message)
        self.text = text
        self.completion = completion


# --- batches ----------------------------------------------------------------------------------


class BatchInterrupted(KeyboardInterrupt):
    """A batch was stopped by Ctrl-C or the stop button; the same call continues it.

    Attributes:
        partial: the batch's frame, with the completed rows.
    """

    def __init__(self, message: str, *, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial


class PullInterrupted(KeyboardInterrupt):
    """The download of a model was stopped by Ctrl-C or the stop button; the same call continues it."""
