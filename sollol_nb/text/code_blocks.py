"""The fenced code blocks of a Markdown text, as strings that know their language."""

from __future__ import annotations

from sollol_nb.text.safe_markdown import language_and_code, parts_of


class CodeBlock(str):
    """The code of one block; a string in every respect.

    Attributes:
        language: the word after the fence, in lower case, such as `python`; "" where there is none.
    """

    __slots__ = ("language",)
    language: str

    def __new__(cls, code: str, language: str = "") -> CodeBlock:
        """A block with this code."""
        block = super().__new__(cls, code)
        block.language = language
        return block

    def __reduce__(self) -> tuple[type[CodeBlock], tuple[str, str]]:
        return CodeBlock, (str(self), self.language)


def code_blocks(text: str) -> list[CodeBlock]:
    """The fenced code blocks of a text, in order, without those that are empty."""
    found = []
    for is_code, part in parts_of(text.replace("\r\n", "\n")):
        if not is_code:
            continue
        info, code = language_and_code(part)
        if code.strip():
            found.append(CodeBlock(code, info.split(maxsplit=1)[0].lower() if info else ""))
    return found
