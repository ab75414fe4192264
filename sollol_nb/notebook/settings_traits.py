"""`%config Sollol`: the settings of `settings.py` as traits, with help, for this kernel.

A trait that nobody set yields what holds without it (the variable's, the file's or the built-in value), looked up
at each reading, so that an edit of `sollol_nb.toml` takes effect at once. Setting it to None lets that hold again.
`c.Sollol.temperature = 0` in `ipython_config.py` works like `%config Sollol.temperature = 0`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from traitlets import TraitType
from traitlets.config import Configurable

from sollol_nb.errors import ConfigError
from sollol_nb.settings import config
from sollol_nb.settings.table import FILE_NAME, SETTINGS, Setting, setting_of

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets import HasTraits
    from traitlets.config import Config

__all__ = ["Sollol", "install", "remove"]

_SECTION = "Sollol"


class SettingTrait(TraitType[Any, Any]):
    """A trait of the setting that it is named after. It stores only what was set; see the module."""

    default_value = None
    allow_none = True

    def __init__(self) -> None:
        super().__init__(config=True)

    @property
    def setting(self) -> Setting:
        """The setting."""
        assert self.name is not None
        return SETTINGS[self.name]

    def class_init(self, cls: type[HasTraits], name: str | None) -> None:
        """Take the help text of the setting."""
        super().class_init(cls, name)
        self.help = self.setting.help

    def get(self, obj: HasTraits, cls: type[Any] | None = None) -> Any:
        """The value that holds.

        Raises:
            ConfigError: a variable or file has a value that cannot be used.
        """
        own = obj._trait_values.get(self.setting.name)
        return config.default(self.setting.name) if own is None else own

    def validate(self, obj: HasTraits, value: Any) -> Any:
        """The value in its one form.

        Raises:
            ConfigError: it cannot be used.
        """
        return self.setting.kind.checked(value, f"{_SECTION}.{self.name}")

    def from_string(self, s: str) -> Any:
        """The value of a command line option, such as `--Sollol.temperature=0`."""
        return None if s == "None" else self.setting.kind.from_text(s)


class Sollol(Configurable):
    """The settings of this kernel.

    Args:
        shell: whose configuration holds what `ipython_config.py` and the command line say.
    """

    model = SettingTrait()
    temperature = SettingTrait()
    top_p = SettingTrait()
    max_tokens = SettingTrait()
    seed = SettingTrait()
    system = SettingTrait()
    priority = SettingTrait()
    timeout = SettingTrait()
    format = SettingTrait()

    strategy = SettingTrait()
    keep_alive = SettingTrait()
    workers = SettingTrait()
    num_workers = SettingTrait()
    auto_setup = SettingTrait()
    context_tokens = SettingTrait()
    slots = SettingTrait()
    threshold_params = SettingTrait()
    ollama_hosts = SettingTrait()
    llama_cpp = SettingTrait()

    short_errors = SettingTrait()
    on_unload = SettingTrait()
    nest_asyncio = SettingTrait()

    def __init__(self, shell: InteractiveShell | None = None) -> None:
        self.section_before = copy.deepcopy(shell.config.get(_SECTION)) if shell is not None else None
        super().__init__(parent=shell)

    def own(self, name: str) -> Any:
        """The value that was set here; None where none was."""
        return self._trait_values.get(name)

    def find(self, name: str) -> config.Found:
        """The value that holds, and where it comes from.

        Raises:
            ConfigError: a variable or file has a value that cannot be used.
        """
        own = self.own(name)
        return config.find(name) if own is None else config.Found(own, "%config")

    def or_built_in(self, name: str) -> Any:
        """The value that holds, or the built-in default where a variable or file cannot be used: for what must not
        fail by that, such as showing the error that says so."""
        try:
            return self.find(name).value
        except ConfigError:
            return SETTINGS[name].default

    def request_defaults(self) -> dict[str, Any]:
        """What someone set for requests, by name of the option (`system`, `model` and `format` too).

        What nobody set is left out: there the router and the engines have defaults of their own. So is a `timeout`
        of the variable or the file: it is the router's default, and this router may have been given another.

        Raises:
            ConfigError: a variable or file has a value that cannot be used.
        """
        found = {one.argument: self.find(one.name) for one in SETTINGS.values() if one.side == "request"}
        if self.own("timeout") is None:
            del found["timeout"]
        return {name: one.value for name, one in found.items() if one.source != config.BUILT_IN}

    def router_settings(self) -> dict[str, Any]:
        """What was set here for the router, as keyword arguments of `sync_wrapper.HybridRouter`.

        It looks into variables and files itself for what is not among them.
        """
        settings = {
            one.argument: self.own(one.name)
            for one in SETTINGS.values()
            if one.side == "router" and self.own(one.name) is not None
        }
        if "ollama_pool" in settings:
            from sollol_nb.sync_wrapper import OllamaPool

            settings["ollama_pool"] = OllamaPool(settings["ollama_pool"])
        return settings

    def on_router_change(self, callback: Callable[[], object]) -> None:
        """Call back whenever a setting of the router was changed here."""
        self.observe(lambda _: callback(), [one.name for one in SETTINGS.values() if one.side == "router"])

    def update_config(self, config: Config) -> None:
        """What `%config Sollol.NAME = ...` calls.

        Raises:
            ConfigError: there is no such setting, or its value cannot be used.
        """
        for name in config.get(_SECTION, ()):
            setting = setting_of(name, _SECTION)
            if setting.side == "machine":
                raise ConfigError(
                    f"{_SECTION}.{name} cannot be changed in a notebook; set {setting.variable} before it starts, "
                    f"or {name} in {FILE_NAME}"
                )
        super().update_config(config)

    @contextmanager
    def hold_trait_notifications(self) -> Iterator[None]:
        """Hold nothing. traitlets would end by setting each changed trait to what reading it yields, which would
        pin the present default where a trait was set to None."""
        yield

    @classmethod
    def class_get_trait_help(
        cls, trait: TraitType[Any, Any], inst: HasTraits | None = None, helptext: str | None = None
    ) -> str:
        """One setting in `%config Sollol`: its value and where that comes from, and how to set it."""
        assert isinstance(trait, SettingTrait)
        setting = trait.setting
        head = f"{cls.__name__}.{setting.name}"
        if isinstance(inst, Sollol):
            found = inst.find(setting.name)
            head += f" = {found.value!r} ({found.source})"
        return "\n".join(
            (
                head,
                f"    {helptext or setting.help}",
                f"    Value: {setting.kind.words}. Default: {setting.default_text}. Variable: {setting.variable}.",
            )
        )


def install(shell: InteractiveShell) -> Sollol:
    """Let `%config Sollol` work in this shell; gives the settings. Twice is fine, and keeps what was set.

    Raises:
        ConfigError: `ipython_config.py` or the command line has a value that cannot be used.
    """
    for settings in _installed(shell):
        return settings
    settings = Sollol(shell)
    shell.configurables.append(settings)  # type: ignore[arg-type]  # any Configurable will do
    return settings


def remove(shell: InteractiveShell) -> None:
    """Take the settings out again, and what `%config` has left of them in the shell's own configuration."""
    for settings in _installed(shell):
        shell.configurables.remove(settings)  # type: ignore[arg-type]
        shell.config.pop(_SECTION, None)
        if settings.section_before is not None:
            shell.config[_SECTION] = settings.section_before


def _installed(shell: InteractiveShell) -> list[Sollol]:
    configurables: list[Any] = shell.configurables
    return [one for one in configurables if isinstance(one, Sollol)]
