"""Imported by Python as it starts: lets torchvision be imported beside a torch that it was not built for.

torchvision registers meta functions of operators that its compiled part defines; where that part cannot be loaded, the
definitions are missing. So the schemas are defined before torchvision is imported. Nothing calls them.
"""

import importlib.abc
import sys

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            _BeforeTorchvision.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in _SCHEMAS:
                self.library.define(schema)


sys.meta_path.insert(0, _BeforeTorchvision())
