"""PyTorch to ONNX: exported from an eval copy, checked in onnxruntime, put in place whole."""

from bnify.exporting.checked import Export, export_onnx
from bnify.exporting.program import (
    EXTERNAL_ABOVE,
    STATIC_BATCH,
    count_norms,
    refuse_train_mode,
)

__all__ = [
    "EXTERNAL_ABOVE",
    "STATIC_BATCH",
    "Export",
    "count_norms",
    "export_onnx",
    "refuse_train_mode",
]
