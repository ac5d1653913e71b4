"""Where a result goes, decided before the work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from bnify.atomic import check_output
from bnify.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """Where a result goes.

    Attributes:
        output: As it was asked for; None to keep nothing.
        place: Where a good result goes, whose name says if nobody verified it.
        failed: Where one goes that failed its verification; None to keep nothing.
        force: Replace what is there.
        onnx: Write an ONNX file too.
    """

    output: Path | None = None
    place: Path | None = None
    failed: Path | None = None
    force: bool = False
    onnx: bool = True

    @classmethod
    def checked(
        cls,
        output: Path | None,
        *,
        force: bool,
        onnx: bool,
        keep_failed: bool,
        verify: bool,
        dry_run: bool,
    ) -> Self:
        """From the options; a place that may not be written is refused before the work is done.

        Raises:
            UsageError: It may not.
        """
        place = _kept_as(output, unverified=not verify, keep_failed=keep_failed)
        failed = output.with_name(f"{output.name}.failed") if output and keep_failed else None
        for folder in (place, failed):
            if folder is not None and not dry_run:
                # The names of bnify's own files, without importing torch with what writes them.
                check_output(folder, force=force, ours=_OURS)
        return cls(output=output, place=place, failed=failed, force=force, onnx=onnx)


_OURS: Final = ("model.safetensors", "bnify.json", "model.onnx", "model.onnx.data", "report.json")


def _kept_as(output: Path | None, *, unverified: bool, keep_failed: bool) -> Path | None:
    """Where the result goes; what nobody verified has a name that says so."""
    if output is None or not unverified:
        return output
    place = output.with_name(f"{output.name}.unverified")
    if not keep_failed:
        raise UsageError(
            "with --no-verify the result is unverified and is not written",
            hint=f"add --keep-failed, which writes {place}",
        )
    return place
