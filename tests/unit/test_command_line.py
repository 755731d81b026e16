"""The command line of a run, and the file with flags that it may name."""

from pathlib import Path

import pytest

from lightrft.strategy.arguments import flag_table
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.setting import settings_of
from lightrft.trainer.command_line import parse_run_arguments, run_parser
from lightrft.trainer.inputs import InputConfig
from lightrft.trainer.settings import TrainerConfig

# Every flag of models and data with words that set it to something else, and what the configuration then holds.
FLAGS = {
    "--prompt_data": (__file__, __file__),
    "--eval_data": (__file__, __file__),
    "--input_key": ("question", "question"),
    "--label_key": ("answer", "answer"),
    "--images_key": ("images", "images"),
    "--system_prompt": ("short --apply_chat_template", "short"),
    "--apply_chat_template": ("", True),
    "--critic_pretrain": ("critic", "critic"),
    "--reward_pretrain": ("one,two", "one,two"),
    "--lora_rank": ("8", 8),
    "--lora_alpha": ("32", 32.0),
    "--use_ema": ("", True),
}


@pytest.fixture(scope="module")
def of_all():
    """A parser that no test changes."""
    return run_parser()


@pytest.fixture
def parsed(tmp_path):
    """What words of the command line give beside a file with these lines."""
    pytest.importorskip("yaml")

    def parse(lines, *words):
        (tmp_path / "run.yaml").write_text(lines)
        parser = run_parser()
        parser.add_argument("--beside", action="store_true")
        return parse_run_arguments(parser, ["--config", str(tmp_path / "run.yaml"), *words])

    return parse


@pytest.mark.parametrize("flag", FLAGS)
def test_k24_every_flag_of_models_and_data_sets_its_setting(of_all, flag):
    words, expected = FLAGS[flag]
    args = parse_run_arguments(of_all, [flag, *words.split()])
    assert getattr(InputConfig.from_args(args), flag.removeprefix("--")) == expected
    assert getattr(InputConfig(), flag.removeprefix("--")) != expected


def test_the_flags_of_models_and_data_are_these():
    assert [f"--{name}" for name in settings_of(InputConfig)] == list(FLAGS)


def test_the_flags_of_models_and_data_are_documented():
    page = Path(__file__).parents[2] / "docs" / "trainer.md"
    assert flag_table(InputConfig) in page.read_text()


def test_a_run_has_the_flags_of_all_parts_and_their_defaults(of_all):
    args = parse_run_arguments(of_all, [])
    for config in (StrategyConfig, TrainerConfig, InputConfig):
        assert config.from_args(args).replace(extra_args={}) == config()


def test_what_follows_from_the_names_of_models():
    config = InputConfig(reward_pretrain="one, two,", lora_rank=8)
    assert config.reward_models == ["one", "two"]
    assert config.lora == {"r": 8, "lora_alpha": 16.0}
    assert InputConfig().reward_models == []
    assert InputConfig().lora is None


def test_a_file_sets_flags_by_name(parsed):
    args = parsed(
        "zero_stage: 3\nadvantage_estimator: reinforce\nlabel_key: 5\nactor_learning_rate: 1e-5\n"
        "adam_betas: [0.8, 0.99]\nuse_ema: true\nbeside: true\neval_data:\nrollout_batch_size:\n"
    )
    strategy, trainer, inputs = (config.from_args(args) for config in (StrategyConfig, TrainerConfig, InputConfig))
    assert (strategy.zero_stage, strategy.actor_learning_rate, strategy.adam_betas) == (3, 1e-5, (0.8, 0.99))
    assert trainer.advantage_estimator == "reinforce"
    assert (inputs.label_key, inputs.use_ema, inputs.eval_data) == ("5", True, None)
    assert args.beside is True
    assert args.rollout_batch_size == StrategyConfig().rollout_batch_size


def test_the_command_line_wins_over_the_file(parsed):
    args = parsed("max_steps: 2\nprogress_bar: false\nwhiten_advantages: true\nseed: 7\n", "--max_steps", "1",
                  "--progress_bar", "--keep_advantages")  # fmt: skip
    assert (args.max_steps, args.progress_bar, args.whiten_advantages, args.seed) == (1, True, False, 7)


