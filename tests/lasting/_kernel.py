"""A process with a router, as a notebook's kernel is, that does what it is told line by line.

The class here starts one, which runs this module. They speak JSON, a line for each request and answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import REPOSITORY
from tests.support.saved_contexts import save_all

LIMIT_S = 900.0
SAVES_ALL = "LASTING_SAVES_ALL"
"""Environment variable: contexts are saved and restored, also where that takes longer than processing them."""


class Kernel:
    """A kernel of its own process.

    Args:
        endpoints: of the workers.
        settings: of its router.
        variables: more environment variables.
    """

    def __init__(self, endpoints: Sequence[str], settings: Mapping[str, Any], **variables: str) -> None:
        told = json.dumps({"rpc_backends": list(endpoints), **settings})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lasting._kernel", told],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, Any]:
        """The answer to the last message: `text`, `routing`, `prompt_tokens` and `answer_tokens`."""
        return self._do("ask", model=model, messages=list(messages), options=options)

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the router; its value, where that is plain data."""
        return self._do("call", method=method, arguments=arguments, named=named)["value"]

    def _do(self, what: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the kernel has died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def end(self) -> None:
        """End it as a user does who shuts a kernel down."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def kill(self) -> None:
        """End it without warning."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Do what standard input says, until it ends."""
    if SAVES_ALL in os.environ:
        save_all(pytest.MonkeyPatch())
    settings = json.loads(sys.argv[1])
    usual = {"auto_discover_rpc": False, "timeout": LIMIT_S, "coordinator_timeout": LIMIT_S}
    with HybridRouter(**{**usual, **settings}) as router:
        for line in sys.stdin:
            told = json.loads(line)
            try:
                answer = _answer(router, told)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer, default=str), flush=True)


def _answer(router: HybridRouter, told: Mapping[str, Any]) -> dict[str, Any]:
    if told["do"] == "call":
        return {"value": getattr(router, told["method"])(*told["arguments"], **told["named"])}
    completion = router.route_request(told["model"], told["messages"], **told["options"])
    return {
        "text": completion["message"]["content"],
        "routing": completion["_routing"],
        "prompt_tokens": completion["prompt_eval_count"],
        "answer_tokens": completion["eval_count"],
    }


if __name__ == "__main__":
    main()
