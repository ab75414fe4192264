"""Progress bars of tqdm. The extension sets another class, whose bars stay in saved notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm.std import tqdm

_bar_class: type[tqdm[Any]] | None = None


def progress_bar(**settings: Any) -> tqdm[Any]:
    """A bar with these settings of tqdm. Create and use it in the thread that shows it."""
    from tqdm.auto import tqdm as default_class

    bar: tqdm[Any] = (default_class if _bar_class is None else _bar_class)(**settings)
    return bar


def use_bars(bar: type[tqdm[Any]] | None) -> None:
    """Draw bars with this class from now on; None restores tqdm's own choice."""
    global _bar_class
    _bar_class = bar
