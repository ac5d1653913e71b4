"""Verification: is this still the same function? Judged by the reference's own rounding error."""

from bnify.verification.budget import judge, verify_budget
from bnify.verification.cases import Measured, measure
from bnify.verification.localise import first_divergent, first_divergent_module
from bnify.verification.runners import OnnxRunner, Runner, TorchRunner, as_runner

__all__ = [
    "Measured",
    "OnnxRunner",
    "Runner",
    "TorchRunner",
    "as_runner",
    "first_divergent",
    "first_divergent_module",
    "judge",
    "measure",
    "verify_budget",
]
