"""The magics about models: which there are, what is known of them, and where their requests would go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.models.profiles import MODEL_PROFILES
from sollol_nb.notebook import magic_line, session

if TYPE_CHECKING:
    import pandas as pd


@magics_class
class ModelMagics(Magics):
    """`%sollol_models`, `%sollol_route`, `%sollol_profile`."""

    @magic_arguments()
    @argument("text", nargs="?", default="", help="only names that contain this")
    @line_magic
    def sollol_models(self, line: str) -> pd.DataFrame:
        """The models that can be asked, as a frame: installed in Ollama, running, built in, or with a profile.

        Columns: `model`, `where` (Ollama nodes, this machine, or nowhere yet), `parameters_b` (billions),
        `memory_gb` (1e9 bytes, as far as known), `sharded`, `running`.

        Example::

            %sollol_models

            %sollol_models demo
        """
        arguments, _ = magic_line.parse(self.sollol_models, line, name="%sollol_models")
        frame = session.router().models()
        return frame[frame["model"].str.contains(arguments.text, case=False, regex=False)].reset_index(drop=True)

    @magic_arguments()
    @argument("model", help="model name")
    @argument("--backend", choices=("auto", "ollama", "sharded", "local"), help="as if this were asked for")
    @line_magic
    def sollol_route(self, line: str) -> None:
        """Tell where a request for a model would go now, and why.

        Example::

            %sollol_route demo
        """
        arguments, _ = magic_line.parse(self.sollol_route, line, name="%sollol_route")
        print(session.router().route(arguments.model, backend=arguments.backend))

    @magic_arguments()
    @argument("model", help="model name")
    @argument("--parameters", type=magic_line.number, metavar="BILLIONS", help="set its number of parameters")
    @argument("--memory", type=magic_line.number, metavar="GB", help="set its memory, in 1e9 bytes")
    @argument("--sharded", action="store_true", default=None, help="say that it needs sharding")
    @argument("--not-sharded", dest="sharded", action="store_false", help="say that it does not")
    @argument("--forget", action="store_true", help="remove its entry; it is sized by its file or name again")
    @line_magic
    def sollol_profile(self, line: str) -> None:
        """Tell what is known of a model, or set it: its entry in `MODEL_PROFILES`, in this kernel.

        Example::

            %sollol_profile llama3.1:70b

            %sollol_profile custom-70b --parameters 70 --memory 42 --sharded

            %sollol_profile custom-70b --forget
        """
        arguments, _ = magic_line.parse(self.sollol_profile, line, name="%sollol_profile")
        model = str(arguments.model)
        given = {
            "parameter_count": arguments.parameters,
            "estimated_memory_gb": arguments.memory,
            "requires_distributed": arguments.sharded,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if arguments.forget and given:
            raise UsageError("%sollol_profile: --forget removes the entry, so nothing can be set with it")
        before = MODEL_PROFILES.get(model)
        if arguments.forget:
            MODEL_PROFILES.pop(model, None)
        elif given:
            MODEL_PROFILES[model] = {**(before or {}), **given}
        try:
            profile = session.router().profile(model)
        except Exception:
            if before is not None:  # a profile that cannot be used is not kept
                MODEL_PROFILES[model] = before
            elif given:
                MODEL_PROFILES.pop(model, None)
            raise
        print(profile)
