"""From any kind to any other: ``python -m lightrft.strategy.utils.ckpt_scripts.convert SOURCE TARGET --to KIND``."""

from __future__ import annotations

import sys

from lightrft.strategy.utils.ckpt_scripts.command import script

if __name__ == "__main__":
    sys.exit(script(["convert", *sys.argv[1:]]))
