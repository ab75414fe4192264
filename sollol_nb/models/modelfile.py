"""What Ollama's Modelfile adds to a model's weights, read from Ollama's storage for a model that llama.cpp runs.

A model keeps its behaviour where it is sharded: its system message, first messages, options, adapters, projector
and prompt template (translated, see `go_template/`). What llama.cpp cannot apply is left out, and
`Modelfile.describe` names it. Source: Ollama's GetModel (`server/images.go`) and ChatHandler
(`server/routes.go`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sollol_nb.errors import ModelError, ModelFileError, ModelNotFoundError
from sollol_nb.gguf.header import GgufFile, Header, check_file, read_header
from sollol_nb.go_template.proof import proven_jinja, reads_tools
from sollol_nb.go_template.syntax import UnknownSyntaxError
from sollol_nb.models.files import DEMO_NAMES, OllamaGGUFResolver, OllamaModelFiles, names_file
from sollol_nb.models.found_files import find_file
from sollol_nb.settings import config
from sollol_nb.text.tables import shortened

BARE_PROMPT = "{{ .Prompt }}"
"""The template of a model that has none, in Ollama."""

_TEXT_LIMIT_BYTES = 1024 * 1024
_REASON_LIMIT_CHARS = 300
_MAX_REASONS = 20
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelfile:
    """What is added to a model's weights.

    Attributes:
        system: the system message of requests that do not begin with one.
        messages: come before those of each request.
        options: sampling options by Ollama's names, for requests that do not give them.
        context_tokens: the wanted context (`num_ctx`); None if none is wanted.
        adapters: LoRA adapters.
        projector: the file that lets the model read images or audio; None without one.
        chat_template: Jinja; "" for the template in the model's file.
        refuses_tools: the template does not use tools, so Ollama refuses requests with tools.
        left_out: what is not applied, and why.
    """

    system: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    context_tokens: int | None = None
    adapters: tuple[Path, ...] = ()
    projector: Path | None = None
    chat_template: str = ""
    refuses_tools: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def of_engine(self) -> dict[str, Any]:
        """What an engine is started with, as plain data. Ollama names files by their content."""
        template = hashlib.sha256(self.chat_template.encode()).hexdigest() if self.chat_template else ""
        return {
            "adapters": [str(path) for path in self.adapters],
            "projector": str(self.projector) if self.projector is not None else "",
            "chat_template": template,
        }

    @classmethod
    def from_engine(cls, data: Mapping[str, Any]) -> Modelfile:
        """The files of an `of_engine`, to show what runs. Raises KeyError or TypeError if it is none."""
        projector = Path(data["projector"]) if data["projector"] else None
        return cls(adapters=tuple(map(Path, data["adapters"])), projector=projector)

    @property
    def digest(self) -> str:
        """The same for all that answers alike; "" if nothing is added."""
        if self == NO_MODELFILE:
            return ""
        of_requests = [self.system, list(map(dict, self.messages)), dict(self.options), self.context_tokens]
        return hashlib.sha256(json.dumps([of_requests, self.of_engine], sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """`Modelfile: SYSTEM, stop, ADAPTER; left out: mirostat`; "" if it adds nothing."""
        given = {
            "SYSTEM": self.system,
            "MESSAGE": self.messages,
            **self.options,
            "num_ctx": self.context_tokens,
            "ADAPTER": self.adapters,
            "projector": self.projector,
            "TEMPLATE": self.chat_template,
        }
        applied = ", ".join(name for name, value in given.items() if value or name in self.options)
        left_out = f"left out: {', '.join(self.left_out)}" if self.left_out else ""
        described = "; ".join(filter(None, (applied, left_out)))
        return f"Modelfile: {described}" if described else ""


NO_MODELFILE = Modelfile()
"""Of a model that is only a file."""


def modelfile_of(model: str, gguf_path: str | Path | None, checked_option: Callable[[str, Any], Any]) -> Modelfile:
    """What Ollama's storage on this machine adds to a model.

    Args:
        gguf_path: the file that is used instead of Ollama's. It replaces only the weights.
        checked_option: returns the value of a sampling option; raises ValueError if it cannot be used.
    """
    if model in DEMO_NAMES:
        return NO_MODELFILE
    if names_file(model):
        return _with_projector(config.saved_model(model).projector)
    try:
        files = OllamaGGUFResolver().files(model, loads=gguf_path is None)
    except ModelNotFoundError:
        found = find_file(model) if gguf_path is None else None
        return _with_projector(None if found is None else found.projector)
    except ModelError as error:  # only where it is not needed for the weights
        return Modelfile(left_out=(f"all of it ({error})",))
    return read_modelfile(files, Path(gguf_path) if gguf_path is not None else files.model, checked_option)


def _with_projector(path: Path | None) -> Modelfile:
    """What the projector of a model's file adds to it."""
    left_out: list[str] = []
    projector = _projector(() if path is None else (path,), left_out)
    return Modelfile(projector=projector, left_out=_bounded(left_out))


