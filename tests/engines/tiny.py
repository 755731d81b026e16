"""Models on disk, small enough to be made by a test: random weights, in the form that engines load."""

from __future__ import annotations

import string

import torch

LETTERS = string.ascii_letters + string.digits + string.punctuation + " "
SPECIAL = ("<pad>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY = 128
LENGTH = 64
PAD, EOS, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))


def tokenizer():
    """One token for each letter."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def text_settings(**settings):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # so that the likeliest token stands out
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **settings,
    }


def qwen2(seed=0, **settings):
    """A random Qwen2 of heads of size 32, in fp32; the same one for the same seed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**text_settings(**settings))).eval()


def qwen2_vl(seed=0):
    """A random Qwen2-VL, which sees images and videos."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2VLConfig(
        text_config=text_settings(rope_parameters=rope),
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "in_chans": 3},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return Qwen2VLForConditionalGeneration(config).eval()


def processor():
    """What turns images and videos into the inputs of :func:`qwen2_vl`."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size),
        tokenizer=tokenizer(),
        chat_template="{{ messages[0]['content'] }}",
    )


def save(model, folder, *others):
    """Write ``model``, and tokenizers or processors beside it, to ``folder``, and return its path."""
    for each in (model, *others):
        each.save_pretrained(folder)
    return str(folder)


def settings(model, **others):
    """Of an engine on this CPU."""
    from lightrft.strategy.engine_settings import EngineSettings

    return EngineSettings(
        **{
            "model": model,
            "dtype": "float32",
            "tp_size": 1,
            "memory_share": 0.5,
            "max_model_len": LENGTH,
            "max_tokens": 8,
            "seed": 0,
            "sleeps": True,
            "device": torch.device("cpu"),
            "group": None,
            **others,
        }
    )


def pair(**more):
    """Two models of one architecture, all of whose weights differ."""
    models = qwen2(0, **more), qwen2(1, **more)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        for model in models:
            for parameter in model.parameters():
                if parameter.dim() == 1:  # else norms are ones and biases zeros, whatever the seed
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return models


def subject(name, start, models, **more):
    """Engines of these models, for the contracts."""
    from lightrft.sim.contracts.engine import LACKS, Subject

    letters = tokenizer()
    return Subject(
        **{
            "start": start,
            "models": models,
            "name": name,
            "vocabulary": VOCABULARY,
            "max_model_len": LENGTH,
            "max_tokens": 8,
            "end": EOS,
            "first_token": len(SPECIAL),
            "encode": letters.encode,
            "decode": lambda ids: letters.decode(ids, skip_special_tokens=True),
            "lacks": LACKS[name],
            "library_calls": lambda engine: len(engine.library_calls),
            **more,
        }
    )


def counting(engine):
    """The same engine, which writes down how its library is called for updates in ``library_calls``."""
    engine.library_calls = []
    owner, name = (
        (engine._llm, "collective_rpc")
        if hasattr(engine, "_llm")
        else (engine._launched.engine, "update_weights_from_tensor")
    )
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        engine.library_calls.append(name)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    return engine
