"""SPEC → what it names: models, their weights, example inputs and data."""

from __future__ import annotations

from bnify.spec.checkpoint import describe_checkpoint, find_state_dicts, read_checkpoint
from bnify.spec.data import load_data
from bnify.spec.inputs import parse_inputs, read_input_file
from bnify.spec.kinds import SpecKind, classify, parse_arguments
from bnify.spec.model import ModelSource, load_model
from bnify.spec.onnx_inputs import draw_onnx_inputs
from bnify.spec.silence import user_output_to_stderr
from bnify.spec.weights import WeightsReport, load_weights

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
    "parse_arguments",
    "parse_inputs",
    "read_checkpoint",
    "read_input_file",
    "user_output_to_stderr",
]
