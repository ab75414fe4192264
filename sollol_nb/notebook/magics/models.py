"""The magics about models: list them, show or set their profiles, and show where their requests would go."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.errors import ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.layers.plan import reason_lines
from sollol_nb.models.found_files import found_files
from sollol_nb.models.profiles import MODEL_PROFILES, save_profile
from sollol_nb.models.routing import BACKENDS
from sollol_nb.notebook import magic_line, session
from sollol_nb.settings import config
from sollol_nb.settings.models import KEYS

if TYPE_CHECKING:
    import pandas as pd


@magics_class
class ModelMagics(Magics):
    """`%sollol_models`, `%sollol_route`, `%sollol_profile`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("words", nargs="*", metavar="TEXT", help="only names that contain this text; or: pull MODEL")
    @argument("--name", metavar="NAME", help="pull: its name (default: the repository's, in lower case)")
    @argument("--all", action="store_true", help="also models that have a profile, but are not available yet")
    @line_magic
    def sollol_models(self, call: magic_line.Call) -> pd.DataFrame | None:
        """List the models as a frame, or pull one from the Hugging Face Hub.

        Listed are models that are installed in Ollama, run, are built in or have a name for their file, and the
        `.gguf` files of LM Studio, llama.cpp, the Hugging Face Hub's cache and the setting `model_dirs`. Columns:
        `model`, `where` (Ollama nodes, this machine, a program; empty if not available yet), `parameters_b`
        (billions), `memory_gb` (1e9 bytes, if known), `sharded`, `running`.

        `pull hf.co/user/repo:quant` downloads a model (`Q4_K_M` if none is named), verifies it, and gives it a
        short name. Stopped, it keeps what has arrived, and the same line continues. It needs `huggingface_hub`.

        Example::

            %sollol_models

            %sollol_models demo

            %sollol_models --all
        """
        arguments = call.arguments
        words = [str(word) for word in arguments.words]
        if words[:1] == ["pull"] or arguments.name is not None:
            _pull(words, arguments.name)
            return None
        if len(words) > 1:
            raise UsageError(f"%sollol_models: unexpected {words[1]!r}; name one text, or use: pull MODEL")
        router = session.router()
        frame = router.models()
        if router.gateway is None:
            for note in found_files().notes:
                print(note)
        if not arguments.all:
            frame = frame[(frame["where"] != "") | (frame["running"] != "")]
        text = words[0] if words else ""
        return frame[frame["model"].str.contains(text, case=False, regex=False)].reset_index(drop=True)

    @magic_line.options_magic()
    @magic_arguments()
    @argument("model", help="model name")
    @argument("--backend", choices=BACKENDS, help="show the route of a request with this --backend")
    @argument("-v", "--verbose", action="store_true", help="with all reasons of the plan, and a standby")
    @line_magic
    def sollol_route(self, call: magic_line.Call) -> None:
        """Show where a request for a model would go now, and why. Nothing is started.

        For a sharded model, this includes its layer plan: that of the running model, or the one that it would get
        over the workers as last seen. `-v` says which workers are left out, and why. With the setting `standby`,
        and with `-v`, the last line says what a standby takes or would take, or why none is possible.

        Example::

            %sollol_route demo

            %sollol_cluster start 2

            %sollol_route demo:sharded -v
        """
        arguments = call.arguments
        router = session.router()
        print(router.route(arguments.model, backend=arguments.backend))
        try:
            plan = router.plan(arguments.model, backend=arguments.backend)
        except (WorkersUnavailableError, ModelDoesNotFitError) as error:
            print(f"no plan: {error}")
            return
        if plan is not None:
            token_ms = plan.predicted_token_ms
            predicted = "" if token_ms is None else f"; predicted: {token_ms:.3g} ms per token"
            print(f"plan: {plan.describe()}{predicted}")
            for line in reason_lines(plan.reasons, verbose=arguments.verbose):
                print(line)
            standby = router.standby_of(arguments.model, backend=arguments.backend, even_if_off=arguments.verbose)
            if standby:
                print(standby)

    @magic_line.options_magic()
    @magic_arguments()
    @argument("model", help="model name, or a new name for the file of --gguf")
    @argument("--gguf", metavar="PATH", help="let this name stand for a .gguf file")
    @argument("--mmproj", metavar="PATH", help="set the projector with which it reads images, a .gguf file")
    @argument(
        "--parameters",
        type=magic_line.number,
        metavar="BILLIONS",
        help="set its number of parameters, in billions",
    )
    @argument("--memory", type=magic_line.number, metavar="GB", help="set the memory it needs, in 1e9 bytes")
    @argument("--sharded", action="store_true", default=None, help="mark as needing sharding")
    @argument("--not-sharded", dest="sharded", action="store_false", help="mark as not needing sharding")
    @argument("--temperature", type=magic_line.number, help="temperature of its requests")
    @argument("--top-p", type=magic_line.number, help="top_p of its requests")
    @argument("--max-tokens", type=magic_line.whole_number, help="maximum length of its answers, in tokens")
    @argument("--seed", type=magic_line.seed, help="seed of its requests")
    @argument("--system", help="system message of its requests")
    @argument(
        "--forget", action="store_true", help="remove its profile; its size comes from its file or name again"
    )
    @line_magic
    def sollol_profile(self, call: magic_line.Call) -> None:
        """Show the profile of a model, or set it: a name for a GGUF file, its size, options of its requests.

        What is set is written to `sollol_nb.toml` in your config folder (its table `[models]`), for all kernels.

        Example::

            %sollol_profile llama3.1:70b

            from sollol_nb.models.files import DEMO_MODEL_PATH

            %sollol_profile tiny --gguf {{ DEMO_MODEL_PATH }} --sharded --temperature 0

            %sollol_profile custom-70b --parameters 70 --memory 42 --sharded

            %sollol_profile custom-70b --forget
        """
        arguments = call.arguments
        model = str(arguments.model)
        given = {key: getattr(arguments, _OPTIONS.get(key, key)) for key in KEYS}
        given = {key: value for key, value in given.items() if value is not None}
        if arguments.forget and given:
            raise UsageError("%sollol_profile: --forget removes the profile; use it without other options")
        if arguments.forget:
            if not config.forget_model(model):
                MODEL_PROFILES.pop(model, None)
        elif given:
            path = save_profile(model, given)
            in_kernel = "set in this kernel only: SOLLOL_CONFIG=0 allows no settings file"
            print(f"saved in {_below_home(path)}" if path else in_kernel)
        router = session.router()
        if router.gateway is not None and (given or arguments.forget):
            print(f"the gateway {router.gateway} reads the settings of its own machine; this is what it knows:")
        print(router.profile(model))
        saved = config.saved_model(model)
        if not given and saved.values:
            print("\n".join(f"{key}: {value}" for key, value in saved.values.items()))
            print(f"set in {_below_home(saved.source)}")


def _pull(words: list[str], name: str | None) -> None:
    """`pull MODEL`, here: a gateway has the files of its own machine."""
    if words[:1] != ["pull"] or len(words) != 2:
        raise UsageError("%sollol_models: name one model to pull, as in: pull hf.co/user/repo:Q4_K_M")
    router = session.router()
    if router.gateway is not None:
        raise UsageError(
            f"%sollol_models: this notebook uses the gateway {router.gateway}; on its machine, run: "
            f"sollol-nb pull {words[1]}"
        )
    from sollol_nb.models.hub.pull import pull  # here, so that `%load_ext` is quick

    of_nodes = [model.model for model in router.listed_models() if "://" in model.where]
    print(pull(words[1], name=name, taken=of_nodes))


def _below_home(path: str) -> str:
    """A path for display, from the user's home on."""
    with contextlib.suppress(RuntimeError, ValueError):  # no home, or not in it
        return f"~/{Path(path).relative_to(Path.home()).as_posix()}"
    return path


_OPTIONS = {"memory_gb": "memory"}
