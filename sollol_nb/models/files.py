"""From a model's name to its GGUF file: the built-in demo model, a path, a router's own file, Ollama's storage,
files of other programs.

Ollama keeps `manifests/<host>/<namespace>/<model>/<tag>`, a JSON list of layers, and the layers as
`blobs/sha256-<hex>`. The layer with mediaType `application/vnd.ollama.image.model` is the model; projectors and
adapters are GGUF files too and differ in their mediaType; the other layers are the rest of the Modelfile (see
`modelfile.py`). Only files are read; Ollama need not run. For names see `names.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sollol_nb.errors import ModelError, ModelFileError, ModelNotFoundError
from sollol_nb.gguf.facts import first_part, read_facts
from sollol_nb.gguf.header import check_file
from sollol_nb.models.found_files import find_file
from sollol_nb.models.names import DIGEST, ModelName, split_digest
from sollol_nb.runtime.amounts import shown
from sollol_nb.settings import config
from sollol_nb.settings.models import BUILT_IN_NAMES
from sollol_nb.text.short_names import is_file_name

DEMO_MODEL_PATH = Path(__file__).parent / "demo.gguf"
DEMO_NAMES = BUILT_IN_NAMES
DEMO_NOTE = "a tiny demo model, not a general one"

_LAYER = "application/vnd.ollama.image."
_MANIFEST_LIMIT_BYTES = 4 * 1024 * 1024
_HEADER_START_BYTES = 1024 * 1024

ARCHITECTURES = frozenset(
    """
    afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom
    chameleon chatglm codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2
    deepseek2-ocr deepseek32 deepseek4 dflash dots1 dots3note dream eagle3 ernie4_5 ernie4_5-moe
    eurobert exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma-embedding gemma2 gemma3 gemma3n
    gemma4 gemma4-assistant glm-dsa glm4 glm4moe glm5-next gpt-oss gpt2 gptj gptneox granite granite_swa
    granitehybrid granitemoe graniteswitch grok grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl
    hy_v3 hy_v4 internlm2 jais jais2 jamba jina-bert-v2 jina-bert-v3 kimi-k3 kimi-linear laguna lfm2
    lfm2moe llada llada-moe llama llama-embed llama4 maincoder mamba mamba2 maple mellum mimo2 minicpm
    minicpm3 minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 modern-bert mpt muse-glimmer nanbeige
    nemotron nemotron_h nemotron_h_moe neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion
    paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe
    qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe qwen4exp refact rnd1
    rwkv6 rwkv6qwen2 rwkv7 seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35
    t5 t5encoder talkie wavtokenizer-dec xverse
    """.split()  # noqa: SIM905 - one name a line would be six pages
)
"""What `general.architecture` may be: LLM_ARCH_NAMES in src/llama-arch.cpp of the pinned llama.cpp, without
`clip` (a projector, not a model)."""


def find_model_file(model: str, gguf_path: str | Path | None = None) -> Path | None:
    """The GGUF file of a model, or None where this machine has none.

    Args:
        model: `demo` and `demo:sharded` name the file in this package; the setting `models` may name others; a
            name that `is_file_name` is a path; all others are looked up in Ollama's storage, and then among the
            files of other programs (`found_files.py`).
        gguf_path: the file to use instead of Ollama's.

    Raises:
        ModelFileError: the named file does not exist, or Ollama's file is damaged or unreadable.
    """
    if model in DEMO_NAMES:
        return DEMO_MODEL_PATH
    saved = config.saved_model(model)
    if saved.gguf is not None:
        if not saved.gguf.is_file():
            raise ModelFileError(
                f"{model} stands for {saved.gguf}, which does not exist; correct its entry in {saved.source}"
            )
        return first_part(saved.gguf)
    if is_file_name(model):
        return _named_file(model)
    if gguf_path is not None:
        return _named_file(gguf_path)
    try:
        return OllamaGGUFResolver().resolve(model)
    except ModelNotFoundError:
        found = find_file(model)
        return None if found is None else first_part(found.path)


def _named_file(named: str | Path) -> Path:
    """The file that a user names; of a split model its first part. Raises ModelFileError if there is none."""
    if "://" in str(named):
        raise ModelFileError(f"{named} is a web address; download the file, and give its path")
    try:
        path = Path(named).expanduser().absolute()
    except RuntimeError as error:  # "~someone" without a home
        raise ModelFileError(f"cannot read {named}: {error}; check the path") from None
    check_file(path, advice="give the path of a GGUF file")
    return first_part(path)


def names_file(model: str) -> bool:
    """Whether a model's name stands for a file on this machine: a path, or a name in the setting `models`."""
    return is_file_name(model) or config.saved_model(model).gguf is not None


