"""BN301: scale and shift are frozen, statistics go on moving."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class HalfFrozen(Rule):
    """A batch norm takes no gradient, and is in train mode with running statistics.

    What it checks:
        Batch norms whose scale and shift have ``requires_grad=False`` while the module is in train
        mode and tracks statistics. Look-alikes with constant statistics (FrozenBatchNorm2d) and
        norms that are in eval mode on purpose are fine. So are, in a training loop, norms that
        took gradients in the last ten steps, or in an interval, if that is shorter: the
        discriminator of a GAN takes none while the generator is trained.

    Why it is bad:
        Freezing parameters does not freeze statistics. In fine-tuning each batch normalizes the
        frozen backbone anew and overwrites the pretrained statistics, so the features that were
        to stay fixed move, most of all with small batches.

    Example:
        ``for p in backbone.parameters(): p.requires_grad = False`` followed by ``model.train()``.

    How to fix it:
        Keep the norm in eval mode, and again after every ``model.train()``: ``--fix`` gives such
        norms a ``train()`` that does nothing.

    Fix safety:
        Safe: eval mode computes the same; train mode then computes what eval mode does.

    Source:
        PyTorch documentation of ``nn.Module.train`` and of ``requires_grad_``.
    """

    code = "BN301"
    name = "half-frozen"
    severity = Severity.ERROR
    tiers = ("T1", "T3")
    needs = needs(Need.MODULES)
    fix = "keep it in eval mode, after model.train() too"
    safety = Safety.SAFE
    cost = "training overwrites the statistics of layers that were to stay fixed"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        trained = subject.observed.trained if subject.observed else frozenset()
        for path in half_frozen(subject):
            if path in trained:
                continue
            yield self.finding(
                path, "weight and bias take no gradient, and the running statistics move"
            )


def half_frozen(subject: Subject) -> Iterator[str]:
    """Paths of norms that are frozen by half."""
    if subject.live is None:
        return
    for norm in subject.live.norms:
        module = norm.module
        parameters = [p for p in module._parameters.values() if p is not None]
        if (
            norm.tracked
            and not norm.frozen
            and module.training
            and getattr(module, "momentum", None) != 0
            and parameters
            and not any(p.requires_grad for p in parameters)
        ):
            yield norm.path
