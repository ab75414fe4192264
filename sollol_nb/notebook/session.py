"""The session of a kernel: its router, its conversations and its settings, which the magics use."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sollol_nb.chat import journaling
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat
from sollol_nb.chat.conversations import ChatBook
from sollol_nb.chat.kept import KeptChats
from sollol_nb.errors import SollolError
from sollol_nb.notebook import settings_traits
from sollol_nb.notebook.identity import notebook_of
from sollol_nb.notebook.preloading import Preload, Preloads
from sollol_nb.notebook.settings_traits import Sollol
from sollol_nb.settings.endpoints import is_loopback
from sollol_nb.settings.kinds import Secret

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from sollol_nb.sync_wrapper import HybridRouter


KEPT_ANSWERS = 50
_STOP_LIMIT_S = 5.0
CALIBRATE = "%sollol_cluster calibrate"
CALIBRATE_HINT = (
    f"hint: `{CALIBRATE}` measures how fast these machines are, about three seconds for each; then layers go "
    "where they are fastest"
)


def _new_router(**settings: Any) -> HybridRouter:
    # Both backends and their libraries are imported here, so that `%load_ext` is quick.
    from sollol_nb.sync_wrapper import HybridRouter

    return HybridRouter(**settings)


class Session:
    """The router, the conversations and the settings of one kernel. Threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # held while the router is created or replaced
        self._router: HybridRouter | None = None
        self._router_is_stale = False
        self._settings: Sollol | None = None
        self._shell: InteractiveShell | None = None
        self._chats = ChatBook()
        self._answers: deque[tuple[str, Completion]] = deque(maxlen=KEPT_ANSWERS)
        self._hinted = False
        self._preloads = Preloads(self.router)

    def start(self, shell: InteractiveShell) -> Sollol:
        """Let `%config Sollol` set the settings; returns them. Starting twice is fine.

        Raises:
            ConfigError: `ipython_config.py` or the command line has a value that cannot be used.
        """
        self._settings = settings_traits.install(shell)
        if self._shell is not shell:
            self._shell, self._chats = shell, ChatBook(self._kept_chats)
        self._settings.on_router_change(self._on_router_change)
        journaling.use_owner(self.owner)
        return self._settings

    def end(self, shell: InteractiveShell) -> None:
        """Close the router, with its engines or without them (setting `on_unload`); forget all else."""
        keep = self._settings is not None and self._settings.or_built_in("on_unload") == "keep"
        self._preloads.stop(_STOP_LIMIT_S)
        if self._router is not None:
            self._router.close(keep=keep)
        self._chats.flush()
        self._router, self._settings, self._shell, self._chats = None, None, None, ChatBook()
        self._answers.clear()
        journaling.flush()
        journaling.use_owner(None)
        settings_traits.remove(shell)

    def settings(self) -> Sollol:
        """The kernel's settings, those of `%config Sollol`.

        Raises:
            RuntimeError: the extension is not loaded.
        """
        if self._settings is None:
            raise RuntimeError("the extension is not loaded; run %load_ext sollol_nb")
        return self._settings

    def chats(self) -> ChatBook:
        """The kernel's conversations."""
        return self._chats

    def owner(self) -> str:
        """What the answers of this kernel belong to in the journal: its notebook, or the name of this process."""
        from sollol_nb.llama_cpp.processes.registry import own_name  # imported late, as the router is

        return (notebook_of(self._shell) if self._shell is not None else None) or own_name()

    def forget_contexts(self, chats: Sequence[Chat]) -> str:
        """Delete the saved contexts of conversations that are deleted; returns why that failed, else "".

        Where they were held over a gateway, their contexts are there.
        """
        conversations = [chat.texts for chat in chats]
        if not any(conversations):
            return ""
        try:
            self.router().forget_contexts(conversations)
        except SollolError as error:
            return f"their saved contexts could not be deleted: {error}"
        return ""

    def remember(self, prompt: str, answer: Completion) -> None:
        """Keep an answer, whole or partial, for `last_answers`."""
        self._answers.append((prompt, answer))

    def hint(self, answer: Completion) -> str:
        """A hint after the first answer over several machines whose speeds were never measured; else ""."""
        plan = answer.routing.get("plan") or {}
        is_unmeasured = any(CALIBRATE in reason for reason in plan.get("reasons", ()))
        shards = plan.get("shards", ())
        workers = [shard for shard in shards if not shard.get("device")]
        are_several = len(shards) > 1 and any(
            worker.get("name") or not is_loopback(worker["endpoint"]) for worker in workers
        )
        if self._hinted or not is_unmeasured or not are_several:
            return ""
        self._hinted = True
        return CALIBRATE_HINT

    def last_answers(self, count: int) -> list[tuple[str, Completion]]:
        """The newest answers with their prompts, oldest first; at most `KEPT_ANSWERS`."""
        return list(self._answers)[-count:]

    def router(self, **router_settings: Any) -> HybridRouter:
        """The kernel's router: created on first use, and again after one of its settings has changed.

        Args:
            **router_settings: replace the router by one with these settings of `HybridRouter`.
        """
        with self._lock:
            if self._router is None or router_settings or self._router_is_stale:
                # After a changed setting the new router adopts those engines that still suit it.
                return self._replace_router(_new_router(**router_settings), keep=not router_settings)
            return self._router

    def connect(self, gateway: str, key: Secret | None = None) -> None:
        """Use the engines of a gateway from now on, or own ones; the previous ones run on for their keep_alive.

        Args:
            gateway: its address, or `local`.
            key: instead of that of the setting `gateway_key`.

        Raises:
            GatewayError: no gateway answers there, or it refuses the key; nothing has changed.
        """
        settings = self.settings()
        given = {} if key is None else {"gateway_key": key}
        with self._lock:
            new = _new_router(gateway=gateway, **given)
            try:
                if new.gateway is not None:
                    new.connect()
            except BaseException:
                new.close(keep=True)
                raise
            settings.gateway = gateway
            if key is not None:
                settings.gateway_key = key
            self._replace_router(new, keep=True)

    def use_router(self, new: HybridRouter | None) -> HybridRouter:
        """Let the magics use this router from now on; None: a new one, with the kernel's settings. The previous
        router is closed."""
        with self._lock:
            return self._replace_router(new if new is not None else _new_router(), keep=False)

    def _kept_chats(self) -> KeptChats | None:
        """Where the notebook's conversations are kept; None if the notebook is not known."""
        settings = self._settings
        notebook = notebook_of(self._shell) if self._shell is not None else None
        if settings is None or notebook is None:
            return None
        return KeptChats(notebook, is_on=lambda: bool(settings.or_built_in("keep_chats")))

    def preload(self, model: str) -> Preload:
        """Begin to load a model in the background; the running cell shows how far it is."""
        return self._preloads.begin(model, self._shell)

    def check_preload(self, _: object = None) -> None:
        """Begin to load the model that the notebook names, if the settings say so; show what loads (for IPython's
        event `post_run_cell`)."""
        if self._shell is not None and self._settings is not None:
            self._preloads.check(self._shell, self._settings)
            self._preloads.show_in_cell()

    def note_typing(self, cell: str) -> None:
        """Note the text of a cell up to the cursor, for which the frontend wants completions; never waits."""
        if self._settings is not None:
            self._preloads.note_typing(cell, self._settings)

    def running_models(self) -> list[str]:
        """The models of the router's coordinators."""
        return [coordinator.model for coordinator in self._router.coordinators] if self._router is not None else []

    def worker_targets(self) -> list[str]:
        """The router's workers as `host:port`, and machines as `ssh://host`."""
        return self._router.worker_targets if self._router is not None else []

    def batch_defaults(self) -> dict[str, Any]:
        """What `df.sollol.map` gets where the call names nothing else."""
        timeout = self._settings.own("timeout") if self._settings is not None else None
        return {} if timeout is None else {"timeout": timeout}

    def has_short_errors(self) -> bool:
        """Whether the package's errors are shown as one line (setting `short_errors`)."""
        return self._settings is None or bool(self._settings.or_built_in("short_errors"))

    def _replace_router(self, new: HybridRouter, *, keep: bool) -> HybridRouter:
        previous, self._router, self._router_is_stale = self._router, new, False
        if previous is not None and previous is not new:
            try:
                are_own = new.gateway is None and previous.gateway is None
                if keep and are_own and (self._settings is None or self._settings.own("workers") is None):
                    new.take_workers(previous.worker_targets)  # also those that were started, found or added
            finally:
                previous.close(keep=keep)
        return new

    def _on_router_change(self, name: str) -> None:
        running = self._router if name == "standby" and not self._router_is_stale else None
        if running is not None and running.gateway is None:  # it changes while all runs on
            for line in running.use_standbys(bool(self.settings().or_built_in("standby"))):
                print(line)
            return
        self._router_is_stale = self._router is not None
        self._preloads.stop()  # it loads as the router's previous settings say


_session = Session()

start = _session.start
end = _session.end
settings = _session.settings
chats = _session.chats
owner = _session.owner
remember = _session.remember
forget_contexts = _session.forget_contexts
hint = _session.hint
last_answers = _session.last_answers
router = _session.router
connect = _session.connect
use_router = _session.use_router
preload = _session.preload
check_preload = _session.check_preload
note_typing = _session.note_typing
running_models = _session.running_models
worker_targets = _session.worker_targets
batch_defaults = _session.batch_defaults
has_short_errors = _session.has_short_errors
