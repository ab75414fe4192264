"""What an object says about itself to a model, by a method of its class.

- `_ai_repr_(**kwargs)` (Jupyter Enhancement Proposal 129): a MIME bundle, such as `{"text/plain": ...,
  "image/png": ...}`, or an awaitable of one. It is called with `multimodal=True`, if it takes that.
- `_repr_llm_()` (the package repr_llm): a text.

The first one that exists and does not return None counts. One that raises, returns something else, or does not
return in time is passed over, and `problem` has the reason: the fault is rarely with the person who asks. What
runs too long without awaiting is ended by the stop button, as any code of a cell.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sollol_nb.text.images import Image, image_in
from sollol_nb.text.tables import shortened

AWAIT_LIMIT_S = 30.0
_HINTS = {"multimodal": True}
_TEXTS = ("text/llm+plain", "text/markdown", "text/plain", "application/json")
"""Which text of a MIME bundle is taken, the first one first; any other `text/...` only without these."""
_IMAGES = ("image/png", "image/jpeg")
_DISPLAYED = ("_repr_markdown_", "_repr_latex_", "_repr_html_")


@dataclass(frozen=True, slots=True)
class OwnForm:
    """What an object says.

    Attributes:
        text: None if it says nothing in words.
        image: None without one.
        problem: why a method of it was passed over; usually "".
    """

    text: str | None = None
    image: Image | None = None
    problem: str = ""

    def __bool__(self) -> bool:
        return self.text is not None or self.image is not None


_NOTHING = OwnForm()


def own_form(value: object) -> OwnForm:
    """What an object says about itself to a model; false if it says nothing."""
    problems = []
    for name, call in (("_ai_repr_", _ai_repr), ("_repr_llm_", _repr_llm)):
        method = getattr(type(value), name, None)
        if not callable(method):
            continue
        try:
            form = call(method, value)
        except Exception as error:  # the object's own code can raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            problems.append(f"{type(value).__name__}.{name}() failed ({shortened(reason, 200)})")
            continue
        if form.problem:
            problems.append(f"{type(value).__name__}.{name}() {form.problem}")
        if form:
            return OwnForm(form.text, form.image, "; ".join(problems))
    return OwnForm(problem="; ".join(problems)) if problems else _NOTHING


def displayed_form(value: object) -> OwnForm:
    """What an object shows on a page, as far as a model can read it: for those whose `str` says nothing."""
    with_bundle = getattr(type(value), "_repr_mimebundle_", None)
    try:
        if callable(with_bundle):
            bundle = with_bundle(value, include=None, exclude=None)  # as IPython calls it
            form = _of_bundle(bundle[0] if isinstance(bundle, tuple) and bundle else bundle)
            if form:
                return form
        for name in _DISPLAYED:
            method = getattr(type(value), name, None)
            text = method(value) if callable(method) else None
            text = text[0] if isinstance(text, tuple) and text else text
            if isinstance(text, str):
                return OwnForm(text)
    except Exception:  # as IPython does: what cannot be displayed is shown by its `repr`
        return _NOTHING
    return _NOTHING


def _repr_llm(method: Callable[..., Any], value: object) -> OwnForm:
    text = method(value)
    if text is None or isinstance(text, str):
        return OwnForm(text)
    return OwnForm(problem=f"returned {type(text).__name__}, not a text")


def _ai_repr(method: Callable[..., Any], value: object) -> OwnForm:
    taken = inspect.signature(method).parameters.values()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken)
    names = {parameter.name for parameter in taken}
    bundle = method(value, **{name: hint for name, hint in _HINTS.items() if takes_all or name in names})
    if inspect.isawaitable(bundle):
        bundle = _awaited(bundle)
    return _of_bundle(bundle)


def _of_bundle(bundle: object) -> OwnForm:
    """The best text and image of a MIME bundle."""
    if bundle is None or isinstance(bundle, str):
        return OwnForm(bundle)
    if not isinstance(bundle, Mapping):
        return OwnForm(problem=f"returned {type(bundle).__name__}, not a dict by MIME type")
    image = next((found for kind in _IMAGES if (found := image_in(bundle.get(kind))) is not None), None)
    text = None
    for kind in (*_TEXTS, *(kind for kind in bundle if str(kind).startswith("text/"))):
        content = bundle.get(kind)
        if kind == "application/json" and content is not None:
            content = json.dumps(content, ensure_ascii=False, default=str)
        if isinstance(content, str):
            text = content
            break
    if text is None and image is None:
        kinds = ", ".join(map(str, bundle)) or "nothing"
        return OwnForm(problem=f"returned no text, PNG or JPEG (but {shortened(kinds, 100)})")
    return OwnForm(text, image)


def _awaited(awaitable: Awaitable[Any]) -> Any:
    """Its result. It runs on a separate event loop, in a thread: the one of the kernel waits for the cell."""
    results: list[Any] = []
    errors: list[Exception] = []

    async def within_limit() -> Any:
        async with asyncio.timeout(AWAIT_LIMIT_S):
            return await awaitable

    def run() -> None:
        try:
            results.append(asyncio.run(within_limit()))
        except TimeoutError:
            errors.append(TimeoutError(f"no result within {AWAIT_LIMIT_S:g} s"))
        except Exception as error:
            errors.append(error)
        except BaseException as error:
            errors.append(RuntimeError(f"ended by {type(error).__name__}"))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join(AWAIT_LIMIT_S + 1)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no result within {AWAIT_LIMIT_S:g} s")
    return results[0]
