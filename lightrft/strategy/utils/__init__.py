"""Parts that every strategy delegates to."""
