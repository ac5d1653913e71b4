"""Why a layer gets no norm: one function a reason, asked in the order of ``RULES``.

Each rule returns None or the refusal. Rules marked ``policy`` can be overridden by ``include``;
the others state what cannot be done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import fx, nn

from bnify import ops
from bnify.capture import Captured
from bnify.graph import Facts
from bnify.insertion.options import InsertOptions
from bnify.insertion.sites import Candidate, activation_call, effective_rows
from bnify.insertion.walk import (
    activation_after,
    join_after,
    norm_after,
    norm_before,
    same_elements,
)
from bnify.layers import carries_norm
from bnify.norms import PER_CHANNEL_KINDS, group_count
from bnify.reason import Reason


@dataclass(frozen=True, slots=True)
class Context:
    """What a rule may ask besides the layer itself."""

    captured: Captured
    facts: Facts
    options: InsertOptions
    batch_size: int
    norm: str  # resolved for the layer at hand, never "auto"


def never_called(layer: Candidate, _context: Context) -> str | None:
    """The forward pass does not run it, or not in both modes: its norm would never learn."""
    if layer.calls and layer.train_calls == 0:
        return "train mode did not run it: it is for eval mode only, or dropped at random"
    if layer.calls or layer.operators:
        return None
    return "it runs in train mode only" if layer.train_calls else ""


def inside_fused_module(layer: Candidate, context: Context) -> str | None:
    """Another module reads the weight; the layer itself, if there is one, is never called."""
    if layer.calls:
        return None
    if isinstance(layer.module, nn.RNNBase | nn.RNNCellBase):
        return f"the matrices of {type(layer.module).__name__} run inside one operator"
    reader = layer.operators[0].node.meta["module"]
    kind = type(context.captured.model.get_submodule(reader)).__name__
    return f"read by {f'{reader} ({kind})' if reader else kind}"


def custom_forward(layer: Candidate, context: Context) -> str | None:
    """What the layer returns is not what its weight computes."""
    if hasattr(layer.module, "norm"):
        return "it has an attribute 'norm' of its own, which the new norm would replace"
    returned = [c.outputs for c in layer.calls]
    own = {op.node for op in layer.inside}
    for outputs in returned:
        if len(outputs) != 1:
            return f"it returns {len(outputs)} tensors"
        node: fx.Node | None = outputs[0]
        while node is not None and node not in own and not context.captured.composite:
            node = ops.first(node) if context.facts.name[node] in ops.VIEWS else None
        if node not in own:
            last = context.facts.name[outputs[0]]
            return f"its own forward ends in {last}, not in its weight"
    return None


def frozen(layer: Candidate, context: Context) -> str | None:
    """Its weight takes no gradient, and ``skip_frozen`` was asked for."""
    return "" if context.options.skip_frozen and is_frozen(layer) else None


def is_frozen(layer: Candidate) -> bool:
    """Whether no parameter of the layer takes a gradient."""
    return layer.module is not None and not any(p.requires_grad for p in layer.module.parameters())


def no_batch_axis(layer: Candidate, _context: Context) -> str | None:
    """A Linear on a vector, or a convolution on an unbatched image."""
    shape = layer.value.meta["shape"]
    least = 2 if layer.linear else len(layer.module.kernel_size) + 2  # type: ignore[union-attr, arg-type]
    return f"its output has shape {list(shape)}" if len(shape) < least else None


def complex_values(layer: Candidate, _context: Context) -> str | None:
    """Torch's norms take real values only."""
    return "" if layer.value.meta["dtype"].is_complex else None


def attention_projection(layer: Candidate, context: Context) -> str | None:
    """Query, key, value or output projection."""
    return "" if any(op.node in context.facts.attention for op in layer.operators) else None


def weight_standardised(layer: Candidate, context: Context) -> str | None:
    """The weight is centred or scaled by its own statistics at every call."""
    for op in layer.operators:
        pending, seen = [op.weight], {op.weight}
        while pending:
            node = pending.pop()
            name = context.facts.name[node]
            if name in ops.NORMS or name in ops.REDUCTIONS - {"sum"}:
                return f"computed with {name}"
            for source in ops.sources(node):
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
    return None


def tied_weights(layer: Candidate, context: Context) -> str | None:
    """The same weight under another name."""
    if not layer.tied or context.options.per_call:
        return None
    return "shared with " + ", ".join(layer.tied[:3])


def called_more_than_once(layer: Candidate, context: Context) -> str | None:
    """Several calls in one forward pass, in eval or in train mode."""
    if context.options.per_call and layer.train_calls in (None, len(layer.calls)):
        return None
    calls = max(len(layer.calls), layer.train_calls or 0)
    if calls < 2:
        return None
    if context.options.per_call:
        return f"{len(layer.calls)} calls in eval mode, {layer.train_calls} in train mode"
    return f"{calls} calls; per_call gives each its own norm"


def output_head(layer: Candidate, context: Context) -> str | None:
    """No weighted layer after it on some path to an output."""
    return "" if any(c.outputs[0] in context.facts.heads for c in layer.calls) else None


