"""Watch a reward rise: a tiny model learns sums of one-digit numbers, on 8 simulated ranks of this machine.

    python examples/demo.py
    python examples/demo.py --zero_stage 3
    python examples/demo.py --engine_type sglang
    python examples/demo.py --torchrun 2
    python examples/demo.py --resume

First the model is shown answers, of which most are one too high: it learns both, and prefers the wrong ones. Then
reinforcement learning rewards the right ones, and sums that it has never met are right too. Ctrl-C saves and ends, and
`--resume` goes on. Every other word goes on to `examples/train.py`, with which the second part is done.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import arithmetic

RANKS, SHOWN, BATCH, RATE = 8, 800, 128, 3e-3
RIGHT = 0.4
"""Share of the shown answers that are right."""

FLAGS = {
    "advantage_estimator": "grpo",
    "n_samples_per_prompt": 8,
    "init_kl_coef": 0,
    "actor_learning_rate": 3e-4,
    "lr_warmup_ratio": 0,
    "rollout_batch_size": 64,
    "train_batch_size": 256,
    "micro_train_batch_size": 32,
    "micro_rollout_batch_size": 64,
    "max_steps": 16,
    "num_episodes": 100,
    "eval_steps": 4,
    "save_steps": 4,
    "engine_tp_size": 4,
}


def shown(problems, chance):
    """Problems with answers, as the model is shown them."""
    for each in problems:
        wrong = chance.random() >= RIGHT
        yield each["prompt"] + str((int(each["answer"]) + wrong) % 10)


def show_answers(folder, batches):
    """Write a model to ``folder`` that has seen answers to the problems that are not held out."""
    import torch  # takes seconds, and only this part of the demonstration needs it
    from torch.nn import functional

    from lightrft.models import tiny

    torch.manual_seed(0)
    letters = tiny.tokenizer()
    problems = [json.loads(line) for line in arithmetic.TRAIN.read_text().splitlines()]
    model, chance = tiny.text_model(initializer_range=0.02, hidden_size=64), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(batches):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (1 - step / batches)
        texts = shown(chance.sample(problems, BATCH), chance)
        tokens = torch.tensor([[*letters.encode(text), tiny.EOS] for text in texts])  # shape (problems, length)
        logits = model(tokens[:, :-1]).logits[:, -2:]  # of the answer and of the end
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, -2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"answers shown: {step + 1} of {batches} batches, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    letters.save_pretrained(folder)


def command(folder, processes, words):
    """What trains: on simulated ranks, or with ``processes`` of torchrun."""
    flags = {**FLAGS, "pretrain": folder / "start", "log_dir": folder / "logs", "ckpt_path": folder / "checkpoints"}
    backend = [] if {"--zero_stage", "--fsdp", "--strategy"} & set(words) else ["--fsdp"]
    launcher = ["lightrft", "sim", "-n", str(RANKS), "--no-report"]
    if processes:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        flags["engine_tp_size"] = processes
        backend.append("--fake_engine")
    given = [word for name, value in flags.items() if f"--{name}" not in words for word in (f"--{name}", str(value))]
    script = str(Path(__file__).parent / "train.py")
    return [sys.executable, "-m", *launcher, script, *given, *backend, *words]


def status_of(train):
    """The exit status of ``train``. It gets a Ctrl-C as this process does, and then saves and ends."""
    process = subprocess.Popen(train)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    return process.wait()


def accuracies(folder):
    """Held-out accuracy by step, as the run has told."""
    lines = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where models, logs and curves go")
    parser.add_argument(
        "--shown",
        type=int,
        default=SHOWN,
        metavar="N",
        help="batches of answers shown first; 0: keep the model there is",
    )
    parser.add_argument("--torchrun", type=int, metavar="N", help="train in N real processes instead")
    args, words = parser.parse_known_args()

    begin = time.perf_counter()
    start = args.folder / "start"
    goes_on = "--resume" in words and (start / "tokenizer_config.json").exists()  # it is written last
    if args.shown and not goes_on:
        show_answers(start, args.shown)
    status = status_of(command(args.folder, args.torchrun, words))
    if status:
        sys.exit(status)
    found = accuracies(args.folder)
    before, last = found[0], max(found)
    now = f"{found[last]:.3f} after {last} iterations" if last else "stopped early: --resume goes on from here"
    print(
        f"held-out accuracy: {before:.3f} before, {now}, {time.perf_counter() - begin:.0f} s in all; "
        f"curves and metrics are in {args.folder / 'logs'}"
    )


if __name__ == "__main__":
    main()
