"""Helpers for tests that state laws: hostile norms, random networks, float64 comparisons.

Nothing here uses bnify beyond its input structures, so that a fault in bnify cannot hide itself.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify.structure import Inputs, as_call, outputs_of

# -- norms that have seen the worst ----------------------------------------------------------------


def norms_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that owns running statistics or a norm's affine vectors."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    for name, module in model.named_modules():
        if isinstance(module, kinds) or isinstance(getattr(module, "running_mean", None), Tensor):
            yield name, module


@torch.no_grad()
def hostile_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every norm with values that a fresh one never has, in place; outputs stay finite.

    Scales of both signs, one in eight exactly 0; random shifts and means; variances over a factor
    of ten, and one channel in eight with a variance far below eps, whose scale is as small, so
    that a wrong eps shows and nothing explodes.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * values).to(like.dtype).to(like.device)

    for _, norm in norms_of(model):
        running_var = getattr(norm, "running_var", None)
        weight = getattr(norm, "weight", None)
        bias = getattr(norm, "bias", None)
        if weight is not None:
            sign = torch.where(draw(weight, 0, 1) < 0.3, -1.0, 1.0).to(weight.dtype)
            weight.copy_(sign * draw(weight, 0.6, 1.6))
        if bias is not None:
            bias.copy_(draw(bias, -0.5, 0.5))
        if running_var is not None:
            norm.running_mean.copy_(draw(running_var, -0.7, 0.7))
            running_var.copy_(0.3 * torch.exp(draw(running_var, 0.0, math.log(10.0))))
            if getattr(norm, "num_batches_tracked", None) is not None:
                norm.num_batches_tracked.fill_(1000)
            tiny = draw(running_var, 0, 1) < 0.125
            running_var[tiny] = 1e-7
            if weight is not None:
                weight[tiny] *= (1e-7 + getattr(norm, "eps", 1e-5)) ** 0.5
        if weight is not None and weight.numel() > 1:
            weight.view(-1)[draw(weight, 0, 1).view(-1) < 0.125] = 0.0
    return model


# -- random networks -------------------------------------------------------------------------------

_MODULES = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, nn.ELU, nn.LeakyReLU, nn.Identity)
_FUNCTIONS = {
    "relu": F.relu,
    "relu_": lambda x: torch.relu_(x * 1.0),
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "hardswish": F.hardswish,
}
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
_UPS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


@dataclass(frozen=True)
class Step:
    """One line of a random forward: ``values[result] = op(layer, *values[sources])``."""

    op: str
    sources: tuple[int, ...]
    layer: str = ""
    option: Any = None


class RandomNetwork(nn.Module):
    """A random DAG of layers, drawn from a seed; :func:`random_network` makes one with inputs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.layers = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.input_shape, self.results = _Author(self, random.Random(seed)).write()

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(self.run(step, [values[i] for i in step.sources]))
        outputs = [values[i] for i in self.results]
        return outputs[0] if len(outputs) == 1 else {f"out{i}": v for i, v in enumerate(outputs)}

    def run(self, step: Step, sources: list[Tensor]) -> Tensor:
        """Apply one step."""
        x = sources[0]
        match step.op:
            case "layer":
                return self.layers[step.layer](x)
            case "function":
                return _FUNCTIONS[step.option](x)
            case "dropout":
                return F.dropout(x, 0.2, self.training)
            case "add":
                return x + sources[1]
            case "add_":
                return (x * 1.0).add_(sources[1])
            case "cat":
                return torch.cat(sources, dim=1)
            case "max_pool":
                return (F.max_pool1d if x.ndim == 3 else F.max_pool2d)(x, 2)
            case "avg_pool":
                return (F.avg_pool1d if x.ndim == 3 else F.avg_pool2d)(x, 2)
            case "gate":
                return x * torch.sigmoid(sources[1])
            case "mean":
                return x.flatten(2).mean(-1)
            case "flatten":
                return x.reshape(x.shape[0], -1)
            case "there_and_back":
                return x.transpose(0, -1).contiguous().transpose(0, -1)
            case "scale":
                return x * step.option
        raise AssertionError(step.op)

    @property
    def signature(self) -> str:
        """What the network computes, without its values; equal for equal programs."""
        return f"{self.input_shape} {self.steps} {self.layers} {self.results}"


