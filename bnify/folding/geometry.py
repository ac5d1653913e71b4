"""How a layer lies over its input, and what it takes to give it another kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnify import ops
from bnify.algebra import Kernel
from bnify.changes import Change
from bnify.folding.arguments import arguments
from bnify.folding.draft import Draft
from bnify.folding.layers import CONVS, Layer, check_own_weight
from bnify.folding.refusal import Refused
from bnify.reason import Reason


@dataclass(frozen=True, slots=True)
class Geometry:
    """Kernel, stride, padding and dilation by axis; empty tuples for a Linear."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    keeps_shape: bool

    def fits(self, host: Geometry) -> bool:
        """Whether its taps are among those of the host, around the same centre."""
        if len(self.kernel) != len(host.kernel) or self.groups % host.groups:
            return False
        if self.stride != host.stride:
            return False
        for k, p, d, host_k, host_p, host_d in zip(
            self.kernel,
            self.padding,
            self.dilation,
            host.kernel,
            host.padding,
            host.dilation,
            strict=True,
        ):
            wider = host_k - k
            if wider % 2 or wider < 0 or (k > 1 and d != host_d):
                return False
            if host_p - p != host_d * wider // 2:
                return False
        return True

    def layout(self, layer: Layer) -> Kernel:
        """The layout of a weight of this geometry."""
        return Kernel("linear") if layer.kernel.kind == "linear" else Kernel("conv", self.groups)


def geometry_of(layer: Layer) -> Geometry | None:
    """The geometry of a linear layer or a zero-padded convolution; None for others."""
    value = layer.value
    if value is None or layer.why_fixed is not None:
        return None
    keeps = value.meta["shape"] == layer.node.meta["shape"]
    if layer.kernel.kind == "linear":
        return Geometry((), (), (), (), 1, keeps)
    if layer.kernel.kind != "conv" or ops.name_of(layer.node) not in CONVS:
        return None
    given = arguments(layer.node)
    kernel = tuple(layer.weight.meta["shape"][2:])
    dims = len(kernel)
    dilation = _each(given["dilation"], dims)
    padding = given["padding"]
    if padding == "same":
        if any((d * (k - 1)) % 2 for k, d in zip(kernel, dilation, strict=True)):
            return None  # one zero more on one side
        sides = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    else:
        sides = (0,) * dims if padding == "valid" else _each(padding, dims)
    centred = all(2 * p == d * (k - 1) for k, p, d in zip(kernel, sides, dilation, strict=True))
    stride = _each(given["stride"], dims)
    keeps = keeps and centred and all(s == 1 for s in stride) and all(k % 2 for k in kernel)
    return Geometry(kernel, stride, sides, dilation, given["groups"], keeps)


def _each(values: Any, count: int) -> tuple[int, ...]:
    listed = tuple(values)
    return listed * count if len(listed) == 1 else listed


_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def alone_in_module(draft: Draft, layer: Layer, *, exact: bool = False) -> bool:
    """Whether a layer is all that its module does, once, so that the module can be replaced.

    Args:
        draft: The recording.
        layer: The layer.
        exact: It also must be a plain torch layer, whose attributes say what it computes.
    """
    module = draft.module(layer.path)
    calls = draft.calls(layer.path)
    if not layer.path or module is None or len(calls) != 1:
        return False
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return False
    if layer.target != f"{layer.path}.weight":
        return False
    outputs = [draft.now(node) for node in calls[0].outputs]
    if outputs != [layer.node] or module._forward_hooks or module._forward_pre_hooks:
        return False
    if exact:
        return (
            type(module).forward in _PLAIN and getattr(module, "padding_mode", "zeros") == "zeros"
        )
    return True


def reshape_layer(
    draft: Draft,
    layer: Layer,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry | None = None,
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Give a layer another weight, in the graph and in what the model becomes.

    Args:
        draft: The recording.
        layer: The layer.
        weight: Its new weight, float64.
        bias: Its new bias, float64; None for none.
        geometry: Its new geometry, where that changes.
        sizes: Attributes of its module that change: ``in_channels`` and such.

    Raises:
        Refused: Others depend on its weight.
    """
    if bias is not None and layer.bias is None and not layer.takes_bias:
        raise Refused(Reason.NO_ABSORBER, f"{layer.label} can take no bias")
    check_own_weight(draft, layer)
    if bias is not None and layer.bias is not None:
        draft.check_writable(layer.bias, [layer.node])
    values: dict[str, Any] = dict(sizes or {})
    changes = draft.changes
    if geometry is not None:
        _restride(layer.node, geometry)
        values |= {
            "kernel_size": list(geometry.kernel),
            "padding": list(geometry.padding),
            "dilation": list(geometry.dilation),
            "groups": geometry.groups,
        }
    name = layer.target
    changes.weights.pop(name, None)
    changes.values[name] = weight.cpu()
    draft.resized(layer, tuple(weight.shape))
    if (geometry is not None or sizes) and not draft.as_graph:
        changes.tree.append(
            Change(kind="weight", path=layer.path, shape=tuple(weight.shape), values=values)
        )
    if bias is None:
        return
    old = layer.bias.meta["shape"] if layer.bias is not None else None
    if layer.bias is not None and old == tuple(bias.shape):
        changes.values[str(layer.bias.target)] = bias
        return
    added = layer.bias_name if layer.bias is None else str(layer.bias.target)
    changes.values[added] = bias
    node = draft.attribute(added, layer.weight, tuple(bias.shape))
    node.meta["shape"] = tuple(bias.shape)
    layer.set_bias(node)
    if not draft.as_graph:
        changes.tree.append(Change(kind="bias", path=layer.path, shape=tuple(bias.shape)))


def _restride(node: fx.Node, geometry: Geometry) -> None:
    """Let a convolution's operator pad, dilate and group as the geometry says."""
    given = arguments(node)
    packet = getattr(torch.ops.aten, ops.name_of(node))
    node.target = packet.default
    node.args = (
        *node.args[:2],
        given["bias"],
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        geometry.groups,
    )
    node.kwargs = {}
