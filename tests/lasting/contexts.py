"""A long conversation is interrupted in six ways, each time before one more short question.

The conversation of SmolLM2 over three workers on loopback is held twice: never interrupted, with nothing saved,
and interrupted before each question. Counted for each interruption: tokens of the prompt that were processed again
though an engine had processed them before; the time to the first token, loading included, as a share of what the
cold prompt took; and whether the text is that of the conversation that was never interrupted.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sollol_nb.llama_cpp.contexts.store import ContextStore
from sollol_nb.llama_cpp.engine.find import find_engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.settings import config
from tests.chaos.machines import Cluster
from tests.lasting._kernel import Kernel
from tests.lasting.goals import Goal, Show, all_of, at_most, percent
from tests.support.engines import REPOSITORY, eventually, kill_at_once, with_variable
from tests.support.smollm2 import BLOCKS, smollm2_path

N = 50
SENTENCES = 450
"""Of the text in the first question: about 6,000 tokens."""
CONTEXT_TOKENS = 8192
ANSWER_TOKENS = 12
MOST_AGAIN = 32
MOST_OF_COLD = 0.15
SAVED_WITHIN = 4
"""Tokens at the end of a conversation that need not be in a saved context: the last is never in the KV cache."""
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": ANSWER_TOKENS, "backend": "sharded"}
SETTINGS: dict[str, Any] = {"context_tokens": CONTEXT_TOKENS, "num_rpc_backends": 3, "keep_alive": "10m"}


def long_text(sentences: int) -> str:
    """A text that no model knows: the log of a cluster."""
    rng = random.Random(16)
    names = ("cedar", "maple", "birch", "rowan", "alder", "hazel", "aspen", "larch")
    return " ".join(
        f"Worker {rng.choice(names)} took {rng.randint(2, 99)} layers in {rng.randint(2, 99)} seconds."
        for _ in range(sentences)
    )


QUESTIONS = (
    "Which worker was first?",
    "Name one more worker.",
    "Was that quick?",
    "How many layers?",
    "Say it in one word.",
    "And the last one?",
    "Are you sure?",
)


@dataclass
class Conversation:
    """A conversation with the model.

    Attributes:
        messages: so far.
        tokens: that an engine has processed or generated of it.
        again: prompt tokens of the last question that were processed though they were no news.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    again: int = 0

    def ask(self, kernel: Kernel, question: str) -> dict[str, Any]:
        """Ask the next question."""
        asked = [*self.messages, {"role": "user", "content": question}]
        answer = kernel.ask(str(smollm2_path()), asked, **ASKED)
        processed = answer["prompt_tokens"] - (answer["routing"]["cached_tokens"] or 0)
        news = answer["prompt_tokens"] - self.tokens
        self.again = processed - news
        self.tokens = answer["prompt_tokens"] + answer["answer_tokens"]
        self.messages = [*asked, {"role": "assistant", "content": answer["text"]}]
        return answer


