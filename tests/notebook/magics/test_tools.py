"""`%%sollol --tools` in a real kernel, on a real engine: steps as folds, confirmations, the stop button."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.calling_model import write_calling
from tests.support.kernels import CELL_TIMEOUT_S, Kernel, Shown, notebook_kernel

pytestmark = pytest.mark.engine

ANSWERS: Any = [[("double", {"x": 3})], [("double", {"x": 6}), ("fail", {})], "It is twelve"]
FUNCTIONS = '''
import asyncio, time
ran, waits = [], []

def double(x: int) -> int:
    """Double."""
    ran.append(x)
    print(f"doubling {x}")
    while x in waits:
        time.sleep(0.05)
    return 2 * x

def fail() -> None:
    """Fail."""
    raise ValueError("<b>no way</b>")

async def slowly(x: int) -> int:
    """Double."""
    await asyncio.sleep(0)
    return 2 * x
slowly.__name__ = "double"

class Kit:
    def double(self, x: int) -> int:
        """Double."""
        return 2 * x
kit = Kit()
frame = 3
'''


@pytest.fixture(scope="module")
def notebook(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel with functions and `MODEL`, which calls them."""
    folder = tmp_path_factory.mktemp("kernel")
    model = write_calling(folder / "calling.gguf", ANSWERS, words=4)
    with notebook_kernel(folder, FUNCTIONS, f"MODEL = {str(model)!r}") as fresh:
        yield fresh


def asked(options: str, prompt: str = "How much?") -> str:
    return f"%%sollol {{{{ MODEL }}}} --temperature 0 --max-tokens 50 {options}\n{prompt}"


def test_steps_are_folds_above_the_answer(notebook: Kernel) -> None:
    shown = notebook.run(asked("--tools double,fail --out answer"))
    assert shown.error == []
    assert len(shown.displays) == 1
    markdown = shown.markdown
    assert markdown.index("<summary><small>double(x=3) = 6 · ") < markdown.index(
        "<summary><small>double(x=6) = 12 · "
    )
    assert "<summary><small>fail() failed: ValueError: &lt;b&gt;no way&lt;/b&gt; · " in markdown
    assert "(think 0.0)" in markdown
    assert markdown.index("(2.2) twelve") > markdown.index("fail() failed")
    assert shown.text.startswith("[double(x=3) = 6]\n[double(x=6) = 12]\n[fail() failed: ")
    assert shown.stream == "doubling 3\ndoubling 6\n"  # what functions print is the cell's
    assert notebook.value("[(s['call'], s['result']) for s in answer.steps], answer.text") == (
        "([('double', '6'), ('double', '12'), ('fail', '')], '(2.0) It (2.1) is (2.2) twelve ')"
    )


@pytest.mark.parametrize("tools", ["slowly,fail", "kit.double --tools fail"])
def test_async_functions_and_methods_are_called_too(notebook: Kernel, tools: str) -> None:
    shown = notebook.run(asked(f"--tools {tools} --out answer"))
    assert shown.error == []
    assert notebook.value("[s['result'] for s in answer.steps]") == "['6', '12', '']"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--tools dubble", "ConfigError: --tools: there is no function named dubble; did you mean double?"),
        ("--tools double,double", "UsageError: --tools names double twice"),
        ("--tools double,kit.double", "ConfigError: two tools are named double"),
        ("--tools frame", "ConfigError: --tools: frame is a int, not a function"),
        ("--tools kit.nothing", "ConfigError: --tools: kit has no nothing"),
        ("--tools print('x')", "UsageError: --tools takes names of functions"),
        ("--confirm", "UsageError: --confirm needs functions"),
        ("--max-steps 3", "UsageError: --max-steps needs functions"),
        (
            "--tools double --confirm --background",
            "ConfigError: --confirm asks before each call, but an answer in",
        ),
    ],
)
def test_wrong_options_are_one_line_and_nothing_is_asked(notebook: Kernel, options: str, error: str) -> None:
    before = notebook.value("ran")
    shown = notebook.run(asked(options))
    text = "\n".join(shown.error) + shown.stream
    assert error in text, text
    assert notebook.value("ran") == before
    assert shown.displays == []


def test_the_steps_can_be_limited(notebook: Kernel) -> None:
    shown = notebook.run(asked("--tools double,fail --max-steps 1 --out answer"))
    assert shown.error == []
    assert "answered without more calls after 1 step (max_steps)" in shown.text
    assert notebook.value("len(answer.steps)") == "1"


