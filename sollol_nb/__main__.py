"""`python -m sollol_nb` is `sollol-nb`."""

import sys

from sollol_nb.cli.main import main

sys.exit(main())
