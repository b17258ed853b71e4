"""`python -m swim_fast`: the same as `swim-fast`."""

import sys

from swim_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