@dataclass(frozen=True, slots=True)
class OllamaModelFiles:
    """The files of one model in Ollama's storage.

    Attributes:
        name: as `ollama list` shows it.
        model: the model's own GGUF file.
        projectors: vision or audio projectors (llama.cpp's `--mmproj`), as GGUF.
        adapters: LoRA adapters (llama.cpp's `--lora`), as GGUF.
        template: the prompt template, in Go's language (`TEMPLATE` in a Modelfile); None without one.
        system: the system message as text (`SYSTEM`); None without one.
        parameters: options as a JSON object (`PARAMETER`); None without any.
        messages: messages as a JSON list (`MESSAGE`); None without any.
        settings: how Ollama treats the model, as a JSON object; None without one.
    """

    name: str
    model: Path
    projectors: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()
    template: Path | None = None
    system: Path | None = None
    parameters: Path | None = None
    messages: Path | None = None
    settings: Path | None = None


def storage_folders() -> list[Path]:
    """The folders where Ollama may keep its models on this system, `OLLAMA_MODELS` first; they need not exist."""
    chosen = config.default("ollama_models")
    folders = [chosen] if chosen is not None else []
    # ~/.ollama is used on Linux, macOS and Windows.
    folders.append(Path.home() / ".ollama" / "models")
    if sys.platform != "win32":
        folders += [
            Path("/usr/share/ollama/.ollama/models"),  # the Linux service's user
            Path("/var/lib/ollama/.ollama/models"),
            Path("/var/lib/ollama/models"),
            Path("/var/lib/ollama"),  # packages that set OLLAMA_MODELS to the service's state folder
            Path("/var/snap/ollama/common/models"),
        ]
    if sys.platform == "darwin":
        folders += [Path("/opt/homebrew/var/ollama/models"), Path("/usr/local/var/ollama/models")]
    return list(dict.fromkeys(folders))


class OllamaGGUFResolver:
    """Finds the GGUF file of a model that Ollama has on this machine's disk.

    Args:
        models_dir: Ollama's storage; None searches `OLLAMA_MODELS` and the usual folders, in this order.
    """

    def __init__(self, models_dir: str | Path | None = None) -> None:
        self._models_dir = None if models_dir is None else Path(models_dir).expanduser()

    @property
    def folders(self) -> list[Path]:
        """The storage folders that are searched, in order."""
        return storage_folders() if self._models_dir is None else [self._models_dir]

    def get_gguf_path(self, model: str) -> str:
        """`resolve(model)` as text.

        Raises:
            ModelNotFoundError, ModelFileError: see `resolve`.
        """
        return str(self.resolve(model))

    def resolve(self, model: str) -> Path:
        """The GGUF file of a model that llama.cpp can load.

        Raises:
            ModelNotFoundError: the model is not in Ollama's storage here; the message names the searched folders.
            ModelFileError: it is, but the file is missing, incomplete, not readable, not GGUF, or of an
                architecture that llama.cpp does not load.
        """
        return self.files(model).model

    def files(self, model: str, *, loads: bool = True) -> OllamaModelFiles:
        """All files of a model.

        Args:
            loads: whether the model's own file must be one that llama.cpp can load.

        Raises:
            ModelNotFoundError, ModelFileError: as for `resolve`.
        """
        text, pinned = split_digest(model)
        wanted = ModelName.parse(text) if text else None
        first_error: ModelError | None = None
        for folder in self.folders:
            try:
                found = _find_blob(folder, pinned) if wanted is None else _find_model(folder, wanted, pinned)
                if found is not None and loads:
                    _check_model(found.name, found.model)
            except ModelError as error:  # another folder may have it complete
                first_error = first_error or error
            else:
                if found is not None:
                    return found
        if first_error is not None:
            raise first_error
        searched = ", ".join(str(folder) for folder in self.folders)
        name = f"sha256:{pinned}" if wanted is None else str(wanted)
        advice = "" if wanted is None else f". Run: ollama pull {wanted}"
        raise ModelNotFoundError(
            f"{name} is not in Ollama's storage on this machine (searched {searched}){advice}"
        )

    def installed(self) -> list[str]:
        """Names of the models in storage as `ollama list` shows them, sorted; whether they load is not checked."""
        names = {str(name) for folder in self.folders for name, _ in _manifests(folder)}
        return sorted(names, key=str.lower)


