"""A verification in words and numbers: every check with its error and its threshold."""

from __future__ import annotations

from bnify.report.document import Block, Column, Items, Mark, Paragraph, Table, Verdict
from bnify.report.numbers import count, percent, ratio, small
from bnify.verdict import Check, Drift, OutputVerdict, Verification


def verdict_of(verification: Verification | None) -> Verdict:
    """The verdict in one line, with the numbers it rests on."""
    if verification is None:
        return Verdict(Mark.NONE, "nothing was compared (--no-verify)")
    numbers = []
    if verification.algebra is not None:
        numbers.append(f"float64 algebra {small(verification.algebra)}")
    if verification.checks:
        done = sum(check.passed is True for check in verification.checks)
        numbers.append(f"{done} of {count(len(verification.checks), 'check')} passed")
    if verification.outputs:
        good = sum(output.passed for output in verification.outputs)
        numbers.append(f"{good} of {count(len(verification.outputs), 'output')} within budget")
    numbers.append(f"on {verification.device}")
    mark = Mark.PASS if verification.passed else Mark.FAIL
    return Verdict(mark, ", ".join(numbers))


def verification_blocks(verification: Verification, *, title: str = "Verification") -> list[Block]:
    """Checks, outputs, train-mode drift and the inputs that were tried."""
    blocks: list[Block] = []
    if verification.checks:
        blocks.append(_check_table(verification.checks, title))
    if verification.outputs:
        heading = f"{title}: outputs" if verification.checks else title
        blocks.append(_output_table(verification.outputs, heading))
    if verification.first_divergent:
        blocks.append(Paragraph(f"First over its error budget: {verification.first_divergent}."))
    if verification.drift:
        blocks.append(_drift(verification.drift))
    if verification.inputs:
        blocks.append(Paragraph("Inputs tried: " + ", ".join(verification.inputs) + "."))
    if verification.notes:
        blocks.append(Items("About the numbers", verification.notes))
    return blocks


def _check_table(checks: tuple[Check, ...], title: str) -> Table:
    return Table(
        title,
        (
            Column("Check"),
            Column("Error", numeric=True),
            Column("Threshold", numeric=True),
            Column("Result", short=True),
            Column("Detail"),
        ),
        tuple(
            (c.name, small(c.error), small(c.threshold), _mark(c.passed), c.detail) for c in checks
        ),
    ).without_empty_columns()


def _output_table(outputs: tuple[OutputVerdict, ...], title: str) -> Table:
    return Table(
        title,
        (
            Column("Output", code=True),
            Column("Rel. L2", numeric=True),
            Column("Max abs", numeric=True),
            Column("Allclose at", numeric=True),
            Column("Top-1", numeric=True),
            Column("Own error", numeric=True),
            Column("Result", short=True),
            Column("Detail"),
        ),
        tuple(
            (
                output.name,
                small(output.rel_l2),
                small(output.max_abs),
                small(output.tolerance),
                percent(output.top1),
                f"{ratio(output.budget_ratio)}×" if output.budget_ratio is not None else "",
                _mark(output.passed),
                output.detail,
            )
            for output in outputs
        ),
    ).without_empty_columns()


def _mark(passed: bool | None) -> str:
    if passed is None:
        return Mark.UNDECIDED.lower()
    return "pass" if passed else Mark.FAIL.value


def _drift(drift: tuple[Drift, ...]) -> Block:
    if len(drift) == 1:
        one = drift[0]
        return Paragraph(
            f"In train mode the outputs move by {percent(one.rel_l2)} (relative L2) at batch size "
            f"{one.batch_size}: there the new norms use the statistics of the batch."
        )
    return Table(
        "Train-mode drift: how far the outputs move while the norms use batch statistics",
        (Column("Batch size", numeric=True), Column("Rel. L2", numeric=True)),
        tuple((str(one.batch_size), percent(one.rel_l2)) for one in drift),
    )
