"""What to say about each kind of result, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bnify.plan import Edit, Plan
from bnify.report.document import (
    Block,
    Column,
    Document,
    Facts,
    Items,
    Mark,
    Paragraph,
    Table,
    Verdict,
)
from bnify.report.folds import fold_blocks, fold_headline, folds_table
from bnify.report.numbers import count
from bnify.report.plans import MANY, example, skip_table, span
from bnify.report.repeats import Row, collapse, without_numbers
from bnify.report.verdicts import verdict_of, verification_blocks


def result_document(
    result: Any,
    *,
    files: Mapping[str, str] | None = None,
    export: Any = None,
    environment: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    extra: Iterable[Block] = (),
) -> Document:
    """The report on an insertion (or another verb with a plan)."""
    plan: Plan = result.plan
    title = f"bnify {plan.verb}  {result.source.get('target') or plan.fingerprint.model}"
    folds = plan.verb == "fold"
    headline = fold_headline if folds else _headline
    blocks: list[Block] = [Paragraph(headline(plan, dry_run=dry_run)), *plan_blocks(plan)]
    if folds:
        blocks += fold_blocks(result)
    verification = result.verification
    if verification is not None:
        # Without an edit there is nothing that could drift.
        shown = verification if plan.edits else replace(verification, drift=())
        blocks += verification_blocks(shown)
    if export is not None:
        blocks += export_blocks(export)
    blocks += extra
    if files:
        blocks.append(Facts("Written", tuple(files.items())))
    if environment:
        blocks.append(made_with(environment))
    if not dry_run:
        blocks.append(closing(verification, export))
    return Document(title, tuple(blocks))


def _headline(plan: Plan, *, dry_run: bool) -> str:
    edits, skips = len(plan.edits), len(plan.skips)
    looked = count(edits + skips, "layer")
    if not edits + skips:
        return "Nothing to insert: the model runs no Linear and no Conv layer."
    why = "for the reason below" if skips == 1 else "each for the reason below"
    if not edits:
        alone = "the one layer is" if skips == 1 else f"all {looked} are"
        return f"Nothing to insert: {alone} left alone, {why}."
    verb = "would get a norm" if dry_run else "got a norm" if edits == 1 else "got norms"
    rest = f"; {skips} left alone, {why}" if skips else ""
    return f"{edits} of {looked} {verb}{rest}."


def plan_blocks(plan: Plan) -> list[Block]:
    """Which layers get what, which do not and why, and what the planner has to say."""
    blocks: list[Block] = []
    if plan.edits:
        blocks.append((folds_table if plan.verb == "fold" else _edit_table)(plan.edits))
    if plan.skips:
        blocks.append(skip_table(plan.skips, "Norm" if plan.verb == "fold" else "Layer"))
    if plan.notes:
        blocks.append(Items("Notes", plan.notes))
    return blocks


def _edit_table(edits: tuple[Edit, ...]) -> Table:
    def alike(edit: Edit) -> tuple[Any, ...]:
        return (edit.layer_type, edit.norm, edit.channels, _edit_note(edit, exact=False))

    def alike_but_channels(edit: Edit) -> tuple[Any, ...]:
        return (edit.layer_type, edit.norm, _edit_note(edit, exact=False))

    rows = collapse(edits, lambda edit: edit.layer, alike)
    if len(rows) > MANY:
        rows = collapse(edits, lambda edit: edit.layer, alike_but_channels)
    return Table(
        "Norms",
        (
            Column("Layer", code=True),
            Column("", short=True),
            Column("Type", short=True),
            Column("Norm", short=True),
            Column("Channels", numeric=True),
            Column("Note"),
        ),
        tuple(_edit_row(row) for row in rows),
    ).without_empty_columns()


def _edit_row(row: Row[Edit]) -> tuple[str, ...]:
    edit = row.first
    channels = span([item.channels for item in row.items])
    note = example([_edit_note(item, exact=True) for item in row.items])
    return (row.label or "(root)", row.count, edit.layer_type, edit.norm, channels, note)


def _edit_note(edit: Edit, *, exact: bool) -> str:
    """What is special about this norm; ``exact=False`` leaves out what differs by numbers."""
    notes = []
    if edit.at and edit.at != edit.layer:
        notes.append(f"after the activation {edit.at}")
    if edit.calls > 1:
        notes.append(f"one for each of {edit.calls} calls")
    if edit.groups:
        notes.append(count(edit.groups, "group"))
    notes += [
        word
        for word, holds in (
            ("on tokens", edit.tokens),
            ("starts as the old function", edit.init == "preserve"),
            ("starts with the data's statistics", edit.init == "stats"),
            ("bias folded into the running mean", edit.drop_bias),
            ("scale starts at 0", edit.zero_gamma),
        )
        if holds
    ]
    if edit.eps is not None:
        notes.append(f"eps {edit.eps:g}")
    if edit.momentum is not None:
        notes.append(f"momentum {edit.momentum:g}")
    if edit.detail:
        notes.append(edit.detail)
    text = "; ".join(notes)
    return text if exact else without_numbers(text)


def export_blocks(export: Any) -> list[Block]:
    """The exported file: where, which opset, how many norms are left in it."""
    facts = [("file", str(export.path)), ("opset", str(export.opset))]
    facts.append(("norms, not optimised", _norms(export.norms_before)))
    facts.append(("norms, as shipped", _norms(export.norms_after)))
    blocks: list[Block] = [Facts("ONNX", tuple(facts))]
    if export.notes:
        blocks.append(Items("About the ONNX file", tuple(export.notes)))
    if export.verification is not None:
        blocks += verification_blocks(export.verification, title="ONNX file against the model")
    return blocks


def _norms(found: Any) -> str:
    """Norms in a file, as a number or by operator."""
    if not isinstance(found, Mapping):
        return str(found)
    return ", ".join(f"{number} {kind}" for kind, number in found.items() if number) or "none"


def export_document(export: Any, *, target: str, environment: Mapping[str, Any] | None) -> Document:
    """The report on an export."""
    blocks = export_blocks(export)
    if environment:
        blocks.append(made_with(environment))
    blocks.append(verdict_of(export.verification))
    return Document(f"bnify export  {target}", tuple(blocks))


def verification_document(
    verification: Any, *, target: str, environment: Mapping[str, Any] | None
) -> Document:
    """The report on a verification of two models."""
    blocks = verification_blocks(verification)
    if environment:
        blocks.append(made_with(environment))
    blocks.append(verdict_of(verification))
    return Document(f"bnify verify  {target}", tuple(blocks))


def closing(verification: Any, export: Any) -> Verdict:
    """The verdict on everything that was verified: the last line says how it ended."""
    exported = getattr(export, "verification", None)
    if exported is not None and not exported.passed:
        return verdict_of(exported)
    closing = verdict_of(verification)
    if closing.mark is Mark.PASS and exported is not None:
        return Verdict(closing.mark, f"{closing.text}; ONNX file: {verdict_of(exported).text}")
    return closing


def made_with(environment: Mapping[str, Any]) -> Facts:
    """Versions, device and seed that a result was made with."""
    versions = environment.get("versions", {})
    shown = [f"{name} {versions[name]}" for name in ("bnify", "torch") if name in versions]
    pairs = [("versions", ", ".join(shown)), ("device", str(environment.get("device", "cpu")))]
    if environment.get("seed") is not None:
        pairs.append(("seed", str(environment["seed"])))
    hashes = environment.get("hashes", {})
    pairs += [(f"{name} SHA-256", digest[:16]) for name, digest in hashes.items() if digest]
    return Facts("Made with", tuple(pairs))
