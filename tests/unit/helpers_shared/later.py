"""Imported by another rank than ``late``; fills the same registry."""

from . import ordinary


@ordinary.register("later")
class Later:
    pass
