"""What to say about a fold: what went where, what it saves, what it does to the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from bnify.plan import Edit, Plan
from bnify.report.document import Block, Column, Items, Paragraph, Table
from bnify.report.numbers import change, count, ratio, seconds, short
from bnify.report.plans import MANY, example, span
from bnify.report.repeats import Row, collapse, without_numbers

#: How an edit's kind is told, in the order in which they are counted.
_KINDS: Final = {"fold-backward": "backward", "fold-forward": "forward", "merge": "merge"}
_COUNTED: Final = {"backward": "backwards", "forward": "forwards", "merge": "merged"}
_ALL: Final = {
    "backward": ("backwards, into what makes its input", "backwards, into what makes their input"),
    "forward": ("forwards, into what reads its result", "forwards, into what reads their result"),
    "merge": ("into a branch beside it", "into a branch beside them"),
}
#: Norms that are gone once they are folded; of all others the scale and shift goes.
_WHOLE: Final = frozenset({"batch", "frozen", "instance"})


def fold_headline(plan: Plan, *, dry_run: bool) -> str:
    """How many norms are folded, in a sentence or two."""
    norms = [edit for edit in plan.edits if edit.norm]
    left = len(plan.skips)
    affines = plan.options.get("affines")
    noun = "norm or affine map" if affines else "norm"
    nouns = "norms and affine maps" if affines else "norms"
    if not plan.edits and not left:
        return f"Nothing to fold: no {noun} runs in this model's forward pass."
    why = "for the reason below" if left == 1 else "each for the reason below"
    if not plan.edits:
        alone = f"the one {noun} is" if left == 1 else f"all {left} {nouns} are"
        return f"Nothing to fold: {alone} left alone, {why}."
    sentences = []
    total = len(norms) + left
    if total:
        verb = "would be folded" if dry_run else "is folded" if len(norms) == 1 else "are folded"
        which = f"{len(norms)} of {count(total, noun, nouns)}"
        if not left:
            which = f"The one {noun}" if total == 1 else f"All {count(total, noun, nouns)}"
        kinds = _by_kind(norms) if norms else ""
        rest = f"; {left} left alone, {why}" if left else ""
        sentences.append(f"{which} {verb}{kinds}{rest}.")
    of_these = _of_these(norms)
    if of_these:
        sentences.append(f"Of the folded, {of_these}.")
    layers = len(plan.edits) - len(norms)
    if layers:
        verb = "would be" if dry_run else "is" if layers == 1 else "are"
        into = "another" if layers == 1 else "others"
        sentences.append(f"{count(layers, 'layer')} {verb} merged into {into}.")
    return " ".join(sentences)


def _by_kind(edits: Sequence[Edit]) -> str:
    """Where norms went: ``" (18 backwards, 2 forwards)"``."""
    found = Counter(_KINDS.get(edit.kind, edit.kind) for edit in edits)
    if len(found) == 1:
        one, several = _ALL[next(iter(found))]
        return f" {one if len(edits) == 1 else several}"
    kinds = ", ".join(f"{found[kind]} {word}" for kind, word in _COUNTED.items() if found[kind])
    return f" ({kinds})" if kinds else ""


def _of_these(edits: Sequence[Edit]) -> str:
    """Which folds are not of whole norms."""
    maps = sum(edit.norm == "affine" for edit in edits)
    tails = sum(edit.norm not in (*_WHOLE, "affine") for edit in edits)
    found = []
    if maps:
        what = "is a scale or shift" if maps == 1 else "are scales or shifts"
        found.append(f"{maps} {what} without a norm")
    if tails:
        stay = "1 norm stays" if tails == 1 else f"{tails} norms stay"
        found.append(f"{stay} without scale and shift")
    return ", and ".join(found)


def folds_table(edits: tuple[Edit, ...]) -> Table:
    """What goes where; edits that are alike share a row."""

    def alike(edit: Edit) -> tuple[Any, ...]:
        return (edit.channels, *but_channels(edit))

    def but_channels(edit: Edit) -> tuple[Any, ...]:
        into = tuple(without_numbers(path) for path in edit.into)
        return (edit.kind, _type(edit), into, without_numbers(edit.detail))

    rows = collapse(edits, lambda edit: edit.layer, alike)
    if len(rows) > MANY // 2:
        rows = collapse(edits, lambda edit: edit.layer, but_channels)
    return Table(
        "Folded",
        (
            Column("Norm", code=True),
            Column("", short=True),
            Column("Kind", short=True),
            Column("Type", short=True),
            Column("Channels", numeric=True),
            Column("Into", code=True),
            Column("Note"),
        ),
        tuple(_row(row) for row in rows),
    ).without_empty_columns()


def _row(row: Row[Edit]) -> tuple[str, ...]:
    edit = row.first
    return (
        row.label or "(root)",
        row.count,
        _KINDS.get(edit.kind, edit.kind),
        _type(edit),
        span([item.channels for item in row.items]) if edit.channels else "",
        _into(row),
        example([_note(item) for item in row.items]),
    )


def _type(edit: Edit) -> str:
    return edit.layer_type or edit.norm


def _into(row: Row[Edit]) -> str:
    """The layers that took the norms of a row, numbers of one path as in the row's own label."""
    paths = dict.fromkeys(path or "(root)" for edit in row.items for path in edit.into)
    return ", ".join(part.label for part in collapse(paths, lambda path: path, lambda _: None))


