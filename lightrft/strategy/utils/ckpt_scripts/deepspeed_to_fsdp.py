"""From DeepSpeed's ZeRO 1, 2 or 3 to FSDP2, so that training goes on.

To run: ``python -m lightrft.strategy.utils.ckpt_scripts.deepspeed_to_fsdp SOURCE TARGET``.
"""

from __future__ import annotations

import sys

from lightrft.strategy.utils.ckpt_scripts.command import run_script

if __name__ == "__main__":
    sys.exit(run_script("deepspeed", "fsdp"))
