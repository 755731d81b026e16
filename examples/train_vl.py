"""Fine-tune a model that sees by reinforcement learning; ``train.py`` with images, and with prompts that have none.

lightrft sim -n 8 examples/train_vl.py --fsdp --engine_tp_size 4 --mixed_mm_data --packing_samples
"""

from pathlib import Path

import colours
from train import main

from lightrft.models.tiny import tiny_vision_model

TASK = {
    "prompt_data": str(colours.FILE),
    "eval_data": str(colours.FILE),
    "label_key": "answer",
    "images_key": "images",
    "apply_chat_template": True,
    "reward_function": f"{Path(__file__).parent / 'arithmetic.py'}:correct",
    "prompt_max_len": 64,
    "generate_max_len": 8,
    "rollout_batch_size": 16,
    "train_batch_size": 16,
}

if __name__ == "__main__":
    main(__doc__, TASK, tiny_vision_model)
