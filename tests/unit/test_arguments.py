"""The flags of the command line."""

import argparse
import functools
from pathlib import Path

import pytest

from lightrft.errors import ConfigError
from lightrft.strategy.arguments import flag_table
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.setting import settings_of
from lightrft.utils import add_arguments

SETTINGS = settings_of(StrategyConfig)

# Every flag with words that set it to something other than its default, and what the configuration then holds.
FLAGS = {
    "--seed": ("7", 7),
    "--bf16": ("", True),
    "--fp16": ("", True),
    "--max_norm": ("0.5", 0.5),
    "--train_batch_size": ("64", 64),
    "--micro_train_batch_size": ("4", 4),
    "--actor_learning_rate": ("1e-5", 1e-5),
    "--critic_learning_rate": ("1e-4", 1e-4),
    "--adam_betas": ("0.8 0.99", (0.8, 0.99)),
    "--weight_decay": ("0.1", 0.1),
    "--lr_scheduler": ("linear", "linear"),
    "--lr_warmup_ratio": ("0.1", 0.1),
    "--gradient_checkpointing": ("", True),
    "--pretrain": ("models/tiny", "models/tiny"),
    "--fsdp": ("", True),
    "--zero_stage": ("3", 3),
    "--fsdp_cpu_offload": ("--fsdp", True),
    "--adam_offload": ("", True),
    "--zpg": ("2 --zero_stage 3", 2),
    "--overlap_comm": ("", True),
    "--grad_accum_dtype": ("fp32", "fp32"),
    "--sp_size": ("2", 2),
    "--strategy": ("fake", "fake"),
    "--local_rank": ("3", 3),
    "--packing_samples": ("", True),
    "--use_mp_opt": ("--fsdp", True),
    "--fused_linear_logprob": ("", True),
    "--chunk_size": ("1024", 1024),
    "--mixed_mm_data": ("", True),
    "--engine_type": ("sglang", "sglang"),
    "--engine_tp_size": ("4", 4),
    "--engine_mem_util": ("0.5", 0.5),
    "--disable_engine_sleep": ("", False),
    "--engine_sleep_level": ("2", 2),
    "--engine_update_bucket_mb": ("64", 64),
    "--rollout_batch_size": ("16", 16),
    "--micro_rollout_batch_size": ("2", 2),
    "--prompt_max_len": ("256", 256),
    "--generate_max_len": ("128", 128),
    "--log_dir": ("./logs", "./logs"),
    "--plot_every": ("10", 10),
}


@pytest.fixture
def parser():
    return argparse.ArgumentParser(prog="train.py")


def read(parser, words=""):
    return StrategyConfig.from_args(add_arguments(parser).parse_args(words.split()))


def test_the_flags(parser):
    known = {word for action in add_arguments(parser)._actions for word in action.option_strings}
    assert known == {*FLAGS, "--enable_engine_sleep", "-h", "--help"}


def test_without_flags_the_defaults_hold(parser):
    assert read(parser) == StrategyConfig()


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_sets_its_field(parser, flag):
    words, value = FLAGS[flag]
    name = flag.removeprefix("--").replace("disable_", "enable_")
    assert getattr(read(parser, f"{flag} {words}"), name) == value != SETTINGS[name].default


def test_engine_sleep_is_switched_on_or_off_but_not_both(parser, capsys):
    add_arguments(parser)
    assert parser.parse_args(["--enable_engine_sleep"]).enable_engine_sleep is True
    with pytest.raises(SystemExit):
        parser.parse_args(["--enable_engine_sleep", "--disable_engine_sleep"])
    assert "not allowed with argument --enable_engine_sleep" in capsys.readouterr().err


def test_the_parser_itself_is_returned(parser):
    assert add_arguments(parser) is parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--zero_stage 0", "--zero_stage: invalid choice: 0"),
        ("--engine_type trt", "--engine_type: invalid choice: 'trt'"),
        ("--train_batch_size many", "--train_batch_size: invalid int value: 'many'"),
        ("--adam_betas 0.9", "--adam_betas: expected 2 arguments"),
        ("--bf17", "unrecognized arguments: --bf17"),
    ],
)
def test_k08_a_wrong_word_ends_the_program_with_the_reason(parser, capsys, words, message):
    with pytest.raises(SystemExit):
        add_arguments(parser).parse_args(words.split())
    assert message in capsys.readouterr().err


