"""One door to every report: a result of any kind and a format give text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bnify.auditing.finding import AuditReport
from bnify.calibrating.result import Calibration
from bnify.comparing.comparison import Comparison
from bnify.errors import BnifyError
from bnify.report import json
from bnify.report.audited import render_audit
from bnify.report.calibrated import calibration_document
from bnify.report.compared import comparison_document
from bnify.report.content import export_document, result_document, verification_document
from bnify.report.diagnosis import doctor_document
from bnify.report.document import Code, Document
from bnify.report.markdown import to_markdown
from bnify.report.terminal import clean, encodes, to_terminal
from bnify.strict_json import dumps
from bnify.verdict import Verification


class Format(StrEnum):
    """How a report is written."""

    RICH = "rich"
    JSON = "json"
    MD = "md"


@dataclass(frozen=True, slots=True)
class Style:
    """What the output can show: columns, ANSI colours, characters."""

    width: int = 80
    color: bool = False
    encoding: str = "utf-8"


def render(
    result: Any,
    fmt: Format | str,
    *,
    width: int | None = None,
    color: bool = False,
    encoding: str = "utf-8",
    target: str = "",
    files: Mapping[str, str] | None = None,
    export: Any = None,
    environment: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    shown: Mapping[str, str] | None = None,
) -> str:
    """A result as text.

    Args:
        result: A Result, an Export, a Verification, an AuditReport, a Comparison, a Calibration
            (or one with its model), or what ``bnify doctor`` found (a dict).
        fmt: ``"rich"`` for a terminal, ``"json"`` or ``"md"``; for an AuditReport also
            ``"concise"``, ``"sarif"`` or ``"github"``.
        width: Columns for ``rich``; None means 80.
        color: ANSI colours for ``rich``.
        encoding: Of the output: ``rich`` falls back to ASCII where it must.
        target: What was exported or verified, for the title.
        files: What was written, name → path.
        export: The ONNX file that was written along with a Result.
        environment: Versions, device, seed and hashes.
        dry_run: Nothing was written or verified on purpose.
        shown: Code to show, ``{"code": forward, "diff": module tree}``.
    """
    if isinstance(result, AuditReport):
        return render_audit(
            result, fmt, width=width, color=color, encoding=encoding, environment=environment
        )
    form = Format(fmt)
    if form is Format.JSON:
        return dumps(_data(result, target, files, export, environment, dry_run, dict(shown or {})))
    document = _document(result, target, files, export, environment, dry_run, shown or {})
    if form is Format.MD:
        return to_markdown(document)
    return to_terminal(document, width=width or 80, color=color, encoding=encoding)


_TITLES = {"code": ("Rewritten forward", "python"), "diff": ("Module tree", "diff")}


def _document(
    result: Any,
    target: str,
    files: Mapping[str, str] | None,
    export: Any,
    environment: Mapping[str, Any] | None,
    dry_run: bool,
    shown: Mapping[str, str],
) -> Document:
    if isinstance(result, Verification):
        return verification_document(result, target=target, environment=environment)
    if isinstance(result, Comparison):
        return comparison_document(result, files=files)
    if isinstance(result, Calibration) or hasattr(result, "calibration"):
        return calibration_document(
            result, target=target, files=files, export=export, environment=environment
        )
    if isinstance(result, Mapping):
        return doctor_document(result)
    if hasattr(result, "plan"):
        return result_document(
            result,
            files=files,
            export=export,
            environment=environment,
            dry_run=dry_run,
            extra=[Code(*_TITLES[kind], text) for kind, text in shown.items()],
        )
    return export_document(result, target=target, environment=environment)


def _data(
    result: Any,
    target: str,
    files: Mapping[str, str] | None,
    export: Any,
    environment: Mapping[str, Any] | None,
    dry_run: bool,
    shown: dict[str, str],
) -> dict[str, Any]:
    """The result as data; every kind has the same outer keys."""
    made = {"environment": dict(environment)} if environment else {}
    if isinstance(result, Verification):
        head = {"schema": json.SCHEMA, "verb": "verify", "target": target}
        return {**head, "verification": result.to_dict(), "files": dict(files or {}), **made}
    if isinstance(result, Comparison):
        written = {} if files is None else {"files": dict(files)}
        return {**result.to_dict(), **written, **made}
    if isinstance(result, Mapping):
        return {"schema": json.SCHEMA, "verb": "doctor", **result}
    if not hasattr(result, "plan") and not isinstance(result, Calibration):
        head = {"schema": json.SCHEMA, "verb": "export", "target": target}
        return {**head, **json.export_data(result), "files": {"onnx": str(result.path)}, **made}
    data = {**result.to_dict(), **shown, **made}
    if files is not None:
        data["files"] = dict(files)
    if export is not None:
        data["export"] = json.export_data(export)
    if dry_run:
        data["dry_run"] = True
    return data


def render_error(
    error: BnifyError,
    verb: str | None,
    fmt: Format | str,
    *,
    color: bool = False,
    encoding: str = "utf-8",
) -> str:
    """An error as text: what went wrong, where and why, and what to try next."""
    form = Format(fmt)
    if form is Format.JSON:
        return dumps(json.error_data(error, verb))
    message, hint = clean(error.message), clean(error.hint)
    if form is Format.MD:
        title = f"# bnify {verb or ''}".rstrip()
        return f"{title}\n\n**error** {message}\n" + (f"\n{hint}\n" if hint else "")
    word = "\x1b[1;31merror:\x1b[0m" if color else "error:"
    lines = f"{word} {message}\n"
    if hint:
        first, *rest = hint.splitlines()
        lines += f"  try: {first}\n" + "".join(f"       {line}\n" for line in rest)
    if not encodes(lines, encoding):
        lines = lines.encode(encoding, errors="replace").decode(encoding, errors="replace")
    return lines
