"""One training interface over DeepSpeed, FSDP2 and a fake backend."""
