"""Models that load in the background, before a cell asks them (setting `preload`).

Each load has a thread, which waits for `router.preload` and shows the progress as one line in the cell that began
it. A cell that asks the model meanwhile waits for the same coordinator; an interrupt ends that cell, not the load.

A notebook may come from anybody. So nothing is loaded unless the user's own settings say so, and what a notebook,
or a folder's settings file that the user has not allowed, names counts only as a name: not as the path of a file.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ConfigError, RequestCancelledError
from sollol_nb.notebook.answers.cell import follow_events
from sollol_nb.notebook.answers.views import UPDATE_INTERVAL_S, LiveAnswer
from sollol_nb.notebook.displays import is_kernel, make_display
from sollol_nb.notebook.identity import notebook_path
from sollol_nb.runtime.io_loop import submit
from sollol_nb.settings import config
from sollol_nb.settings.kinds import TYPING
from sollol_nb.text.short_names import is_file_name, short_name

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from sollol_nb.notebook.settings_traits import Sollol
    from sollol_nb.sync_wrapper import HybridRouter

NOTEBOOK_LIMIT_BYTES = 16 * 1024 * 1024
"""Longer notebook files are not searched for a model."""
NAME_LIMIT_CHARS = 200
_CELL = re.compile(r"\s*%%sollol[ \t]+(?:\w+[ \t]*<<[ \t]*)?(?P<model>[^\s\"'{}-][^\s\"'{}]*)(?:\s|\Z)")


class Preloads:
    """The models that a kernel loads in the background. Threads may use it.

    Args:
        router: returns the kernel's router; may take long, and is called in a thread.
    """

    def __init__(self, router: Callable[[], HybridRouter]) -> None:
        self._router = router
        self._lock = threading.Lock()
        self._names: set[str] = set()  # of all that were begun
        self._loads: list[Preload] = []  # whose ends were not shown yet
        self._checked: object = None

    def begin(self, model: str, shell: InteractiveShell | None = None) -> Preload:
        """Begin to load a model; one that is loaded already is ready at once.

        Args:
            shell: of the running cell, in which the progress is shown; None shows nothing.
        """
        show = make_display if shell is not None and is_kernel(shell) else None
        with self._lock:
            self._names.add(model)
            self._loads.append(Preload(model, self._router, show))
            return self._loads[-1]

    def check(self, shell: InteractiveShell, settings: Sollol) -> None:
        """Begin to load the model that the notebook names, if the settings say so and it has not begun yet. Called
        when the extension is loaded, and after each cell, which may have changed a setting."""
        try:
            wanted, model = settings.find("preload").value, settings.find("model")
        except ConfigError:  # the next cell that asks says so
            return
        checked = (wanted, model)
        if checked == self._checked:
            return
        self._checked = checked
        if not wanted:
            return
        if model.value:
            name = model.value if may_load(model.value, model.source) else None
        else:
            name = model_of_notebook(notebook_path(shell))
        if name is not None and name not in self._names:
            self.begin(name, shell)

    def note_typing(self, cell: str, settings: Sollol) -> None:
        """Begin to load the model of the cell that is being typed, if the setting is `typing`; never waits.

        Args:
            cell: up to the cursor, which is below its first line.
        """
        model = model_of_cell(cell)
        if model is None or model in self._names or settings.or_built_in("preload") != TYPING:
            return
        if may_load(model):
            self.begin(model)

    def show_in_cell(self) -> None:
        """Show the present lines as a part of the running cell: nbclient takes updates of that one only."""
        with self._lock:
            self._loads = [load for load in self._loads if not load.show_in_cell()]

    def stop(self, wait_s: float = 0.0) -> None:
        """End the loads that have not ended; the next check may begin new ones.

        Args:
            wait_s: how long to wait for their threads.
        """
        with self._lock:
            stopped, self._loads = self._loads, []
            self._names, self._checked = set(), None
        for preload in stopped:
            preload.cancel()
        deadline = time.monotonic() + wait_s
        for preload in stopped:
            preload.join(max(0.0, deadline - time.monotonic()))


class Preload:
    """The load of one model in the background.

    Args:
        router: returns the router; called in a thread.
        show: how a notebook shows a mime bundle and updates it; None shows nothing.

    Attributes:
        model: its name, or the path of its file.
        line: what it does, or how it has ended.
    """

    def __init__(
        self,
        model: str,
        router: Callable[[], HybridRouter],
        show: Callable[[dict[str, Any]], Callable[[dict[str, Any]], None]] | None,
    ) -> None:
        self.model = model
        self.line = f"loading {short_name(model)}"
        self._router = router
        self._lock = threading.Lock()
        self._future: Future[str] | None = None
        self._is_cancelled = False
        self._ended = threading.Event()
        self._update = None if show is None else show(self._bundle)
        # In the context of the cell, where a kernel looks up which cell an output belongs to.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._load,), name="sollol_nb preload", daemon=True
        )
        self._thread.start()

    @property
    def _bundle(self) -> dict[str, Any]:
        return {"text/plain": self.line}

    @property
    def is_shown(self) -> bool:
        """Whether a notebook shows the line."""
        return self._update is not None

    def cancel(self) -> None:
        """End the load, and the engine if it is still loading."""
        with self._lock:
            self._is_cancelled = True
            if self._future is not None:
                self._future.cancel()

    def join(self, timeout_s: float) -> None:
        """Wait until it has ended and its end is shown."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def show_in_cell(self) -> bool:
        """Show the line as a part of the running cell; whether this was the end. A terminal shows only that."""
        with self._lock:
            is_end = self._ended.is_set()
            if self._update is not None:
                self._update(self._bundle)
            elif is_end and sys.stderr.isatty():
                print(f"[{self.line}]", file=sys.stderr, flush=True)
            return is_end

    def _load(self) -> None:
        name, began = short_name(self.model), time.monotonic()
        try:
            self._wait()
            self._show(f"{name} is ready after {time.monotonic() - began:.1f} s")
        except (CancelledError, RequestCancelledError):
            self._show(f"{name}: loading was stopped")
        except Exception as error:  # the cell that asks raises it
            self._show(f"{name} was not loaded: {' '.join(str(error).split()) or type(error).__name__}")
        finally:
            self._ended.set()

    def _wait(self) -> None:
        """Wait until the model is loaded, and show how far it is."""
        router, progress = self._router(), LiveAnswer(self.model)
        with follow_events(router.events, self.model, progress):
            with self._lock:
                if self._is_cancelled:
                    raise CancelledError
                self._future = submit(router.preload_async(self.model))
            while not wait([self._future], timeout=UPDATE_INTERVAL_S).done:
                if progress.status:
                    self._show(progress.status)
            self._future.result()

    def _show(self, line: str) -> None:
        with self._lock:
            if line == self.line:
                return
            self.line = line
            if self._update is not None:
                self._update(self._bundle)


