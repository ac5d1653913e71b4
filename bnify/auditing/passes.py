"""Both passes over the data: norms in eval mode, then the same batch with norms in train mode."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from bnify.auditing.batches import Batch, labels_for
from bnify.auditing.owners import Norms
from bnify.auditing.probe import Probe, run_once
from bnify.auditing.scores import (
    Distance,
    Tally,
    main_output,
    nonfinite,
    predictions,
    why_no_classes,
)
from bnify.borrow import evaluating
from bnify.errors import PlanError


class Passes:
    """Both passes over all batches.

    Args:
        norms: The norms of the working copy.
        batches: The batches.

    Attributes:
        eval: What reached the norms in eval mode.
        train: What reached them with all norms in train mode.
        tally: What the model said in eval mode, against labels and against train mode.
        train_tally: What it said in train mode of the norms, against labels.
        distance: Between the outputs of both.
        labels: Of the batches that have some.
        said: Predictions in train mode of the norms.
        nonfinite: Number of outputs in eval mode that are NaN or infinite.
        why_not: Why there are no predictions.
    """

    def __init__(self, norms: Norms, batches: Iterable[Batch]) -> None:
        self.norms = norms
        self.batches = tuple(batches)
        self.eval, self.train = Probe(norms, train=False), Probe(norms, train=True)
        self.tally, self.train_tally, self.distance = Tally(), Tally(), Distance()
        self.labels: list[Tensor] = []
        self.said: list[Tensor] = []
        self.nonfinite = 0
        self.why_not = ""

    def run(self) -> None:
        """Run every batch in both modes, and compare.

        Raises:
            PlanError: The model raises on one, or its outputs are not finite in either mode.
        """
        for batch in self.batches:
            got = run_probed(self.norms.working, self.eval, batch)
            want = run_probed(self.norms.working, self.train, batch)
            bad, train_bad = nonfinite(got), nonfinite(want)
            if bad and train_bad:
                raise PlanError(
                    f"{bad} outputs are NaN or infinite on batch {batch.number} of the data, in "
                    "eval mode and with batch statistics too",
                    hint="not the running statistics: look at the weights and at the data",
                )
            self.nonfinite += bad
            self.compare(batch, got, want)

    def compare(self, batch: Batch, got: Tensor | None, want: Tensor | None) -> None:
        """Count predictions of one batch, or how far the outputs are apart."""
        self.why_not = self.why_not or why_no_classes(got, batch)
        if got is None or want is None:
            return
        self.distance.add(got, want)
        if self.why_not:
            return
        labels = labels_for(batch, tuple(got.shape))
        self.said.append(predictions(want))
        self.tally.add(predictions(got), labels, self.said[-1])
        self.train_tally.add(self.said[-1], labels, None)
        if labels is not None:
            self.labels.append(labels)


def run_probed(
    model: nn.Module, probe: Probe | None, batch: Batch, *, number: int | None = None
) -> Tensor | None:
    """The main output of one batch, in eval mode.

    Args:
        model: The model.
        probe: Sees the norms; None for none.
        batch: The batch.
        number: Which random state forward() draws from; None for the batch's own, the same in
            every pass.

    Raises:
        PlanError: The model raised; the batch is named.
    """
    number = batch.number if number is None else number
    try:
        with evaluating(model):
            if probe is None:
                return main_output(run_once(model, batch.call, number))
            with probe.attached(), probe:
                return main_output(run_once(model, batch.call, number))
    except Exception as error:  # forward() is user code
        lines = str(error).strip().splitlines() or ["no message"]
        raise PlanError(
            f"the model raised {type(error).__name__} on batch {batch.number} of the data: "
            f"{lines[0]}",
            hint="let the data yield batches of the same kind as the example inputs",
        ) from error
