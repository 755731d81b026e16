"""From DeepSpeed (ZeRO 1, 2, 3) to a folder of Hugging Face: ``python -m lightrft.strategy.utils.ckpt_scripts.deepspeed_to_hf SOURCE TARGET``."""

from __future__ import annotations

import sys

from lightrft.strategy.utils.ckpt_scripts.command import run_script

if __name__ == "__main__":
    sys.exit(run_script("deepspeed", "hf"))
