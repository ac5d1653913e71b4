"""CAPTURE: one recorded forward pass as an executable ``fx.Graph`` with its facts."""

from bnify.capture.captured import (
    Captured,
    Escape,
    ModuleCall,
    attribute_name,
    copied,
    tensor_at,
)
from bnify.capture.record import record
from bnify.capture.symbolic import make_symbolic

__all__ = [
    "Captured",
    "Escape",
    "ModuleCall",
    "attribute_name",
    "copied",
    "make_symbolic",
    "record",
    "tensor_at",
]
