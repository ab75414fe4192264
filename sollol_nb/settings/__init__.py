"""Settings: every default that a user can change, and where its value comes from.

- `table.py`: the settings. `python -m sollol_nb.settings` prints them as Markdown.
- `kinds.py`: which values are valid.
- `config.py`: the value of a setting, from a variable, a file or the table; the package's folders.
- `models.py`: the setting `models`: names for GGUF files, and what is known of models.
- `file.py`: `sollol_nb.toml`.
- `consent.py`: which settings of a folder's file need the user's consent.
- `trust.py`: what `sollol-nb trust` and `%sollol_trust` show and do.
- `edit.py`: writing models into `sollol_nb.toml`.
- `ssh_hosts.py`: hosts in the user's configuration of ssh.
- `endpoints.py`: endpoints (`host:port`) as text.
- `__main__.py`: prints the table.
"""
