"""Generating with SGLang: the engine on the leader of each tensor-parallel group, in processes of its own."""

from lightrft.strategy.sglang_utils.adapter import SGLangEngine, start

__all__ = ["SGLangEngine", "start"]
