"""Progress bars: tqdm's, in terminals and notebooks; the extension brings one that a saved notebook keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm.std import tqdm

_own: type[tqdm[Any]] | None = None


def progress_bar(**settings: Any) -> tqdm[Any]:
    """A bar with these settings of tqdm. Make and use it in the thread whose output it is."""
    from tqdm.auto import tqdm as usual

    bar: tqdm[Any] = (usual if _own is None else _own)(**settings)
    return bar


def use_bars(bar: type[tqdm[Any]] | None) -> None:
    """Draw bars with this class from now on; None goes back to tqdm's own choice."""
    global _own
    _own = bar
