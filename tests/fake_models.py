"""Tiny models on disk, for tests of engines."""

import torch

VOCABULARY = 64


def tiny_model(folder, seed=0, **changes):
    """Write a random Qwen2 of two layers to ``folder``, and return it."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            eos_token_id=1,
            bos_token_id=0,
            pad_token_id=0,
            initializer_range=0.2,
            **changes,
        )
        model = transformers.Qwen2ForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # else norms are ones and biases zeros, whatever the seed
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model
