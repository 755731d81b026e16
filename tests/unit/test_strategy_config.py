"""What a configuration holds, what it refuses, and what it reads."""

import argparse
import copy
import dataclasses
import json
import pickle
import re
import types
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.setting import settings_of

DEFAULTS = {
    "seed": 42,
    "bf16": False,
    "fp16": False,
    "max_norm": 1.0,
    "train_batch_size": 128,
    "micro_train_batch_size": 1,
    "actor_learning_rate": 1e-6,
    "critic_learning_rate": 9e-6,
    "adam_betas": (0.9, 0.95),
    "weight_decay": 0.0,
    "lr_scheduler": "cosine_with_min_lr",
    "lr_warmup_ratio": 0.03,
    "gradient_checkpointing": False,
    "pretrain": None,
    "fsdp": False,
    "zero_stage": 2,
    "fsdp_cpu_offload": False,
    "adam_offload": False,
    "zpg": 1,
    "overlap_comm": False,
    "grad_accum_dtype": None,
    "sp_size": 1,
    "strategy": None,
    "local_rank": -1,
    "packing_samples": False,
    "use_mp_opt": False,
    "fused_linear_logprob": False,
    "chunk_size": 4096,
    "mixed_mm_data": False,
    "engine_type": "vllm",
    "engine_tp_size": 1,
    "engine_mem_util": 0.85,
    "enable_engine_sleep": True,
    "engine_sleep_level": 1,
    "engine_update_bucket_mb": 512,
    "rollout_batch_size": 1024,
    "micro_rollout_batch_size": 8,
    "prompt_max_len": 1024,
    "generate_max_len": 1024,
    "log_dir": None,
    "plot_every": 0,
}
SETTINGS = settings_of(StrategyConfig)


def test_the_settings_and_their_defaults():
    assert StrategyConfig().to_dict() == {**DEFAULTS, "extra_args": {}}
    assert list(SETTINGS) == list(DEFAULTS)


def test_every_setting_has_the_type_of_its_annotation():
    hints = typing.get_type_hints(StrategyConfig)
    for name, known in SETTINGS.items():
        expected = known.kind | None if known.default is None else known.kind
        assert hints[name] == (tuple[float, float] if known.kind is tuple else expected), name


