"""Python values as text that a model can read: tables as Markdown, figures as descriptions, plain data as JSON.

Everything is limited. A text is cut only if it is very long, since somebody wrote it so. Other values are shown by
their shape and their head if they are large, and a last line in brackets says what is missing (`[cut: 120 of
50,000 rows shown]`). Only the head of a large value is read. No library is imported for a value: it can only be an
object of one that has been imported already.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections import deque
from collections.abc import Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from enum import Enum
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

from sollol_nb.text.images import Image, about_image, image_of, is_figure, is_image
from sollol_nb.text.own_forms import OwnForm, displayed_form, own_form
from sollol_nb.text.readable_frames import describe_table, is_instance_of
from sollol_nb.text.tables import counted, shortened

LIMIT_CHARS = 8000
MAX_TEXT_CHARS = 100_000
MAX_DEPTH = 40  # of containers inside containers

_NAME_ONLY = re.compile(r"<[\w.<>]+ object(?: at 0x[0-9A-Fa-f]+)?>")
"""A text that says only the class of an object, as Python's default does."""
_MAX_SORTED = 10_000
_MAX_DIGITS = 4000  # Python refuses to convert longer integers to text


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """A value as a model reads it.

    Attributes:
        text: the value in words.
        image: the image that it is, for models that read images; None without one.
        beside: what these models get besides the image; usually "".
        cut_chars: the length of a text that was cut; 0 if it was not.
        problem: why something of it was left out; usually "".
    """

    text: str
    image: Image | None = None
    beside: str = ""
    cut_chars: int = 0
    problem: str = ""


class GivenText(str):
    """A text whose length somebody has chosen, so it is not cut."""

    __slots__ = ()


def readable(value: object, *, limit_chars: int | None = None) -> str:
    """The value as text for a prompt.

    A class says by a method what its objects look like: `_ai_repr_(**kwargs)`, `_repr_llm_()` (see `own_forms.py`)
    or `_prompt_text_()`. Otherwise, a frame or series (of pandas, polars or pyarrow) becomes its shape, its dtypes
    and its head as a Markdown table; an array its shape, dtype, range and head; a matplotlib figure a description
    and sampled data; an image its size; a function or class its source; a dict, list, tuple, set, dataclass or
    pydantic model JSON in one line; anything else what `str` says.

    Args:
        limit_chars: maximum length, 100 or more. Default: `LIMIT_CHARS`, and `MAX_TEXT_CHARS` of a text.
    """
    return form_of(value, limit_chars=limit_chars, with_image=False).text


def form_of(
    value: object,
    *,
    limit_chars: int | None = None,
    text_chars: int | None = MAX_TEXT_CHARS,
    with_image: bool = True,
) -> Form:
    """The value as text (see `readable`), and the image that it is.

    Args:
        limit_chars: maximum length of any text. Default: `LIMIT_CHARS`, and `text_chars` of a text.
        text_chars: maximum length of a text, and of what `_prompt_text_()` returns; None does not cut them.
        with_image: whether to make the image, which can take a while.
    """
    if isinstance(value, GivenText):
        return Form(value)
    text_limit = text_chars if limit_chars is None else limit_chars
    limit_chars = LIMIT_CHARS if limit_chars is None else limit_chars
    if type(value) is str:
        return _limited(value, text_limit)
    own = own_form(value)
    if own:
        return _form_of_own(own, limit_chars)
    if isinstance(value, Enum):
        return form_of(value.value, limit_chars=limit_chars, text_chars=text_chars, with_image=with_image)
    whole = whole_text_of(value)
    if whole is not None:
        return dataclasses.replace(_limited(whole, text_limit), problem=own.problem)
    image, problem = None, own.problem
    if with_image and is_image(value):
        image, problem = _image(value, problem)
    text = _limited_text(value, limit_chars)
    return Form(text if len(text) <= limit_chars else _cut(text, limit_chars), image, problem=problem)


