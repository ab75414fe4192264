"""The settings files in use, named for the user; `sollol-nb trust` and `%sollol_trust` show and give consent."""

from __future__ import annotations

from pathlib import Path

from sollol_nb.errors import ConfigError
from sollol_nb.settings import config, consent
from sollol_nb.settings.file import SettingsFile, find_nearest, read_settings
from sollol_nb.settings.kinds import Secret
from sollol_nb.settings.table import FILE_NAME

_SHOWN_CHARS = 200


def describe_files(command: str) -> list[str]:
    """One line for each settings file in use that sets anything, and one for what does not count of it.

    Args:
        command: what the user runs to allow a file.

    Raises:
        ConfigError: a file cannot be used.
    """
    lines = []
    for path in config.settings_files():
        file = read_settings(path)
        if any(value != {} for value in file.values.values()):
            lines.append(str(path))
        if config.withheld_values(file):
            lines.append(config.withheld_message(file, command))
    return lines


def review(given: str | None, command: str, *, give: bool = False, withdraw: bool = False) -> str:
    """What a settings file sets only with the user's consent, after consent was given or withdrawn.

    Args:
        given: a settings file or its folder; by default the one that is found from the working folder.
        command: the name of this command, for the next step.

    Raises:
        ConfigError: the file cannot be used.
    """
    if give and withdraw:
        raise ConfigError("--yes and --revoke cannot be combined")
    file = _file(given)
    if file is None:
        return f"there is no {FILE_NAME} in {Path.cwd()} or above, so nothing needs your consent"
    if config.is_chosen(file.path):
        return f"{file.path} was chosen by you, so it needs no consent"
    guarded = consent.split(file.values)[1]
    if not guarded:
        return f"{file.path} sets nothing that needs your consent"
    if withdraw:
        consent.withdraw(file.path, config.consent_folder())
    if give:
        consent.give(file, config.consent_folder())
    withheld = config.withheld_values(file)
    lines = [f"{file.path} {'would set' if withheld else 'sets'}:"]
    lines += [f"  {name} = {_shown(value)}" for name, value in guarded.items()]
    if withheld:
        lines.append(f"ignored until you allow this file with this content: {command} --yes")
    else:
        lines.append(f"allowed until the file changes; to withdraw that: {command} --revoke")
    return "\n".join(lines)


def _file(given: str | None) -> SettingsFile | None:
    if given is not None:
        path = Path(given).expanduser().absolute()
        return read_settings(path / FILE_NAME if path.is_dir() else path)
    found = find_nearest(Path.cwd())
    return read_settings(found[0]) if found else None


def _shown(value: object) -> str:
    """A value on one line: the file may try to hide what it sets."""
    if isinstance(value, Secret):
        return repr(value)
    text = repr([str(item) for item in value] if isinstance(value, list) else str(value))
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}… ({len(text)} characters)"
