"""Why an engine ended: what its log and its exit code say."""

from __future__ import annotations

import signal

import pytest

from sollol_nb.llama_cpp.processes.exit_reasons import (
    BAD_MODEL,
    BAD_TEMPLATE,
    CRASHED,
    ILLEGAL_INSTRUCTION,
    PORT_TAKEN,
    WORKER_LOST,
    crash_reason,
    exit_reason,
    last_lines,
    template_problem,
)
from tests.support.engines import posix_only

UNKNOWN_FILTER = [
    "0.1 E srv          init: init: chat template parsing error: Unable to generate parser for this template.",
    "While executing FilterExpression at line 1, column 37 in source:",
    "Error: Unknown (built-in) filter 'nosuchfilter' for type String",
    "0.2 E srv  llama_server: exiting due to model loading error",
]
UNCLOSED = [
    "0.1 E common_chat_templates_init: error: parser: Parser Error: Expected }} (Got })",
    "0.2 E common_chat_templates_init: failed to initialize chat template",
]


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (["couldn't bind HTTP server socket"], PORT_TAKEN),
        (["Remote RPC server crashed or returned malformed response"], WORKER_LOST),
        (["error loading model: unknown model architecture: 'x'"], BAD_MODEL),
        (UNKNOWN_FILTER, BAD_TEMPLATE),
        (UNCLOSED, BAD_TEMPLATE),
        (["all is well"], None),
    ],
)
def test_reason_is_read_from_the_log(log: list[str], reason: str | None) -> None:
    assert exit_reason(log) is reason


def test_what_is_wrong_with_a_template_is_told_in_the_engines_words() -> None:
    assert template_problem(UNKNOWN_FILTER) == "Unknown (built-in) filter 'nosuchfilter' for type String"
    assert template_problem(UNCLOSED) == "Expected }} (Got })"
    assert template_problem(["std::exception"]) == ""


@posix_only
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-signal.SIGILL, ILLEGAL_INSTRUCTION),
        (-signal.SIGSEGV, CRASHED),
        (-signal.SIGABRT, None),
        (-9, None),
        (1, None),
        (None, None),
    ],
)
def test_crashes_of_the_engine_itself_are_told_from_other_ends(code: int | None, reason: str | None) -> None:
    assert crash_reason(code) is reason


def test_last_lines_are_errors_and_no_debug_output() -> None:
    assert last_lines(["0.1 I loaded", "0.2 E failed", "0.3 D buffer size"]) == "0.2 E failed"
    assert last_lines(["0.1 I loaded", "0.3 D buffer size"]) == "0.1 I loaded"
    assert last_lines([]) == "its log is empty"
