"""SPEC → what it names: models, their weights, example inputs and data.

Names resolve on first use: what a SPEC is, :mod:`bnify.spec.kinds` tells without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnify.spec.checkpoint import describe_checkpoint, find_state_dicts, read_checkpoint
    from bnify.spec.data import load_data
    from bnify.spec.inputs import parse_inputs, read_input_file
    from bnify.spec.kinds import SpecKind, classify, parse_arguments
    from bnify.spec.model import ModelSource, load_model, model_factory
    from bnify.spec.onnx_inputs import draw_onnx_inputs
    from bnify.spec.silence import user_output_to_stderr
    from bnify.spec.weights import WeightsReport, load_weights

_HOME = {
    "ModelSource": "model",
    "SpecKind": "kinds",
    "WeightsReport": "weights",
    "classify": "kinds",
    "describe_checkpoint": "checkpoint",
    "draw_onnx_inputs": "onnx_inputs",
    "find_state_dicts": "checkpoint",
    "load_data": "data",
    "load_model": "model",
    "load_weights": "weights",
    "model_factory": "model",
    "parse_arguments": "kinds",
    "parse_inputs": "inputs",
    "read_checkpoint": "checkpoint",
    "read_input_file": "inputs",
    "user_output_to_stderr": "silence",
}

__all__ = [
    "ModelSource",
    "SpecKind",
    "WeightsReport",
    "classify",
    "describe_checkpoint",
    "draw_onnx_inputs",
    "find_state_dicts",
    "load_data",
    "load_model",
    "load_weights",
    "model_factory",
    "parse_arguments",
    "parse_inputs",
    "read_checkpoint",
    "read_input_file",
    "user_output_to_stderr",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bnify.spec' has no attribute {name!r}")
    return getattr(import_module(f"bnify.spec.{_HOME[name]}"), name)
