"""The magic that connects the kernel to a gateway."""

from __future__ import annotations

from getpass import getpass
from typing import TYPE_CHECKING

from IPython.core.error import StdinNotImplementedError, UsageError
from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.errors import GatewayKeyError
from sollol_nb.notebook import magic_line, session
from sollol_nb.settings.kinds import LOCAL, Secret, checked_gateway

if TYPE_CHECKING:
    from sollol_nb.sync_wrapper import HybridRouter


@magics_class
class ConnectMagics(Magics):
    """`%sollol_connect`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("address", nargs="?", help="of a gateway, such as http://head:11440; `local` is the same as --off")
    @argument("--off", action="store_true", help="use this kernel's own engines again")
    @line_magic
    def sollol_connect(self, call: magic_line.Call) -> None:
        """Use the engines of a gateway instead of this kernel's own; without an address, show which are used.

        All magics then work on the gateway's cluster, which other notebooks and programs use, too. The setting
        `gateway` does the same for each new kernel. If the gateway needs a key, it is taken from the setting
        `gateway_key`, or you type it at a prompt; never write it into the line.

        Example::

            %sollol_connect

            %sollol_connect http://head:11440

            %sollol_connect --off
        """
        arguments = call.arguments
        if arguments.off and arguments.address is not None:
            raise UsageError("%sollol_connect: give an address or --off, not both")
        if arguments.address is None and not arguments.off:
            print(_description(session.router()))
            return
        url = None if arguments.off else checked_gateway(arguments.address)
        if url is None:
            session.connect(LOCAL)
        else:
            try:
                session.connect(url)
            except GatewayKeyError as error:
                session.connect(url, _asked_key(url, error))
        print(_description(session.router()))


def _asked_key(url: str, error: GatewayKeyError) -> Secret:
    """The key, as the user types it; it is not shown.

    Raises:
        GatewayKeyError: the given one, if the front end cannot ask.
    """
    try:
        return Secret(getpass(f"Key of the gateway {url}: ").strip())
    except (StdinNotImplementedError, EOFError):
        raise error from None


def _description(router: HybridRouter) -> str:
    """`connected to http://head:11440 (sollol_nb 0.1.0 on head, as ana)`."""
    if router.gateway is None:
        return "this kernel uses its own engines"
    info = router.connect()
    key = f", as {info.key}" if info.key else ""
    control = "" if info.may_control else "; this key may ask, but not change the cluster"
    return f"connected to {router.gateway} (sollol_nb {info.version} on {info.host}{key}){control}"
