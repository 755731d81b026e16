"""A package that keeps per-process state in every way that packages do."""