@pytest.mark.parametrize(
    ("lines", "switched"), [("no_progress_bar: true", False), ("no_progress_bar: false", True), ("", True)]
)
def test_a_file_has_the_flags_that_switch_something_off(parsed, lines, switched):
    assert parsed("seed: 7\n" + lines).progress_bar is switched


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("zero_stag: 3", "no flag --zero_stag; did you mean zero_stage?"),
        ("1: 2", "no flag --1"),
        ("config: other.yaml", "no flag --config"),
        ("- zero_stage", "expected names with values, such as `zero_stage: 3`"),
        ("a: [", "while parsing a flow"),
        ("max_steps: many", "argument --max_steps: invalid int value: 'many'"),
        ("max_steps: 1.5", "argument --max_steps: invalid int value: '1.5'"),
        ("max_steps: [1]", "max_steps=[1]: expected an integer, got list"),
        ("max_steps: true", "max_steps=True: expected an integer, got bool"),
        ("use_ema: 1", "use_ema=1: expected true or false"),
        ("beside: always", "beside='always': expected true or false"),
        ("policy_loss: pop", "policy_loss='pop': expected ppo"),
        ("adam_betas: [0.9]", "adam_betas=[0.9]: expected 2 numbers"),
        ("bf16: true\nfp16: true", "bf16"),
        ("system_prompt: short", "system_prompt needs apply_chat_template"),
        ("progress_bar: true\nno_progress_bar: true", "--no_progress_bar and another flag say what progress_bar is"),
    ],
)
def test_a_file_that_cannot_work_is_told_without_a_traceback(parsed, capsys, lines, message):
    with pytest.raises(SystemExit) as error:
        parsed(lines)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--max_step", "3"], "unrecognized arguments: --max_step 3"),
        (["--advantage_estimator", "grpo"], "n_samples_per_prompt is 1: set it to 2 or more"),
        (["--use_ema", "--lora_rank", "8"], "use_ema with lora_rank"),
    ],
)
def test_words_that_cannot_work_are_told_without_a_traceback(of_all, capsys, words, message):
    if "--config" in words:
        pytest.importorskip("yaml")
    with pytest.raises(SystemExit) as error:
        parse_run_arguments(of_all, words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_in_another_encoding_is_told(parsed, capsys, tmp_path):
    (tmp_path / "other.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(SystemExit):
        parsed("", "--config", str(tmp_path / "other.yaml"))
    assert "other.yaml: 'utf-8' codec" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prompt_data none.jsonl", "prompt_data='none.jsonl': there is no such file or folder"),
        ("--eval_data none", "eval_data='none': there is no such file or folder"),
        ("--pretrain ./none", "pretrain='./none': there is no such folder"),
        ("--critic_pretrain /models/none", "critic_pretrain='/models/none': there is no such folder"),
        ("--reward_pretrain who/what,a/b/c", "reward_pretrain='a/b/c': there is no such folder"),
        ("--reward_function none.py:score", "'none.py:score': none.py is no file"),
        ("--reward_function score", "'score' names no reward function: expected path/to/file.py:function"),
        ("--reward_function rewards.py:score", "rewards.py has no function 'score': it has length, Best"),
        ("--reward_function broken.py:score", "'broken.py:score': broken.py is not Python: invalid syntax"),
    ],
)
def test_what_is_read_late_is_looked_for_at_once(of_all, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("import re\ndef length(): ...\nclass Best: ...\nraise SystemExit")
    (tmp_path / "broken.py").write_text("def score(")
    with pytest.raises(SystemExit) as error:
        parse_run_arguments(of_all, words.split())
    assert error.value.code == 2
    assert message.replace("invalid syntax", "") in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--pretrain who/what --critic_pretrain gpt2",
        "--reward_function rewards.py:score",
        "--reward_function rewards.py:best",
        "--reward_function rewards.py:other",
        "--reward_function star.py:other",
        "--reward_function some.module:other",
    ],
)
def test_what_may_be_there_is_left_for_later(of_all, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("if 1:\n    def score(): ...\nbest = 1\nfrom re import sub as other\n1 / 0")
    (tmp_path / "star.py").write_text("from re import *")
    parse_run_arguments(of_all, words.split())