def _note(edit: Edit) -> str:
    calls = f"{edit.calls} calls" if edit.calls > 1 else ""
    return "; ".join(filter(None, (calls, edit.detail)))


def fold_blocks(result: Any) -> list[Block]:
    """What the fold saves and what it does to the weights, where that was counted."""
    figures = getattr(result, "figures", None)
    if figures is None or not (result.plan.edits or result.latency):
        return []
    blocks: list[Block] = []
    rows = [*_cost_rows(figures), *_timed_rows(result)]
    if rows:
        columns = (
            Column(""),
            Column("Before", numeric=True),
            Column("After", numeric=True),
            Column("Change", numeric=True),
        )
        blocks.append(Table("Before and after", columns, tuple(rows)))
    blocks += _remarks(result)
    return blocks


def _cost_rows(figures: Any) -> list[tuple[str, ...]]:
    before, after = figures.before, figures.after
    if before is None or after is None:
        return []
    per = figures.samples or 1
    call = "FLOPs a sample" if figures.samples else "FLOPs a call"
    rows: list[tuple[str, ...]] = [("Norms that run", str(before.norms), str(after.norms), "")]
    rows.append(("Linear and conv layers that run", str(before.weighted), str(after.weighted), ""))
    old, new = before.parameters, after.parameters
    rows.append(("Parameters", f"{old:,}", f"{new:,}", change(old, new)))
    old, new = before.flops / per, after.flops / per
    rows.append((call, short(old), short(new), change(old, new)))
    return rows


def _timed_rows(result: Any) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in result.latency:
        name = f"Latency, {one.name}"
        rows.append((name, seconds(one.before), seconds(one.after), f"{ratio(one.ratio)}×"))
    if result.onnx is not None:
        old, new = result.onnx.before, result.onnx.after
        rows.append(("Operators in the ONNX file", str(old.nodes), str(new.nodes), ""))
        rows.append(("Norms in the ONNX file", str(old.norms), str(new.norms), ""))
    return rows


def _remarks(result: Any) -> list[Block]:
    """What has to be known of the numbers, and of the range of the weights."""
    figures = result.figures
    blocks: list[Block] = []
    remarks = []
    if result.latency:
        rounds = min(one.rounds for one in result.latency)
        remarks.append(
            f"Latencies are medians of at least {count(rounds, 'call')} of each, in turns."
        )
    if result.onnx is not None:
        remarks.append(
            "ONNX before: the exporter's own optimised file of the original; it folds norms too."
        )
    if remarks:
        blocks.append(Paragraph(" ".join(remarks)))
    notes = (*figures.notes, *result.notes)
    if notes:
        blocks.append(Items("Not measured", notes))
    if figures.magnified is not None:
        name, factor = figures.magnified
        text = "no weight grew by more than rounding"
        if factor >= 1.001:
            text = f"the weight that grew most is {name}, by a factor of {ratio(factor)}"
        blocks.append(Paragraph(f"Range: {text}."))
    return blocks + _warnings(figures.warnings)


def _warnings(warnings: Sequence[Any]) -> list[Block]:
    rows = collapse(warnings, lambda one: one.layer, lambda one: one.kind)
    if not rows:
        return []
    return [Items("Warnings", tuple(map(_warning, rows)))]


def _warning(row: Row[Any]) -> str:
    """One warning for tensors that are alike."""
    sentence = example([one.sentence for one in row.items])
    return f"{row.label} {row.count}: {sentence}" if row.count else sentence
