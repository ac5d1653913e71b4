"""What a report on a calibration says: how far each norm had drifted, and what that was worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from bnify.calibrating.result import Calibrated, Calibration
from bnify.report.content import closing, export_blocks, made_with
from bnify.report.document import Block, Column, Document, Facts, Items, Paragraph, Table
from bnify.report.numbers import count, ratio
from bnify.report.repeats import collapse, without_numbers
from bnify.report.verdicts import verification_blocks

if TYPE_CHECKING:
    from bnify.calibrating.kept import CalibratedModel

#: Norms that are listed; the others drifted less.
_SHOWN: Final = 20
#: Less of an accuracy than this is none.
_WORSE: Final = 0.005


def calibration_document(
    result: CalibratedModel | Calibration,
    *,
    target: str = "",
    files: Mapping[str, str] | None = None,
    export: Any = None,
    environment: Mapping[str, Any] | None = None,
) -> Document:
    """The report on a calibration.

    Args:
        result: A calibration, or one with the model that is written.
        target: What was calibrated, for the title.
        files: What was written, name → path.
        export: The ONNX file that was written.
        environment: Versions, device, seed and hashes.
    """
    kept = None if isinstance(result, Calibration) else result
    found = result if isinstance(result, Calibration) else result.calibration
    if kept is not None:
        target = kept.source.get("target") or kept.plan.fingerprint.model
    blocks: list[Block] = [Paragraph(_headline(found))]
    if found.accuracy_before is not None and found.accuracy_after is not None:
        blocks.append(Paragraph(_accuracy(found.accuracy_before, found.accuracy_after)))
    if found.updated:
        blocks.append(_drifts(found.updated))
        rest = found.updated[_SHOWN:]
        if rest:
            blocks.append(
                Paragraph(f"{count(len(rest), 'more norm')} drifted {_drift(rest[0])} or less.")
            )
    if found.left:
        blocks.append(_left(found.left))
    notes = (*found.notes, *_repeated(found.updated))
    if notes:
        blocks.append(Items("Notes", notes))
    if kept is not None and kept.verification is not None:
        blocks += verification_blocks(kept.verification)
    if export is not None:
        blocks += export_blocks(export)
    if files:
        blocks.append(Facts("Written", tuple(files.items())))
    if environment:
        blocks.append(made_with(environment))
    if kept is not None:
        blocks.append(closing(kept.verification, export))
    return Document(f"bnify calibrate  {target}".rstrip(), tuple(blocks))


def _headline(found: Calibration) -> str:
    seen = f"{count(found.samples, 'sample')} in {count(found.batches, 'batch', 'batches')}"
    where = f" on {found.ranks} ranks" if found.ranks > 1 else ""
    if not found.norms:
        return f"Nothing to calibrate: {seen}{where}, and no norm keeps running mean and variance."
    updated = len(found.updated)
    rest = f"; {len(found.left)} left as it was" if found.left else ""
    if len(found.left) > 1:
        rest = f"; {len(found.left)} left as they were"
    return f"{count(updated, 'norm')} got the statistics of {seen}{where}{rest}."


def _accuracy(before: float, after: float) -> str:
    text = f"Accuracy on these batches: {before:.3f} before, {after:.3f} after."
    if after < before - _WORSE:
        text += " It is worse: the old statistics suited the weights better than these data do."
    return text


def _drifts(updated: tuple[Calibrated, ...]) -> Table:
    return Table(
        "Drift, the worst first",
        (
            Column("Norm", code=True),
            Column("Channels", numeric=True),
            Column("Values", numeric=True),
            Column("Mean moved (σ)", numeric=True),
            Column("Variance ×", numeric=True),
            Column("Std. error (σ)", numeric=True),
        ),
        tuple(
            (
                norm.name or "(root)",
                str(norm.channels),
                f"{norm.count:,}",
                _number(norm.shift),
                _number(norm.ratio),
                ratio(norm.error),
            )
            for norm in updated[:_SHOWN]
        ),
    ).without_empty_columns()


def _number(value: float) -> str:
    return ratio(value) if math.isfinite(value) else "was not finite"


def _drift(norm: Calibrated) -> str:
    return f"{_number(norm.shift)} σ in the mean and ×{_number(norm.ratio)} in the variance"


def _left(left: tuple[Calibrated, ...]) -> Table:
    rows = collapse(left, lambda norm: norm.name, lambda norm: (norm.kind, norm.notes))
    return Table(
        "Left as they were",
        (Column("Norm", code=True), Column("", short=True), Column("Why")),
        tuple((row.label or "(root)", row.count, "; ".join(row.first.notes)) for row in rows),
    ).without_empty_columns()


def _repeated(norms: tuple[Calibrated, ...]) -> Iterator[str]:
    """The notes of norms, each kind once with the first norm it holds for."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for norm in norms:
        for note in norm.notes:
            alike.setdefault(without_numbers(note), []).append((norm.name or "the norm", note))
    for (name, note), *others in alike.values():
        more = f" (and so on for {count(len(others), 'more norm')})" if others else ""
        yield f"{name}: {note}{more}"
