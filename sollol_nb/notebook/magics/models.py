"""The magics about models: list them, show or set their profiles, and show where their requests would go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.models.profiles import MODEL_PROFILES
from sollol_nb.models.routing import BACKENDS
from sollol_nb.notebook import magic_line, session

if TYPE_CHECKING:
    import pandas as pd


@magics_class
class ModelMagics(Magics):
    """`%sollol_models`, `%sollol_route`, `%sollol_profile`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("text", nargs="?", default="", help="only names that contain this text")
    @line_magic
    def sollol_models(self, call: magic_line.Call) -> pd.DataFrame:
        """List the models as a frame: installed in Ollama, running, built in, or with a profile.

        Columns: `model`, `where` (Ollama nodes, this machine; empty if not available yet), `parameters_b`
        (billions), `memory_gb` (1e9 bytes, if known), `sharded`, `running`.

        Example::

            %sollol_models

            %sollol_models demo
        """
        arguments = call.arguments
        frame = session.router().models()
        return frame[frame["model"].str.contains(arguments.text, case=False, regex=False)].reset_index(drop=True)

    @magic_line.options_magic()
    @magic_arguments()
    @argument("model", help="model name")
    @argument("--backend", choices=BACKENDS, help="show the route of a request with this --backend")
    @line_magic
    def sollol_route(self, call: magic_line.Call) -> None:
        """Show where a request for a model would go now, and why.

        Example::

            %sollol_route demo
        """
        arguments = call.arguments
        print(session.router().route(arguments.model, backend=arguments.backend))

    @magic_line.options_magic()
    @magic_arguments()
    @argument("model", help="model name")
    @argument(
        "--parameters",
        type=magic_line.number,
        metavar="BILLIONS",
        help="set its number of parameters, in billions",
    )
    @argument("--memory", type=magic_line.number, metavar="GB", help="set the memory it needs, in 1e9 bytes")
    @argument("--sharded", action="store_true", default=None, help="mark as needing sharding")
    @argument("--not-sharded", dest="sharded", action="store_false", help="mark as not needing sharding")
    @argument(
        "--forget", action="store_true", help="remove its profile; its size comes from its file or name again"
    )
    @line_magic
    def sollol_profile(self, call: magic_line.Call) -> None:
        """Show the profile of a model, or set it in this kernel (its entry in `MODEL_PROFILES`).

        Example::

            %sollol_profile llama3.1:70b

            %sollol_profile custom-70b --parameters 70 --memory 42 --sharded

            %sollol_profile custom-70b --forget
        """
        arguments = call.arguments
        model = str(arguments.model)
        given = {
            "parameter_count": arguments.parameters,
            "estimated_memory_gb": arguments.memory,
            "requires_distributed": arguments.sharded,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if arguments.forget and given:
            raise UsageError("%sollol_profile: --forget removes the profile; use it without other options")
        before = MODEL_PROFILES.get(model)
        if arguments.forget:
            MODEL_PROFILES.pop(model, None)
        elif given:
            MODEL_PROFILES[model] = {**(before or {}), **given}
        try:
            profile = session.router().profile(model)
        except Exception:
            if before is not None:  # an invalid profile is not kept
                MODEL_PROFILES[model] = before
            elif given:
                MODEL_PROFILES.pop(model, None)
            raise
        print(profile)
