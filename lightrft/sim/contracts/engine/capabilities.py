"""The contract of engines, and what an implementation of it may lack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.sim.contracts.contract import Contract

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CAPABILITIES", "LACKS", "contract"]

CAPABILITIES = {
    "language_model": "completions are drawn from the distribution of the model, and log-probs are of it",
    "text": "prompts may be text, completions have text, and texts end them",
    "seeds": "a request may have a seed",
    "stops_beyond_the_end": "with `ignore_eos`, `stop_token_ids` end a completion nevertheless",
    "log_probs_after_cuts": "log-probs are of what top-k, top-p and min-p leave",
    "shared": "several ranks share an engine",
    "tells_weights": "`fingerprints()` says what the engine holds",
}
"""What an engine may lack; the contract of sending weights has the same."""

contract = Contract("engine", prefix="EN", capabilities=CAPABILITIES)

_DIGEST = "tokens follow from a digest of the weights, and log-probs are made up"
_TEMPERED = "SGLang gives those of logits / temperature"
_WITH_THE_END = "SGLang passes over them with the end token, so that both together are refused"

LACKS: Mapping[str, Mapping[str, str]] = {
    "fake vLLM": {},
    "fake SGLang": {"log_probs_after_cuts": _TEMPERED, "stops_beyond_the_end": _WITH_THE_END},
    "fake vLLM, hash mode": {"language_model": _DIGEST, "log_probs_after_cuts": _DIGEST},
    "fake SGLang, hash mode": {
        "language_model": _DIGEST,
        "log_probs_after_cuts": _DIGEST,
        "stops_beyond_the_end": _WITH_THE_END,
    },
    "vLLM": {},
    "SGLang, on a CPU": {
        "seeds": "its attention backends for CPUs are not deterministic",
        "log_probs_after_cuts": _TEMPERED,
        "stops_beyond_the_end": _WITH_THE_END,
    },
}
"""What each engine of this package lacks, with the reason."""