def _manifests(folder: Path) -> Iterator[tuple[ModelName, Path]]:
    """Name and path of every manifest; folders that cannot be read count as empty."""
    root = folder / "manifests"
    try:
        paths = sorted(root.glob("*/*/*/*"))
    except OSError:
        return
    for path in paths:
        host, namespace, model, tag = path.relative_to(root).parts
        try:
            name = ModelName.parse(f"{host}/{namespace}/{model}:{tag}")
            is_file = path.is_file()
        except (ModelNotFoundError, OSError):
            continue
        if is_file:
            yield name, path


def _find_model(folder: Path, wanted: ModelName, pinned: str) -> OllamaModelFiles | None:
    """The model's files in one storage folder; None if the folder does not have it."""
    path = folder.joinpath("manifests", wanted.host, wanted.namespace, wanted.model, wanted.tag)
    try:
        if not _is_file(path):
            path = next((path for name, path in _manifests(folder) if name.key == wanted.key), path)
            if not _is_file(path):
                return None
        with path.open("rb") as file:
            content = file.read(_MANIFEST_LIMIT_BYTES)
    except PermissionError:
        raise _permission_error(str(wanted), path, folder) from None
    except OSError as error:
        raise ModelFileError(f"{wanted}: cannot read {path}: {error.strerror}") from None
    layers, config_digest = _layers(wanted, path, content)
    models = [layer for layer in layers if layer["mediaType"] == _LAYER + "model"]
    if pinned and pinned not in (hashlib.sha256(content).hexdigest(), *(_hex(layer) for layer in models)):
        raise ModelFileError(f"{wanted} in {folder} does not have the digest sha256:{pinned}")
    if not models:
        raise _no_model_layer(wanted, path, layers, config_digest)

    def blobs(*kinds: str) -> tuple[Path, ...]:
        types = [_LAYER + kind for kind in kinds]
        return tuple(_blob(folder, str(wanted), layer) for layer in layers if layer["mediaType"] in types)

    def last(*kinds: str) -> Path | None:
        """Of several layers of one kind Ollama itself uses the last."""
        return next(reversed(blobs(*kinds)), None)

    settings = folder / "blobs" / config_digest.replace(":", "-") if DIGEST.fullmatch(config_digest) else None
    return OllamaModelFiles(
        str(wanted),
        _blob(folder, str(wanted), models[-1]),
        projectors=blobs("projector"),
        adapters=blobs("adapter"),
        template=last("template", "prompt"),
        system=last("system"),
        parameters=last("params"),
        messages=last("messages"),
        settings=settings,
    )


