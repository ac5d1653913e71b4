"""Writes the steps of random networks: layers that can absorb an affine, and norms of all kinds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrizations

import laws
from foldparts import FrozenCall, FrozenScale, FrozenSteps, NormAct, NormThenRelu
from laws import Step

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_UPS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

#: Samples of the example; sizes of nothing else.
BATCH = 3


@dataclass(frozen=True)
class NormUse:
    """A norm that runs: the names a plan may give it, and how often it runs."""

    names: tuple[str, ...]
    calls: int = 1


@dataclass(frozen=True)
class Value:
    """Shape (batch included) and channel axis of a value while a program is written."""

    shape: tuple[int, ...]
    axis: int = 1

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def space(self) -> tuple[int, ...]:
        return self.shape[2:] if self.axis == 1 else self.shape[1:-1]

    @property
    def tokens(self) -> bool:
        return self.axis != 1

    @property
    def image(self) -> bool:
        return self.axis == 1 and len(self.shape) > 2


@dataclass
class Writer:
    """Adds steps to a network and follows the shapes of their values."""

    net: Any
    rng: random.Random
    values: list[Value] = field(default_factory=list)
    vocabulary: int = 0
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)  # of the norm, by step
    weighted_layers: list[tuple[str, int, bool, int]] = field(default_factory=list)
    norm_layers: list[tuple[str, int, int]] = field(default_factory=list)
    own: set[int] = field(default_factory=set)  # values that may be written to
    count: int = 0

    #: Results of these operators are tensors of their own, never an input or a parameter.
    FRESH: ClassVar[frozenset[str]] = frozenset(
        {"conv", "linear", "matmul", "norm", "add", "sub", "scale", "cat", "plus", "times", "lerp"}
    )

    # -- writing steps -----------------------------------------------------------------------------

    def step(
        self, op: str, *sources: int, layer: str = "", option: Any = None, axis: int | None = None
    ) -> int:
        """Add a step, with the shape that it gives."""
        added = Step(op, sources, layer, option)
        with torch.no_grad():
            dtype = torch.int64 if self.vocabulary and sources[0] == 0 else torch.float32
            result = self.net.run(
                added, [torch.zeros(self.values[i].shape, dtype=dtype) for i in sources]
            )
        before = self.values[sources[0]].axis
        axis = before if axis is None else axis
        self.values.append(Value(tuple(result.shape), axis))
        self.net.steps.append(added)
        number = len(self.values) - 1
        if op in self.FRESH or (op in ("add_", "relu_") and sources[0] in self.own):
            self.own.add(number)
        return number

    def fresh_name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def layer(self, module: nn.Module, source: int, axis: int | None = None) -> int:
        name = self.fresh_name(type(module).__name__.lower())
        self.net.layers[name] = module.eval()
        return self.step("layer", source, layer=name, axis=axis)

    def parameter(self, *shape: int, scale: float = 1.0) -> str:
        name = self.fresh_name("p")
        self.net.register_parameter(name, nn.Parameter(scale * torch.randn(*shape)))
        return name

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # -- layers with weights -----------------------------------------------------------------------

    def weighted(self, source: int, after: int | None = None, same: bool = False) -> int:
        """A linear layer; ``same`` keeps the spatial size."""
        value, rng = self.values[source], self.rng
        free = after is None
        after = after or rng.choice((4, 6, 8, *([value.shape[1]] if value.tokens else [])))
        if value.image:
            small = max(value.space) <= 5 and math.prod(value.space) <= 30
            if not same and small and self.chance(0.25):
                result = self.up(source, after)
            else:
                if free and self.chance(0.3):
                    after = value.channels  # so that depthwise happens
                result = self.conv(source, after, same)
        else:
            result = self.linear(source, after)
        if self.net.steps[-1].op == "layer":
            self.own.add(result)
            layer = self.net.steps[-1].layer
            self.weighted_layers.append((layer, len(value.shape), value.image, value.channels))
        return result

    def linear(self, source: int, after: int) -> int:
        before = self.values[source].channels
        draw = self.rng.random()
        if draw < 0.1:
            names = [self.parameter(after, before, scale=0.6)]
            names += [self.parameter(after)] if self.chance(0.5) else []
            return self.step("linear", source, option=tuple(names))
        if draw < 0.18:
            return self.step("matmul", source, option=self.parameter(before, after, scale=0.5))
        return self.layer(self.dressed(nn.Linear(before, after, bias=self.chance(0.7))), source)

    def conv(self, source: int, after: int, same: bool) -> int:
        value, rng = self.values[source], self.rng
        before, space = value.channels, value.space
        kernel = rng.choice((1, 2, 3, 3)) if not same else rng.choice((1, 3))
        dilation = 2 if kernel == 3 and min(space) > 5 and self.chance(0.2) else 1
        reach = dilation * (kernel - 1)
        padding: Any = reach // 2 if same or self.chance(0.5) else 0
        if reach >= min(space) + 2 * padding:
            kernel, dilation, padding, reach = 1, 1, 0, 0
        stride = 2 if not same and min(space) >= 6 and self.chance(0.3) else 1
        groups = rng.choice([g for g in (1, 1, 2, 4, before) if not (before % g or after % g)])
        if self.chance(0.06):
            names = [self.parameter(after, before // groups, *[kernel] * len(space), scale=0.4)]
            names += [self.parameter(after)] if self.chance(0.5) else []
            options = (("stride", stride), ("padding", padding), ("dilation", dilation))
            option = (tuple(names), (*options, ("groups", groups)))
            return self.step("conv", source, option=option)
        mode = rng.choice(("zeros", "zeros", "zeros", "reflect", "circular", "replicate"))
        if reach >= min(space) or not padding:
            mode = "zeros"
        if stride == 1 and self.chance(0.15) and (same or reach < min(space)):
            odd = kernel % 2 and self.chance(0.5)
            padding = "same" if same or odd else "valid"
        conv = _CONVS[len(space)](
            before, after, kernel, stride, padding, dilation, groups, self.chance(0.7), mode
        )
        return self.layer(self.dressed(conv), source)

    def up(self, source: int, after: int) -> int:
        value, rng = self.values[source], self.rng
        before = value.channels
        kernel, stride = rng.choice(((1, 1), (2, 2), (3, 1), (3, 2), (2, 1)))
        padding = 1 if kernel == 3 and self.chance(0.5) else 0
        extra = 1 if stride == 2 and self.chance(0.3) else 0
        groups = rng.choice([g for g in (1, 1, 2, before) if not (before % g or after % g)])
        kind = _UPS[len(value.space)]
        bias = self.chance(0.7)
        up = kind(before, after, kernel, stride, padding, extra, groups, bias)
        return self.layer(self.dressed(up), source)

    def dressed(self, layer: Any) -> nn.Module:
        """The layer as it is, or with a parametrized or tied weight."""
        draw = self.rng.random()
        if draw < 0.04:
            return parametrizations.weight_norm(layer)
        if draw < 0.07:
            return parametrizations.spectral_norm(layer)
        if draw < 0.12:
            for other in self.net.layers.values():
                if type(other) is type(layer) and other.weight.shape == layer.weight.shape:
                    layer.weight = other.weight
                    break
        return layer

    def again(self, source: int) -> int:
        """A layer that ran before runs on another value, before the same norm or another."""
        value = self.values[source]
        fits = (len(value.shape), value.image, value.channels)
        names = [name for name, *wants in self.weighted_layers if tuple(wants) == fits]
        if not names:
            return self.block(source)
        name = self.rng.choice(names)
        layer = self.net.layers[name]
        if value.image and hasattr(layer, "dilation"):
            reach = layer.dilation[0] * (layer.kernel_size[0] - 1)
            if reach >= min(value.space):
                return self.block(source)
        result = self.step("layer", source, layer=name)
        self.own.add(result)
        if self.chance(0.4):
            first = next(i for i, s in enumerate(self.net.steps, 1) if s.layer == name)
            for follower in self.net.steps:
                norm = any(n == follower.layer for n, *_ in self.norm_layers)
                if follower.sources[0] == first and norm:
                    return self.old_norm(result, follower.layer)
        return self.norm(result) if self.chance(0.8) else result

    # -- norms -------------------------------------------------------------------------------------

    def named(self, number: int, *names: str) -> int:
        self.names[number] = names
        return number

    def old_norm(self, source: int, name: str) -> int:
        result = self.step("layer", source, layer=name)
        self.own.add(result)
        known = next(n for n in self.names.values() if n[0] == f"layers.{name}")
        return self.named(result, *known)

    def norm(self, source: int) -> int:
        """One norm of any kind, sometimes one that is there already."""
        value, rng = self.values[source], self.rng
        if value.tokens:
            return self.token_norm(source)
        fits = (len(value.shape), value.channels)
        old = [name for name, *wants in self.norm_layers if tuple(wants) == fits]
        if old and self.chance(0.05):
            return self.old_norm(source, rng.choice(old))
        channels, dims = value.channels, len(value.space)
        batch = _BATCH_NORMS[dims]
        # Of one channel it is a multiplication by a number, not a norm.
        frozen = (FrozenCall, FrozenScale, FrozenSteps) if channels > 1 else (FrozenCall,)
        kinds: dict[Callable[[], nn.Module], float] = {
            lambda: batch(channels, eps=rng.choice((1e-5, 1e-3, 0.1))): 11,
            lambda: batch(channels, affine=False, eps=1e-2): 1.5,
            lambda: rng.choice(frozen)(channels): 3,
            lambda: nn.SyncBatchNorm(channels): 0.7,
            lambda: batch(channels, track_running_stats=False): 0.5,
        }
        if dims and math.prod(value.space) > 1:
            instance = _INSTANCE_NORMS[dims]
            options = {"eps": 1e-2, "affine": self.chance(0.7), "track_running_stats": True}
            kinds[lambda: instance(channels, **options)] = 1
        if dims == 2:
            act = rng.choice((nn.ReLU, nn.SiLU, nn.Identity))
            kinds[lambda: NormAct(channels, act())] = 1
            kinds[lambda: NormThenRelu(channels)] = 0.3
        if channels % 2 == 0 and math.prod(value.shape[2:]) * channels > 4:
            kinds[lambda: nn.GroupNorm(2, channels)] = 0.8
        if not dims:
            kinds[lambda: nn.LayerNorm(channels)] = 1
        if self.chance(0.14):
            return self.functional_norm(source)
        module = rng.choices(list(kinds), list(kinds.values()))[0]()
        if self.chance(0.02):
            module.register_forward_pre_hook(lambda _, arguments: (arguments[0] * 1.5,))
        result = self.layer(module, source)
        self.own.add(result)
        if not isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            layer = self.net.steps[-1].layer
            self.norm_layers.append((layer, *fits))
            self.named(result, f"layers.{layer}")
        return result

    def functional_norm(self, source: int) -> int:
        """The statistics are buffers of the network itself, or of a module that never runs."""
        channels = self.values[source].channels
        if self.chance(0.4):
            name = self.fresh_name("owner")
            self.net.layers[name] = FrozenCall(channels)
            path = f"layers.{name}"
            return self.named(self.step("norm", source, option=path), path)
        statistics = laws.hostile_(nn.BatchNorm1d(channels), self.rng.randrange(1 << 20))
        mean, var = self.fresh_name("mean"), self.fresh_name("var")
        self.net.register_buffer(mean, statistics.running_mean)
        self.net.register_buffer(var, statistics.running_var)
        gamma = beta = ""
        if self.chance(0.7):
            gamma, beta = self.fresh_name("gamma"), self.fresh_name("beta")
            self.net.register_parameter(gamma, statistics.weight)
            self.net.register_parameter(beta, statistics.bias)
        result = self.step("norm", source, option=(mean, var, gamma, beta))
        return self.named(result, *filter(None, (gamma, mean)))

    def token_norm(self, source: int) -> int:
        """Batch norm over tokens, laid out in the ways people do it; or a layer norm."""
        value, rng = self.values[source], self.rng
        _, length, channels = value.shape
        match rng.choice(("transposed", "transposed", "merged", "merged", "layer", "rms", "wrong")):
            case "transposed":
                there = self.step("from_tokens", source, axis=1)
                return self.step("from_tokens", self.norm(there), axis=2)
            case "merged":
                there = self.step("merge_tokens", source, axis=1)
                back = self.norm(there)
                if self.chance(0.5):
                    return self.step("view_as", back, source, axis=2)
                return self.step("split_tokens", back, option=length, axis=2)
            case "layer":
                return self.layer(
                    nn.LayerNorm(channels, elementwise_affine=self.chance(0.9)), source
                )
            case "rms":
                return self.layer(nn.RMSNorm(channels), source)
        result = self.layer(nn.BatchNorm1d(length), source)  # on the axis of tokens
        return self.named(result, f"layers.{self.net.steps[-1].layer}")
