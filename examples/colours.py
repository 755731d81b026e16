"""A task for models that see: name the colour of a picture. Some prompts have two pictures, and some have none."""

import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
FILE = DATA / "colours.jsonl"
COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (30, 30, 220), "white": (250, 250, 250)}


def records():
    """One picture, two pictures, and no picture, for each colour."""
    names = list(COLOURS)
    found = []
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        one, two = f"colours/{name}.png", f"colours/{other}.png"
        found += [
            {"prompt": "<image>colour?", "images": [one], "answer": name},
            {"prompt": "<image><image>first?", "images": [one, two], "answer": name},
            {"prompt": "<image><image>last?", "images": [two, one], "answer": name},
            {"prompt": f"say {name}", "answer": name},
        ]
    return found


def write():
    """Write the pictures and the file of prompts."""
    from PIL import Image

    (DATA / "colours").mkdir(exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (28, 28), colour).save(DATA / "colours" / f"{name}.png")
    FILE.write_text("".join(json.dumps(each) + "\n" for each in records()))


if __name__ == "__main__":
    write()
