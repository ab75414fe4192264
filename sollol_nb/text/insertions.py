"""What expressions insert into one prompt: text, images, and notes for the person who asks.

In the text, a mark stands for each image until the prompt is complete: words of a line are split, quoted and
joined in between. `sent` then gives both forms of the prompt, as not every model reads images.
"""

from __future__ import annotations

import re
import secrets

from sollol_nb.text.images import Image, is_image
from sollol_nb.text.readable import MAX_TEXT_CHARS, Form, form_of

MAX_IMAGES = 16  # of one prompt
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # characters that Unicode reserves for the inside of programs


class Insertions:
    """What the expressions of one prompt have inserted.

    Attributes:
        notes: what was cut or left out, one line each.

    Args:
        text_chars: longer texts are cut; None does not cut them.
    """

    def __init__(self, *, text_chars: int | None = MAX_TEXT_CHARS) -> None:
        self.notes: list[str] = []
        self._text_chars = text_chars
        self._images: list[tuple[Image, Form]] = []
        self._id = secrets.token_hex(4)  # so that no text can have the mark of an image by accident
        self._mark = re.compile(f"{_OPEN}{self._id}:(\\d+){_CLOSE}")

    def text_of(self, value: object, source: str = "") -> str:
        """The value as text, with the mark of its image if it is one.

        A list of images is all of them, one below the other.

        Args:
            source: the expression, for notes.
        """
        if isinstance(value, list | tuple) and value and all(map(is_image, value)):
            return "\n".join(self.text_of(item, source) for item in value)
        may_add = len(self._images) < MAX_IMAGES
        form = form_of(value, text_chars=self._text_chars, with_image=may_add)
        shown = f"{{{{ {source} }}}}" if source else "a value"
        if form.problem:
            self._note(f"{shown}: {form.problem}")
        if form.cut_chars:
            more = (
                f"; {{{{ readable({source}, limit_chars={form.cut_chars}) }}}} sends all of it" if source else ""
            )
            self._note(f"{shown} has {form.cut_chars:,} characters and was cut{more}")
        if form.image is None or not may_add:
            if not may_add and (form.image is not None or is_image(value)):
                self._note(f"only the first {MAX_IMAGES} images were sent")
            return form.text
        self._images.append((form.image, form))
        return f"{_OPEN}{self._id}:{len(self._images)}{_CLOSE}"

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def sent(self, text: str) -> tuple[str, list[str], str]:
        """The text with `[image 1]` for each mark, its images as base64 text, and the text without images."""
        marks = dict.fromkeys(self._mark.findall(text))
        images = [self._images[int(mark) - 1][0].base64 for mark in marks]
        numbers = {mark: number for number, mark in enumerate(marks, 1)}
        seen = self._mark.sub(lambda mark: self._placed(mark[1], numbers[mark[1]]), text)
        return seen, images, self.in_words(text)

    def _placed(self, mark: str, number: int) -> str:
        beside = self._images[int(mark) - 1][1].beside
        return f"[image {number}]\n{beside}" if beside else f"[image {number}]"

    def in_words(self, text: str) -> str:
        """The text with a description of each image, for models that read none."""
        return self._mark.sub(lambda mark: self._described(*self._images[int(mark[1]) - 1]), text)

    def _described(self, image: Image, form: Form) -> str:
        description = "" if form.text == image.about else f"\n{form.text}"
        return f"[an image that you cannot see: {image.about}]{description}"
