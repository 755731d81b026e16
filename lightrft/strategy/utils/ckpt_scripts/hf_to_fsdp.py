"""From a Hugging Face model to FSDP2: weights alone.

To run: ``python -m lightrft.strategy.utils.ckpt_scripts.hf_to_fsdp SOURCE TARGET``.
"""

from __future__ import annotations

import sys

from lightrft.strategy.utils.ckpt_scripts.command import run_script

if __name__ == "__main__":
    sys.exit(run_script("hf", "fsdp"))
