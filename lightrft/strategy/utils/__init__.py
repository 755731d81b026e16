"""What all strategies share: communication, data, gradients, checkpoints, sequence parallelism."""
