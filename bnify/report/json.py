"""What a JSON report holds: one object on stdout, and nothing else there."""

from __future__ import annotations

from typing import Any, Final

from bnify.errors import BnifyError

SCHEMA: Final = 1


def error_data(error: BnifyError, verb: str | None) -> dict[str, Any]:
    """An error; one that holds a result (a failed verification) brings the result's data."""
    data: dict[str, Any] = {"schema": SCHEMA, "verb": verb}
    result: Any = getattr(error, "result", None)
    verification = getattr(result, "verification", None)
    if hasattr(result, "plan"):
        data |= result.to_dict()
    elif verification is not None:
        data["verification"] = verification.to_dict()
    export = getattr(error, "export", None)
    if export is not None:
        data["export"] = export_data(export)
    return {**data, "error": error.to_dict()}


def export_data(export: Any) -> dict[str, Any]:
    """The facts of an exported file."""
    verification = export.verification
    return {
        "opset": export.opset,
        "norms_before": export.norms_before,
        "norms_after": export.norms_after,
        "verification": None if verification is None else verification.to_dict(),
        "notes": list(export.notes),
    }
