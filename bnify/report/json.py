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
        data["export"] = export.to_dict()
    return {**data, "error": error.to_dict()}