class Scene:
    """Three machines, a kernel, and what happens to them.

    Attributes:
        kernel: the one that asks now.
    """

    def __init__(self, cluster: Cluster, other_model: Path) -> None:
        self.cluster = cluster
        self.machines = cluster.machines[:3]
        self._other_model = other_model
        self._layouts = 0
        self.kernel: Kernel

    def begin(self) -> None:
        """Start the kernel."""
        self.kernel = self._new_kernel()

    def _new_kernel(self, **variables: str) -> Kernel:
        return Kernel([machine.endpoint for machine in self.machines], SETTINGS, **variables)

    @contextmanager
    def uninterrupted(self) -> Iterator[Kernel]:
        """A kernel that saves no context; its engine ends with it."""
        kernel = self._new_kernel(SOLLOL_CONTEXT_CACHE_GB="0")
        try:
            yield kernel
            kernel.call("stop_coordinator")
        finally:
            kernel.kill()
            self.end()
            self.cluster.make_well()

    def think(self, conversation: Conversation) -> None:
        """Pause as a reader does, until the context is saved. Nothing else is known to take as long."""
        store = ContextStore()
        eventually(
            lambda: max((each.tokens for each in store.list()), default=0) >= conversation.tokens - SAVED_WITHIN,
            f"{conversation.tokens} tokens are saved, of {[each.tokens for each in store.list()]}",
        )

    def keep_alive_ends(self) -> None:
        """Nobody asks for longer than `keep_alive`."""
        self.kernel.call("configure", keep_alive="1s")
        self._is_gone()
        self.kernel.call("configure", keep_alive=SETTINGS["keep_alive"])

    def another_model_needs_room(self) -> None:
        """Another model is asked, for which the coordinator has to end: no worker is free."""
        held = [worker for entry in registry.entries(registry.COORDINATOR) for worker in entry.workers]
        for machine in self.machines:
            if machine.endpoint not in held:
                machine.kill()
        self.kernel.ask(str(self._other_model), [{"role": "user", "content": "Hi"}], **{**ASKED, "max_tokens": 2})
        eventually(
            lambda: self._running_models() == [str(self._other_model)],
            f"only {self._other_model} runs, not {self._running_models()}",
        )

    def _running_models(self) -> list[str]:
        return [entry.about["model_file"]["path"] for entry in registry.entries(registry.COORDINATOR)]

    def is_stopped(self) -> None:
        """`sollol-nb stop` ends it."""
        run = [sys.executable, "-m", "sollol_nb", "stop", str(smollm2_path())]
        done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
        assert "stopped coordinator" in done.stdout, done
        self._is_gone()

    def machine_restarts(self) -> None:
        """The kernel and all engines end at once; a new kernel begins."""
        self.end()
        self.kernel.kill()  # and wait for its end
        self.cluster.make_well()
        self.kernel = self._new_kernel()

    def another_layout(self) -> None:
        """The model is planned again, over the same workers."""
        first, second, third = (machine.endpoint for machine in self.machines)
        self._layouts += 1
        few = 4 if self._layouts % 2 else 15
        rest = BLOCKS + 1 - few
        counts = {first: few, second: rest // 2, third: rest - rest // 2}
        self.kernel.call("apply_plan", str(smollm2_path()), counts)

    def worker_dies(self) -> None:
        """One of the workers is gone, which only the next question notices."""
        self.machines[self._layouts % 3].kill()

    def end(self) -> None:
        """End all kernels and engines at once."""
        kill_at_once(with_variable("SOLLOL_STATE_DIR", str(config.state_dir())))

    def _is_gone(self) -> None:
        eventually(lambda: not registry.entries(registry.COORDINATOR), "the coordinator has ended")


WAYS: Mapping[str, Callable[[Scene], None]] = {
    "keep_alive ended": Scene.keep_alive_ends,
    "another model needed room": Scene.another_model_needs_room,
    "sollol-nb stop": Scene.is_stopped,
    "machine restarted": Scene.machine_restarts,
    "another layout": Scene.another_layout,
    "a worker died": Scene.worker_dies,
}


def run(n: int, seed: int, show: Show, *, sentences: int = SENTENCES) -> list[Goal]:
    """Interrupt so many times.

    Args:
        sentences: of the text that the conversation is about.
    """
    ways = [list(WAYS)[number % len(WAYS)] for number in range(n)]
    random.Random(seed).shuffle(ways)
    first = f"{long_text(sentences)} {QUESTIONS[0]}"
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(n)]
    other_model = config.cache_dir() / "other.gguf"
    shutil.copyfile(smollm2_path(), other_model)
    with Cluster(find_engine()) as cluster:
        scene = Scene(cluster, other_model)
        try:
            with scene.uninterrupted() as kernel:
                undisturbed = Conversation()
                texts = [undisturbed.ask(kernel, question)["text"] for question in (first, *questions)]
            scene.begin()
            conversation = Conversation()
            cold = conversation.ask(scene.kernel, first)
            cold_ms = cold["routing"]["ttft_ms"] - (cold["routing"]["load_ms"] or 0.0)
            show(f"{cold['prompt_tokens']:,} tokens of prompt took {cold_ms / 1000:.1f} s")
            is_same = [cold["text"] == texts[0]]
            again: list[float] = []
            shares: list[float] = []
            for number, (way, question) in enumerate(zip(ways, questions, strict=True), 1):
                scene.think(conversation)
                WAYS[way](scene)
                answer = conversation.ask(scene.kernel, question)
                cluster.make_well()
                routing = answer["routing"]
                again.append(conversation.again)
                shares.append(routing["ttft_ms"] / cold_ms)
                is_same.append(answer["text"] == texts[number])
                first_s, load_s = routing["ttft_ms"] / 1000, (routing["load_ms"] or 0.0) / 1000
                show(
                    f"{number}/{n} {way}: {conversation.again} tokens again, "
                    f"{routing['restored_tokens']} restored; first token {first_s:.1f} s "
                    f"({load_s:.1f} s of them loading), {percent(shares[-1])} of cold; "
                    f"layers {routing['layout']}; {'same text' if is_same[-1] else 'OTHER TEXT'} "
                    f"{routing['context_note']}"
                )
        finally:
            scene.end()
    return [
        at_most("prompt tokens processed again", again, MOST_AGAIN),
        at_most("first token, as a share of the cold prompt", shares, MOST_OF_COLD, percent),
        all_of("text as never interrupted", is_same),
    ]
