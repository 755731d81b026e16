"""Generate, train, send the weights, generate again: one script for every backend and every engine.

    lightrft sim -n 8 examples/strategy/rollout.py --fsdp --engine_type vllm --engine_tp_size 4
    lightrft sim -n 8 examples/strategy/rollout.py --zero_stage 3 --engine_type sglang --engine_tp_size 2
    torchrun --nproc-per-node 2 examples/strategy/rollout.py --fsdp --engine_tp_size 2

A simulated run needs no engine installed. Without ``--pretrain FOLDER`` it makes a small random model of its own. The
reward of a completion is the share of even tokens in it, and the policy gradient is the plainest there is.
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lightrft.models.tiny import tiny_text_model
from lightrft.strategy import get_strategy
from lightrft.utils import add_arguments


def small_model():
    """The path of a small model, made by rank 0 and the same for all ranks."""
    path = [None]
    if dist.get_rank() == 0:
        path = [tempfile.mkdtemp()]
        tiny_text_model(path[0])
    dist.broadcast_object_list(path)
    return path[0]


def log_probs(model, prompt, output):
    """Of the tokens in ``output`` after ``prompt``, one each."""
    logits = model(input_ids=torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(output).unsqueeze(1)).squeeze(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--iterations", type=int, default=2)
    parser.set_defaults(prompt_max_len=32, generate_max_len=32, train_batch_size=8)
    args = parser.parse_args()

    logging.disable_progress_bar()
    strategy = get_strategy(args)
    path = args.pretrain or small_model()
    with strategy.init_model_context():
        actor = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = strategy.create_optimizer(actor, lr=1e-2)
    actor, optimizer, _ = strategy.prepare((actor, optimizer, None), is_rlhf=True)
    args.pretrain = path
    strategy.setup_inference_engine(args)

    every = [[2 + number, 3 + number, 5] for number in range(args.train_batch_size)]
    mine = every[strategy.get_rank() :: strategy.world_size]
    for iteration in range(args.iterations):
        completions = strategy.gather_and_generate(
            {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}, all_prompt_token_ids=mine
        )
        rewards = [sum(token % 2 == 0 for token in one.output_token_ids) / 8 for one in completions]
        mean = strategy.all_reduce(sum(rewards) / len(rewards))
        gap = 0.0
        for one, reward in zip(completions, rewards, strict=True):
            found = log_probs(actor, one.prompt_token_ids, one.output_token_ids)
            gap = max(gap, (found.detach() - torch.tensor(one.log_probs)).abs().max().item())
            strategy.backward(-(reward - mean) * found.mean(), actor, optimizer)
            strategy.optimizer_step(optimizer, actor, None)
        strategy.update_engine_weights(actor)
        gap = strategy.all_reduce(gap, op="max")
        version = completions[0].weight_version
        strategy.print(f"iteration {iteration}: weights {version}, reward {mean:.4f}")
        everyone = [None] * strategy.world_size
        dist.all_gather_object(everyone, [one.output_token_ids for one in completions])
        for rank, outputs in enumerate(everyone):
            strategy.print(f"rank {rank} got", *outputs)
        strategy.print("log-probs of engine and trainer", "agree" if gap < 1e-4 else f"differ by {gap:.1e}")
    strategy.inference_engine.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
