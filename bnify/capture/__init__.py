"""CAPTURE: one recorded forward pass as an executable ``fx.Graph`` with its facts."""

from bnify.capture.captured import (
    Captured,
    Escape,
    ModuleCall,
    attribute_name,
    copied,
    tensor_at,
)
from bnify.capture.example import free_batch, record_example, record_train
from bnify.capture.record import record
from bnify.capture.symbolic import make_symbolic

__all__ = [
    "Captured",
    "Escape",
    "ModuleCall",
    "attribute_name",
    "copied",
    "free_batch",
    "make_symbolic",
    "record",
    "record_example",
    "record_train",
    "tensor_at",
]
