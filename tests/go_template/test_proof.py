"""Prompt templates of Ollama for llama.cpp: the same prompts as from Ollama, or a reason why not."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.go_template.proof import _conversations, _environment, _openai_message, proven_jinja, reads_tools
from sollol_nb.go_template.render import render, thinking_tags, with_response
from sollol_nb.go_template.syntax import MAX_BYTES, UnknownSyntaxError, parse
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.runtime.http_client import JsonClient
from tests.support.engines import eventually, run, unused_ports
from tests.support.go_templates import CHATML, LLAMA_3_1, QWEN_3, TEMPLATES, TURNS
from tests.support.ollama_server import OllamaServer

CONVERSATION = [
    {"role": "system", "content": "You are Mario."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "It's me!"},
    {"role": "user", "content": "Who?"},
]


def doubled(value: str) -> str:
    """A template whose text doubles, by this value, for each pair of messages."""
    loop = "{{ range .Messages }}{{ range $.Messages }}{{ $x = " + value + " }}{{ end }}{{ end }}"
    return '{{ $x := "12345678" }}' + loop


def prompt(source: str, *, think: bool = True) -> str:
    nodes = with_response(parse(source))
    return render(nodes, CONVERSATION, thinks=all(thinking_tags(nodes)), think=think)


def test_a_prompt_is_rendered_as_go_renders_it() -> None:
    assert prompt(CHATML) == (
        "<|im_start|>system\nYou are Mario.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nIt's me!<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt(TURNS) == (
        "<|system|>\nYou are Mario.</s>\n<|user|>\nHi</s>\n<|assistant|>\nIt's me!</s>\n"
        "<|user|>\nWho?</s>\n<|assistant|>\n"
    )
    assert prompt(QWEN_3, think=False).endswith(
        "Who? /no_think<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_well_known_models_are_translated(name: str) -> None:
    assert proven_jinja(TEMPLATES[name])


def test_whether_a_template_has_a_place_for_tools_is_known() -> None:
    assert reads_tools(LLAMA_3_1)
    assert not reads_tools(CHATML)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('{{ define "a" }}{{ end }}{{ .Prompt }}', "define"),
        ('{{ template "a" . }}', "template"),
        ("{{ range .Messages }}{{ toTypeScriptType .Role }}{{ end }}", "toTypeScriptType"),
        ("{{ if .Prompt }}", "without an end"),
        ("{{ end }}", "without a beginning"),
        ("{{ .Prompt", "{{ without }}"),
        ("{{ .Prompt }}\0", "a NUL character"),
        ('{{ "' + 'a" "' * 5000, "{{ without }}"),
        ("{{ range .Messages }}{{ .Nickname }}{{ end }}", ".Nickname of a message"),
        ("{{ .Prompt.Length }}", ".Length of a text"),
        ("{{ $x }}{{ .Prompt }}", "$x without a declaration"),
        ('{{ $x := "" }}{{ range .Messages }}{{ $x = 1 }}{{ end }}', "two kinds of values"),
        ('{{ printf "%08d" 1 }}{{ .Prompt }}', "printf"),
        ("{{ if eq .System 1 }}{{ end }}{{ .Prompt }}", "eq of these values"),
        ("{{ range .System }}{{ end }}{{ .Prompt }}", "loop over something else"),
        ("{{ continue }}{{ .Prompt }}", "outside of a loop"),
        ("{{ range .Messages }}{{ .ToolCalls.Name }}{{ end }}", ".Name of a calls"),
        ("{{ if .Prompt }}" * 100 + "{{ end }}" * 100, "nested too deeply"),
        ("{{ " + "(" * 100 + ".Prompt" + ")" * 100 + " }}", "nested too deeply"),
        ("x" * (MAX_BYTES + 1), "more than"),
        ("{{ (index .Messages 3).Content }}", "index of these values"),
        ("{{ range $.Messages }}" * 9 + "{{ end }}" * 9, "it takes too long"),
        (doubled('printf "%s%s" $x $x'), "a text of more than"),
        (doubled("print $x $x"), "a text of more than"),
        ("{{ range $.Messages }}" * 3 + "x" * 25_000 + "{{ end }}" * 3, "a text of more than"),
    ],
)
def test_what_cannot_be_translated_is_named(source: str, reason: str) -> None:
    with pytest.raises(UnknownSyntaxError) as caught:
        proven_jinja(source)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_tool_without_parameters_is_written_as_ollama_writes_it() -> None:
    source = (
        "{{ range .Messages }}{{ .Content }}{{ end }}{{ range .Tools }}{{ .Function.Name }}"
        "{{ if .Function.Parameters }}:{{ range $name, $property := .Function.Parameters.Properties }}"
        " {{ $name }}{{ end }}{{ end }};{{ end }}"
    )
    tools = [
        {"type": "function", "function": {"name": "now"}},
        {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}, "b": {}}}}},
    ]

    template = _environment().from_string(proven_jinja(source))

    assert template.render(messages=[{"role": "user", "content": "Hi"}], tools=tools) == "Hinow:;add: a b;"


def test_a_translation_that_gives_other_prompts_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr("sollol_nb.go_template.proof.to_jinja", lambda source: wrong)

    with pytest.raises(UnknownSyntaxError, match="its translation gives other prompts"):
        proven_jinja("{{ range .Messages }}{{ .Role }}{{ .Content }}{{ end }}")


# --- with the real programs ---------------------------------------------------------------------


@contextmanager
def llama_server(engine: Engine, template: str) -> Iterator[JsonClient]:
    """A llama-server with the demo model and this chat template."""

    def is_ready() -> bool:
        assert process.poll() is None, "llama-server has ended"
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
        return False

    port = unused_ports(1)
    process = subprocess.Popen(
        [str(engine.server), "-m", str(DEMO_MODEL_PATH), "--host", "127.0.0.1", "--port", str(port), "-c", "256"],
        env={**os.environ, "LLAMA_ARG_CHAT_TEMPLATE": template},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(is_ready, "llama-server is ready")
        client = JsonClient(f"http://127.0.0.1:{port}")
        yield client
        run(client.aclose())
    finally:
        process.kill()
        process.wait()


@pytest.mark.engine
@pytest.mark.ollama
@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_and_llama_server_render_the_same_prompts(
    engine: Engine, scratch_ollama: OllamaServer, name: str, tmp_path: Path
) -> None:
    source = TEMPLATES[name]
    thinks = all(thinking_tags(with_response(parse(source))))
    scratch_ollama.create(f"template-{name}", template=source)
    conversations = [
        conversation for at, conversation in enumerate(_conversations()) if at % 8 == 0 or len(conversation) > 4
    ]
    with llama_server(engine, proven_jinja(source)) as client:
        for messages in conversations:
            for think in (True, False) if thinks else (None,):
                thinking: dict[str, Any] = {} if think is None else {"think": think}
                asked = {"model": f"template-{name}", "messages": messages, "stream": False, **thinking}
                answer = scratch_ollama.ask("/api/chat", {**asked, "_debug_render_only": True})
                body = {"messages": [_openai_message(message) for message in messages]}
                if think is not None:
                    body["chat_template_kwargs"] = {"enable_thinking": think}

                rendered = run(client.post("/apply-template", body))["prompt"]

                assert rendered == answer["_debug_info"]["rendered_template"], (messages, think)