def test_a_configuration_is_given_by_keywords_and_stays_as_it_is():
    config = StrategyConfig(seed=1)
    with pytest.raises(TypeError, match="positional"):
        StrategyConfig(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 2


# -- types and ranges -------------------------------------------------------------------------------------------------

WRONG_TYPES = {
    bool: [1, 0, "True", "", 1.0, [True], np.True_, None],
    int: [True, "4", 4.0, "", [4], float("nan"), None],
    float: [True, "1e-3", "", [0.5], 0.5j, float("nan"), float("inf"), None],
    str: [1, True, b"vllm", ["vllm"], ""],
    tuple: [0.9, (0.9,), (0.9, 0.95, 0.99), "ab", (0.9, "0.95"), (True, False), None],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_value_of_another_type_is_refused_by_name(name):
    for value in WRONG_TYPES[SETTINGS[name].kind]:
        with pytest.raises(ConfigError, match=f"^{name}=") as refused:
            StrategyConfig(**{name: value})
        assert "expected" in str(refused.value)


@pytest.mark.parametrize(("name", "text"), [("train_batch_size", "4"), ("actor_learning_rate", "1e-6"), ("bf16", "no")])
def test_text_in_place_of_a_value_is_told_apart(name, text):
    with pytest.raises(ConfigError, match="got str: convert it first .* YAML reads 1e-6 as one"):
        StrategyConfig(**{name: text})


RANGES = {
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "max_norm": ([0, 0.0, 3], [-0.1]),
    "train_batch_size": ([1, 7], [0, -1]),
    "micro_train_batch_size": ([1, 128], [0, -8]),
    "actor_learning_rate": ([0, 1], [-1e-9]),
    "critic_learning_rate": ([0.0, 1e-3], [-1]),
    "adam_betas": ([(0, 0), [0.5, 0.999]], [(1, 0.9), (0.9, 1.0), (-0.1, 0.9)]),
    "weight_decay": ([0, 0.1], [-0.1]),
    "lr_scheduler": (["constant", "linear"], ["cosine", ""]),
    "lr_warmup_ratio": ([0, 1.0], [-0.1, 1.1]),
    "zero_stage": ([1, 2, 3], [-1, 0, 4]),
    "zpg": ([1], [0]),
    "sp_size": ([1, 3], [0]),
    "local_rank": ([-1, 7], [-2]),
    "chunk_size": ([1], [0]),
    "engine_type": (["vllm", "sglang"], ["vLLM", "tgi"]),
    "engine_tp_size": ([1, 8], [0]),
    "engine_mem_util": ([0.01, 1, 1.0], [0, 0.0, 1.01, 85]),
    "engine_sleep_level": ([1, 2], [0, 3]),
    "engine_update_bucket_mb": ([1], [0]),
    "rollout_batch_size": ([1], [0]),
    "micro_rollout_batch_size": ([1], [0]),
    "prompt_max_len": ([1], [0]),
    "generate_max_len": ([1], [0]),
    "grad_accum_dtype": ([None, "fp32", "bf16", "fp16"], ["float32", "fp8"]),
    "plot_every": ([0, 1], [-1]),
}


def test_every_number_and_every_choice_has_a_range():
    bounded = {name for name, known in SETTINGS.items() if known.choices or known.kind in {int, float, tuple}}
    assert bounded == set(RANGES)


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range(name):
    inside, outside = RANGES[name]
    for value in inside:
        kept = getattr(StrategyConfig(**{name: value}), name)
        assert kept == (tuple(value) if isinstance(value, list) else value)
    for value in outside:
        with pytest.raises(ConfigError, match=f"^{name}=") as refused:
            StrategyConfig(**{name: value})
        assert f"expected {SETTINGS[name].values()}" in str(refused.value)


def test_k08_a_wrong_choice_names_those_that_are_allowed():
    with pytest.raises(ConfigError, match=r"^engine_type='trt': expected vllm or sglang$"):
        StrategyConfig(engine_type="trt")


def test_stage_0_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="expected 1, 2 or 3 .stage 0 shards nothing; stage 1"):
        StrategyConfig(zero_stage=0)


def test_numbers_are_kept_as_plain_ones():
    config = StrategyConfig(seed=np.int64(7), max_norm=2, adam_betas=[0, np.float32(0.5)])
    assert [type(value) for value in (config.seed, config.max_norm, *config.adam_betas)] == [int, float, float, float]
    assert json.loads(json.dumps(config.to_dict()))["adam_betas"] == [0.0, 0.5]


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as refused:
        StrategyConfig(seed=-1, bf16="yes", engine_mem_util=2.0, extra_args=3)
    assert [re.match(r"\w+", line)[0] for line in str(refused.value).splitlines()] == [
        "seed",
        "bf16",
        "engine_mem_util",
        "extra_args",
    ]


# -- contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both on.*switch one off"),
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload needs fsdp: switch fsdp on, or use adam_offload"),
        ({"use_mp_opt": True}, "use_mp_opt needs fsdp: switch fsdp on"),
        ({"fsdp": True, "adam_offload": True}, "adam_offload is for DeepSpeed.*use fsdp_cpu_offload"),
        ({"fsdp": True, "zpg": 2}, "zpg=2 is for DeepSpeed.*set it to 1, or switch fsdp off"),
        ({"fsdp": True, "grad_accum_dtype": "fp32"}, "grad_accum_dtype='fp32' is for DeepSpeed.*leave it out"),
        ({"zpg": 2}, "zpg=2 needs zero_stage=3, got zero_stage=2"),
        ({"fsdp": True, "strategy": "deepspeed"}, "strategy='deepspeed' and fsdp are both given"),
        ({"strategy": "fsdp", "adam_offload": True}, "adam_offload is for DeepSpeed"),
        (
            {"train_batch_size": 10, "micro_train_batch_size": 4},
            "train_batch_size=10 is no multiple of micro_train_batch_size=4: use train_batch_size=8 or 12$",
        ),
        ({"train_batch_size": 2, "micro_train_batch_size": 4}, "use train_batch_size=4$"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        StrategyConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"fsdp": True, "zero_stage": 3},
        {"fsdp": True, "overlap_comm": True},
        {"fsdp": True, "fsdp_cpu_offload": True, "use_mp_opt": True},
        {"zero_stage": 3, "zpg": 2, "adam_offload": True, "grad_accum_dtype": "bf16"},
        {"strategy": "fake", "fsdp": True, "use_mp_opt": True},
        {"strategy": "deepspeed", "bf16": True},
    ],
)
def test_settings_that_go_together(settings):
    config = StrategyConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_settings_that_follow_from_others():
    assert StrategyConfig(strategy="fsdp").fsdp
    assert not StrategyConfig(strategy="fake").fsdp
    assert StrategyConfig(plot_every=20).log_dir == "./logs"
    assert StrategyConfig(plot_every=20, log_dir="here").log_dir == "here"


