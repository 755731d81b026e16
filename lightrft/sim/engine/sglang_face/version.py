"""Whose surface the face has."""

__all__ = ["__version__"]

__version__ = "0.5.23"
