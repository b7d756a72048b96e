"""`python -m vimtune ...` is `vimtune ...`."""

import sys

from vimtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