def answered(notebook: Kernel, code: str, *replies: str) -> tuple[Shown, list[str]]:
    """What a cell shows whose questions get these replies, and the questions."""
    message_id = notebook.client.execute(code)
    prompts = []
    for reply in replies:
        prompts.append(notebook.client.get_stdin_msg(timeout=CELL_TIMEOUT_S)["content"]["prompt"])
        notebook.client.input(reply)
    return notebook.collect(message_id), prompts


def test_each_call_is_confirmed_below_the_cell(notebook: Kernel) -> None:
    shown, prompts = answered(notebook, asked("--tools double,fail --confirm --out answer"), "y", "n", "no")
    assert shown.error == []
    assert [prompt.splitlines()[0] for prompt in prompts] == ["double(x=3)", "double(x=6)", "fail()"]
    assert notebook.value("[s['result'] or s['error'] for s in answer.steps]") == (
        "['6', 'the user declined this call', 'the user declined this call']"
    )
    shown, prompts = answered(notebook, asked("--tools double,fail --confirm"), "all")
    assert (shown.error, len(prompts)) == ([], 1)


def test_an_awaited_request_asks_too(notebook: Kernel) -> None:
    code = """
from sollol_nb import HybridRouter
router = HybridRouter(auto_discover_rpc=False)
options = {"backend": "local", "temperature": 0, "max_tokens": 50, "confirm": True}
answer = await router.route_request(MODEL, "How much?", tools=[slowly, fail], **options)
await router.close()
"""
    shown, prompts = answered(notebook, code, "y", "a")
    assert shown.error == []
    assert len(prompts) == 2
    assert notebook.value("[s['result'] for s in answer.steps]") == "['6', '12', '']"


def test_a_front_end_without_input_is_refused_before_anything_is_asked(notebook: Kernel) -> None:
    before = notebook.value("ran")
    shown = notebook.collect(notebook.client.execute(asked("--tools double --confirm"), allow_stdin=False))
    assert "ConfigError: --confirm asks before each call, but this front end takes no input; leave it out" in (
        "\n".join(shown.error) + shown.stream
    )
    assert notebook.value("ran") == before


def test_the_setting_asks_too(notebook: Kernel) -> None:
    notebook.run("%config Sollol.confirm_tools = True")
    try:
        shown, prompts = answered(notebook, asked("--tools double,fail"), "a")
        assert (shown.error, len(prompts)) == ([], 1)
        shown = notebook.collect(notebook.client.execute(asked("--tools double"), allow_stdin=False))
        assert "the setting confirm_tools asks before each call" in "\n".join(shown.error) + shown.stream
    finally:
        notebook.run("%config Sollol.confirm_tools = False")


def test_the_stop_button_ends_a_function_and_keeps_the_steps(notebook: Kernel) -> None:
    notebook.run("waits = [6]")
    message_id = notebook.client.execute(asked("--tools double,fail --out answer"))
    try:
        notebook.collect(message_id, until_shown=r"calling double\(x=6\)")
        notebook.manager.interrupt_kernel()
        shown = notebook.collect(message_id)
    finally:
        notebook.run("waits = []")
    assert "RequestCancelledError" in "\n".join(shown.error) + shown.stream
    assert "[double(x=3) = 6]" in shown.text
    assert notebook.run("1 + 1").status == "ok"


def test_functions_run_in_the_background(notebook: Kernel) -> None:
    shown = notebook.run(asked("--tools double,fail --background --quiet --out handle"))
    assert shown.error == []
    assert notebook.value("[s['result'] for s in handle.result(60).steps]") == "['6', '12', '']"


def test_a_conversation_goes_on_after_calls(notebook: Kernel) -> None:
    notebook.run(asked("--tools double,fail --chat tour"))
    messages = notebook.value(
        "[m['role'] for m in get_ipython().run_line_magic('sollol_chat', 'tour --messages')]"
    )
    assert messages == "['user', 'assistant', 'tool', 'assistant', 'tool', 'tool', 'assistant']"
    assert notebook.run(asked("--chat tour --quiet", "And now?")).error == []


def test_tab_completes_functions(notebook: Kernel) -> None:
    line = "%%sollol demo --tools double,fa"
    reply = notebook.reply(notebook.client.complete(line, len(line)))
    assert "double,fail" in reply["matches"]
