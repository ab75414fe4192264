"""Pulls a model from the Hugging Face Hub, for llama.cpp: downloaded, verified, and given a short name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from sollol_nb.errors import ModelPullError, PullInterrupted
from sollol_nb.gguf.facts import read_facts
from sollol_nb.models.files import DEMO_NAMES, OllamaGGUFResolver
from sollol_nb.models.hub.files import HubModel, HubReference, choose_model, folder_name, shown_size
from sollol_nb.models.hub.repository import Repository
from sollol_nb.models.names import key_of
from sollol_nb.models.profiles import MODEL_PROFILES, save_profile
from sollol_nb.runtime.progress_bars import progress_bar
from sollol_nb.settings import config
from sollol_nb.text.short_names import is_file_name
from sollol_nb.text.tables import counted


@dataclass(frozen=True, slots=True)
class PulledModel:
    """A model that was pulled.

    Attributes:
        reference: what it was pulled from.
        name: its short name, as requests name it.
        files: its files.
        path: the model's file; of a split one the first part.
        projector: the file that lets it read images, if any.
        saved_in: the settings file with the name; "" where only this process has it.
    """

    reference: str
    name: str
    files: HubModel
    path: Path
    projector: Path | None
    saved_in: str

    def __str__(self) -> str:
        """What was pulled, and how to ask it: two lines."""
        count = counted(len(self.files.files), "file")
        with_images = ", reads images" if self.projector is not None else ""
        where = f"saved in {self.saved_in}" if self.saved_in else "for this process only, since SOLLOL_CONFIG=0"
        return (
            f"pulled {self.reference}: {self.files.quant}, {shown_size(self.files.size_bytes)} in {count}, hashes "
            f"verified{with_images}\n"
            f"its name is {self.name} ({where}); ask it with %%sollol {self.name}"
        )


def pull(
    reference: str,
    *,
    name: str | None = None,
    taken: Collection[str] = (),
    say: Callable[[str], object] = print,
) -> PulledModel:
    """Download a model with a progress bar, or what is missing of it, and give it a name. Waits; Ctrl-C stops it.

    Args:
        reference: `hf.co/user/repo`, `hf.co/user/repo:quant` or `hf.co/user/repo:file.gguf`.
        name: its name; None for that of the repository, in lower case and without `-GGUF`.
        taken: names of models on Ollama nodes, which the model must not get.
        say: called with a line when something takes longer than expected.

    Raises:
        ModelPullError: the Hub cannot be reached or refuses, the disk is too small, a file is damaged.
        ModelNotFoundError: there is no such repository or quantization.
        ModelFileError: llama.cpp cannot load the file.
        ConfigError: the name cannot be used.
        PullInterrupted: Ctrl-C; what has arrived is kept, and the same call continues.
    """
    wanted = HubReference.parse(reference)
    with Repository(wanted.repository) as hub:
        files = choose_model(wanted, hub.files())
        name = _free_name(wanted, files, name, {key_of(each) for each in taken})
        hub.check_access(files.files[0])
        hub.check_disk(files)
        bar = progress_bar(total=files.size_bytes, desc=f"{name} {files.quant}", unit="B", unit_scale=True)
        try:
            paths = {file: hub.fetch(file, bar, say) for file in files.files}
        except KeyboardInterrupt:
            raise PullInterrupted(
                f"stopped; {shown_size(bar.n)} of {shown_size(files.size_bytes)} are kept, and the same command "
                "continues"
            ) from None
        finally:
            bar.close()
    path = paths[files.parts[0]]
    read_facts(path)
    projector = None if files.projector is None else paths[files.projector]
    entry = {"gguf": path} | ({} if projector is None else {"mmproj": projector})
    return PulledModel(str(wanted), name, files, path, projector, save_profile(name, entry))


def _free_name(reference: HubReference, files: HubModel, given: str | None, taken: Collection[str | None]) -> str:
    """The name for the model: the given one, or the first that nothing else has.

    Raises:
        ModelPullError: it is the name of something else.
    """
    base = re.sub(r"[-_.]gguf$", "", reference.repository.partition("/")[2].lower())
    names = (given,) if given is not None else (base, f"{base}:{files.quant.lower()}")
    known = (*DEMO_NAMES, *MODEL_PROFILES, *OllamaGGUFResolver().installed())
    others = {key_of(name) for name in known} | set(taken)
    problem = ""
    for name in names:
        saved = config.saved_model(name).gguf
        if is_file_name(name):
            problem = f"{name} is a path"
        elif saved is not None and not _is_of(saved, reference, files):
            problem = f"{name} stands for {saved}"
        elif saved is None and key_of(name) in others:
            problem = f"{name} is another model, of Ollama or built in"
        else:
            return name
    raise ModelPullError(f"{problem}; choose a name for {reference} with --name NAME")


def _is_of(path: Path, reference: HubReference, files: HubModel) -> bool:
    """Whether a path in the Hub's cache is that of these files, in any of their versions."""
    repository = folder_name(reference.repository)
    return repository in path.parts and path.as_posix().endswith(f"/{files.parts[0].name}")
