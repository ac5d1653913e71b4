"""Why a layer is left alone: "no" is a value with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Reason(StrEnum):
    """Why a layer is left alone. The order of precedence is that of ``bnify.insertion.rules``."""

    EXCLUDED = "excluded"
    NEVER_CALLED = "never-called"
    INSIDE_FUSED_MODULE = "inside-fused-module"
    CUSTOM_FORWARD = "custom-forward"
    NO_BATCH_AXIS = "no-batch-axis"
    COMPLEX_VALUES = "complex-values"
    FROZEN = "frozen"
    ATTENTION_PROJECTION = "attention-projection"
    WEIGHT_STANDARDISED = "weight-standardised"
    TIED_WEIGHTS = "tied-weights"
    CALLED_MORE_THAN_ONCE = "called-more-than-once"
    OUTPUT_HEAD = "output-head"
    ALREADY_NORMED = "already-normed"
    GATE = "gate"
    ONE_VALUE_PER_CHANNEL = "one-value-per-channel"
    PRE_NORM = "pre-norm"
    TOKEN_LAYER = "token-layer"
    FUNCTIONAL_ACTIVATION = "functional-activation"

    @property
    def sentence(self) -> str:
        """The reason in words, one sentence without a full stop."""
        return _SENTENCES[self]


_SENTENCES: Mapping[Reason, str] = {
    Reason.EXCLUDED: "left out by include, exclude or only",
    Reason.NEVER_CALLED: "the forward pass never runs this layer",
    Reason.INSIDE_FUSED_MODULE: "another module reads the weight itself, so a norm on the layer "
    "would never run",
    Reason.CUSTOM_FORWARD: "the layer's own forward computes more after its weight is applied",
    Reason.ATTENTION_PROJECTION: "query, key, value or output projection of attention",
    Reason.WEIGHT_STANDARDISED: "the weight is standardised at every call: norm-free by design",
    Reason.TIED_WEIGHTS: "the weight is shared, and one norm would mix populations",
    Reason.CALLED_MORE_THAN_ONCE: "one norm would mix the populations of several calls",
    Reason.FROZEN: "the layer is frozen and frozen layers were to be skipped",
    Reason.OUTPUT_HEAD: "an output is reached without another weighted layer",
    Reason.ALREADY_NORMED: "a norm follows already",
    Reason.GATE: "the value only steers a gate that multiplies another value",
    Reason.ONE_VALUE_PER_CHANNEL: "statistics over a single value per channel are meaningless",
    Reason.PRE_NORM: "the block normalizes its input, and its output joins a residual or a concat",
    Reason.TOKEN_LAYER: "a Linear on tokens; consider layer or rms norm, or include it",
    Reason.FUNCTIONAL_ACTIVATION: "the activation is no module called once, so no norm can follow "
    "it",
    Reason.NO_BATCH_AXIS: "the layer runs on a value without a batch axis",
    Reason.COMPLEX_VALUES: "the layer computes complex values, and norms are for real ones",
}
