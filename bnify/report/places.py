"""Where a finding is, as a file and a line that a code host can show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bnify.auditing.finding import AuditReport, Finding


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file.

    Attributes:
        file: Absolute.
        line: From 1.
        root: The folder that paths are relative to.
    """

    file: Path
    line: int
    root: Path

    @property
    def inside(self) -> bool:
        """Whether the file lies below the root."""
        return self.file.is_relative_to(self.root)

    @property
    def path(self) -> str:
        """With forward slashes, relative to the root where it lies below it."""
        return (self.file.relative_to(self.root) if self.inside else self.file).as_posix()

    @property
    def uri(self) -> str:
        """The path as a URI reference (RFC 3986): special characters are percent-encoded."""
        if not self.inside:
            return self.file.as_uri()
        prefix = f"{self.root.as_uri().rstrip('/')}/"
        return self.file.as_uri().removeprefix(prefix)


def place_of(
    finding: Finding, report: AuditReport, *, root: Path, audited: Path | None
) -> Place | None:
    """The definition of the module's class, where it is the user's; else the file that was audited.

    Args:
        finding: What was found.
        report: Knows where classes are defined.
        root: The current folder.
        audited: The file that was audited: a checkpoint, an ONNX file, the SPEC's Python file.
    """
    root = root.resolve()
    source = report.sources.get(finding.module)
    defined = Place(Path(source[0]).resolve(), source[1], root) if source else None
    if defined is not None and defined.inside:
        return defined
    if audited is not None:
        return Place(audited.resolve(), 1, root)
    return defined
