"""``python -m evit_ext``: the command ``evit``."""

import sys

from evit_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
