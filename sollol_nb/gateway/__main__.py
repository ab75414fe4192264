"""`python -m sollol_nb.gateway`."""

import sys

from sollol_nb.gateway.command import main

if __name__ == "__main__":
    sys.exit(main())
