"""Part of the stand-in: see the package."""

from sgl_kernel import __getattr__ as __getattr__
