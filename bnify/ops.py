"""Families of operators: what an ATen operator means to a norm. Names as in the schema."""

from __future__ import annotations

from typing import Any, Final

from torch import fx

#: Operators that multiply by a weight; the position of the weight among the arguments.
WEIGHT_POSITION: Final = {
    "linear": 1,
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
    "convolution": 1,
    "_convolution": 1,
    "addmm": 2,
    "mm": 1,
    "matmul": 1,
    "bmm": 1,
    "baddbmm": 2,
}
RECURRENT: Final = frozenset(
    {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell"}
    | {"rnn_relu_cell"}
)
#: Matrix products between values.
PRODUCTS: Final = frozenset({"matmul", "bmm", "mm", "baddbmm", "einsum"})
#: They only move elements, or copy them.
VIEWS: Final = frozenset(
    {
        "_reshape_alias",
        "_to_copy",
        "_unsafe_view",
        "alias",
        "channel_shuffle",
        "chunk",
        "clone",
        "constant_pad_nd",
        "contiguous",
        "detach",
        "expand",
        "flatten",
        "getitem",
        "lift_fresh",
        "movedim",
        "narrow",
        "numpy_T",
        "pad",
        "permute",
        "pixel_shuffle",
        "pixel_unshuffle",
        "reshape",
        "resolve_conj",
        "resolve_neg",
        "roll",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "swapaxes",
        "swapdims",
        "t",
        "tensor_split",
        "to",
        "transpose",
        "type_as",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
    }
)
DROPOUTS: Final = frozenset(
    {"dropout", "native_dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
)
POOLS: Final = frozenset(
    {f"{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)}
    | {f"adaptive_{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3)}
    | {f"max_pool{n}d_with_indices" for n in (1, 2, 3)}
    | {"mean", "amax", "max", "logsumexp", "upsample_nearest2d", "upsample_bilinear2d"}
)
ACTIVATIONS: Final = frozenset(
    {
        "celu",
        "clamp",
        "clamp_min",
        "elu",
        "gelu",
        "glu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "log_sigmoid",
        "log_softmax",
        "mish",
        "prelu",
        "relu",
        "relu6",
        "rrelu",
        "selu",
        "sigmoid",
        "silu",
        "softmax",
        "softplus",
        "softshrink",
        "tanh",
        "threshold",
    }
)
GATES: Final = frozenset({"sigmoid", "hardsigmoid", "softmax", "_softmax"})
NORMS: Final = frozenset(
    {
        "batch_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "cudnn_batch_norm",
        "layer_norm",
        "native_layer_norm",
        "group_norm",
        "native_group_norm",
        "instance_norm",
        "rms_norm",
        "_fused_rms_norm",
    }
)
#: A reduction over a value, as hand-written norms and weight standardisation use it.
REDUCTIONS: Final = frozenset({"mean", "var", "std", "var_mean", "std_mean", "sum"})
ATTENTION: Final = frozenset(
    {
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_attention_math",
    }
)


def name_of(node: fx.Node) -> str:
    """The operator's schema name without namespace and in-place mark: ``"relu"``."""
    if node.op != "call_function":
        return node.op
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", "")
    name: str = schema.name.partition("::")[2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def sources(node: fx.Node) -> list[fx.Node]:
    """The values a node reads, once each, in the order of its arguments."""
    return list(node.all_input_nodes)


def first(node: fx.Node) -> fx.Node | None:
    """The value a node works on: its first argument, when that is one."""
    source: Any = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) else None
