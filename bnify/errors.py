"""The exception tree: every refusal of bnify says what, where, why and the next move.

BnifyError              exit code 3: found while doing it
├── UsageError          exit code 2: the request itself cannot be right
├── SpecError           a SPEC that cannot be turned into a model
├── WeightsError        a checkpoint that cannot be read or does not fit
├── CaptureError        a forward pass that cannot be recorded
├── PlanError           a plan that cannot be made or applied
│   ├── OptionsError    exit code 2: options that contradict each other
│   └── NothingToFix    an audit without a finding that can be fixed
├── VerificationError   exit code 1: checked, and failed
├── ExportError         no ONNX file could be written or run
└── DeviceError         a device or execution provider that is not there
"""

from __future__ import annotations

from typing import Any, ClassVar


class BnifyError(Exception):
    """Base of all errors that bnify raises on purpose.

    Args:
        message: One line: what failed, where, and why.
        hint: The next command or line to try; empty where there is none.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_dict(self) -> dict[str, Any]:
        """The error as the CLI's ``--format json`` prints it."""
        return {"kind": type(self).__name__, "message": self.message, "hint": self.hint}


class UsageError(BnifyError):
    """The request itself cannot be right: an unknown norm or dtype, a malformed value."""

    exit_code = 2


class SpecError(BnifyError):
    """A SPEC that names no model, or a model that cannot be built."""


class WeightsError(BnifyError):
    """A checkpoint that cannot be read, must not be unpickled, or does not fit the model."""


class CaptureError(BnifyError):
    """A forward pass that cannot be recorded."""


class PlanError(BnifyError):
    """A plan that cannot be made, read or applied to this model."""


class OptionsError(PlanError):
    """Options that contradict each other, whatever the model is."""

    exit_code = 2


class NothingToFix(PlanError):  # noqa: N818 - it says what it is
    """There is no finding that can be fixed in the way that was asked for."""


class VerificationError(BnifyError):
    """A rewrite that was measured and found wrong; ``result`` holds it for inspection.

    ``export`` holds the ONNX file's facts where that file, written along, is what is wrong.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, hint: str = "", result: Any = None, export: Any = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.result = result
        self.export = export


class ExportError(BnifyError):
    """No ONNX file could be written, or the one written cannot be run."""


class DeviceError(BnifyError):
    """A device or execution provider that was asked for and is not there."""
