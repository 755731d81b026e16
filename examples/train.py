"""Fine-tune a language model by reinforcement learning.

    lightrft sim -n 8 examples/train.py --fsdp --engine_tp_size 4
    torchrun --nproc-per-node 8 examples/train.py --config run.yaml --zero_stage 3 --engine_type vllm --engine_tp_size 4

A run of your own has --pretrain, --prompt_data and --reward_function; `run.yaml` may hold any flag. Without --pretrain
the script makes a tiny random model, and without --prompt_data that model meets sums of one-digit numbers: what is seen
then is that everything works. `nox -s demo` trains one that has learned a little before.
"""

import importlib.util
import tempfile
from contextlib import nullcontext
from pathlib import Path

import arithmetic
import torch.distributed as dist

from lightrft.datasets import PromptDataset
from lightrft.models import Actor, Critic, RewardModel
from lightrft.models.readers import reader_of
from lightrft.models.tiny import tiny_text_model
from lightrft.strategy import get_strategy
from lightrft.trainer import SPMDPPOTrainer
from lightrft.trainer.command_line import parse_run_arguments, run_parser
from lightrft.trainer.inputs import InputConfig
from lightrft.trainer.settings import TrainerConfig


def arguments(description, task):
    """The flags; ``task`` gives those of a run that names no data of its own."""
    parser = run_parser(description)
    parser.add_argument(
        "--fake_engine", action="store_true", help="generate with the simulator's engine where none is installed"
    )
    args = parse_run_arguments(parser)
    if args.prompt_data is None:
        parser.set_defaults(**task)
        args = parse_run_arguments(parser)
    if _is_missing(args.engine_type) and not args.fake_engine and args.strategy != "fake":
        parser.error(
            f"the package {args.engine_type} is not installed: install it, or pass --fake_engine to see what happens"
        )
    return args


def _is_missing(package):
    return importlib.util.find_spec(package) is None


def same_on_all(make):
    """What rank 0 has made, for all ranks."""
    found = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def tiny_model(make):
    """The path of a model that ``make`` writes."""
    folder = tempfile.mkdtemp()
    make(folder)
    return folder


def main(description=__doc__, task=None, tiny=tiny_text_model):
    """Train.

    Args:
        description: of the command.
        task: flags of a run that names no data.
        tiny: writes the model of a run that names none.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    args = arguments(description, task or ARITHMETIC)
    strategy = get_strategy(args)
    if args.pretrain is None:
        args.pretrain = same_on_all(lambda: tiny_model(tiny))
    inputs, config = InputConfig.from_args(args), TrainerConfig.from_args(args)

    processor = reader_of(args.pretrain)
    tokenizer = getattr(processor, "tokenizer", processor)
    prompts, held_out = (
        path and PromptDataset.from_file(path, processor, max_length=args.prompt_max_len, **inputs.fields)
        for path in (inputs.prompt_data, inputs.eval_data)
    )

    def load(kind, path, **more):
        return kind.from_pretrained(path, settings=strategy.config, **more)

    with strategy.init_model_context():
        actor = load(Actor, args.pretrain, lora=inputs.lora)
        critic = load(Critic, inputs.critic_pretrain or args.pretrain) if config.advantage_estimator == "gae" else None
        rewards = [load(RewardModel, path) for path in inputs.reward_models] or None
        initial = load(Actor, args.pretrain) if config.init_kl_coef else None
        average = load(Actor, args.pretrain) if inputs.use_ema else None

    steps = config.optimizer_steps(len(prompts), strategy.config)
    actor_part, critic_part, rewards, initial = strategy.prepare_models_and_optimizers(
        actor, critic, rewards, initial, args, steps
    )
    (actor, actor_optim, actor_scheduler), (critic, critic_optim, critic_scheduler) = actor_part, critic_part
    average = average and strategy.prepare_reward_model(average)

    with _faces() if args.fake_engine and _is_missing(args.engine_type) else nullcontext():
        strategy.setup_inference_engine(args)
        trainer = SPMDPPOTrainer(
            strategy=strategy,
            actor=actor,
            critic=critic,
            reward_model=rewards,
            initial_model=initial,
            ema_model=average,
            actor_optim=actor_optim,
            critic_optim=critic_optim,
            actor_scheduler=actor_scheduler,
            critic_scheduler=critic_scheduler,
            tokenizer=tokenizer,
            processor=None if processor is tokenizer else processor,
            config=config,
        )
        trainer.fit(prompts, held_out)
        strategy.inference_engine.shutdown()
    dist.destroy_process_group()


def _faces():
    from lightrft.sim.engine.faces import faces

    return faces()


ARITHMETIC = {
    "prompt_data": str(arithmetic.TRAIN),
    "eval_data": str(arithmetic.HELD_OUT),
    "label_key": "answer",
    "reward_function": f"{Path(arithmetic.__file__)}:correct",
    "prompt_max_len": 16,
    "generate_max_len": 4,
    "rollout_batch_size": 128,
}

if __name__ == "__main__":
    main()
