"""The magic about the settings file of a folder: what it may set."""

from __future__ import annotations

from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.notebook import magic_line
from sollol_nb.settings.trust import review


@magics_class
class TrustMagics(Magics):
    """`%sollol_trust`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("file", nargs="?", help="a settings file or its folder; default: the one in use here")
    @argument("--yes", action="store_true", help="let these settings count, until the file changes")
    @argument("--revoke", action="store_true", help="ignore them again")
    @line_magic
    def sollol_trust(self, call: magic_line.Call) -> None:
        """Show which settings of a folder's `sollol_nb.toml` need your consent.

        They could run a program, send prompts elsewhere, add to what is asked, or move or delete your data, so
        they are ignored in a file that came with a folder, until you allow it.

        Example::

            %sollol_trust
        """
        arguments = call.arguments
        print(review(arguments.file, "%sollol_trust", give=arguments.yes, withdraw=arguments.revoke))
