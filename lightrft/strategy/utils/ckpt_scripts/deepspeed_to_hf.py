"""From DeepSpeed's ZeRO 1, 2 or 3 to a Hugging Face model.

To run: ``python -m lightrft.strategy.utils.ckpt_scripts.deepspeed_to_hf SOURCE TARGET``.
"""

from __future__ import annotations

import sys

from lightrft.strategy.utils.ckpt_scripts.command import run_script

if __name__ == "__main__":
    sys.exit(run_script("deepspeed", "hf"))
