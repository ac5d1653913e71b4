"""Declares the schemas of torchvision's compiled operators where its extension cannot be loaded.

torchvision built for another torch than the one installed imports its Python half, then fails on
``operator torchvision::nms does not exist`` while it registers fakes and gradients. The models
used in tests need none of these operators, only that they are declared. Where the extension does
load, nothing is declared.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path

_POOL = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_BACK = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_MAPPED = "Tensor grad, Tensor rois, Tensor channel_mapping"
_DEFORM = (
    "Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
    "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask"
)
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_ALIGN = "int sampling_ratio, bool aligned"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_POOL}, {_ALIGN}) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, {_BACK}, {_SIZE}, {_ALIGN}) -> Tensor",
    f"roi_pool({_POOL}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_BACK}, {_SIZE}) -> Tensor",
    f"ps_roi_align({_POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward({_MAPPED}, {_BACK}, int sampling_ratio, {_SIZE}) -> Tensor",
    f"ps_roi_pool({_POOL}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward({_MAPPED}, {_BACK}, {_SIZE}) -> Tensor",
    f"deform_conv2d(Tensor input, {_DEFORM}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, Tensor input, {_DEFORM}) -> {_FIVE}",
)
_declared: list[object] = []  # keeps the library alive: its schemas die with it


def declare() -> None:
    """Declare the operators unless the compiled extension brings them; does so once."""
    if _declared:
        return
    import torch

    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for library in Path(folder).glob("_C*"):
            try:
                torch.ops.load_library(str(library))
            except (ImportError, OSError):
                continue
            _declared.append(library)
            return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Calls :func:`declare` when torchvision is about to be imported, and finds nothing itself."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision" and not _declared and self in sys.meta_path:
            sys.meta_path.remove(self)  # find_spec("torchvision") in declare() must not come back
            declare()
        return


def install() -> None:
    """Make ``import torchvision`` work from here on, without importing torch before it is."""
    if not any(type(finder).__name__ == "_BeforeTorchvision" for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
