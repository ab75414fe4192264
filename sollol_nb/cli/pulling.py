"""`sollol-nb pull`: a model from the Hugging Face Hub."""

from __future__ import annotations

from sollol_nb.errors import OllamaUnavailableError
from sollol_nb.models.hub.pull import PulledModel
from sollol_nb.models.hub.pull import pull as pull_model
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.io_loop import run_blocking


def pull(model: str, name: str | None) -> PulledModel:
    """Download a model, and name it. Arguments and errors as for `hub.pull`."""
    return pull_model(model, name=name, taken=_names_of_nodes())


def _names_of_nodes() -> list[str]:
    """The models of the Ollama nodes that answer."""

    async def names() -> list[str]:
        pool = OllamaPool.auto_configure()
        try:
            return [str(model["name"]) for model in (await pool.list())["models"]]
        except OllamaUnavailableError:
            return []
        finally:
            await pool.close()

    return run_blocking(names())
