"""Faults around saved contexts, on real engines: whatever happens to one, no answer is lost or wrong."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.llama_cpp.contexts import actions, keeper
from sollol_nb.llama_cpp.contexts.store import ContextStore, SavedContext
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.lasting._kernel import Kernel
from tests.support import own_folders
from tests.support.engines import (
    ENDLESS_CONTEXT_TOKENS,
    engines_of,
    eventually,
    linux_only,
    posix_only,
    run,
    script,
    unused_ports,
    write_endless,
)
from tests.support.saved_contexts import save_all

pytestmark = pytest.mark.engine

LONG = "A worker holds layers. " * 50 + "What is a worker?"
QUESTION = "What is a coordinator?"
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "backend": "sharded"}
MOST_AGAIN = 8
"""Tokens that may be processed again: the last one, and those of a text that is other tokens in a prompt."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Separate folders for this module, and contexts that are saved and restored, however quick the prompt is."""
    folder = tmp_path_factory.mktemp("faults")
    before = own_folders.use(own_folders.own_settings(folder))
    with pytest.MonkeyPatch.context() as patch:
        save_all(patch)
        yield folder
    own_folders.use(before)


def settings() -> dict[str, Any]:
    """Of a router over a worker of its own."""
    return {
        "auto_setup_rpc": True,
        "auto_discover_rpc": False,
        "num_rpc_backends": 1,
        "rpc_port": unused_ports(8),
        "coordinator_port": unused_ports(4),
    }


@pytest.fixture(scope="module")
def shared(own: Path) -> Iterator[HybridRouter]:
    """A router over a worker of its own."""
    with HybridRouter(**settings()) as fresh:
        yield fresh


@pytest.fixture
def router(shared: HybridRouter) -> HybridRouter:
    """The router; nothing is saved, and no slot holds anything."""
    shared.stop_coordinator()  # once what it saves has been saved
    kill_coordinator()
    ContextStore().forget()
    return shared


@pytest.fixture(scope="module")
def expected(shared: HybridRouter) -> tuple[str, str]:
    """The answers to both questions. The demo model never wavers, however its prompt was processed."""
    talk = Talk()
    texts = talk.ask(shared).text, talk.ask(shared, QUESTION).text
    assert all(texts)
    assert texts[0] != texts[1]
    return texts