def may_load(model: str, source: str | None = None) -> bool:
    """Whether a model may be loaded without a further word of the user: a name, or a file that they have named.

    Args:
        source: of the setting that names it (see `config.Found`); None where a notebook names it.
    """
    try:
        if is_file_name(model):
            return source is not None and config.is_of_user(source)
        saved = config.saved_model(model)
        return saved.gguf is None or config.is_of_user(saved.source)
    except ConfigError:
        return False


def model_of_cell(cell: str) -> str | None:
    """The model that a `%%sollol NAME` cell names, if it is a name; None for all other cells."""
    match = _CELL.match(cell)
    name = match["model"] if match is not None else ""
    return name if 0 < len(name) <= NAME_LIMIT_CHARS and name.isprintable() and not is_file_name(name) else None


def model_of_notebook(path: str | None) -> str | None:
    """The model of the first `%%sollol NAME` cell in a notebook's file; None if there is none, if it may not be
    loaded, and where the file cannot be read."""
    if path is None or not path.endswith(".ipynb") or not Path(path).is_file():
        return None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        with Path(path).open("rb") as file:
            data = file.read(NOTEBOOK_LIMIT_BYTES + 1)
        cells = json.loads(data)["cells"] if len(data) <= NOTEBOOK_LIMIT_BYTES else []
        for cell in cells if isinstance(cells, list) else []:
            source = cell.get("source") if isinstance(cell, dict) and cell.get("cell_type") == "code" else None
            text = "".join(map(str, source)) if isinstance(source, list) else source
            if isinstance(text, str) and (model := model_of_cell(text)) is not None:
                return model if may_load(model) else None
    return None
