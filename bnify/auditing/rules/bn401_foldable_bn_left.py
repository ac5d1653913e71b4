"""BN401: a model for inference still runs norms that could be in the weights."""

from __future__ import annotations

from collections.abc import Iterator

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class FoldableNormLeft(Rule):
    """A model in eval mode, or a file, runs norms that exact algebra puts into a layer beside them.

    What it checks:
        In eval mode a batch norm is ``y = s*x + t`` by channel, and a layer in front of it or
        behind it can take both numbers over. A live model: every norm that ``bnify fold`` would
        remove. An ONNX file: every norm whose input comes from one Conv, ConvTranspose, Gemm or
        MatMul with stored weights that nobody else reads, channel for channel.

    Why it is bad:
        It is no fault. Each norm is a pass over its activation that computes nothing the weights
        could not; runtimes that fuse norms do so for some of them only.

    Example:
        A resnet18 in eval mode has 20 norms, and ``bnify fold`` removes all 20.

    How to fix it:
        ``bnify fold SPEC --weights FILE -o out/``, or ``bnify.fold(model, inputs)``. A file is
        not rewritten: fold the model, then export it.

    Fix safety:
        Safe: the function of eval mode stays the same, and the fold is verified. The folded model
        is for inference; train the original.

    Source:
        Jacob et al. (2018), section 3.2: batch norm folding for inference.
    """

    code = "BN401"
    name = "foldable-bn-left"
    severity = Severity.INFO
    tiers = ("T1", "T0x")
    needs = needs(Need.EVAL, Need.ONNX)
    fix = "bnify fold"
    safety = Safety.SAFE
    cost = "a pass over the activation that the weights could make"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        if subject.onnx is not None:
            for fold in subject.onnx.folds:
                state = fold.norm.state
                channels = state.channels if state is not None else 0
                yield self.finding(
                    fold.norm.path,
                    f"{fold.layer} in front of it can take its {channels} channels",
                    {"into": [fold.layer], "operator": fold.op.kind, "channels": channels},
                    fix="bnify fold on the model, then bnify export",
                )
        elif subject.live is not None and subject.live.folded is not None:
            for edit in subject.live.folded.edits:
                into = ", ".join(layer or "the root" for layer in edit.into)
                where = "behind" if edit.kind == "fold-forward" else "in front of"
                yield self.finding(
                    edit.layer,
                    f"{into} {where} it can take its {edit.channels} channels",
                    {"into": list(edit.into), "kind": edit.kind, "channels": edit.channels},
                )