class Talk:
    """A conversation whose first question is long.

    Attributes:
        messages: so far.
        tokens: of them.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.tokens = 0

    def ask(self, router: HybridRouter, question: str = LONG) -> Completion:
        """The answer to the next question."""
        self.messages.append({"role": "user", "content": question})
        answer = router.route_request("demo", self.messages, **ASKED)
        self.messages.append({"role": "assistant", "content": answer.text})
        self.tokens = answer["prompt_eval_count"] + answer["eval_count"]
        return answer

    def saved(self, *, but: str = "") -> SavedContext:
        """Its saved context, once it has all of it.

        Args:
            but: the id of one that does not count.
        """
        found: list[SavedContext] = []

        def is_whole() -> bool:
            contexts = ContextStore().list()
            found[:] = [each for each in contexts if each.tokens >= self.tokens - MOST_AGAIN and each.id != but]
            return bool(found)

        eventually(is_whole, f"{self.tokens} tokens are saved")
        return found[-1]


def coordinators() -> list[psutil.Process]:
    return engines_of(psutil.Process(), "llama-server")


def kill_coordinator() -> None:
    """End it without warning; the next request gets another one."""
    for process in coordinators():
        with suppress(psutil.NoSuchProcess):  # it may end at any moment
            process.kill()
    eventually(lambda: not coordinators(), "the coordinator has ended")


def data_of(context: SavedContext) -> Path:
    return ContextStore().folder / context.file_name


def change(context: SavedContext, **values: Any) -> None:
    """Change what is known of it."""
    about = ContextStore().folder / f"{context.id}.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), **values}))


def unfinished() -> list[str]:
    """Files of savings that are under way, or were."""
    return [path.name for path in ContextStore().folder.glob("*.part")]


# --- a context that is there --------------------------------------------------------------------------


def test_a_conversation_continues_on_another_coordinator(router: HybridRouter, expected: tuple[str, str]) -> None:
    talk = Talk()
    assert talk.ask(router).routing["restored_tokens"] == 0
    talk.saved()
    before = talk.tokens
    kill_coordinator()

    answer = talk.ask(router, QUESTION)

    assert answer.text == expected[1]
    assert before - MOST_AGAIN <= answer.routing["restored_tokens"] <= answer.routing["cached_tokens"]
    assert f"{answer.routing['restored_tokens']:,} from a saved context" in answer.footer()
    (row,) = router.latency.frame(last=1).itertuples()
    counts = answer.routing["cached_tokens"], answer.routing["restored_tokens"]
    assert (row.cached_tokens, row.restored_tokens) == counts


def cut(context: SavedContext) -> None:
    with data_of(context).open("r+b") as file:
        file.truncate(context.size // 2)


def flip_a_bit(context: SavedContext) -> None:
    data = bytearray(data_of(context).read_bytes())
    data[len(data) // 2] ^= 1
    data_of(context).write_bytes(data)


def replace_with_garbage(context: SavedContext) -> None:
    garbage = os.urandom(context.size)
    data_of(context).write_bytes(garbage)
    change(context, checksum=zlib.crc32(garbage))


def of_another_build(context: SavedContext) -> None:
    change(context, made_of={**context.made_of, "engine": "another"})


def of_another_file(context: SavedContext) -> None:
    change(context, made_of={**context.made_of, "model_file": {"path": "/other.gguf", "size": 1, "mtime_ns": 1}})


@pytest.mark.parametrize(
    ("fault", "note", "is_deleted"),
    [
        (cut, "damaged", True),
        (flip_a_bit, "damaged", True),
        (replace_with_garbage, "llama.cpp did not take the saved context", False),
        (of_another_build, "another build of llama.cpp", False),
        (of_another_file, "another version of the model's file", False),
    ],
)
def test_what_cannot_be_used_is_named_and_the_answer_is_right(
    router: HybridRouter,
    expected: tuple[str, str],
    fault: Callable[[SavedContext], None],
    note: str,
    is_deleted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talk = Talk()
    talk.ask(router)
    context = talk.saved()
    fault(context)
    kill_coordinator()
    monkeypatch.setattr(keeper, "PAUSE_S", 600.0)  # else its file may have been replaced already

    answer = talk.ask(router, QUESTION)

    assert answer.text == expected[1]
    assert note in answer.routing["context_note"]
    assert answer.routing["context_note"] in answer.footer()
    assert answer.routing["restored_tokens"] == 0
    assert data_of(context).exists() is not is_deleted
    router.stop_coordinator()  # which saves first
    talk.saved(but=context.id)


def test_what_another_user_has_put_there_is_not_believed(
    router: HybridRouter, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk()
    talk.ask(router)
    talk.saved()
    kill_coordinator()
    owner = os.geteuid()
    with monkeypatch.context() as patch:
        # All files of this user are another one's now.
        patch.setattr(os, "geteuid", lambda: owner + 1)
        assert not ContextStore().list()
    about = next(ContextStore().folder.glob("*.json"))
    about.chmod(0o666)  # others may have written it

    answer = talk.ask(router, QUESTION)

    assert answer.text == expected[1]
    assert answer.routing["restored_tokens"] == 0


@posix_only
@pytest.mark.parametrize("why", ["others can write there", "it is a file"])
def test_with_a_folder_that_cannot_be_used_answers_come_as_before(
    router: HybridRouter, expected: tuple[str, str], own: Path, why: str
) -> None:
    folder = ContextStore().folder
    aside = folder.rename(own / "aside")
    if why == "it is a file":
        folder.write_text("not a folder")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    try:
        talk = Talk()
        assert (talk.ask(router).text, talk.ask(router, QUESTION).text) == expected
        router.stop_coordinator()  # which tries to save first
        assert folder.is_file() or not list(folder.iterdir())
    finally:
        kill_coordinator()
        if folder.is_file():
            folder.unlink()
        else:
            folder.rmdir()
        aside.rename(folder)


def test_two_coordinators_restore_the_same_context_at_the_same_time(
    router: HybridRouter, expected: tuple[str, str], own: Path
) -> None:
    talk = Talk()
    talk.ask(router)
    # The kernels have measured no prompt and go by this: restoring is quicker, and nothing is worth saving soon.
    change(talk.saved(), prefill_ms=1.0)
    kill_coordinator()
    asked = [*talk.messages, {"role": "user", "content": QUESTION}]
    # With state folders and workers of their own, none adopts the other's coordinator or meets its workers.
    ports = unused_ports(16)
    kernels = [
        Kernel(
            (),
            {**settings(), "rpc_port": ports + 8 * number, "coordinator_port": ports + 8 * number + 4},
            SOLLOL_STATE_DIR=str(own / f"state-{number}"),
        )
        for number in range(2)
    ]
    try:
        with ThreadPoolExecutor(2) as threads:
            # Both are ready before they ask: what one saves after its answer replaces what the other restores.
            first = [{"role": "user", "content": "Hello!"}]
            list(threads.map(lambda kernel: kernel.ask("demo", first, **{**ASKED, "max_tokens": 1}), kernels))
            answers = list(threads.map(lambda kernel: kernel.ask("demo", asked, **ASKED), kernels))
    finally:
        for kernel in kernels:
            kernel.end()
    assert [answer["text"] for answer in answers] == [expected[1]] * 2
    assert all(answer["routing"]["restored_tokens"] >= talk.tokens - MOST_AGAIN for answer in answers)
    assert ContextStore().list()


# --- while one is saved -------------------------------------------------------------------------------


def test_a_coordinator_that_dies_while_it_saves_costs_only_the_saving(
    router: HybridRouter, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = ContextStore.begin
    struck: list[Path] = []

    def kill_soon(process: psutil.Process) -> None:
        time.sleep(0.5)
        process.kill()

    def begin_and_die(store: ContextStore, size: int) -> Path | None:
        part = begin(store, size)
        if part is not None and not struck:
            part.write_bytes(b"the beginning")
            (coordinator,) = coordinators()
            coordinator.suspend()  # it does not answer any more, and is killed with the request under way
            struck.append(part)
            threading.Thread(target=kill_soon, args=[coordinator]).start()
        return part

    monkeypatch.setattr(ContextStore, "begin", begin_and_die)
    talk = Talk()
    assert talk.ask(router).text == expected[0]
    eventually(lambda: bool(struck) and not coordinators(), "it has died")
    eventually(lambda: not unfinished(), "what it had written is deleted")
    assert not ContextStore().list()

    assert talk.ask(router, QUESTION).text == expected[1]
    talk.saved()


DISK_FULL = """
import json, sys
import pytest
from sollol_nb.llama_cpp.contexts.store import ContextStore
from sollol_nb.runtime.events import EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import eventually
from tests.support.saved_contexts import save_all
told = json.loads(sys.argv[1])
save_all(pytest.MonkeyPatch())
ContextStore._allowed_bytes = lambda store: 1 << 40  # the disk fills up after it was looked at
refused = []
with HybridRouter(**told["settings"]) as router:
    router.events.subscribe(lambda event: event.kind == EventKind.CONTEXT_REFUSED and refused.append(event))
    first = router.route_request("demo", told["messages"][:1], **told["asked"])
    eventually(lambda: refused, "the saving has failed")
    files = [path.name for path in ContextStore().folder.iterdir() if path.name != "filler"]
    second = router.route_request("demo", told["messages"], **told["asked"])
    same = first.routing["coordinator_url"] == second.routing["coordinator_url"]