def already_carries(layer: Candidate, context: Context) -> str | None:
    """A norm that bnify put there: no option puts a second one on top."""
    if layer.module is not None and carries_norm(layer.module):
        return "bnify put one there"
    at = activation_after(context.facts, layer.value) if context.options.after_act else None
    if at is not None and carries_norm(context.captured.model.get_submodule(at.meta["module"])):
        return f"bnify put one on {at.meta['module']}"
    return None


def already_normed(layer: Candidate, context: Context) -> str | None:
    """A norm follows through views, dropout, pooling and at most one activation."""
    for call in layer.calls:
        norm = norm_after(context.facts, call.outputs[0])
        if norm is not None:
            return f"by {norm.meta['module'] or context.facts.name[norm]}"
    return None


def gate(layer: Candidate, context: Context) -> str | None:
    """Squeeze-and-excitation and its like, from the squeeze layer on."""
    return "" if all(c.outputs[0] in context.facts.gates for c in layer.calls) else None


def one_value_per_channel(layer: Candidate, context: Context) -> str | None:
    """The norm has nothing to take a variance over."""
    shape = layer.value.meta["shape"]
    if context.norm not in PER_CHANNEL_KINDS:
        values = shape[-1] if layer.linear else math.prod(shape[1:])
        groups = 1
        if context.norm == "group":
            groups = context.options.groups or group_count(shape[layer.axis], linear=layer.linear)
        single = f"{context.norm} norm of a single value is a constant"
        return single if values == groups else None
    spatial = math.prod(shape[2:]) if not layer.linear else math.prod(shape[1:-1])
    if spatial == 1 and (not layer.linear or context.norm == "instance"):
        return f"its output is {'×'.join(map(str, shape[1:]))}; another kind of norm would do"
    rows = effective_rows(layer, shape[0], context.batch_size)
    if context.norm != "instance" and rows < 2:
        return f"{rows} value a channel at batch size {context.batch_size}"
    return None


def pre_norm(layer: Candidate, context: Context) -> str | None:
    """Its block is normalized at the entrance: ResNet v2, DenseNet, ConvNeXt."""
    for op in layer.inside:
        value = op.node.args[1] if context.facts.name[op.node] == "addmm" else op.node.args[0]
        before = norm_before(context.facts, value) if isinstance(value, fx.Node) else None
        after = join_after(context.facts, layer.value)
        if before is not None and after is not None:
            return f"by {before.meta['module'] or context.facts.name[before]}"
    return None


def token_layer(layer: Candidate, _context: Context) -> str | None:
    """A Linear on more than two dimensions."""
    shape = layer.value.meta["shape"]
    if not layer.linear or len(shape) < 3:
        return None
    return f"output {'×'.join(map(str, shape))}"


def instance_on_tokens(layer: Candidate, context: Context) -> str | None:
    """Instance norm has no form for tokens."""
    if context.norm == "instance" and token_layer(layer, context) is not None:
        return "instance norm has no form for tokens"
    return None


def functional_activation(layer: Candidate, context: Context) -> str | None:
    """With ``after-act`` the activation has to be a module that is called once."""
    if not context.options.after_act:
        return None
    activation = activation_after(context.facts, layer.value)
    if activation is None:
        return None
    if same_elements(context.facts, layer.value, activation) and activation_call(
        context.captured, context.facts, activation
    ):
        return None
    where = activation.meta["module"]
    if not same_elements(context.facts, layer.value, activation):
        return f"{where or context.facts.name[activation]} works on a reshaped value"
    return (
        f"{context.facts.name[activation]} runs in {where or type(context.captured.model).__name__}"
    )


Rule = Callable[[Candidate, Context], str | None]

#: Reason, rule, and whether ``include`` overrides it; the first that holds is given.
RULES: Final[tuple[tuple[Reason, Rule, bool], ...]] = (
    (Reason.NEVER_CALLED, never_called, False),
    (Reason.INSIDE_FUSED_MODULE, inside_fused_module, False),
    (Reason.ALREADY_NORMED, already_carries, False),
    (Reason.CUSTOM_FORWARD, custom_forward, False),
    (Reason.NO_BATCH_AXIS, no_batch_axis, False),
    (Reason.COMPLEX_VALUES, complex_values, False),
    (Reason.FROZEN, frozen, False),
    (Reason.ATTENTION_PROJECTION, attention_projection, True),
    (Reason.WEIGHT_STANDARDISED, weight_standardised, False),
    (Reason.TIED_WEIGHTS, tied_weights, False),
    (Reason.CALLED_MORE_THAN_ONCE, called_more_than_once, False),
    (Reason.OUTPUT_HEAD, output_head, True),
    (Reason.ALREADY_NORMED, already_normed, True),
    (Reason.GATE, gate, True),
    (Reason.ONE_VALUE_PER_CHANNEL, one_value_per_channel, False),
    (Reason.PRE_NORM, pre_norm, True),
    (Reason.TOKEN_LAYER, instance_on_tokens, False),
    (Reason.TOKEN_LAYER, token_layer, True),
    (Reason.FUNCTIONAL_ACTIVATION, functional_activation, False),
)
