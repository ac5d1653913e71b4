"""BN213: a deep network without any norm."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

_LAYERS = 8


class NoNormalization(Rule):
    """Eight or more weighted layers, and nothing that keeps their scale.

    What it checks:
        Whether a model with at least 8 weighted layers runs no norm of any kind, no scale on its
        residual branches, and no weight standardisation. In preview: off unless selected.

    Why it is bad:
        The scale of activations and gradients grows or shrinks with depth, which narrows the
        learning rates and initialisations that work.

    Example:
        vgg16 without batch norm: 16 layers, trained from a shallower network's weights.

    How to fix it:
        ``bnify insert``, with ``init="preserve"`` for a trained model.

    Fix safety:
        It changes training; with ``preserve`` eval mode stays as it is.

    Source:
        Ioffe & Szegedy (2015); Brock, De & Smith (2021), "Characterizing signal propagation", for
        what networks without norms do instead.
    """

    code = "BN213"
    name = "no-normalization"
    severity = Severity.INFO
    tiers = ("T1",)
    needs = needs(Need.FORWARD)
    default = False
    fix = "bnify insert"
    cost = "few learning rates and initialisations work"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """At most one finding, for the model."""
        live = subject.live
        if live is None or live.draft is None or live.uses or live.norms:
            return
        from bnify.folding.sources import find_sources

        layers = sum(
            node.op == "call_function" and live.draft.layer(node) is not None
            for node in live.draft.graph.nodes
        )
        scaled = find_sources(live.draft, affines=True)
        if layers >= _LAYERS and not scaled:
            yield self.finding("", f"{layers} weighted layers and no norm", {"layers": layers})
