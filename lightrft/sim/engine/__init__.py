"""The fake engine: a core that generates, and the faces of vLLM and SGLang in front of it."""
