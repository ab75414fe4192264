"""`%config Sollol`: the settings of `settings/table.py` as traits of this kernel, with help.

A trait that is not set has the value of the environment variable, of the settings file, or the default. It is
looked up at each reading, so that an edit of `sollol_nb.toml` takes effect immediately. Setting a trait to None
unsets it.

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
    """The trait of the setting with the same name. It stores only a value that was set here."""

    default_value = None
    allow_none = True

    def __init__(self) -> None:
        super().__init__(config=True)

    @property
    def setting(self) -> Setting:
        """The setting of this trait."""
        assert self.name is not None
        return SETTINGS[self.name]

    def class_init(self, cls: type[HasTraits], name: str | None) -> None:
        """Use the help text of the setting."""
        super().class_init(cls, name)
        self.help = self.setting.help

    def get(self, obj: HasTraits, cls: type[Any] | None = None) -> Any:
        """The value in effect.

        Raises:
            ConfigError: a variable or file has an invalid value.
        """
        own = obj._trait_values.get(self.setting.name)
        return config.default(self.setting.name) if own is None else own

    def validate(self, obj: HasTraits, value: Any) -> Any:
        """The value in its normal form.

        Raises:
            ConfigError: it is invalid.
        """
        return self.setting.kind.checked(value, f"{_SECTION}.{self.name}")

    def from_string(self, s: str) -> Any:
        """The value of a command line option, such as `--Sollol.temperature=0`."""
        return None if s == "None" else self.setting.kind.from_text(s)


class Sollol(Configurable):
    """The settings of this kernel.

    Args:
        shell: its configuration has the values of `ipython_config.py` and the command line.
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
    recovery = SettingTrait()
    deterministic = SettingTrait()
    speculation = SettingTrait()
    replan = SettingTrait()
    standby = SettingTrait()
    draft = SettingTrait()
    threshold_params = SettingTrait()
    ollama_hosts = SettingTrait()
    llama_cpp = SettingTrait()
    gateway = SettingTrait()
    gateway_key = SettingTrait()

    short_errors = SettingTrait()
    on_unload = SettingTrait()
    nest_asyncio = SettingTrait()
    keep_chats = SettingTrait()
    preload = SettingTrait()
    journal = SettingTrait()
    confirm_tools = SettingTrait()

    def __init__(self, shell: InteractiveShell | None = None) -> None:
        self.section_before = copy.deepcopy(shell.config.get(_SECTION)) if shell is not None else None
        super().__init__(parent=shell)

    def own(self, name: str) -> Any:
        """The value that was set here; None if it was not set."""
        return self._trait_values.get(name)

    def find(self, name: str) -> config.Found:
        """The value in effect, and where it comes from.

        Raises:
            ConfigError: a variable or file has an invalid value.
        """
        own = self.own(name)
        return config.find(name) if own is None else config.Found(own, config.IN_NOTEBOOK)

    def or_built_in(self, name: str) -> Any:
        """The value in effect, or the default if a variable or file has an invalid value: for code that must not
        fail because of that, such as showing the error about it."""
        try:
            return self.find(name).value
        except ConfigError:
            return SETTINGS[name].default

    def request_defaults(self, model: str | None = None) -> dict[str, Any]:
        """The request settings that were set anywhere, by name of the option (also `system`, `model`, `format`).

        Settings with their default value are left out, since the router and the engines have their own defaults. A
        `timeout` from the variable or the file is left out too: it is the router's default, and this router may
        have been given another. What the setting `models` says about a model comes before a file's settings for
        all models; the router knows it.

        Args:
            model: the model of the request; None is the one of the setting `model`.

        Raises:
            ConfigError: a variable or file has an invalid value.
        """
        found = {
            setting.argument: self.find(setting.name) for setting in SETTINGS.values() if setting.side == "request"
        }
        if self.own("timeout") is None:
            del found["timeout"]
        model = model or found["model"].value
        saved = config.saved_model(model).values if model else {}
        files = set(map(str, config.settings_files()))
        return {
            name: each.value
            for name, each in found.items()
            if each.source != config.BUILT_IN and not (name in saved and each.source in files)
        }

    def on_router_change(self, callback: Callable[[str], object]) -> None:
        """Call back with its name whenever a setting of the router changes here."""
        names = [setting.name for setting in SETTINGS.values() if setting.side == "router"]
        self.observe(lambda change: callback(change["name"]), names)

    def update_config(self, config: Config) -> None:
        """`%config Sollol.NAME = ...` calls this.

        Raises:
            ConfigError: the setting does not exist, or its value is invalid.
        """
        for name in config.get(_SECTION, ()):
            setting = setting_of(name, _SECTION)
            if setting.side == "machine":
                raise ConfigError(
                    f"{_SECTION}.{name} cannot be changed in a notebook; set {setting.variable} before the kernel "
                    f"starts, or {name} in {FILE_NAME}"
                )
        super().update_config(config)

    @contextmanager
    def hold_trait_notifications(self) -> Iterator[None]:
        """Hold nothing. traitlets would finally set each changed trait to the value it reads, and so pin the
        present default of a trait that was set to None."""
        yield

    @classmethod
    def class_get_trait_help(
        cls, trait: TraitType[Any, Any], inst: HasTraits | None = None, helptext: str | None = None
    ) -> str:
        """One setting in `%config Sollol`: its value, where the value comes from, and how to set it."""
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
                f"    Value: {setting.kind.description}. Default: {setting.default_text}. "
                f"Variable: {setting.variable}.",
            )
        )


def install(shell: InteractiveShell) -> Sollol:
    """Make `%config Sollol` work in this shell; returns the settings. Twice is fine, and keeps their values.

    Raises:
        ConfigError: `ipython_config.py` or the command line has an invalid value.
    """
    for settings in _installed(shell):
        return settings
    settings = Sollol(shell)
    config.use_notebook_settings(settings.own)
    shell.configurables.append(settings)  # type: ignore[arg-type]  # any Configurable will do
    return settings


def remove(shell: InteractiveShell) -> None:
    """Remove the settings, and what `%config` has added to the shell's own configuration."""
    config.use_notebook_settings(None)
    for settings in _installed(shell):
        shell.configurables.remove(settings)  # type: ignore[arg-type]
        shell.config.pop(_SECTION, None)
        if settings.section_before is not None:
            shell.config[_SECTION] = settings.section_before


def _installed(shell: InteractiveShell) -> list[Sollol]:
    configurables: list[Any] = shell.configurables
    return [part for part in configurables if isinstance(part, Sollol)]
