"""From an Ollama model's name to its GGUF file, under the name that the guide uses. The code is in `models/`."""

from sollol_nb.models.files import OllamaGGUFResolver, OllamaModelFiles

__all__ = ["OllamaGGUFResolver", "OllamaModelFiles"]
