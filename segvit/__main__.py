"""`python -m segvit`: the same as the command `segvit`."""

import sys

from segvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