# -- the world --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        (
            {"engine_tp_size": 4},
            6,
            "engine_tp_size=4 does not divide a world of 6 ranks: use engine_tp_size=3 or 6, or run 4 or 8 ranks",
        ),
        ({"engine_tp_size": 4}, 2, "use engine_tp_size=2, or run 4 ranks"),
        ({"sp_size": 4}, 10, "sp_size=4 does not divide a world of 10 ranks: use sp_size=2 or 5, or run 8 or 12 ranks"),
        ({"zpg": 3, "zero_stage": 3}, 8, "zpg=3 does not divide a world of 8 ranks: use zpg=2 or 4, or run 6 or 9"),
        (
            {"train_batch_size": 100, "micro_train_batch_size": 5},
            6,
            "no multiple of micro_train_batch_size=5 x 6 data parallel ranks = 30: use train_batch_size=90 or 120",
        ),
        ({"train_batch_size": 4}, 8, "= 8: use train_batch_size=8"),
        (
            {"train_batch_size": 5, "sp_size": 2},
            4,
            "x 2 data parallel ranks (4 ranks, sp_size=2) = 2: use train_batch_size=4 or 6",
        ),
    ],
)
def test_a_world_that_does_not_fit_is_told_what_would(settings, world, message):
    config = StrategyConfig(**settings)
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.check_world(world)


def test_everything_that_does_not_fit_the_world_is_told_at_once():
    with pytest.raises(ConfigError) as refused:
        StrategyConfig(engine_tp_size=4, sp_size=2).check_world(6)
    assert [line.partition("=")[0] for line in str(refused.value).splitlines()] == [
        "engine_tp_size",
        "train_batch_size",
    ]


