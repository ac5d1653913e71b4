"""BN309: running statistics that take in batches which are not trained on."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class StatisticsContamination(Rule):
    """A norm is in train mode in passes that train nothing, and its statistics take them in.

    What it checks:
        In the first steps of a watched training loop, every call of a norm that tracks
        statistics: train mode inside ``no_grad`` or ``inference_mode``. What activation
        checkpointing runs twice is told apart. From then on no pass is looked at. The count of
        updates between two optimizer steps is: it stands out where it is at least 5 more than
        twice that of other steps, once or twice in a row, if three steps in four are alike. That
        is a validation in train mode of 6 batches or more, with ``no_grad`` or without; of
        k + 5 or more where gradients are accumulated over k batches. And where statistics move
        for ten steps or more, while scale and shift take gradients and get none, the norm always
        runs under ``no_grad``.

    Why it is bad:
        A forward pass in train mode updates running statistics, whatever the gradients do. With
        validation batches in them the validation score is too good; with batches of noise,
        duplicates or another source, eval mode has the statistics of nothing that was trained.

    Example:
        ``with torch.no_grad(): validate(model)`` without ``model.eval()``; a frozen backbone under
        ``no_grad`` that ``model.train()`` put back into train mode.

    How to fix it:
        ``model.eval()`` around such passes and ``model.train()`` after them. Where it is meant, as
        in a momentum encoder: ``bnify.watch(..., ignore=["BN309"])``.

    Fix safety:
        By hand. Statistics recover by themselves in some 1/momentum further steps.

    Source:
        PyTorch documentation, "Autograd mechanics": ``model.eval()`` is independent of ``no_grad``.
        The limits were chosen such that uneven gradient accumulation stays below them.
    """

    code = "BN309"
    name = "stats-contamination"
    severity = Severity.WARNING
    tiers = ("T3",)
    needs = needs(Need.LOOP)
    fix = "model.eval() around passes that train nothing"
    cost = "eval mode has statistics of batches that were not trained on"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        observed = subject.observed
        if observed is None:
            return
        for path, calls in observed.calls.items():
            if calls.without_gradient:
                yield self.finding(
                    path,
                    f"in train mode under no_grad or inference_mode in {calls.without_gradient} "
                    f"of {calls.total} calls",
                    {"without_gradient": calls.without_gradient, "calls": calls.total},
                )
        for path, burst in observed.bursts.items():
            yield self.finding(
                path,
                f"its statistics were written {burst.writes} times after optimizer step "
                f"{burst.step - 1}, and at most {burst.usual} times after others",
                {"writes": burst.writes, "usual": burst.usual, "before_step": burst.step},
            )
        for path, steps in observed.ungraded.items():
            yield self.finding(
                path,
                f"its statistics moved in {steps} steps in which no gradient reached its scale and "
                "shift, though they take one",
                {"steps": steps},
            )
