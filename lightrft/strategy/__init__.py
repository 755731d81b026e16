"""One interface over training backends and inference engines."""
