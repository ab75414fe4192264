"""The options of a `%%sollol` cell as one request: model, prompt, how to show the answer, where to store it.

`magics/ask.py` declares the options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from sollol_nb.chat.chunk import NOTE
from sollol_nb.chat.completion import Completion, checked_against_schema
from sollol_nb.chat.messages import WITHOUT_IMAGES
from sollol_nb.notebook.answers.tools import tool_options
from sollol_nb.notebook.magic_line import NO_EXPAND_HINT, Call, Word
from sollol_nb.text.expansion import expand
from sollol_nb.text.insertions import Insertions
from sollol_nb.text.short_names import is_file_name

if TYPE_CHECKING:
    import pandas as pd

OPTIONS = (
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
    "stop",
    "priority",
    "timeout",
    "backend",
    "recovery",
    "deterministic",
    "speculation",
    "journal",
)
"""Options of the magic that go to the router unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRequest:
    """One request of a cell.

    Attributes:
        model: the model's name.
        prompt: the user's message, with `{{ }}` expanded.
        images: those that `{{ }}` have inserted, as base64 text.
        without_images: the prompt for a model that reads no images, if there are any.
        notes: what was cut or left out of the prompt, one line each.
        system: the system message, or None.
        system_is_default: the system message is the default, not the cell's own.
        options: for `HybridRouter.stream`, without those that are None.
        schema: what the answer must match, or None.
        chat: name of the conversation that the request continues, or None.
        reset: start that conversation over.
        shown_as: `markdown`, `text`, `json`, `html` or `code`.
        raw: show only the model's text.
        quiet: show nothing.
        as_frame: the value is a DataFrame.
        out: variable that gets the value, or None.
        background: do not wait for the answer.
    """

    model: str
    prompt: str
    system: str | None
    options: Mapping[str, Any]
    images: Sequence[str] = ()
    without_images: str = ""
    notes: Sequence[str] = ()
    system_is_default: bool = False
    schema: object = None
    chat: str | None = None
    reset: bool = False
    shown_as: str = "markdown"
    raw: bool = False
    quiet: bool = False
    as_frame: bool = False
    out: str | None = None
    background: bool = False

    @property
    def message(self) -> dict[str, Any]:
        """The user's message."""
        message: dict[str, Any] = {"role": "user", "content": self.prompt}
        if self.images:
            message |= {"images": list(self.images), WITHOUT_IMAGES: self.without_images}
        return message

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of a request that continues no conversation."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, self.message]

    @property
    def stream_options(self) -> dict[str, Any]:
        """Keyword arguments of `HybridRouter.stream`."""
        options = dict(self.options)
        if self.schema is not None:
            options["schema"] = self.schema
        elif self.shown_as == "json":
            options["format"] = "json"
        return options

    def apply_form(self, completion: Completion) -> Completion:
        """Set how the completion is shown, its schema, and the notes about the prompt; returns it."""
        completion.shown_as, completion.schema = self.shown_as, self.schema
        if self.notes:
            completion[NOTE] = " · ".join([*filter(None, [completion.get(NOTE)]), *self.notes])
        return completion

    def value(self, completion: Completion) -> Completion | pd.DataFrame:
        """The cell's value.

        Raises:
            StructureError: the answer does not match the schema, or has no frame.
        """
        checked_against_schema(completion, self.schema)
        if not self.as_frame:
            return completion
        frame = completion.frame
        frame.attrs["completion"] = completion
        return frame


def cell_request(call: Call, defaults: Mapping[str, Any]) -> CellRequest:
    """The request of a `%%sollol` cell.

    Args:
        call: the magic's options and the cell.
        defaults: from `%config Sollol`, by name of the option.

    Raises:
        UsageError, ConfigError: an option is missing or wrong.
    """
    arguments = call.arguments
    words = list(arguments.model_and_prompt)
    insertions = next((word.insertions for word in words if word.insertions is not None), None) or Insertions()
    model, prompt = _model_and_prompt(words, call.cell, defaults.get("model"))
    if call.cell is not None and arguments.expand:
        prompt = expand(prompt, call.variables, hint=NO_EXPAND_HINT, insertions=insertions)
    if not prompt.strip():
        raise UsageError("the prompt is empty; write it below %%sollol MODEL or after %sollol MODEL")
    if arguments.reset and arguments.chat is None:
        raise UsageError("--reset starts a conversation over; name it with --chat NAME")
    if arguments.raw and arguments.quiet:
        raise UsageError("--raw and --quiet cannot be combined; use only one of them")
    options = {}
    for name in OPTIONS:
        given = getattr(arguments, name)
        value = defaults.get(name) if given is None else given
        if value is not None:
            options[name] = value
    options |= tool_options(call)
    schema = None
    if arguments.schema is not None:
        schema = call.named_value(arguments.schema, "--schema")
    shown_as = arguments.format or ("json" if schema is not None else defaults.get("format") or "markdown")
    prompt, images, without_images = insertions.sent(prompt.strip())
    return CellRequest(
        model=model,
        prompt=prompt,
        images=images,
        without_images=without_images,
        notes=insertions.notes,
        system=arguments.system if arguments.system is not None else defaults.get("system"),
        system_is_default=arguments.system is None,
        options=options,
        schema=schema,
        chat=arguments.chat,
        reset=arguments.reset,
        shown_as=shown_as,
        raw=arguments.raw,
        quiet=arguments.quiet,
        as_frame=arguments.frame,
        out=arguments.out,
        background=arguments.background,
    )


def named_model(words: list[Word], cell: str | None) -> str | None:
    """The model that a cell names, if any. A quoted text in its place is a prompt for the default model."""
    first = words[0] if words else None
    is_prompt = first is not None and first.is_quoted and not is_file_name(first) and cell is None
    return None if first is None or is_prompt else str(first)


def _model_and_prompt(words: list[Word], cell: str | None, default: str | None) -> tuple[str, str]:
    """Model and prompt."""
    if named_model(words, cell) is None:
        if default is None:
            raise UsageError(
                "no model given; write %%sollol demo, or set a default: %config Sollol.model = 'llama3.2'"
            )
        model = default
    else:
        model = str(words.pop(0))
        if model[:1] in ("$", "{"):
            raise UsageError(
                f"{model!r} is not a model's name; to insert a variable, write {{{{ {model.strip('${}')} }}}}"
            )
    if cell is None:
        return model, words[0].marked if len(words) == 1 else " ".join(word.raw_marked for word in words)
    if words:
        rest = " ".join(word.raw for word in words)
        raise UsageError(f"unexpected {rest!r}; with %%sollol the prompt goes below the first line")
    return model, cell
