"""Training strategies: one interface over every backend."""
