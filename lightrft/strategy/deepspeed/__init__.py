"""Training on DeepSpeed ZeRO."""