def _form_of_own(own: OwnForm, limit_chars: int) -> Form:
    """What an object says about itself."""
    image = own.image
    if image is None:
        return dataclasses.replace(_limited(own.text or "", limit_chars), problem=own.problem)
    problem = "; ".join(filter(None, [own.problem, image.problem]))
    form = _limited(image.about if own.text is None else own.text, limit_chars)
    if image.data is None:
        return dataclasses.replace(form, problem=problem)
    return dataclasses.replace(form, image=image, beside="" if own.text is None else form.text, problem=problem)


def whole_text_of(value: object) -> str | None:
    """The text that a value is: a string, or what its method `_prompt_text_()` returns; None for all else.

    With this method a class says what its objects look like in a prompt, as it does for a page with
    `_repr_html_()`.
    """
    if isinstance(value, str):
        return str(value)
    method = getattr(type(value), "_prompt_text_", None)
    return None if method is None else str(method(value))


def _limited(text: str, limit_chars: int | None) -> Form:
    if limit_chars is None or len(text) <= limit_chars:
        return Form(text)
    return Form(_cut(text, limit_chars), cut_chars=len(text))


def _image(value: object, problem: str) -> tuple[Image | None, str]:
    """The image that a value is, and the problems, one more if it cannot be sent."""
    try:
        image = image_of(value)
    except Exception as error:  # what draws itself can raise anything
        reason = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 200)
        return None, "; ".join(filter(None, [problem, f"{type(value).__name__} could not be drawn ({reason})"]))
    if image is None or image.data is not None:
        return image, problem
    return None, "; ".join(filter(None, [problem, image.problem]))


def _limited_text(value: object, limit_chars: int) -> str:
    if value is None or isinstance(value, bool | int | float):
        return _plain_number(value)
    about = about_image(value)
    if about:
        return about
    if isinstance(value, bytes | bytearray | memoryview):
        return _describe_bytes(value)
    table = describe_table(value, limit_chars, lambda part, limit: readable(part, limit_chars=limit))
    if table is not None:
        return table
    if is_figure(value):
        from sollol_nb.text.readable_figures import describe_figure

        return describe_figure(value)
    container = _container(value)
    if container is not None:
        return _as_json(value, container, limit_chars)
    if isinstance(value, type | FunctionType | MethodType):
        return _source_of(value)
    text = str(value)
    says_nothing = _NAME_ONLY.fullmatch(text)
    return displayed_form(value).text or text if says_nothing else text


def _cut(text: str, limit_chars: int) -> str:
    shown_chars = max(0, limit_chars - 60)
    return f"{text[:shown_chars]}\n[cut: {shown_chars:,} of {len(text):,} characters shown]"


def _source_of(value: Any) -> str:
    """The source of a function or class; where it has none, what `str` says."""
    try:
        return textwrap.dedent(inspect.getsource(value)).strip()
    except (OSError, TypeError):  # builtins, and what `exec` made
        return str(value)


def _plain_number(value: float | None) -> str:
    if isinstance(value, int) and value.bit_length() > _MAX_DIGITS * 3:
        return f"integer of {value.bit_length():,} bits"
    return str(value)


def _describe_bytes(value: bytes | bytearray | memoryview) -> str:
    count = value.nbytes if isinstance(value, memoryview) else len(value)
    head = bytes(value[:32]) if count and (not isinstance(value, memoryview) or value.ndim == 1) else b""
    begin = f", beginning with {head!r}" if head else ""
    return f"{type(value).__name__}: {counted(count, 'byte')}{begin}"


# --- plain data -------------------------------------------------------------------------------


