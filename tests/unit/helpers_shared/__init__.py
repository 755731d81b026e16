"""Modules whose state ranks share."""
