"""`python -m sollol_nb.settings` prints the README's table of settings."""

from sollol_nb.settings.table import as_markdown

print(as_markdown())