def read_modelfile(
    files: OllamaModelFiles, model_path: Path, checked_option: Callable[[str, Any], Any]
) -> Modelfile:
    """What these files add to the weights in `model_path`. `checked_option` is as for `modelfile_of`."""
    left_out: list[str] = []
    options, context_tokens = _options(files.parameters, checked_option, left_out)
    chat_template, refuses_tools = _chat_template(files, model_path, left_out)
    return Modelfile(
        system=_text(files.system, "SYSTEM", left_out) or "",
        messages=_messages(files.messages, left_out),
        options=options,
        context_tokens=context_tokens,
        adapters=_adapters(files.adapters, model_path, left_out),
        projector=_projector(files.projectors, left_out),
        chat_template=chat_template,
        refuses_tools=refuses_tools,
        left_out=_bounded(left_out),
    )


def _bounded(reasons: Sequence[str]) -> tuple[str, ...]:
    """The reasons as parts of a line: files choose names in them, and how many there are."""
    lines = [shortened(_printable(reason), _REASON_LIMIT_CHARS) for reason in reasons[:_MAX_REASONS]]
    more = [f"{len(reasons) - _MAX_REASONS:,} more"] if len(reasons) > _MAX_REASONS else []
    return (*lines, *more)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))


def _text(path: Path | None, what: str, left_out: list[str]) -> str | None:
    """The text of a layer; None without one. One that cannot be read is left out."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            content = file.read(_TEXT_LIMIT_BYTES + 1)
        if len(content) > _TEXT_LIMIT_BYTES:
            raise ValueError("larger than 1 MiB")
        return content.decode()
    except UnicodeDecodeError:
        left_out.append(f"{what} (not UTF-8)")
        return None
    except (OSError, ValueError) as error:
        left_out.append(f"{what} ({getattr(error, 'strerror', None) or error})")
        return None


def _json(path: Path | None, what: str, left_out: list[str]) -> Any:
    text = _text(path, what, left_out)
    try:
        return json.loads(text, parse_constant=_refused) if text else None
    except (ValueError, RecursionError):
        left_out.append(f"{what} (not JSON)")
        return None


def _refused(constant: str) -> None:
    """Python reads NaN and infinities, which are not JSON."""
    raise ValueError(constant)


def _options(
    path: Path | None, checked_option: Callable[[str, Any], Any], left_out: list[str]
) -> tuple[dict[str, Any], int | None]:
    """The sampling options, and `num_ctx`."""
    given = _json(path, "PARAMETER", left_out)
    if given is not None and not isinstance(given, dict):
        left_out.append("PARAMETER (not an object)")
    parameters = given if isinstance(given, dict) else {}
    options: dict[str, Any] = {}
    context_tokens = None
    for name, value in parameters.items():
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if name == "num_ctx" and isinstance(whole, int) and not isinstance(whole, bool) and whole > 0:
            context_tokens = whole
            continue
        try:
            if isinstance(value, float) and not math.isfinite(value):  # such as 1e999
                raise ValueError(name)
            options[name] = checked_option(name, whole)
        except ValueError:
            left_out.append(str(name))
    return options, context_tokens


def _messages(path: Path | None, left_out: list[str]) -> tuple[dict[str, Any], ...]:
    given = _json(path, "MESSAGE", left_out)
    if given is None:
        return ()
    if not isinstance(given, list) or not all(map(_is_message, given)):
        left_out.append("MESSAGE (not messages)")
        return ()
    lost = {name for message in given for name, value in message.items() if value} - {"role", "content"}
    left_out += [f"{name} of MESSAGE" for name in sorted(lost)]
    return tuple({"role": message["role"], "content": message["content"]} for message in given)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        return False
    content = message.get("content")
    return isinstance(content, str) and content == content.encode(errors="ignore").decode()  # not half of a pair


def _chat_template(files: OllamaModelFiles, model_path: Path, left_out: list[str]) -> tuple[str, bool]:
    """The template in Jinja, "" where that of the GGUF file is used; and whether it does not use tools."""
    settings = _json(files.settings, "settings", left_out)
    built_in = {name: settings.get(name) for name in ("renderer", "parser")} if isinstance(settings, dict) else {}
    left_out += [f"{name.upper()} {value}" for name, value in built_in.items() if value]
    if built_in.get("renderer"):  # Ollama uses it instead of the template
        return "", False
    if files.template is None and (files.settings is None or _own_template(model_path)):
        return "", False
    source = BARE_PROMPT if files.template is None else _text(files.template, "TEMPLATE", left_out)
    if source is None:
        return "", False
    source = source or BARE_PROMPT
    try:
        return proven_jinja(source), not reads_tools(source)
    except UnknownSyntaxError as error:
        instead = "that of the GGUF file" if _own_template(model_path) else "ChatML"
        left_out.append(f"TEMPLATE ({error}; {instead} is used)")
        return "", False


def _own_template(model_path: Path) -> str:
    try:
        return str(_header(model_path).keys.get("tokenizer.chat_template") or "")
    except ModelFileError:  # its loading will say so
        return ""


# --- GGUF files ------------------------------------------------------------------------------


def _adapters(paths: tuple[Path, ...], model_path: Path, left_out: list[str]) -> tuple[Path, ...]:
    usable = []
    for path in paths:
        try:
            problem = _adapter_problem(_header(path), _header(model_path))
        except ModelFileError as error:
            problem = _without(path, error)
        if problem:
            left_out.append(f"ADAPTER ({problem})")
        else:
            usable.append(path)
    return tuple(usable)


def _adapter_problem(adapter: Header, model: Header) -> str:
    """Why llama.cpp would refuse the adapter (`llama_adapter_lora_init_impl`); "" if it would not."""
    if (adapter.keys.get("general.type"), adapter.keys.get("adapter.type")) != ("adapter", "lora"):
        return "not a LoRA adapter"
    architecture, wanted = (header.keys.get("general.architecture") for header in (adapter, model))
    if architecture != wanted:
        return f"made for {architecture}, but the model is {wanted}"
    if model.keys.get("split.count"):  # the model's other tensors are in other files
        return ""
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    for tensor in adapter.tensors:
        base, dot, part = tensor.name.rpartition(".")
        if not (dot and part in ("lora_a", "lora_b")):
            if tensor.name.endswith("_norm.weight"):  # not applied by llama.cpp either
                continue
            return f"{tensor.name} is not a part of a LoRA adapter"
        if base not in shapes or len(tensor.shape) != 2 or len(shapes[base]) < 2:
            return f"{base} is not a matrix of the model"
        side = 0 if part == "lora_a" else 1
        embeds = base.endswith("token_embd.weight")  # its two parts are the other way round
        if tensor.shape[1 if embeds else side] != shapes[base][1 - side if embeds else side]:
            return f"{base} has another shape in the model"
    return ""


def _projector(paths: tuple[Path, ...], left_out: list[str]) -> Path | None:
    """The first, as in Ollama; llama-server takes one."""
    left_out += ["projector (llama-server takes one)" for _ in paths[1:]]
    for path in paths[:1]:
        try:
            architecture = _header(path).keys.get("general.architecture")
        except ModelFileError as error:
            left_out.append(f"projector ({_without(path, error)})")
        else:
            if architecture == "clip":
                return path
            left_out.append(f"projector (llama.cpp does not know the kind {architecture})")
    return None


def _without(path: Path, error: ModelFileError) -> str:
    """The reason without the path of a blob, which nobody knows."""
    return str(error).replace(str(path), "it")


def _header(path: Path) -> Header:
    return _header_of(check_file(path, advice="pull the model again"))


@functools.lru_cache(maxsize=16)
def _header_of(file: GgufFile) -> Header:
    return read_header(file)
