"""CAPTURE: one recorded forward pass as an executable ``fx.Graph`` with its facts."""

from bnify.capture.captured import Captured, Escape, ModuleCall, tensor_at
from bnify.capture.record import record

__all__ = ["Captured", "Escape", "ModuleCall", "record", "tensor_at"]
