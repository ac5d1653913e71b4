"""Operators by what they do to an affine map by channel."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from bnify import ops
from bnify.folding.arguments import arguments, place_of, rerun
from bnify.folding.refusal import Refused
from bnify.reason import Reason

if TYPE_CHECKING:
    from bnify.folding.draft import Draft

#: They move elements, repeat them or leave some out; nothing is computed.
MOVERS: Final = (ops.VIEWS - {"constant_pad_nd", "getitem", "to", "_to_copy", "type_as", "pad"}) | {
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    "broadcast_to",
    "diagonal",
    "flip",
    "index",
    "index_select",
    "native_channel_shuffle",
    "ravel",
    "repeat",
    "repeat_interleave",
    "rot90",
    "tile",
}
#: Movers that give a list, of which ``getitem`` takes one.
LISTS: Final = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind"})
CASTS: Final = frozenset({"to", "_to_copy", "type_as"})
AVERAGES: Final = frozenset(
    {f"avg_pool{n}d" for n in (1, 2, 3)}
    | {f"adaptive_avg_pool{n}d" for n in (1, 2, 3)}
    | {f"_adaptive_avg_pool{n}d" for n in (2, 3)}
    | {f"upsample_nearest{n}d" for n in (1, 2, 3)}
    | {f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)}
    | {"upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"}
    | {"_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "mean", "sum"}
)
MAXIMA: Final = frozenset(
    {f"max_pool{n}d" for n in (1, 2, 3)}
    | {f"max_pool{n}d_with_indices" for n in (1, 2, 3)}
    | {f"adaptive_max_pool{n}d" for n in (1, 2, 3)}
    | {"amax", "amin", "max", "min"}
)
SUMS: Final = frozenset({"add", "sub", "rsub"})
PRODUCTS: Final = frozenset({"mul", "div"})
_ELEMENTWISE: Final = frozenset(
    {"pow", "exp", "log", "sqrt", "rsqrt", "abs", "sin", "cos", "erf", "square", "where", "maximum"}
    | {"minimum", "masked_fill", "sign", "log1p", "expm1", "reciprocal", "clamp_max", "round"}
)
NONLINEAR: Final = (
    ops.ACTIVATIONS | _ELEMENTWISE | MAXIMA | ops.NORMS | ops.RECURRENT | {"_softmax", "mul", "div"}
)


def is_dropout_off(node: fx.Node) -> bool:
    """Whether this is a dropout that passes its input on."""
    if ops.name_of(node) not in ops.DROPOUTS:
        return False
    given = arguments(node)
    return not given.get("train", True) or given.get("p") == 0


def is_same_dtype(node: fx.Node) -> bool:
    """Whether this is a cast that changes nothing but perhaps the device or the layout."""
    source = ops.first(node)
    return (
        ops.name_of(node) in CASTS
        and source is not None
        and source.meta.get("dtype") == node.meta.get("dtype")
    )


def padding_of(node: fx.Node) -> tuple[str, float]:
    """Mode and constant of a padding operator."""
    given = arguments(node)
    if ops.name_of(node) == "constant_pad_nd":
        return "constant", float(given["value"])
    return given["mode"], float(given["value"] or 0.0)


def is_mover(node: fx.Node) -> bool:
    """Whether the operator only moves elements of its first argument."""
    name, source = ops.name_of(node), ops.first(node)
    if source is not None and node.meta.get("dtype") not in (None, source.meta.get("dtype")):
        return False  # the same bits, read as another type
    if name == "pad":
        return padding_of(node)[0] != "constant"
    if name == "im2col":
        return not any(arguments(node)["padding"])
    return name in MOVERS


def numbers(shape: Any) -> Tensor:
    """The elements of a value, numbered; float64, which every operator takes and keeps exact."""
    return torch.arange(prod(shape), dtype=torch.float64).view(tuple(shape))


def moved(node: fx.Node, tensor: Tensor, static: Any) -> Any:
    """Run a mover on another tensor."""
    source = ops.first(node)
    return rerun(node, lambda read: tensor if read is source else static(read))


def pooled_axes(node: fx.Node) -> list[int]:
    """The axes of the input that an average or a maximum runs over."""
    source = ops.first(node)
    dims = len(source.meta["shape"]) if source is not None else 0
    name = ops.name_of(node)
    if name in ("mean", "sum", "amax", "amin", "max", "min"):
        wanted = arguments(node).get("dim")
        listed = [wanted] if isinstance(wanted, int) else list(wanted or range(dims))
        return sorted(axis % dims for axis in listed)
    spatial = next(int(c) for c in reversed(name.removesuffix("_with_indices")) if c.isdigit())
    return list(range(dims - spatial, dims))


def adds_zeros(node: fx.Node) -> str:
    """Why an average is none of a shift: what else enters it; empty if nothing does."""
    given = arguments(node)
    name = ops.name_of(node)
    if name == "sum":
        return "a sum adds the shift many times"
    if given.get("divisor_override") is not None:
        return "its divisor is not the number of elements"
    if name.startswith("avg_pool") and given.get("count_include_pad") and any(given["padding"]):
        return "padded zeros enter the average"
    return ""


def stuck(draft: Draft, node: fx.Node) -> Refused:
    """Why an operator lets no affine map pass."""
    name, what = ops.name_of(node), place_of(node)
    live = [s for s in ops.sources(node) if s not in draft.static]
    if name in NONLINEAR:
        if name in PRODUCTS and len(live) > 1:
            what = f"{what} multiplies two values"
        return Refused(Reason.NONLINEARITY_BETWEEN, what)
    return Refused(Reason.NO_ABSORBER, f"{what} takes no affine map")
