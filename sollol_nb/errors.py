"""One exception tree. Every message is one line: what happened, to what, and what to do.

* SollolError
  x ConfigError                    a setting or option that cannot be used
  + EngineError                    the llama.cpp binaries
    x EngineNotFoundError
    x EngineIncompatibleError
    x EngineBuildError
  + ModelError                     a model or its file
    x ModelNotFoundError
    x ModelFileError
    x ModelDoesNotFitError
  + WorkerError                    RPC workers
    x WorkerStartError
    x WorkersUnavailableError
  + CoordinatorError               a llama-server over workers
    x CoordinatorStartError
    x CoordinatorTimeoutError      (also a TimeoutError)
    + CoordinatorLostError
      x AnswerInterruptedError     (.partial)
    x AnswerDivergedError
  + TransportError                 HTTP to an engine or node; places translate it into their own words
    x ConnectFailedError
    x ConnectionBrokenError
    x TransportTimeoutError        (also a TimeoutError)
    x HttpStatusError              (.status, .reason)
  + OllamaError                    Ollama nodes
    x OllamaUnavailableError
    x OllamaResponseError
  + RequestError                   one chat request
    x RequestTimeoutError          (also a TimeoutError)
    + RequestRejectedError
      x ContextOverflowError       (.prompt_tokens, .context_tokens)
    x RequestCancelledError
    x ChatBusyError
    x StructureError               (.text, .completion)
* BatchInterrupted                 (a KeyboardInterrupt: `except Exception` must not swallow a stop; .partial)
"""

from __future__ import annotations

from typing import Any


class SollolError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(SollolError, ValueError):
    """A setting, option or argument has a value that cannot be used."""


# --- the llama.cpp binaries -------------------------------------------------------------------


class EngineError(SollolError):
    """Something about the llama.cpp binaries."""


class EngineNotFoundError(EngineError):
    """No llama-server and RPC worker were found in any of the places looked at."""


class EngineIncompatibleError(EngineError):
    """A binary was found but cannot be used: does not run, lacks RPC, or does not match its pair."""


class EngineBuildError(EngineError):
    """Fetching or building llama.cpp failed; the tail of the build log is in the message."""


# --- models -----------------------------------------------------------------------------------


class ModelError(SollolError):
    """Something about a model or its file."""


class ModelNotFoundError(ModelError):
    """No file is known for the model's name."""


class ModelFileError(ModelError):
    """The model's file is missing, unreadable, truncated or not GGUF."""


class ModelDoesNotFitError(ModelError):
    """The plan needs more memory than the workers have; the message says how much and where."""


# --- workers ----------------------------------------------------------------------------------


class WorkerError(SollolError):
    """Something about RPC workers."""


class WorkerStartError(WorkerError):
    """A local worker could not be started; the message carries its last log lines."""


class WorkersUnavailableError(WorkerError):
    """Too few workers are free for what was asked."""


# --- coordinators -----------------------------------------------------------------------------


class CoordinatorError(SollolError):
    """Something about a coordinator (a llama-server)."""


class CoordinatorStartError(CoordinatorError):
    """The coordinator exited before it was ready; the message carries the log's reason.

    Attributes:
        may_pass: it was killed, stalled or lost a worker, so another try may go better.
    """

    may_pass: bool = False


class CoordinatorTimeoutError(CoordinatorError, TimeoutError):
    """The coordinator was not ready within `coordinator_timeout` seconds."""


class CoordinatorLostError(CoordinatorError):
    """The coordinator's process ended, or its connection broke, in the middle of a request."""


class AnswerInterruptedError(CoordinatorLostError):
    """A coordinator was lost in mid-answer, and no other could take over.

    Attributes:
        partial: the completion so far; `router.resume(error)` goes on with it once workers are back.
        state: what is needed for that, as plain data; None when not a token had been asked for.
        backend: the backend that was asked for, if any.
        schema: what the whole answer must fit, if anything.
    """

    partial: Any = None
    state: dict[str, Any] | None = None
    backend: str | None = None
    schema: object = None


class AnswerDivergedError(CoordinatorError):
    """An answer had to be repeated on another coordinator, which wrote something else."""


# --- HTTP -------------------------------------------------------------------------------------


class TransportError(SollolError):
    """HTTP to an engine or node failed."""


class ConnectFailedError(TransportError):
    """Nothing accepts connections there."""


class ConnectionBrokenError(TransportError):
    """The connection ended in the middle of an answer."""


class TransportTimeoutError(TransportError, TimeoutError):
    """The peer accepted, then stayed silent past the limit."""


class HttpStatusError(TransportError):
    """The peer answered with an error status.

    Attributes:
        status: the HTTP status code.
        reason: the peer's own message.
    """

    def __init__(self, message: str, *, status: int, reason: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


# --- Ollama -----------------------------------------------------------------------------------


class OllamaError(SollolError):
    """Something about an Ollama node."""


class OllamaUnavailableError(OllamaError):
    """No Ollama node answers, or none has the model."""


class OllamaResponseError(OllamaError):
    """An Ollama node answered with an error; the message is Ollama's own."""


# --- requests ---------------------------------------------------------------------------------


class RequestError(SollolError):
    """Something about one chat request."""


class RequestTimeoutError(RequestError, TimeoutError):
    """The request was not finished within its `timeout` seconds; it was cancelled on the engine."""


class RequestRejectedError(RequestError):
    """The engine refused the request (an HTTP 4xx); the message is the engine's own."""


class ContextOverflowError(RequestRejectedError):
    """The messages do not fit the context of the place that should answer; nothing was left out in silence.

    Attributes:
        prompt_tokens: what the messages take; None where the place does not tell.
        context_tokens: what it holds for one request, answer included; None where it does not tell.
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
    """The answer does not have the structure that was asked for.

    Attributes:
        text: the answer as it came.
        completion: the answer with its timings, where a request was made.
    """

    def __init__(self, message: str, *, text: str, completion: Any = None) -> None:
        super().__init__(message)
        self.text = text
        self.completion = completion


# --- batches ----------------------------------------------------------------------------------


class BatchInterrupted(KeyboardInterrupt):
    """A batch was stopped by Ctrl-C or the stop button; the same call again goes on with it.

    Attributes:
        partial: the batch's frame, with the rows that are done.
    """

    def __init__(self, message: str, *, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial
