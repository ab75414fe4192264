"""The options `--tools`, `--max-steps` and `--confirm` of a cell: which functions its model may call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from IPython.core.error import UsageError

from sollol_nb.chat.tools import Toolbox
from sollol_nb.errors import ConfigError
from sollol_nb.notebook.magic_line import Call
from sollol_nb.text.nearest import nearest_variable


def tool_options(call: Call) -> dict[str, Any]:
    """The options of the router for the functions that a cell names; empty if it names none.

    Raises:
        UsageError: an option needs `--tools`, or a name is given twice.
        ConfigError: a name is unknown, or no model could call its function.
    """
    arguments = call.arguments
    if arguments.tools is None:
        for name, option in (("max_steps", "--max-steps"), ("confirm", "--confirm")):
            if getattr(arguments, name) is not None:
                raise UsageError(f"{option} needs functions that the model may call; name them with --tools f,g")
        return {}
    names = [name.strip() for given in arguments.tools for name in given.split(",")]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise UsageError(f"--tools names {twice} twice; give each function once")
    functions = [_function(name, call) for name in names]
    Toolbox(functions)  # its errors come before anything is loaded
    given = {"max_steps": arguments.max_steps, "confirm": arguments.confirm}
    return {"tools": functions, **{name: value for name, value in given.items() if value is not None}}


def check_can_ask(shell: Any, options: Mapping[str, Any], *, by_default: bool, background: bool) -> None:
    """Refuse a cell whose calls are to be confirmed where nobody can be asked.

    Args:
        options: those of the request.
        by_default: the setting `confirm_tools`.

    Raises:
        ConfigError: that is so; the message says what to do.
    """
    if "tools" not in options or not options.get("confirm", by_default):
        return
    why = "an answer in the background cannot ask" if background else ""
    kernel = getattr(shell, "kernel", None)
    if kernel is not None and not getattr(kernel, "_allow_stdin", True):
        why = "this front end takes no input"
    if why:
        asked = "--confirm" if "confirm" in options else "the setting confirm_tools"
        instead = "leave it out" if "confirm" in options else "%config Sollol.confirm_tools = False"
        raise ConfigError(f"{asked} asks before each call, but {why}; {instead}")


def _function(name: str, call: Call) -> Any:
    first, *rest = name.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        raise UsageError(f"--tools takes names of functions with commas between them, such as f,g; not {name!r}")
    if first not in call.variables:
        near = nearest_variable(first, call.variables)
        hint = f"; did you mean {near}?" if near else "; define it in a cell above"
        raise ConfigError(f"--tools: there is no function named {first}{hint}")
    found = call.variables[first]
    for part in rest:
        if not hasattr(found, part):
            raise ConfigError(f"--tools: {first} has no {part}, so {name} is not a function")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"--tools: {name} is a {type(found).__name__}, not a function")
    return found
