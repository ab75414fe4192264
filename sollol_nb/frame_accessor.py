"""`df.sollol.map(...)`: batches of a router (`HybridRouter.map`) as a pandas accessor.

`%load_ext` registers it with the kernel's router. In a script::

    from sollol_nb import frame_accessor
    frame_accessor.register(lambda: router)
    labelled = df.sollol.map("Is this praise or blame? {{ text }}", model="llama3.2", schema=Label)

Registering does not import pandas, which takes longer than all else that the extension loads: if pandas is not
imported yet, the accessor is attached when it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sollol_nb.batch.rows import RowTemplate
from sollol_nb.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

    from sollol_nb.sync_wrapper import HybridRouter

NAME = "sollol"

_get_router: Callable[[], HybridRouter] | None = None
_get_defaults: Callable[[], Mapping[str, Any]] = dict


class FrameAccessor:
    """`df.sollol`: ask a model about each row of a frame."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame

    def map(self, template: RowTemplate, *, router: HybridRouter | None = None, **settings: Any) -> pd.DataFrame:
        """`router.map(df, template, **settings)`: the frame joined with an answer for each row.

        Args:
            template: a text with `{{ column }}` in it, or a function of a row (a dict by column).
            router: a blocking router; by default the registered one.
            settings: those of `HybridRouter.map`: `model`, `schema`, `system`, `concurrency`, `fresh`, ...

        Raises:
            ConfigError: no router is registered, or as for `HybridRouter.map`.
            SollolError, BatchInterrupted: as for `HybridRouter.map`.
        """
        if router is None:
            if _get_router is None:
                raise ConfigError("no router is registered for df.sollol; pass one: router=HybridRouter()")
            router = _get_router()
            settings = {**_get_defaults(), **settings}
        return router.map(self._frame, template, **settings)


def register(
    get_router: Callable[[], HybridRouter] | None = None, get_defaults: Callable[[], Mapping[str, Any]] = dict
) -> None:
    """Add `.sollol` to all frames. Registering again only changes the router.

    Args:
        get_router: returns the router for calls without `router`; called for each of them. None: each call must
            pass one.
        get_defaults: returns settings of these calls that they may override.
    """
    global _get_router, _get_defaults
    _get_router, _get_defaults = get_router, get_defaults
    if _is_imported():
        _attach()
    elif _WITH_PANDAS not in sys.meta_path:
        sys.meta_path.insert(0, _WITH_PANDAS)


def unregister() -> None:
    """Remove `.sollol` from all frames, if they have it."""
    global _get_router, _get_defaults
    _get_router, _get_defaults = None, dict
    if _WITH_PANDAS in sys.meta_path:
        sys.meta_path.remove(_WITH_PANDAS)
    if _is_imported():
        frames = _frames()
        if NAME in frames._accessors:
            delattr(frames, NAME)
            frames._accessors.discard(NAME)


def _is_imported() -> bool:
    return hasattr(sys.modules.get("pandas"), "DataFrame")


def _frames() -> Any:
    import pandas as pd

    return pd.DataFrame  # as Any: `_accessors`, the names of all accessors, is not part of its type


def _attach() -> None:
    from pandas.api.extensions import register_dataframe_accessor

    if NAME not in _frames()._accessors:
        register_dataframe_accessor(NAME)(FrameAccessor)


class _AttachingLoader(Loader):
    """Loads pandas as its own loader does, then attaches the accessor."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._inner
        if _WITH_PANDAS in sys.meta_path:  # else `unregister` was called meanwhile
            sys.meta_path.remove(_WITH_PANDAS)
            _attach()


class _WithPandas(MetaPathFinder):
    """Waits until pandas is imported; a caller that only looks for its spec (`importlib.util.find_spec`) does not
    end the wait."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "pandas":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _AttachingLoader(spec.loader)
        return spec


_WITH_PANDAS = _WithPandas()