def _is_file(path: Path) -> bool:
    """Whether the file exists. Raises PermissionError where that cannot be known."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except PermissionError:
        raise
    except OSError:
        return False


def _find_blob(folder: Path, digest: str) -> OllamaModelFiles | None:
    path = folder / "blobs" / f"sha256-{digest}"
    name = f"sha256:{digest}"
    try:
        if not _is_file(path):
            return None
    except PermissionError:
        raise _permission_error(name, path, folder) from None
    return OllamaModelFiles(name, path)


def _layers(name: ModelName, path: Path, content: bytes) -> tuple[list[dict[str, Any]], str]:
    """The manifest's layers and the digest of its config."""
    try:
        manifest = json.loads(content)
        layers = [dict(layer) for layer in manifest["layers"]]
        config_digest = str(dict(manifest.get("config") or {}).get("digest", ""))
        for layer in layers:
            if not isinstance(layer["mediaType"], str) or not isinstance(layer.get("size", 0), int):
                raise TypeError("a layer's mediaType or size")
            _hex(layer)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(
            f"{name}: {path} is not an Ollama manifest ({error!r}). Run: ollama pull {name}"
        ) from None
    return layers, config_digest


def _hex(layer: dict[str, Any]) -> str:
    match = DIGEST.fullmatch(str(layer["digest"]))
    if match is None:
        raise ValueError("a layer's digest")
    return match[1].lower()


def _no_model_layer(
    name: ModelName, path: Path, layers: list[dict[str, Any]], config_digest: str
) -> ModelFileError:
    if any(layer["mediaType"].startswith(_LAYER + "tensor") for layer in layers):
        return ModelFileError(
            f"{name} is stored as separate tensors ({path}), not as GGUF; pull a GGUF variant of it"
        )
    blob = path.parents[4] / "blobs" / config_digest.replace(":", "-")
    try:
        with blob.open("rb") if DIGEST.fullmatch(config_digest) else io.BytesIO(b"{}") as file:
            settings = json.loads(file.read(_MANIFEST_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        settings = {}
    if isinstance(settings, dict) and settings.get("remote_host"):
        return ModelFileError(f"{name} is a cloud model ({path}); it has no file on this machine")
    return ModelFileError(f"{name}: {path} has no model layer. Run: ollama pull {name}")


def _blob(folder: Path, name: str, layer: dict[str, Any]) -> Path:
    """The file of a layer, with its size checked."""
    path = folder / "blobs" / f"sha256-{_hex(layer)}"
    again = f". Run: ollama pull {name}"
    try:
        size_bytes = path.stat().st_size
    except PermissionError:
        raise _permission_error(name, path, folder) from None
    except OSError:
        if any(path.parent.glob(path.name + "-partial*")):
            raise ModelFileError(f"{name}: the download of {path} is incomplete{again}") from None
        raise ModelFileError(f"{name}: {path} is missing{again}") from None
    stated_bytes = layer.get("size", size_bytes)
    if size_bytes != stated_bytes:
        raise ModelFileError(f"{name}: {path} has {size_bytes} bytes instead of {stated_bytes}{again}")
    return path


def _check_model(name: str, path: Path) -> None:
    """Raise ModelFileError if llama.cpp cannot load the file."""
    try:
        architecture = read_facts(path).architecture
    except ModelFileError as error:
        raise ModelFileError(f"{name}: {error}") from error
    if architecture not in ARCHITECTURES:
        raise ModelFileError(
            f"{name}: {path} has the architecture {shown(architecture)}, which this llama.cpp does not load; "
            "run it in Ollama, or use a GGUF made for llama.cpp"
        )
    # Ollama's own engine keeps vision and audio tensors in the model's file; llama.cpp needs them in a separate
    # file and refuses this one ("wrong number of tensors").
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_START_BYTES)
    except OSError as error:
        raise ModelFileError(f"{name}: cannot read {path}: {error.strerror}") from None
    for part in ("vision", "audio"):
        key = f"{architecture}.{part}.block_count".encode()
        if struct.pack("<Q", len(key)) + key in header:
            raise ModelFileError(
                f"{name}: {path} contains its {part} part, a form that only Ollama's own engine loads; "
                "run it in Ollama, or use a GGUF made for llama.cpp (such as hf.co/user/repo:quant)"
            )


def _permission_error(name: str, path: Path, folder: Path) -> ModelFileError:
    fix = "allow your user to read it"
    if sys.platform != "win32":
        fix = f"run: sudo usermod -aG ollama $USER (and log in again), or: sudo chmod -R a+rX {folder}"
    return ModelFileError(f"{name}: no permission to read {path}; {fix}")
