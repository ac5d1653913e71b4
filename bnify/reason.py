"""Why a layer is left alone: "no" is a value with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Reason(StrEnum):
    """Why a layer is left alone.

    Those of insertion come first, in the order of precedence of ``bnify.insertion.rules``.
    """

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

    # Folding.
    BATCH_STATISTICS = "batch-statistics"
    BAD_STATISTICS = "bad-statistics"
    EXTRA_COMPUTATION = "extra-computation"
    HOOK_ON_NORM = "hook-on-norm"
    IN_FORWARD = "in-forward"
    ANOTHER_CONSUMER = "another-consumer"
    VALUE_IS_OUTPUT = "value-is-output"
    SHARED_LAYER = "shared-layer"
    COMPUTED_WEIGHT = "computed-weight"
    WRONG_AXIS = "wrong-axis"
    PADDED_FORWARD = "padded-forward"
    PADDED_CONSTANT = "padded-constant"
    NONLINEARITY_BETWEEN = "nonlinearity-between"
    NO_ABSORBER = "no-absorber"
    NOT_PLANNED = "not-planned"
    VERIFICATION_FAILED = "verification-failed"

    @property
    def folding(self) -> bool:
        """Whether it is a reason not to fold a norm; the others are for insertions."""
        return _PLACES[self] >= _PLACES[Reason.BATCH_STATISTICS] or self in _BOTH

    @property
    def insertion(self) -> bool:
        """Whether it is a reason to put no norm behind a layer."""
        return _PLACES[self] < _PLACES[Reason.BATCH_STATISTICS]

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
    Reason.TIED_WEIGHTS: "the weight is shared with another layer",
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
    Reason.BATCH_STATISTICS: "its statistics are those of the values at hand, in eval mode too",
    Reason.BAD_STATISTICS: "its statistics give no finite scale and shift",
    Reason.EXTRA_COMPUTATION: "the norm's module computes more than the norm",
    Reason.HOOK_ON_NORM: "a hook on the norm would see other values",
    Reason.IN_FORWARD: "it is written out in a forward, which only emit='graph' can drop",
    Reason.ANOTHER_CONSUMER: "somebody else reads the value as well",
    Reason.VALUE_IS_OUTPUT: "the value is an output of the model",
    Reason.SHARED_LAYER: "the layer is called more than once, and not always for this norm",
    Reason.COMPUTED_WEIGHT: "the weight is computed at every call and cannot be baked in",
    Reason.WRONG_AXIS: "the norm's channels are not those of the layer",
    Reason.PADDED_FORWARD: "the next convolution pads with zeros, which the shift would have to be",
    Reason.PADDED_CONSTANT: "a padded constant is not the same in every channel",
    Reason.NONLINEARITY_BETWEEN: "something nonlinear stands between the norm and every layer",
    Reason.NO_ABSORBER: "no layer beside the norm can take it",
    Reason.NOT_PLANNED: "the plan that is carried out does not fold it",
    Reason.VERIFICATION_FAILED: "folded, measured, found wrong and undone",
}

_PLACES: Mapping[Reason, int] = {reason: place for place, reason in enumerate(Reason)}
_BOTH = frozenset({Reason.TIED_WEIGHTS, Reason.WEIGHT_STANDARDISED})
