"""Models and engines that cannot start: the error names the cause, and nothing is started in vain."""

from __future__ import annotations

from pathlib import Path

import pytest

from sollol_nb.errors import CoordinatorStartError, ModelFileError, RequestRejectedError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import posix_only, unused_ports
from tests.support.scripted_model import CHATML, write_scripted
from tests.support.smollm2 import smollm2_path

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.content | nosuchfilter }}{% endfor %}", "nosuchfilter"),
        ("{% for m in messages %}{{ m.content }", "Expected }}"),
    ],
)
def test_a_chat_template_that_llama_cpp_cannot_use_is_named(
    engine: Engine, tmp_path: Path, template: str, problem: str
) -> None:
    path = write_scripted(tmp_path / "m.gguf", [" alpha,"], template=template)
    starts: list[Event] = []
    with HybridRouter(coordinator_port=unused_ports(1), keep_alive=0) as router:
        router.events.subscribe(starts.append)
        with pytest.raises(ModelFileError, match="cannot use the model's chat template") as caught:
            router.route_request(str(path), "hi")

    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [event.kind for event in starts].count(EventKind.COORDINATOR_STARTING) == 1


def test_messages_that_a_chat_template_refuses_are_told_so(engine: Engine, tmp_path: Path) -> None:
    template = CHATML + "{% if messages[0].content == 'secret' %}{{ raise_exception('No secrets') }}{% endif %}"
    path = write_scripted(tmp_path / "m.gguf", [" alpha,"], template=template)
    refused = pytest.raises(RequestRejectedError, match=r"template does not take these messages: .*No secrets")
    with HybridRouter(coordinator_port=unused_ports(1), keep_alive=0) as router, refused:
        router.route_request(str(path), "secret")


@posix_only
@pytest.mark.parametrize("crashes", ["repacking", "always"])
def test_an_engine_that_crashes_on_this_cpu_is_started_once_more_without_repacked_weights(
    engine: Engine, tmp_path: Path, crashes: str
) -> None:
    """A stand-in for the CPU: the real engine behind a script that ends as llama-server does there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    spared = "*--no-repack*" if crashes == "repacking" else "nothing"
    server = folder / "llama-server"
    server.write_text(
        f'#!/bin/sh\ncase "$*" in {spared}) ;; *"-m "*) kill -ILL $$ ;; esac\nexec {engine.server} "$@"\n'
    )
    server.chmod(0o755)
    (folder / engine.worker.name).symlink_to(engine.worker)
    messages: list[str] = []
    with HybridRouter(llama_cpp=folder, coordinator_port=unused_ports(1), keep_alive=0) as router:
        router.events.subscribe(
            lambda event: messages.append(event.message) if event.kind == EventKind.COORDINATOR_STARTING else None
        )
        if crashes == "repacking":
            for _ in range(2):  # the second start knows
                assert router.route_request("demo", "What is a worker?", backend="local", max_tokens=3).text
                router.stop_coordinator()
            assert sum(message.startswith("starting") for message in messages) == 3
        else:
            with pytest.raises(CoordinatorStartError, match=r"signal 4.*processor instructions.*install"):
                router.route_request("demo", "hi", backend="local")
            assert sum(message.startswith("starting") for message in messages) == 2
        assert sum("without rearranging" in message for message in messages) == 1


def test_a_real_model_answers_on_this_machine_without_workers(engine: Engine) -> None:
    with HybridRouter(coordinator_port=unused_ports(1), keep_alive=0) as router:
        answer = router.route_request(smollm2_path(), "Say hello.", backend="local", temperature=0, max_tokens=8)

    assert answer.text.strip()
