"""Conversions between checkpoints of DeepSpeed, of FSDP2, and folders of Hugging Face: ``lightrft ckpt``."""
