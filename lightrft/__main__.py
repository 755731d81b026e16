"""``python -m lightrft``: the same as the command ``lightrft``."""

import sys

from lightrft.cli import main

if __name__ == "__main__":
    sys.exit(main())
