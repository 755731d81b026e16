"""Imported during a run."""

VALUES = []
