"""Reinforcement-learning fine-tuning of language models, testable for many GPUs on one machine.

Importing this package loads nothing else: not torch, and none of the training and inference backends.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
