"""BN207: BatchNorm1d on tokens, over the wrong axis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnify.auditing.finding import Finding, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

if TYPE_CHECKING:
    from torch import fx

    from bnify.auditing.live import Live

_STEPS = 8
#: Operators whose result has its features on the last axis.
_LAST = frozenset(
    {"linear", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"}
    | {"scaled_dot_product_attention", "addmm"}
)


class WrongAxis(Rule):
    """A BatchNorm1d gets (N, T, C), with features last, and normalizes the tokens.

    What it checks:
        Batch norms on three dimensions whose input comes from a Linear, a LayerNorm or attention
        through operators that keep its shape: there the features are on the last axis, and
        BatchNorm1d takes axis 1. A Linear that mixes positions, reading what a convolution gave
        with its channels still on axis 1, does not count.

    Why it is bad:
        Each position of the sequence is normalized over all features, and the running statistics
        belong to positions. It runs only if T equals ``num_features``, so nothing raises.

    Example:
        ``BatchNorm1d(16)`` behind ``Linear(32, 16)`` on inputs of shape (N, 16, 32).

    How to fix it:
        ``x.transpose(1, 2)`` before and after the norm, or flatten to (N·T, C); ``bnify insert``
        does the latter.

    Fix safety:
        It changes the function, and the statistics must be trained or calibrated anew.

    Source:
        PyTorch documentation of ``torch.nn.BatchNorm1d``: input (N, C) or (N, C, L).
    """

    code = "BN207"
    name = "wrong-axis"
    severity = Severity.WARNING
    tiers = ("T1",)
    needs = needs(Need.FORWARD)
    fix = "transpose(1, 2) around the norm, or flatten to (N·T, C)"
    cost = "positions are normalized instead of features"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm."""
        from bnify import ops
        from bnify.auditing.flow import before

        live = subject.live
        if live is None:
            return
        seen: set[str] = set()
        for use in live.uses:
            if use.kind != "batch" or use.of_weight or len(use.shape) != 3 or use.layer in seen:
                continue
            shape = use.shape

            def alike(node: object, shape: tuple[int, ...] = shape) -> bool:
                return (
                    tuple(node.meta.get("shape") or ()) == shape  # type: ignore[attr-defined]
                    and ops.name_of(node) not in _LAST  # type: ignore[arg-type]
                    and ops.name_of(node) not in _MOVING  # type: ignore[arg-type]
                )

            above = before(live, use.source.value, _STEPS, alike)
            source = next(
                (
                    node
                    for node in above
                    if node.op == "call_function"
                    and ops.name_of(node) in _LAST
                    and tuple(node.meta.get("shape") or ()) == shape
                ),
                None,
            )
            if source is None or _mixes_positions(live, source):
                continue
            seen.add(use.layer)
            yield self.finding(
                use.layer,
                f"it normalizes axis 1 ({shape[1]}) of {list(shape)}, which {ops.name_of(source)} "
                "gives with its features on the last axis",
                {"shape": list(shape), "source": ops.name_of(source)},
            )


def _mixes_positions(live: Live, node: fx.Node) -> bool:
    """Whether it is a Linear that reads what a convolution gave, its channels still on axis 1."""
    from bnify import ops
    from bnify.auditing.flow import live_inputs

    if ops.name_of(node) != "linear":
        return False
    swapped = False
    for _ in range(_STEPS):
        sources = live_inputs(live, node)
        if len(sources) != 1 or sources[0].op != "call_function":
            return False
        name, before = ops.name_of(sources[0]), tuple(node.meta.get("shape") or ())
        node = sources[0]
        shape = tuple(node.meta.get("shape") or ())
        if name in _CONVOLUTIONS:
            return not swapped
        if name in _SWAPPING:
            swapped = not swapped
        elif name in _MOVING and shape[:2] != before[:2]:
            return False
    return False


_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "convolution"})
#: Operators that, of three axes, put the last in the place of the second.
_SWAPPING = frozenset({"transpose", "permute", "swapaxes", "swapdims", "movedim"})
#: Operators that may keep the shape and yet move elements between axes, or mix them.
_MOVING = frozenset(
    {"transpose", "permute", "swapaxes", "swapdims", "movedim", "t", "view", "reshape", "flatten"}
    | {"_unsafe_view", "_reshape_alias", "unflatten", "roll", "conv1d", "convolution", "matmul"}
    | {"bmm", "einsum"}
)