@settings(deadline=None)
@given(train=st.integers(1, 400), micro=st.integers(1, 8), sp=st.integers(1, 8), tp=st.integers(1, 8), world=st.data())
def test_the_values_that_a_message_names_do_fit(train, micro, sp, tp, world):
    size = world.draw(st.integers(1, 24))
    config = StrategyConfig(train_batch_size=train * micro, micro_train_batch_size=micro, sp_size=sp, engine_tp_size=tp)
    try:
        config.check_world(size)
    except ConfigError as error:
        for line in str(error).splitlines():
            name, values = re.search(r"use (\w+)=(\d+(?: or \d+)?)", line).groups()
            for value in values.split(" or "):
                assert line not in messages(config.replace(**{name: int(value)}), size)
                assert not any(
                    other.startswith(f"{name}=") for other in messages(config.replace(**{name: int(value)}), size)
                )
    else:
        assert size % tp == size % sp == (train * micro) % (micro * (size // sp)) == 0


def messages(config, size):
    try:
        config.check_world(size)
    except ConfigError as error:
        return str(error).splitlines()
    return []


@settings(deadline=None)
@given(micro=st.integers(1, 5), ranks=st.integers(1, 8), sp=st.integers(1, 4), accumulation=st.integers(1, 6))
def test_k20_accumulation_and_data_parallel_size_take_sequence_parallelism_into_account(micro, ranks, sp, accumulation):
    config = StrategyConfig(
        train_batch_size=micro * ranks * accumulation, micro_train_batch_size=micro, sp_size=sp, engine_tp_size=1
    )
    assert config.data_parallel_size(ranks * sp) == ranks
    assert config.accumulated_gradient(ranks * sp) == accumulation


def test_k20_ranks_of_one_sequence_count_once():
    config = StrategyConfig(train_batch_size=8, sp_size=2)
    assert (config.data_parallel_size(4), config.accumulated_gradient(4)) == (2, 4)
    assert config.replace(sp_size=1).accumulated_gradient(4) == 2
    with pytest.raises(ConfigError, match="sp_size=2 does not divide a world of 3 ranks"):
        config.data_parallel_size(3)
    with pytest.raises(ConfigError, match="sp_size=2 does not divide a world of 3 ranks"):
        config.accumulated_gradient(3)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2", None])
def test_a_world_has_a_number_of_ranks(size):
    for method in (
        StrategyConfig().check_world,
        StrategyConfig().accumulated_gradient,
        StrategyConfig().data_parallel_size,
    ):
        with pytest.raises(ConfigError, match="world_size=.*expected the number of ranks, at least 1"):
            method(size)


# -- sources ----------------------------------------------------------------------------------------------------------


class Slots:
    __slots__ = ("empty", "kl", "seed")

    def __init__(self):
        self.seed, self.kl = 7, 0.1


class WithClassAttributes:
    seed = 7
    kl = 0.1
    _hidden = 1

    def method(self):
        """No entry."""

    @property
    def micro_train_batch_size(self):
        return 2

    @property
    def unrelated(self):
        raise AssertionError("nobody asked for it")


class Answers:
    def __getattr__(self, name):
        if name in {"seed", "micro_train_batch_size"}:
            return {"seed": 7, "micro_train_batch_size": 2}[name]
        raise AttributeError(name)


class LikeAMapping:
    def keys(self):
        return ["seed", "kl"]

    def __getitem__(self, name):
        return {"seed": 7, "kl": 0.1}[name]


@pytest.mark.parametrize(
    "source",
    [
        argparse.Namespace(seed=7, kl=0.1),
        {"seed": 7, "kl": 0.1},
        types.MappingProxyType({"seed": 7, "kl": 0.1}),
        types.SimpleNamespace(seed=7, kl=0.1),
        Slots(),
        LikeAMapping(),
        StrategyConfig(seed=7, extra_args={"kl": 0.1}),
    ],
    ids=lambda source: type(source).__name__,
)
def test_from_args_reads_many_kinds_of_sources(source):
    assert StrategyConfig.from_args(source) == StrategyConfig(seed=7, extra_args={"kl": 0.1})


@pytest.mark.parametrize("source", [WithClassAttributes(), Answers()], ids=lambda source: type(source).__name__)
def test_from_args_asks_an_object_for_each_setting(source):
    config = StrategyConfig.from_args(source)
    assert (config.seed, config.micro_train_batch_size) == (7, 2)
    assert dict(config.extra_args) == ({"kl": 0.1} if isinstance(source, WithClassAttributes) else {})


def test_a_class_or_a_module_can_hold_the_arguments():
    class Arguments:
        seed = 7
        kl = 0.1

        def method(self):
            """No entry."""

    module = types.ModuleType("arguments")
    module.seed, module.kl, module.json, module.function = 7, 0.1, json, len
    for source in (Arguments, module):
        assert StrategyConfig.from_args(source) == StrategyConfig(seed=7, extra_args={"kl": 0.1})


def test_private_attributes_are_no_entries():
    assert StrategyConfig.from_args(argparse.Namespace(_hidden=1)) == StrategyConfig()


def test_an_instance_may_hold_functions_of_its_own():
    def reward(texts):
        return [0.0 for _ in texts]

    assert StrategyConfig.from_args(argparse.Namespace(reward=reward)).get_extra_arg("reward") is reward


def test_no_source_means_the_defaults():
    assert (
        StrategyConfig.from_args(None) == StrategyConfig.from_args() == StrategyConfig.from_args({}) == StrategyConfig()
    )


@pytest.mark.parametrize("source", ["--fsdp", ["--fsdp"], 3, True, (1,), {1}, 1.5, b""])
def test_a_source_without_names_is_refused(source):
    with pytest.raises(ConfigError, match=f"got {type(source).__name__} .*expected parsed arguments"):
        StrategyConfig.from_args(source)


def test_a_mapping_has_names_as_keys():
    with pytest.raises(ConfigError, match="key 3 is a int: expected the name of a setting"):
        StrategyConfig.from_args({3: 4})


def test_a_wrong_value_of_a_source_is_an_error():
    with pytest.raises(ConfigError, match="^fsdp='full_shard': expected True or False, got str"):
        StrategyConfig.from_args(argparse.Namespace(fsdp="full_shard"))


def test_none_means_not_given():
    config = StrategyConfig.from_args(dict.fromkeys([*DEFAULTS, "extra_args", "disable_engine_sleep"]))
    assert config == StrategyConfig()
    given_before = StrategyConfig(seed=7, pretrain="here")
    assert StrategyConfig.from_args(given_before, seed=None, pretrain=None) == StrategyConfig(seed=7)


@pytest.mark.parametrize(("source", "sleeps"), [({}, True), ({"disable_engine_sleep": True}, False)])
def test_the_off_flag_of_engine_sleep_is_understood(source, sleeps):
    for given_so in (source, argparse.Namespace(**source), {**source, "enable_engine_sleep": True}):
        config = StrategyConfig.from_args(given_so)
        assert config.enable_engine_sleep is sleeps
        assert not config.extra_args
    assert StrategyConfig.from_args({}, **source).enable_engine_sleep is sleeps
    assert StrategyConfig.from_args(source, enable_engine_sleep=True).enable_engine_sleep
    assert StrategyConfig.from_args({"disable_engine_sleep": False}).enable_engine_sleep
    with pytest.raises(ConfigError, match="^disable_engine_sleep='yes': expected True or False"):
        StrategyConfig.from_args({"disable_engine_sleep": "yes"})


def test_overrides_win():
    source = argparse.Namespace(seed=7, fsdp=True, kl=0.1)
    config = StrategyConfig.from_args(source, seed=42, kl=0.2, extra_args={"gamma": 0.9})
    assert config == StrategyConfig(fsdp=True, extra_args={"kl": 0.2, "gamma": 0.9})
    assert vars(source) == {"seed": 7, "fsdp": True, "kl": 0.1}


def test_k08_an_unknown_override_is_an_error_that_names_what_was_meant():
    for change in (StrategyConfig(zero_stage=1).replace, lambda **words: StrategyConfig.from_args({}, **words)):
        with pytest.raises(
            ConfigError, match="'zero_stge' is no setting: did you mean zero_stage; an entry of your own"
        ):
            change(zero_stge=3)
        with pytest.raises(ConfigError, match="'qqq' is no setting: expected one of seed, "):
            change(qqq=3)


def test_extra_entries_are_read_only_and_do_not_follow_their_source():
    source = {"kl": 0.1}
    config = StrategyConfig.from_args(source)
    source["kl"] = 5
    assert config.get_extra_arg("kl") == config.extra_args["kl"] == 0.1
    with pytest.raises(TypeError):
        config.extra_args["kl"] = 3
    config.to_dict()["extra_args"]["kl"] = 3
    assert config.get_extra_arg("kl") == 0.1


def test_get_extra_arg():
    config = StrategyConfig(seed=7, extra_args={"kl": None})
    assert config.get_extra_arg("kl", 1) is None
    assert config.get_extra_arg("gamma") is None
    assert config.get_extra_arg("gamma", 0.9) == 0.9
    assert config.get_extra_arg("seed", 1) == 7


def test_a_setting_is_no_extra_entry():
    with pytest.raises(ConfigError, match="extra_args has 'seed', which is a setting: give it as seed="):
        StrategyConfig(extra_args={"seed": 3})


# -- round trips ------------------------------------------------------------------------------------------------------


def values_of(known):
    if known.choices:
        return st.sampled_from(known.choices)
    high = known.at_most if known.at_most is not None else known.below
    ends = {"min_value": known.at_least, "max_value": high}
    number = st.floats(
        **ends, allow_nan=False, allow_infinity=False, exclude_max=known.below is not None
    ) | st.integers(0, 0 if known.below == 1 or high == 1 else 9)
    kinds = {
        bool: st.booleans(),
        int: st.integers(known.at_least, (known.below or 10**9) - 1),
        float: number.filter(lambda value: known.above is None or value > known.above),
        str: st.none() | st.text("aä 0-", min_size=1),
        tuple: st.tuples(number, number) | st.lists(number, min_size=2, max_size=2),
    }
    return kinds[known.kind]


@st.composite
def configs(draw):
    free = set(SETTINGS) - {"zpg", "train_batch_size", "strategy"}
    chosen = {name: draw(values_of(SETTINGS[name])) for name in sorted(free) if draw(st.booleans())}
    chosen["fp16"] = chosen.get("fp16", False) and not chosen.get("bf16", False)
    off = ["adam_offload", "grad_accum_dtype"] if chosen.get("fsdp", False) else ["fsdp_cpu_offload", "use_mp_opt"]
    chosen |= {name: SETTINGS[name].default for name in off}
    chosen["train_batch_size"] = chosen.get("micro_train_batch_size", 1) * draw(st.integers(1, 9))
    chosen["strategy"] = draw(
        st.none() | st.sampled_from(["fake", "mine", "fsdp" if chosen.get("fsdp") else "deepspeed"])
    )
    extra = st.dictionaries(st.sampled_from(["kl", "gamma", "_x"]), st.integers() | st.none())
    return StrategyConfig(**chosen, extra_args=draw(extra))


@pytest.mark.slow
@settings(deadline=None)
@given(configs())
def test_what_a_configuration_says_makes_the_same_one(config):
    for source in (
        config,
        vars(config),
        config.to_dict(),
        dataclasses.asdict(config),
        types.SimpleNamespace(**vars(config)),
    ):
        assert StrategyConfig.from_args(source) == config
    assert StrategyConfig(**vars(config)) == config
    assert StrategyConfig.from_args(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(StrategyConfig(**vars(config))) == hash(config)


@settings(deadline=None)
@given(configs())
def test_a_copy_is_equal(config):
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), config.replace()):
        assert copied == config
        assert copied.to_dict() == config.to_dict()
    if not config.extra_args:
        assert eval(repr(config)) == config


def test_replace_makes_another_one_and_checks_it():
    config = StrategyConfig(seed=1, extra_args={"kl": 0.1})
    assert config.replace(fsdp=True) == StrategyConfig(seed=1, fsdp=True, extra_args={"kl": 0.1})
    assert config == StrategyConfig(seed=1, extra_args={"kl": 0.1})
    with pytest.raises(ConfigError, match="^seed=None: expected an integer"):
        config.replace(seed=None)
    with pytest.raises(ConfigError, match="bf16 and fp16"):
        config.replace(bf16=True, fp16=True)


def test_a_subclass_may_add_fields_of_its_own():
    @dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
    class Mine(StrategyConfig):
        kl: float = 0.1

    config = Mine.from_args({"kl": 0.2, "seed": 7, "other": 1})
    assert (config.kl, config.seed, dict(config.extra_args)) == (0.2, 7, {"other": 1})
    assert Mine.from_args({"kl": None}).kl == 0.1
    assert StrategyConfig.from_args(config).get_extra_arg("kl") == 0.2


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_summary_tells_what_differs_and_no_values_of_extra_entries():
    config = StrategyConfig(bf16=True, adam_betas=(0.5, 0.9), extra_args={"api_key": "secret", "kl": 0.1})
    assert config.summary().splitlines() == [
        "StrategyConfig, what differs from the defaults:",
        "  bf16 = True (default: False)",
        "  adam_betas = (0.5, 0.9) (default: (0.9, 0.95))",
        "  extra_args: api_key, kl",
    ]
    assert StrategyConfig().summary() == "StrategyConfig: all defaults"


def test_repr_is_short():
    assert repr(StrategyConfig()) == "StrategyConfig()"
    config = StrategyConfig(bf16=True, extra_args={"api_key": "secret"})
    assert repr(config) == "StrategyConfig(bf16=True, extra_args=<api_key>)"


def test_nothing_is_printed(capsys):
    config = StrategyConfig.from_args(argparse.Namespace(seed=7, kl=0.1), fsdp=True)
    config.check_world(4)
    config.summary()
    assert capsys.readouterr() == ("", "")
