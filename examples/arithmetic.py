"""A task that is learned in minutes: sums of one-digit numbers, a reward, and answers that are often off by one."""

import json
import random
from pathlib import Path

DATA = Path(__file__).parent / "data"
TRAIN, HELD_OUT = DATA / "arithmetic.jsonl", DATA / "arithmetic_held_out.jsonl"


def correct(_prompts, responses, labels):
    """1 for a response that is the label, 0 for any other."""
    right = [float(response == label) for response, label in zip(responses, labels, strict=True)]
    return {"reward": right, "accuracy": right}


def problems():
    """Every ``a+b-c=`` whose answer has one digit, in an order drawn once."""
    digits = range(10)
    found = [(f"{a}+{b}-{c}=", str(a + b - c)) for a in digits for b in digits for c in digits if 0 <= a + b - c <= 9]
    random.Random(0).shuffle(found)
    return [{"prompt": prompt, "answer": answer} for prompt, answer in found]


def write():
    """Write the files of this folder: a fifth of the problems is held out."""
    found = problems()
    for file, part in ((HELD_OUT, found[: len(found) // 5]), (TRAIN, found[len(found) // 5 :])):
        file.write_text("".join(json.dumps(each) + "\n" for each in part))


if __name__ == "__main__":
    write()
