"""From a model's name to its GGUF file: the built-in demo model, a path, a router's own file, Ollama's storage."""

from __future__ import annotations

from pathlib import Path

from sollol_nb.errors import ModelFileError, ModelNotFoundError
from sollol_nb.models.ollama_storage import OllamaGGUFResolver

DEMO_MODEL_PATH = Path(__file__).parent / "demo.gguf"
DEMO_NAMES = ("demo", "demo:sharded")
DEMO_NOTE = "a tiny demo model, not a general one"


def find_model_file(model: str, gguf_path: str | Path | None = None) -> Path | None:
    """The GGUF file of a model, or None where this machine has none.

    Args:
        model: `demo` and `demo:sharded` name the file in this package; a name that ends in `.gguf` is a path;
            others are looked up in Ollama's storage.
        gguf_path: used instead of that look-up.

    Raises:
        ModelFileError: a file is named but is not there, or Ollama's is damaged or unreadable.
    """
    if model in DEMO_NAMES:
        return DEMO_MODEL_PATH
    if gguf_path is not None or model.endswith(".gguf"):
        path = Path(model if model.endswith(".gguf") or gguf_path is None else gguf_path).expanduser().absolute()
        if not path.is_file():
            raise ModelFileError(f"{path} is not there; give the path of a GGUF file")
        return path
    try:
        return OllamaGGUFResolver().resolve(model)
    except ModelNotFoundError:
        return None
