"""BN212: lazy modules that never ran."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class LazyUninitialised(Rule):
    """A norm, or a layer that may stand before one, has parameters without a shape yet.

    What it checks:
        Whether a parameter or buffer of a norm, a Linear or a convolution is still
        uninitialised, as those of ``nn.LazyBatchNorm2d`` are before the first forward pass.

    Why it is bad:
        An optimizer built now never sees the real parameters, a state dict has no statistics, and
        DDP refuses the model.

    Example:
        ``nn.LazyBatchNorm2d()`` in a model whose optimizer is built right after the model.

    How to fix it:
        One dry run on an example before anything else: ``model(*inputs)``.

    Fix safety:
        Safe: it fills in shapes and draws initial values. Do it in eval mode, or statistics move.

    Source:
        PyTorch documentation of ``torch.nn.modules.lazy.LazyModuleMixin``.
    """

    code = "BN212"
    name = "lazy-uninitialised"
    severity = Severity.ERROR
    tiers = ("T1",)
    needs = needs(Need.MODULES)
    fix = "run the model once on an example, in eval mode, before the optimizer is built"
    cost = "the optimizer never sees these parameters"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a module."""
        live = subject.live
        if live is None:
            return
        for path, names in live.lazy.items():
            kind = type(live.modules[path]).__name__
            yield self.finding(
                path, f"{', '.join(names)} of {kind} have no shape yet", {"tensors": list(names)}
            )