def _container(value: Any) -> Mapping[Any, Any] | Collection[Any] | None:
    """The value as a mapping or collection if it has parts, otherwise None."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if is_instance_of(value, "pydantic.BaseModel"):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if isinstance(value, set | frozenset) and len(value) <= _MAX_SORTED:
        try:
            return sorted(value)
        except TypeError:  # of different types
            return value
    collections = (list, tuple, set, frozenset, deque, KeysView, ValuesView, ItemsView)
    return value if isinstance(value, collections) else None


class _TooLargeError(Exception):
    """The data does not fit as a whole."""


@dataclasses.dataclass(slots=True)
class _PlainData:
    """Converts values to plain data for JSON, within a number of characters.

    Attributes:
        chars_left: how many characters may still be used.
        shorten: replace parts that do not fit by a mark; otherwise raise _TooLargeError.
    """

    chars_left: int
    shorten: bool
    max_items: int = 20
    max_text_chars: int = 200

    def of(self, value: object, inside: tuple[int, ...] = ()) -> Any:
        """A value as plain data; `inside` has the ids of the containers around it."""
        if self.chars_left < 0:
            if not self.shorten:
                raise _TooLargeError
            return "…"
        text = own_form(value).text
        if text is None and not isinstance(value, Enum):
            text = whole_text_of(value)
        if text is not None:
            return self._text(text)
        container = _container(value)
        if container is None:
            leaf = self._leaf(value)
            if not isinstance(leaf, list):
                return leaf
            container = leaf
        if id(value) in inside or len(inside) >= MAX_DEPTH:
            return "…"
        inside = (*inside, id(value))
        self.chars_left -= 2
        items: Iterator[Any] = iter(container.items() if isinstance(container, Mapping) else container)
        left_out = 0
        if self.shorten and len(container) > self.max_items:
            items, left_out = islice(items, self.max_items), len(container) - self.max_items
        if not isinstance(container, Mapping):
            listed = [self.of(item, inside) for item in items]
            return [*listed, f"… {left_out:,} more"] if left_out else listed
        named: dict[str, Any] = {}
        for key, item in items:
            name = self._text(str(key))
            named[repr(key) if name in named else name] = self.of(item, inside)
        return {**named, "…": f"{left_out:,} more"} if left_out else named

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, Enum):
            value = value.value
        if value is None or isinstance(value, bool | int | float):
            text = _plain_number(value)
            self.chars_left -= len(text) + 2
            return text if text.startswith("integer of") else value
        if is_instance_of(value, "numpy.generic") and value.dtype.kind in "biuf":
            self.chars_left -= 8
            return float(str(value)) if value.dtype.kind == "f" else value.item()
        if is_instance_of(value, "numpy.ndarray") and value.ndim > 0 and value.size <= 100:
            return value.tolist()
        if isinstance(value, str):  # of an Enum
            return self._text(value)
        return self._text(readable(value, limit_chars=1000).partition("\n")[0])

    def _text(self, text: str) -> str:
        if self.shorten:
            text = shortened(text, self.max_text_chars)
        self.chars_left -= len(text) + 4
        return text


def _as_json(value: object, container: Mapping[Any, Any] | Collection[Any], limit_chars: int) -> str:
    """The data as JSON in one line; if it is too large, its beginning with large parts shortened, and a notice."""
    try:
        whole = _json(_PlainData(limit_chars, shorten=False).of(value))
        if len(whole) <= limit_chars:
            return whole
    except _TooLargeError:
        pass
    chars_left = limit_chars - 80  # for the notice
    shown: list[str] = []
    named = isinstance(container, Mapping)
    for item in container.items() if isinstance(container, Mapping) else container:
        part = dict([item]) if named else [item]
        text = _json(_PlainData(max(chars_left, 200), shorten=True).of(part, (id(value),)))[1:-1]
        chars_left -= len(text) + 2
        if shown and chars_left < 0:
            break
        shown.append(text)
    opening, closing = "{}" if named else "[]"
    left_out = f"{len(shown):,} of {len(container):,} items shown; " if len(shown) < len(container) else ""
    return f"{opening}{', '.join(shown)}{closing}\n[cut: {left_out}… marks what is missing]"


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)