@dataclass
class _Author:
    """Writes the program of a random network."""

    net: RandomNetwork
    rng: random.Random
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # without the batch axis

    def write(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rng = self.rng
        spatial = rng.choice((0, 1, 2, 2))
        start = (rng.choice((3, 4, 6)), *{0: (), 1: (16,), 2: (12, 12)}[spatial])
        self.shapes.append(start)
        here = self.weighted(0, rng.choice((4, 8, 12)))
        for _ in range(rng.randint(3, 9)):
            here = rng.choice(self.moves(here))(here)
        extra = (here,) if rng.random() < 0.2 else ()
        if len(self.shapes[here]) > 1:
            small = math.prod(self.shapes[here]) <= 300
            here = self.step("flatten" if small and rng.random() < 0.4 else "mean", here)
            if rng.random() < 0.5:
                here = self.activation(self.weighted(here, 8))
        head = self.weighted(here, rng.choice((2, 5)))
        return start, (head, *extra)

    def moves(self, here: int) -> list[Any]:
        shape = self.shapes[here]
        moves = [
            lambda i: self.weighted(i, self.rng.choice((4, 8, 12))),
            lambda i: self.activation(self.weighted(i, self.rng.choice((4, 8, 16)))),
            self.activation,
            self.residual,
            self.residual,
            self.concat,
            self.norm,
            self.gate,
            lambda i: self.step("dropout", i),
            lambda i: self.step("there_and_back", i),
            lambda i: self.step("scale", i, option=self.rng.choice((0.5, -1.5))),
        ]
        if len(shape) > 1 and min(shape[1:]) >= 4:
            moves.append(lambda i: self.step(self.rng.choice(("max_pool", "avg_pool")), i))
        if len(shape) > 1 and max(shape[1:]) <= 8:
            moves.append(self.up)
        return moves

    def step(self, op: str, *sources: int, layer: str = "", option: Any = None) -> int:
        """Add a step, with the shape that it gives on a batch of two."""
        added = Step(op, sources, layer, option)
        values = [torch.zeros(2, *self.shapes[i]) for i in sources]
        mode = self.net.training
        with torch.no_grad():
            self.shapes.append(tuple(self.net.eval().run(added, values).shape[1:]))
        self.net.train(mode)
        self.net.steps.append(added)
        return len(self.shapes) - 1

    def layer(self, module: nn.Module, source: int) -> int:
        name = f"{type(module).__name__.lower()}{len(self.net.layers)}"
        self.net.layers[name] = module
        return self.step("layer", source, layer=name)

    def weighted(self, source: int, after: int, stride: int | None = None) -> int:
        before, *space = self.shapes[source]
        rng = self.rng
        if not space:
            return self.layer(nn.Linear(before, after, bias=rng.random() < 0.8), source)
        kernel = rng.choice((1, 3))
        groups = rng.choice([g for g in (1, 1, 2, 4) if before % g == 0 and after % g == 0])
        if stride is None:
            stride = 2 if min(space) >= 8 and rng.random() < 0.25 else 1
        conv = _CONVS[len(space)](
            before, after, kernel, stride, kernel // 2, groups=groups, bias=rng.random() < 0.8
        )
        return self.layer(conv, source)

    def up(self, source: int) -> int:
        before, *space = self.shapes[source]
        after = self.rng.choice((4, 8))
        groups = 2 if before % 2 == 0 and self.rng.random() < 0.3 else 1
        return self.layer(_UPS[len(space)](before, after, 2, 2, groups=groups), source)

    def activation(self, source: int) -> int:
        if self.rng.random() < 0.5:
            return self.layer(self.rng.choice(_MODULES)(), source)
        return self.step("function", source, option=self.rng.choice(sorted(_FUNCTIONS)))

    def norm(self, source: int) -> int:
        channels, *space = self.shapes[source]
        return self.layer(_NORMS[len(space)](channels), source)

    def residual(self, source: int) -> int:
        branch = self.activation(self.weighted(source, self.rng.choice((4, 8)), stride=1))
        branch = self.weighted(branch, self.shapes[source][0], stride=1)
        return self.step(self.rng.choice(("add", "add_")), branch, source)

    def concat(self, source: int) -> int:
        if self.shapes[source][0] > 24:
            return self.activation(source)
        branch = self.activation(self.weighted(source, 4, stride=1))
        return self.step("cat", source, branch)

    def gate(self, source: int) -> int:
        return self.step("gate", source, self.weighted(source, self.shapes[source][0], stride=1))


def random_network(seed: int, batch: int = 4) -> tuple[RandomNetwork, Tensor]:
    """A random network in eval mode, its norms hostile, and inputs; the same for the same seed."""
    net = RandomNetwork(seed).eval()
    hostile_(net, seed)
    generator = torch.Generator().manual_seed(seed)
    return net, torch.randn(batch, *net.input_shape, generator=generator)


# -- comparisons in float64 ------------------------------------------------------------------------


def run64(model: nn.Module, inputs: Inputs, *, train: bool = False, seed: int = 0) -> list[Tensor]:
    """Outputs of a float64 copy of the model; the model stays as it is."""
    working = copy.deepcopy(model).double().train(train)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        value = as_call(inputs).clone().to(dtype=torch.float64)(working)
    return [tensor for _, tensor in outputs_of(value)]


def relative_error(want: Tensor, got: Tensor) -> float:
    """``|got - want| / |want|`` in the 2-norm, in float64; infinite where shapes or NaNs differ."""
    if want.shape != got.shape or want.dtype.is_floating_point != got.dtype.is_floating_point:
        return math.inf
    want, got = want.detach().double(), got.detach().double()
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return math.inf
    if not torch.equal(want[~finite].nan_to_num(nan=7.0), got[~finite].nan_to_num(nan=7.0)):
        return math.inf
    gap = torch.linalg.vector_norm((got - want)[finite])
    if gap == 0:
        return 0.0
    size = torch.linalg.vector_norm(want[finite])
    return float(gap / size) if size > 0 else math.inf


def worst_error(want: list[Tensor], got: list[Tensor]) -> float:
    """The largest relative error over outputs; infinite if their number differs."""
    if len(want) != len(got):
        return math.inf
    return max((relative_error(a, b) for a, b in zip(want, got, strict=True)), default=math.inf)


@torch.no_grad()
def one_ulp_noise(model: nn.Module, inputs: Inputs, seed: int = 1) -> float:
    """How far the outputs move in float64 when each weight moves by at most one ulp of float64."""
    shaken = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in shaken.parameters():
        if parameter.is_floating_point():
            sign = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.mul_(1.0 + sign.to(parameter) * torch.finfo(torch.float64).eps)
    return worst_error(run64(model, inputs), run64(shaken, inputs))


def assert_same_function(want: nn.Module, got: nn.Module, inputs: Inputs) -> None:
    """Two models agree in eval, in float64, within the one-ulp rule: max(1e-12, 100 × noise)."""
    error = worst_error(run64(want, inputs), run64(got, inputs))
    allowed = max(1e-12, 100 * one_ulp_noise(want, inputs))
    assert error <= allowed, f"outputs differ by {error:.3g}, allowed {allowed:.3g}"


def training_step(model: nn.Module, inputs: Inputs, lr: float = 1e-3) -> list[str]:
    """One SGD step in train mode on the squared outputs; names of parameters without gradient.

    A gradient that is not finite counts as none. The model is changed, and left in train mode.
    """
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    outputs = outputs_of(as_call(inputs)(model))
    target = torch.Generator().manual_seed(0)
    loss = sum(
        (value * torch.randn(value.shape, generator=target)).sum() + value.square().mean()
        for _, value in outputs
        if value.is_floating_point() and value.requires_grad
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all())
    ]


# -- how much is drawn -----------------------------------------------------------------------------


def seeds(count: int, times: int = 1) -> range:
    """Seeds of a property test: ``count``, or fresh ones, more of them, under ``make fuzz``.

    ``times`` is for quick properties, which get so many times more.
    """
    extra = int(os.environ.get("BNIFY_FUZZ", "0")) * times
    return range(10_000, 10_000 + extra) if extra else range(count)
