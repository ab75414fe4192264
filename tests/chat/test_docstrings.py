"""Docstrings: the text before the sections, and what they say of each argument."""

from __future__ import annotations

import pytest

from sollol_nb.chat.docstrings import described

GOOGLE = """Convert an amount.

    By today's rate.

    Args:
        amount: how much, such as
            3.5
        to (str, optional): the currency: EUR or USD
        **more: ignored

    Returns:
        amount: not an argument
    """
NUMPY = """Convert an amount.

    By today's rate.

    Parameters
    ----------
    amount : float
        how much, such as
        3.5
    to : str, optional
        the currency: EUR or USD

    Returns
    -------
    amount : float
        not an argument
    """
SPHINX = """Convert an amount.

    By today's rate.

    :param amount: how much, such as
        3.5
    :param str to: the currency: EUR or USD
    :returns: the amount
    :raises ValueError: never
    """


@pytest.mark.parametrize("docstring", [GOOGLE, NUMPY, SPHINX])
def test_three_forms_say_the_same(docstring: str) -> None:
    text, arguments = described(docstring)
    assert text == "Convert an amount.\n\nBy today's rate."
    assert arguments.pop("more", "ignored") == "ignored"
    assert arguments == {"amount": "how much, such as 3.5", "to": "the currency: EUR or USD"}


def test_numpys_form_describes_several_arguments_at_once() -> None:
    docstring = "Go.\n\nParameters\n----------\nx, y : float\n    where\nz : float\n    how deep\n"
    assert described(docstring) == ("Go.", {"x": "where", "y": "where", "z": "how deep"})


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        (None, ""),
        ("", ""),
        ("Note: this is text.\nReturns the sum.", "Note: this is text.\nReturns the sum."),
        ("Only text, with args: none.", "Only text, with args: none."),
    ],
)
def test_text_alone_is_the_description(docstring: str | None, text: str) -> None:
    assert described(docstring) == (text, {})