print(json.dumps([first.text, second.text, files, same, second.routing["cached_tokens"], refused[0].message]))
"""
TINY_DISK = """
mkdir -p "$1" && mount -t tmpfs -o size=1m,mode=700 tmpfs "$1" && shift
head -c "$1" /dev/zero > "$FILLED/filler"; shift
exec "$@"
"""


@linux_only
@pytest.mark.parametrize("filled_bytes", [900_000, 2_000_000], ids=["nearly full", "full"])
def test_a_disk_that_is_full_costs_only_the_saving(
    shared: HybridRouter, expected: tuple[str, str], tmp_path: Path, filled_bytes: int
) -> None:
    told = {
        "settings": settings(),
        "asked": ASKED,
        "messages": [
            {"role": "user", "content": LONG},
            {"role": "assistant", "content": expected[0]},
            {"role": "user", "content": QUESTION},
        ],
    }
    cache = own_folders.own_settings(tmp_path)
    folder = tmp_path / "cache" / "contexts"
    variables = {name: value for name, value in cache.items() if value is not None}
    program = [sys.executable, "-c", DISK_FULL, json.dumps(told)]
    mounted = ["unshare", *(["-m"] if os.geteuid() == 0 else ["-rm"]), "sh", "-c", TINY_DISK, "sh"]
    command = [*mounted, str(folder), str(filled_bytes), *program]
    with script(RUN, json.dumps(command), FILLED=str(folder), **variables) as process:
        out, complaints = process.communicate()
    assert process.returncode == 0, complaints
    first, second, files, is_same, cached_tokens, why = json.loads(out.splitlines()[-1])
    assert (first, second) == expected
    assert files == [], "nothing is left of it"
    assert is_same, "the coordinator lives"
    assert cached_tokens > 100, "and its slot still holds the conversation"
    assert "not saved" in why


RUN = "import json, subprocess, sys; sys.exit(subprocess.run(json.loads(sys.argv[1])).returncode)"


# --- while another kernel uses its slot -----------------------------------------------------------------


def test_the_answer_of_another_kernel_is_neither_waited_for_nor_disturbed(
    router: HybridRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "TAKEN_S", 0.05)
    model = str(write_endless(tmp_path))
    # With a context that is full only minutes later.
    with HybridRouter(**settings(), context_tokens=ENDLESS_CONTEXT_TOKENS) as roomy:
        answer = roomy.stream(model, "Hello", temperature=0, max_tokens=100_000, backend="sharded")
        next(answer)
        coordinator = roomy.coordinators[-1]
        contexts = keeper.ContextKeeper(
            coordinator._client, coordinator.settings.slots, coordinator.ask_lease, lambda _: None
        )

        for slot in contexts.slots.all:
            run(contexts._actions.erase(slot))

        assert sum(slot.is_taken for slot in contexts.slots.all) == 1
        assert not contexts.is_acting
        assert next(answer)
        answer.close()


# --- what shall not be saved --------------------------------------------------------------------------


def test_a_forgotten_conversation_is_not_saved_again_and_others_stay(router: HybridRouter) -> None:
    talk, other = Talk(), Talk()
    saved: list[Event] = []
    unsubscribe = router.events.subscribe(
        lambda event: saved.append(event) if event.kind == EventKind.CONTEXT_SAVED else None
    )
    talk.ask(router)
    other.ask(router, "A slot has tokens. " * 60 + QUESTION)
    eventually(lambda: len(saved) == 2, "both are saved")  # what is forgotten before it is reported is not kept
    unsubscribe()
    assert len(ContextStore().list()) == 2

    router.forget_contexts([[str(message["content"]) for message in talk.messages]])

    (left,) = ContextStore().list()
    assert left.has_turns([str(message["content"]) for message in other.messages])
    other.ask(router, QUESTION)  # after it, all that is worth it is saved
    other.saved(but=left.id)
    assert all("A worker holds layers." not in each.text for each in ContextStore().list())


def test_what_is_forgotten_while_it_is_answered_is_not_saved_after_it(router: HybridRouter) -> None:
    talk, other = Talk(), Talk()
    talk.ask(router)
    talk.saved()
    texts = [str(message["content"]) for message in talk.messages]
    messages = [*talk.messages, {"role": "user", "content": QUESTION}]
    answer = router.stream("demo", messages, **ASKED)
    next(answer)
    router.forget_contexts([texts])
    assert list(answer)

    other.ask(router, "A slot has tokens. " * 60 + QUESTION)  # after it, all that is worth it is saved
    other.saved()
    assert all("A worker holds layers." not in each.text for each in ContextStore().list())


def test_nothing_is_written_where_the_setting_says_so(
    router: HybridRouter, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_CONTEXT_CACHE_GB", "0")
    before = sorted(ContextStore().folder.iterdir())  # another user's files, which are not deleted
    seen: list[Any] = []
    unsubscribe = router.events.subscribe(lambda event: seen.append(event.kind))
    talk = Talk()
    texts = talk.ask(router).text, talk.ask(router, QUESTION).text
    kill_coordinator()
    unsubscribe()
    assert texts == expected
    assert not {EventKind.CONTEXT_SAVED, EventKind.CONTEXT_RESTORED} & set(seen)
    assert sorted(ContextStore().folder.iterdir()) == before
