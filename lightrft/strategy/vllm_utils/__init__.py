"""vLLM as the engine of a strategy."""

from lightrft.strategy.vllm_utils.engine import VLLMEngine, start

__all__ = ["VLLMEngine", "start"]
