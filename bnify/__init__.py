"""bnify: the normalization toolchain for PyTorch.

>>> import bnify
>>> result = bnify.insert(model, inputs)  # doctest: +SKIP
>>> result.model  # doctest: +SKIP

Importing this package loads no torch; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnify.api import apply, export, fold, insert, load, verify
    from bnify.auditing.finding import AuditReport, Finding
    from bnify.audits import audit
    from bnify.calibrating.result import Calibration
    from bnify.calibrations import calibrate
    from bnify.comparing.comparison import Comparison
    from bnify.comparisons import compare
    from bnify.errors import (
        BnifyError,
        CaptureError,
        DeviceError,
        ExportError,
        PlanError,
        SpecError,
        UsageError,
        VerificationError,
        WeightsError,
    )
    from bnify.exporting import Export
    from bnify.frozen import freeze_norms, thaw_norms
    from bnify.optim import param_groups
    from bnify.plan import Edit, Plan, Skip
    from bnify.reason import Reason
    from bnify.result import Result
    from bnify.synced import sync_norms, unsync_norms
    from bnify.verdict import Verification
    from bnify.watching import watch

__version__ = "0.1.0"

_HOME = {
    "AuditReport": "auditing.finding",
    "BnifyError": "errors",
    "Calibration": "calibrating.result",
    "CaptureError": "errors",
    "Comparison": "comparing.comparison",
    "DeviceError": "errors",
    "Edit": "plan",
    "Export": "exporting",
    "ExportError": "errors",
    "Finding": "auditing.finding",
    "Plan": "plan",
    "PlanError": "errors",
    "Reason": "reason",
    "Result": "result",
    "Skip": "plan",
    "SpecError": "errors",
    "UsageError": "errors",
    "Verification": "verdict",
    "VerificationError": "errors",
    "WeightsError": "errors",
    "apply": "api",
    "audit": "audits",
    "calibrate": "calibrations",
    "compare": "comparisons",
    "export": "api",
    "fold": "api",
    "freeze_norms": "frozen",
    "insert": "api",
    "load": "api",
    "param_groups": "optim",
    "sync_norms": "synced",
    "thaw_norms": "frozen",
    "unsync_norms": "synced",
    "verify": "api",
    "watch": "watching",
}

__all__ = [
    "AuditReport",
    "BnifyError",
    "Calibration",
    "CaptureError",
    "Comparison",
    "DeviceError",
    "Edit",
    "Export",
    "ExportError",
    "Finding",
    "Plan",
    "PlanError",
    "Reason",
    "Result",
    "Skip",
    "SpecError",
    "UsageError",
    "Verification",
    "VerificationError",
    "WeightsError",
    "apply",
    "audit",
    "calibrate",
    "compare",
    "export",
    "fold",
    "freeze_norms",
    "insert",
    "load",
    "param_groups",
    "sync_norms",
    "thaw_norms",
    "unsync_norms",
    "verify",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bnify' has no attribute {name!r}")
    return getattr(import_module(f"bnify.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
