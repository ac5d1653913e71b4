"""What the networks of the folding tests are made of: norms as people write them, and operators.

Everything is written here from the formulas; nothing is taken from a library of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- norms that are no plain BatchNorm -------------------------------------------------------------


class FourBuffers(nn.Module):
    """A frozen norm: four buffers of length C, γ·(x − mean)/√(var + ε) + β."""

    eps = 1e-5
    num_batches_tracked = None  # laws.hostile_ asks for it

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def column(self, values: Tensor, x: Tensor) -> Tensor:
        return values.reshape(1, -1, *[1] * (x.ndim - 2))


class FrozenScale(FourBuffers):
    """Scale and shift are computed in every forward, then one multiplication and one addition."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.column(self.weight, x) * (self.column(self.running_var, x) + self.eps).rsqrt()
        shift = self.column(self.bias, x) - self.column(self.running_mean, x) * scale
        return x * scale + shift


class FrozenSteps(FourBuffers):
    """The formula as it stands in a textbook, in four operators on the activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.column(self.running_mean, x)) / self.column(
            (self.running_var + self.eps).sqrt(), x
        )
        return x * self.column(self.weight, x) + self.column(self.bias, x)


class FrozenCall(FourBuffers):
    """Four buffers given to the functional batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )


class NormAct(nn.BatchNorm2d):
    """A batch norm whose forward goes on with its children ``drop`` and ``act``."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )
        return self.act(self.drop(x))


class NormThenRelu(nn.BatchNorm2d):
    """A batch norm whose own forward does more, and no child holds it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class PlainSubclass(nn.BatchNorm2d):
    """A subclass that only checks its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError("images only")
        return super().forward(x)


class LayerScale(nn.Module):
    """x·γ, one γ per channel of the last axis."""

    def __init__(self, channels: int, last: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gamma if self.last else self.gamma[:, None, None])


# -- operators of random programs: (net, sources, option) -> value ---------------------------------


def column(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """A vector laid along one axis of a value."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _norm_call(net: nn.Module, x: Tensor, option: Any) -> Tensor:
    """A functional batch norm; option: names of mean, var, γ and β, or the owner's path."""
    if isinstance(option, str):
        o = net.get_submodule(option)
        return F.batch_norm(x, o.running_mean, o.running_var, o.weight, o.bias, False, 0.1, o.eps)
    mean, var, gamma, beta = (getattr(net, name) if name else None for name in option)
    return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=1e-3)


