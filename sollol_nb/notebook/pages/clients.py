"""Which clients a kernel hears from, and where an answer is shown.

Each page that is loaded is a new client with a session id of its own. It asks for the kernel's information, which
a busy kernel answers when its cell has ended; JupyterLab's debugger speaks to the control channel, at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from sollol_nb.notebook import displays
from sollol_nb.notebook.pages.saved_outputs import SavedDisplay
from sollol_nb.notebook.pages.watch import PageWatch, ShownAnswer

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from sollol_nb.notebook.pages.jupyter_server import JupyterServer

_HEARD = (
    ("shell_handlers", ("kernel_info_request",)),
    ("control_handlers", ("kernel_info_request", "debug_request")),
)
_SHOWS_ANSWERS = ("%sollol_answers", "%sollol_last")


class Clients:
    """The clients of one kernel.

    Args:
        shell: of a kernel.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = cast("Any", shell)
        self._undo: list[Callable[[], None]] = []
        self.watch = PageWatch(self._find_server)
        for name, kinds in _HEARD:
            handlers = getattr(self._shell.kernel, name, {})
            for kind in kinds:
                if kind in handlers:
                    self._listen(handlers, kind)
        shell.events.register("pre_run_cell", self.begin_cell)

    def end(self) -> None:
        """Listen no more."""
        self.watch.end()
        self._shell.events.unregister("pre_run_cell", self.begin_cell)
        while self._undo:
            self._undo.pop()()

    def begin_cell(self, info: Any = None) -> None:
        """Say what the page of this cell has missed (for IPython's event `pre_run_cell`)."""
        session = self._header().get("session", "")
        if not session:
            return
        self.watch.note(session)
        if not getattr(info, "store_history", True):  # code of the page itself (a variable inspector), not a cell
            return
        hint = self.watch.hint(session)
        if hint and not str(getattr(info, "raw_cell", "")).lstrip().startswith(_SHOWS_ANSWERS):
            print(hint)

    def shown_answer(self, model: str) -> ShownAnswer:
        """An answer that the running cell asks for, looked after from now on."""
        answer = ShownAnswer(model, self._header().get("session", ""))
        self.watch.add(answer)
        return answer

    def make_display(self, answer: ShownAnswer, bundle: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        """Show a mime bundle of an answer; returns the function that replaces it."""
        if displays.is_captured():  # its outputs are the state of a widget
            return displays.make_display(bundle)
        parent = self._shell.parent_header
        shown = SavedDisplay(
            cell_id=str((parent.get("metadata") or {}).get("cellId") or ""),
            code=str((parent.get("content") or {}).get("code") or ""),
            request=str(self._header().get("msg_id") or ""),
            bundle=bundle,
        )
        answer.displays.append(shown)
        update = displays.make_display(bundle, shown.metadata)

        def replace(new: dict[str, Any]) -> None:
            shown.bundle = new
            update(new)

        return replace

    def _find_server(self) -> JupyterServer | None:
        from sollol_nb.notebook.pages.jupyter_server import find_server  # loads the HTTP client, so on first use

        application = getattr(self._shell.kernel, "parent", None)
        return find_server(getattr(application, "connection_file", None))

    def _header(self) -> dict[str, Any]:
        header = self._shell.parent_header.get("header")
        return header if isinstance(header, dict) else {}

    def _listen(self, handlers: dict[str, Any], kind: str) -> None:
        handler = handlers[kind]

        def listen(stream: Any, ident: Any, parent: Any) -> Any:
            session = parent.get("header", {}).get("session")
            if session:
                self.watch.note(str(session))
            return handler(stream, ident, parent)

        def restore() -> None:
            if handlers.get(kind) is listen:
                handlers[kind] = handler

        handlers[kind] = listen
        self._undo.append(restore)


_clients: list[Clients] = []
"""Those of this kernel, while the extension is loaded."""


def follow(shell: InteractiveShell) -> None:
    """Listen to the clients of a kernel; in a terminal nothing is done. Twice is fine."""
    if displays.is_kernel(shell) and not _clients:
        _clients.append(Clients(shell))


def forget() -> None:
    """Listen no more."""
    while _clients:
        _clients.pop().end()


def shown_answer(model: str) -> ShownAnswer | None:
    """An answer that the running cell asks for, looked after from now on; None in a terminal."""
    return _clients[0].shown_answer(model) if _clients else None


def make_display(answer: ShownAnswer, bundle: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Show a mime bundle of an answer; returns the function that replaces it."""
    return _clients[0].make_display(answer, bundle) if _clients else displays.make_display(bundle)