def test_a_value_out_of_range_is_refused_when_the_configuration_is_built(parser):
    with pytest.raises(ConfigError, match=r"^engine_mem_util=1.5: expected a number, above 0, at most 1$"):
        read(parser, "--engine_mem_util 1.5")


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_shows_every_flag_in_its_group_with_its_default(parser):
    parser.formatter_class = functools.partial(argparse.HelpFormatter, max_help_position=60, width=400)
    sections = add_arguments(parser).format_help().split("\n\n")
    for name, known in SETTINGS.items():
        [section] = [each for each in sections if each.startswith(f"{known.group}:")]
        [line] = [each for each in section.splitlines() if each.split()[:1] == [f"--{name}"]]
        assert known.help in line
        if known.kind in {int, float, str} and known.default is not None:
            assert line.endswith(f"(default: {known.default})")
        elif known.kind is bool:
            assert line.endswith(f"(default: {'on' if known.default else 'off'})")
    assert "(default: 0.9 0.95)" in parser.format_help()


def test_every_setting_is_explained_in_one_line():
    for name, known in SETTINGS.items():
        assert known.help, name
        assert not known.help.endswith("."), name
        assert "\n" not in known.help, name


def test_the_page_shows_every_flag():
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert flag_table() in page.read_text(), "docs/configuration.md: replace its tables by what flag_table() gives"


# -- beside flags of the user -----------------------------------------------------------------------------------------


def test_flags_of_the_user_become_extra_entries(parser):
    parser.add_argument("--kl", type=float, default=0.1)
    assert read(parser) == StrategyConfig(extra_args={"kl": 0.1})


def test_the_user_may_change_a_default(parser):
    add_arguments(parser).set_defaults(seed=7, enable_engine_sleep=False)
    assert StrategyConfig.from_args(parser.parse_args([])) == StrategyConfig(seed=7, enable_engine_sleep=False)


def test_a_flag_that_the_user_has_too_is_named(parser):
    parser.add_argument("--seed", type=int)
    parser.add_argument("--disable_engine_sleep", action="store_true")
    with pytest.raises(ConfigError, match="the parser has --seed, --disable_engine_sleep already: leave out your own"):
        add_arguments(parser)
    assert parser.parse_args(["--seed", "3"]) == argparse.Namespace(seed=3, disable_engine_sleep=False)


def test_a_parser_that_resolves_conflicts_loses_no_flag_silently():
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    parser.add_argument("--seed", type=str)
    with pytest.raises(ConfigError, match="the parser has --seed already"):
        add_arguments(parser)


def test_flags_are_added_once(parser):
    with pytest.raises(ConfigError, match="the parser has all of these flags already: call add_arguments once"):
        add_arguments(add_arguments(parser))


@pytest.mark.parametrize("wrong", [None, [], argparse.Namespace()])
def test_only_a_parser_takes_flags(wrong):
    with pytest.raises(ConfigError, match=f"got {type(wrong).__name__}: expected an argparse.ArgumentParser"):
        add_arguments(wrong)


# -- the documented command lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            """--zero_stage 2 --engine_tp_size 4 --engine_mem_util 0.9 --enable_engine_sleep
            --micro_train_batch_size 1 --train_batch_size 128""",
            {"engine_tp_size": 4, "engine_mem_util": 0.9},
        ),
        (
            """--fsdp --fsdp_cpu_offload --use_mp_opt --engine_tp_size 2 --engine_mem_util 0.85
            --enable_engine_sleep --micro_train_batch_size 1 --train_batch_size 64""",
            {"fsdp": True, "fsdp_cpu_offload": True, "use_mp_opt": True, "engine_tp_size": 2, "train_batch_size": 64},
        ),
        (
            "--fsdp --engine_tp_size 4 --mixed_mm_data --packing_samples --enable_engine_sleep --plot_every 20",
            {
                "fsdp": True,
                "engine_tp_size": 4,
                "mixed_mm_data": True,
                "packing_samples": True,
                "plot_every": 20,
                "log_dir": "./logs",
            },
        ),
    ],
    ids=["high throughput", "memory efficient", "vision and language"],
)
def test_the_documented_command_lines_work_on_8_ranks(parser, words, expected):
    config = read(parser, words)
    assert config == StrategyConfig(**expected)
    config.check_world(8)