def _channel_shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, *space = x.shape
    return x.view(n, groups, c // groups, *space).transpose(1, 2).reshape(n, c, *space)


def _writes(x: Tensor) -> Tensor:
    x[:, 0] = 0.0
    return x


def _attend(x: Tensor) -> Tensor:
    q, k, v = x.chunk(3, dim=-1)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def _pool(kind: str, x: Tensor, **options: Any) -> Tensor:
    return getattr(F, f"{kind}{x.ndim - 2}d")(x, **options)


def _conv(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return getattr(F, f"conv{x.ndim - 2}d")(x, *arguments, **options)


Operator = Callable[[Any, list[Tensor], Any], Any]

OPERATORS: dict[str, Operator] = {
    "dropout": lambda net, v, o: F.dropout(v[0], 0.3, net.training),
    "relu": lambda net, v, o: F.relu(v[0]),
    "relu_": lambda net, v, o: F.relu(v[0], inplace=True),
    "gelu": lambda net, v, o: F.gelu(v[0]),
    "silu": lambda net, v, o: F.silu(v[0]),
    "tanh": lambda net, v, o: torch.tanh(v[0]),
    "leaky_relu_": lambda net, v, o: F.leaky_relu_(v[0], 0.2),
    "hardswish": lambda net, v, o: F.hardswish(v[0]),
    "softplus": lambda net, v, o: F.softplus(v[0]),
    "clamp": lambda net, v, o: v[0].clamp(-2, 2),
    "abs": lambda net, v, o: v[0].abs(),
    # two values
    "add": lambda net, v, o: v[0] + v[1],
    "add_": lambda net, v, o: v[0].add_(v[1]),
    "sub": lambda net, v, o: v[0] - v[1],
    "weighted_add": lambda net, v, o: torch.add(v[0], v[1], alpha=o),
    "lerp": lambda net, v, o: 0.3 * v[0] + 0.7 * v[1],
    "mul": lambda net, v, o: v[0] * v[1].tanh(),
    "gate": lambda net, v, o: v[0] * torch.sigmoid(v[1]),
    "maximum": lambda net, v, o: torch.maximum(v[0], v[1]),
    "cat": lambda net, v, o: torch.cat(v, dim=o),
    "sum3": lambda net, v, o: v[0] + v[1] + v[2],
    # constants
    "scale": lambda net, v, o: v[0] * o,
    "scale_": lambda net, v, o: v[0].mul_(o),
    "shift": lambda net, v, o: v[0] + o,
    "rsub": lambda net, v, o: o - v[0],
    "negate": lambda net, v, o: -v[0],
    "divide": lambda net, v, o: v[0] / o,
    "times": lambda net, v, o: v[0] * column(getattr(net, o[0]), v[0], o[1]),
    "over": lambda net, v, o: v[0] / (1.0 + column(getattr(net, o[0]), v[0], o[1]).abs()),
    "plus": lambda net, v, o: v[0] + column(getattr(net, o[0]), v[0], o[1]),
    "position": lambda net, v, o: v[0] + getattr(net, o),
    # functional layers
    "norm": lambda net, v, o: _norm_call(net, v[0], o),
    "linear": lambda net, v, o: F.linear(v[0], *(getattr(net, name) for name in o)),
    "matmul": lambda net, v, o: v[0] @ getattr(net, o),
    "conv": lambda net, v, o: _conv(v[0], *(getattr(net, n) for n in o[0]), **dict(o[1])),
    # pools
    "pool": lambda net, v, o: _pool(o[0], v[0], **dict(o[1])),
    "mean": lambda net, v, o: v[0].flatten(2).mean(-1),
    "mean_keep": lambda net, v, o: v[0].mean(tuple(range(2, v[0].ndim)), keepdim=True),
    "mean_tokens": lambda net, v, o: v[0].mean(1),
    "amax": lambda net, v, o: v[0].flatten(2).amax(-1),
    "sum_space": lambda net, v, o: 0.1 * v[0].flatten(2).sum(-1),
    "interpolate": lambda net, v, o: F.interpolate(v[0], scale_factor=2, **dict(o)),
    # moving elements
    "flatten": lambda net, v, o: v[0].reshape(v[0].shape[0], -1),
    "flatten_space": lambda net, v, o: v[0].flatten(2),
    "to_tokens": lambda net, v, o: v[0].flatten(2).transpose(1, 2),
    "from_tokens": lambda net, v, o: v[0].transpose(1, 2),
    "square": lambda net, v, o: v[0].transpose(1, 2).unflatten(2, o),
    "unflatten": lambda net, v, o: v[0].unflatten(1, o),
    "permuted": lambda net, v, o: v[0].movedim(1, -1).contiguous().movedim(-1, 1),
    "squeezed": lambda net, v, o: v[0].unsqueeze(1).squeeze(1),
    "merge_tokens": lambda net, v, o: v[0].flatten(0, 1),
    "split_tokens": lambda net, v, o: v[0].view(-1, o, v[0].shape[-1]),
    "view_as": lambda net, v, o: v[0].reshape_as(v[1]),
    "part": lambda net, v, o: v[0].chunk(o[0], dim=o[1])[o[2]],
    "split": lambda net, v, o: v[0].split(list(o[0]), dim=1)[o[1]],
    "swap_halves": lambda net, v, o: torch.cat(v[0].chunk(2, dim=1)[::-1], dim=1),
    "crop": lambda net, v, o: v[0][..., 1:-1],
    "thin": lambda net, v, o: v[0][..., ::2],
    "narrow": lambda net, v, o: v[0].narrow(1, o, v[0].shape[1] - o),
    "select": lambda net, v, o: v[0].select(o[0], o[1]),
    "flip": lambda net, v, o: v[0].flip(-1),
    "roll": lambda net, v, o: v[0].roll(1, dims=o),
    "pixel_shuffle": lambda net, v, o: F.pixel_shuffle(v[0], 2),
    "pixel_unshuffle": lambda net, v, o: F.pixel_unshuffle(v[0], 2),
    "channel_shuffle": lambda net, v, o: _channel_shuffle(v[0], o),
    "native_shuffle": lambda net, v, o: F.channel_shuffle(v[0], o),
    "pad": lambda net, v, o: F.pad(v[0], o[0], o[1], o[2]),
    "expand_as": lambda net, v, o: v[0].expand_as(v[1]).contiguous(),
    "stack": lambda net, v, o: torch.stack(v, dim=2).flatten(2),
    "detach": lambda net, v, o: v[0].detach(),
    "cast": lambda net, v, o: v[0].to(v[0].dtype),
    "writes": lambda net, v, o: _writes(v[0]),
    "attend": lambda net, v, o: _attend(v[0]),
}
