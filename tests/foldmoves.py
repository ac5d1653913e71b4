"""The moves of random networks: blocks, branches, passages between a layer and its norm, traps."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from foldparts import LayerScale
from foldwriting import BATCH, NormUse, Value, Writer
from laws import Step

_MODULES = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, nn.ELU, nn.LeakyReLU, nn.Sigmoid)
_FUNCTIONS = ("relu", "gelu", "silu", "tanh", "hardswish", "softplus", "clamp", "abs")


class Author(Writer):
    """Writes the program of a random network."""

    def write(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rng = self.rng
        channels = rng.choice((3, 4, 4, 6))
        start = rng.choices(
            (
                (channels,),
                (channels, 9),
                (channels, 7, 8),
                (channels, 4, 4),
                (channels, 4, 5, 4),
                "tokens",
                "ids",
            ),
            (2, 2, 6, 3, 1, 2, 1),
        )[0]
        axis = 1
        if start == "tokens":
            start, axis = (rng.choice((4, 6)), rng.choice((4, 6))), 2
        elif start == "ids":
            start, self.vocabulary = (rng.choice((5, 6)),), 11
        self.values.append(Value((BATCH, *start), axis))
        here = 0
        if self.vocabulary:
            padding = rng.choice((None, 0))
            embed = nn.Embedding(11, rng.choice((5, 6, 8)), padding_idx=padding)
            here = self.layer(embed, 0, axis=2)
        for _ in range(rng.randint(4, 9)):
            here = self.move(here)
            if rng.random() < 0.06:
                here = rng.randrange(1 if self.vocabulary else 0, len(self.values))
        if rng.random() < 0.5:
            here = self.weighted(self.pooled(here))
        results = [here or self.block(0)]
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            results.append(rng.randrange(1, len(self.values)))
        return start, self.prune(list(dict.fromkeys(results)))

    def prune(self, results: list[int]) -> tuple[int, ...]:
        """Leave out what no result needs; new numbers of the results."""
        steps = self.net.steps
        needed, todo = {0}, list(results)
        while todo:
            value = todo.pop()
            if value not in needed:
                needed.add(value)
                todo.extend(steps[value - 1].sources)
        number = {value: i for i, value in enumerate(sorted(needed))}
        kept = [
            Step(s.op, tuple(number[i] for i in s.sources), s.layer, s.option)
            for value, s in enumerate(steps, 1)
            if value in needed
        ]
        self.names = {number[v]: names for v, names in self.names.items() if v in needed}
        self.net.steps = kept
        used = {step.layer for step in kept}
        used.update(str(step.option).split(".")[-1] for step in kept if step.op == "norm")
        for name in list(self.net.layers):
            if name not in used:
                del self.net.layers[name]
        return tuple(number[value] for value in results)

    def norm_uses(self) -> tuple[NormUse, ...]:
        """The norms of the pruned program, each with its number of calls."""
        names = list(self.names.values())
        return tuple(NormUse(n, names.count(n)) for n in dict.fromkeys(names))

    def move(self, here: int) -> int:
        value, rng = self.values[here], self.rng
        moves: dict[Callable[[int], int], float] = {
            self.block: 6,
            self.pre_block: 3,
            self.residual: 2,
            self.branches: 2,
            self.activation: 1,
            self.norm: 1,
            self.weighted: 1,
            self.passage: 2.5,
            self.combine: 1.5,
            self.again: 1,
            self.concat: 1.5,
            self.consumers: 1.5,
        }
        if value.image:
            moves[self.reparameterised] = 1.5
            moves[self.reshaped] = 0.5
        elif value.tokens:
            moves[self.reshaped] = 1
            moves[self.attention] = 1
        else:
            moves[self.reshaped] = 0.6
        return rng.choices(list(moves), list(moves.values()))[0](here)

    # -- blocks ------------------------------------------------------------------------------------

    def block(self, source: int) -> int:
        """A layer, what may stand between, and its norm."""
        here = self.passages(self.weighted(source))
        for _ in range(self.rng.choice((1, 1, 1, 1, 2, 3))):
            here = self.norm(here)
        return self.activation(here) if self.chance(0.7) else here

    def pre_block(self, source: int) -> int:
        """A norm before its layer."""
        here = self.activation(source) if self.chance(0.5) else source
        return self.weighted(self.passages(self.norm(here)))

    def consumers(self, source: int) -> int:
        """A norm that several layers read, and sometimes somebody else."""
        after = self.rng.choice((4, 6))
        read = self.norm(self.activation(source))
        results = [self.weighted(read, after, same=True) for _ in range(self.rng.choice((2, 2, 3)))]
        here = results[0]
        for other in results[1:]:
            here = self.step("add", here, other)
        if self.chance(0.25) and self.values[read] == self.values[here]:
            return self.step("add", here, read)
        return here

    def residual(self, source: int) -> int:
        """x + f(x), the norm at the end of the branch or at its beginning."""
        channels = self.values[source].channels
        if self.chance(0.4):
            branch = self.weighted(self.activation(self.norm(source)), channels, same=True)
        else:
            branch = self.activation(self.norm(self.weighted(source, same=True)))
            branch = self.norm(self.weighted(branch, channels, same=True))
        if self.chance(0.2):
            branch = self.channel_constant("times", branch)
        elif self.chance(0.15) and len(self.values[branch].shape) == 4:
            branch = self.layer(LayerScale(channels, last=False), branch)
        sources = (branch, source) if self.chance(0.5) else (source, branch)
        inplace = sources[0] in self.own and self.chance(0.3)
        return self.step("add_" if inplace else "add", *sources)

    def branches(self, source: int) -> int:
        """Several layers on one value, summed, with a norm on each or on the sum."""
        after = self.rng.choice((4, 6, self.values[source].channels))
        norms = self.chance(0.5)
        results = []
        for _ in range(self.rng.choice((2, 2, 3))):
            branch = self.weighted(source, after, same=True)
            results.append(self.norm(branch) if norms else branch)
        if len(results) == 3:
            here = self.step("sum3", *results)
        elif self.chance(0.2):
            here = self.step("weighted_add", *results, option=self.rng.choice((0.5, -2.0)))
        else:
            op = self.rng.choice(("add", "add", "sub", "lerp", "maximum"))
            here = self.step(op, *results)
        return self.activation(here if norms and self.chance(0.7) else self.norm(here))

    def reparameterised(self, source: int) -> int:
        """Parallel branches: k×k convolution, 1×1 convolution and the value itself, summed."""
        channels = self.values[source].channels
        source = self.activation(source) if self.chance(0.5) else source
        dims = len(self.values[source].space)
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        groups = self.rng.choice((1, channels))
        inside = self.chance(0.7)
        here = 0
        for kernel in self.rng.choice(((3, 1), (3, 3, 1), (3,))):
            module = conv(channels, channels, kernel, 1, kernel // 2, 1, groups, not inside)
            branch = self.layer(module, source)
            branch = self.norm(branch) if inside else branch
            here = self.step("add", here, branch) if here else branch
        identity = self.norm(source) if inside else source
        here = self.step("add", *((here, identity) if self.chance(0.7) else (identity, here)))
        return self.activation(here if inside else self.norm(here))

    def concat(self, source: int) -> int:
        """Values side by side, with a norm on all or on some."""
        value = self.values[source]
        if value.channels > 8:
            return self.block(source)
        here = self.weighted(source, 4, same=True)
        other = self.rng.choice((source, self.weighted(source, 3, same=True)))
        if self.chance(0.3):
            here = self.norm(here)
        if self.chance(0.2) and value.image and value.space[-1] <= 6:
            twin = self.weighted(source, 4, same=True)
            joined = self.step("cat", here, twin, option=-1)
        elif self.chance(0.15) and value.image and value.space[-1] <= 6:
            joined = self.step("stack", here, self.weighted(source, 4, same=True))
        else:
            joined = self.step("cat", here, other, option=value.axis)
        return self.activation(self.norm(joined)) if self.chance(0.7) else self.weighted(joined)

    def combine(self, source: int) -> int:
        """This value with another of its shape: one that is there, or a branch."""
        value = self.values[source]
        others = [i for i, v in enumerate(self.values) if v == value and i != source]
        if self.vocabulary:
            others = [i for i in others if i]
        if others and self.chance(0.7):
            other = self.rng.choice(others)
        else:
            other = self.weighted(source, value.channels, same=True)
        op = self.rng.choice(("add", "sub", "mul", "gate", "maximum", "weighted_add", "lerp"))
        option = 0.5 if op == "weighted_add" else None
        here = self.step(op, source, other, option=option)
        return self.norm(here) if self.chance(0.5) else here

    def attention(self, source: int) -> int:
        """Norm, one projection to queries, keys and values, attention, sometimes a norm."""
        value = self.values[source]
        if value.channels > 8 or value.shape[0] != BATCH:
            return self.block(source)
        read = self.norm(source)
        here = self.step("attend", self.layer(nn.Linear(value.channels, 3 * value.channels), read))
        here = self.layer(nn.Linear(value.channels, value.channels), here)
        return self.step("add", source, self.norm(here) if self.chance(0.4) else here)

    def activation(self, source: int) -> int:
        draw = self.rng.random()
        if draw < 0.4:
            return self.layer(self.rng.choice(_MODULES)(), source)
        if draw < 0.6 and source in self.own:
            if self.chance(0.5):
                result = self.layer(nn.ReLU(inplace=True), source)
                self.own.add(result)
                return result
            op = self.rng.choice(
                ("relu_", "leaky_relu_", "writes" if self.chance(0.1) else "relu_")
            )
            return self.step(op, source)
        return self.step(self.rng.choice(_FUNCTIONS), source)

    # -- passages ----------------------------------------------------------------------------------

    def passages(self, source: int) -> int:
        for _ in range(self.rng.choice((0, 0, 1, 1, 1, 2))):
            source = self.passage(source)
        return source

    def channel_constant(self, op: str, source: int) -> int:
        value = self.values[source]
        name = self.parameter(value.channels)
        return self.step(op, source, option=(name, value.axis))

    def passage(self, source: int) -> int:
        """One operator that an affine may get through."""
        value, rng = self.values[source], self.rng
        moves: list[Callable[[int], int]] = [
            lambda i: self.step("dropout", i),
            lambda i: self.layer(rng.choice((nn.Dropout(0.2), nn.Identity())), i),
            lambda i: self.step("scale", i, option=rng.choice((0.5, -1.5))),
            lambda i: self.step(rng.choice(("shift", "rsub")), i, option=rng.choice((0.3, -1.0))),
            lambda i: self.step("divide", i, option=rng.choice((2.0, -0.7))),
            lambda i: self.step(rng.choice(("negate", "detach", "cast")), i),
            lambda i: self.channel_constant(rng.choice(("times", "over", "plus")), i),
            *[self.slicing] * 3,
        ]
        if value.image:
            moves += [self.pool] * 3 + [self.image_passage] * 5 + [self.pad] * 2
        elif value.tokens:
            moves.append(lambda i: self.step("roll", i, option=rng.choice((1, 2))))
            position = value.shape[1:]
            moves.append(
                lambda i: self.step("position", i, option=self.parameter(*position, scale=0.3))
            )
        return rng.choice(moves)(source)

    def slicing(self, source: int) -> int:
        """Parts of a value along its channels or beside them."""
        value, rng = self.values[source], self.rng
        axis = value.axis if value.channels >= 6 and self.chance(0.7) else len(value.shape) - 1
        if axis != value.axis and value.shape[axis] >= 6:
            return self.step("part", source, option=(2, axis, rng.randrange(2)))
        if axis == 1 and value.channels >= 6:
            left = value.channels - 4
            moves: list[Callable[[int], int]] = [
                lambda i: self.step("part", i, option=(2, 1, rng.randrange(2))),
                lambda i: self.step("split", i, option=((left, 4), rng.randrange(2))),
                lambda i: self.step("narrow", i, option=2),
                self.halves,
                self.halves,
            ]
            if value.channels % 2 == 0:
                moves.append(lambda i: self.step("swap_halves", i))
            return rng.choice(moves)(source)
        return self.step("detach", source)

    def halves(self, source: int) -> int:
        """One half goes through a norm, the other does not, and both meet again."""
        halves = [self.step("part", source, option=(2, 1, i)) for i in range(2)]
        which = self.rng.randrange(2)
        halves[which] = self.norm(halves[which])
        return self.step("cat", *halves, option=1)

    def pool(self, source: int) -> int:
        value, rng = self.values[source], self.rng
        dims, smallest = len(value.space), min(value.space)
        if smallest < 3:
            return self.step("mean_keep", source)
        kernel = rng.choice((2, 3))
        options = {"kernel_size": kernel, "stride": rng.choice((1, 2))}
        options["padding"] = rng.choice((0, 0, 1))
        options["ceil_mode"] = self.chance(0.3)
        match rng.choice(("avg", "avg", "max", "adaptive_avg", "adaptive_max", "mean", "amax")):
            case "avg":
                options["count_include_pad"] = self.chance(0.5)
                if dims > 1 and self.chance(0.15):
                    options["divisor_override"] = 3
                return self.step("pool", source, option=("avg_pool", tuple(options.items())))
            case "max":
                return self.step("pool", source, option=("max_pool", tuple(options.items())))
            case "adaptive_avg":
                sized = (("output_size", rng.choice((1, 2, 3))),)
                return self.step("pool", source, option=("adaptive_avg_pool", sized))
            case "adaptive_max":
                return self.step(
                    "pool", source, option=("adaptive_max_pool", (("output_size", 2),))
                )
            case "mean":
                return self.step("mean_keep", source)
        return self.step("pool", source, option=("lp_pool", (("norm_type", 2), ("kernel_size", 2))))

    def pad(self, source: int) -> int:
        value, rng = self.values[source], self.rng
        width = [1, 1] * len(value.space)
        if min(value.space) < 2 or self.chance(0.3):
            fill = rng.choice((0.0, 0.0, 0.5))
            return self.step("pad", source, option=(tuple(width), "constant", fill))
        mode = rng.choice(("reflect", "replicate", "circular"))
        return self.step("pad", source, option=(tuple(width), mode, None))

    def image_passage(self, source: int) -> int:
        """Operators that move elements of images, or mix those of one channel."""
        value, rng = self.values[source], self.rng
        channels, space = value.channels, value.space
        moves: list[Callable[[int], int]] = [
            lambda i: self.step(rng.choice(("flip", "permuted", "squeezed")), i),
            lambda i: self.step("roll", i, option=rng.choice((1, 2))),
            lambda i: self.step("expand_as", self.step("mean_keep", i), i),
        ]
        if space[-1] >= 4:
            moves.append(lambda i: self.step(rng.choice(("crop", "thin")), i))
        if max(space) <= 5 and math.prod(space) <= 30:
            linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(space)]
            corners = (("mode", linear), ("align_corners", self.chance(0.5)))
            options = rng.choice(((("mode", "nearest"),), (("mode", "nearest-exact"),), corners))
            moves.append(lambda i: self.step("interpolate", i, option=options))
        if channels % 2 == 0:
            shuffle = rng.choice(("channel_shuffle", "native_shuffle"))
            moves.append(lambda i: self.step(shuffle, i, option=2))
        if len(space) == 2 and channels % 4 == 0 and max(space) <= 5:
            moves.append(lambda i: self.step("pixel_shuffle", i))
        if len(space) == 2 and channels <= 3 and all(size % 2 == 0 for size in space):
            moves.append(lambda i: self.step("pixel_unshuffle", i))
        return rng.choice(moves)(source)

    # -- other layouts -----------------------------------------------------------------------------

    def reshaped(self, source: int) -> int:
        """From images to tokens or vectors and back."""
        value, rng = self.values[source], self.rng
        if value.image:
            small = math.prod(value.shape[1:]) <= 120
            moves: list[Callable[[int], int]] = [
                self.pooled,
                lambda i: self.step("to_tokens", i, axis=2),
                lambda i: self.step("flatten_space", i),
                lambda i: self.step("select", i, option=(len(value.shape) - 1, 0)),
            ]
            if small:
                moves += [lambda i: self.step("flatten", i)] * 2
            here = rng.choice(moves)(source)
        elif value.tokens:
            length = value.shape[1]
            square = math.isqrt(length)
            moves = [
                lambda i: self.step("from_tokens", i, axis=1),
                lambda i: self.step("mean_tokens", i, axis=1),
                lambda i: self.step("select", i, option=(1, 0), axis=1),
            ]
            if square * square == length and square > 1:
                moves += [lambda i: self.step("square", i, option=(square, square), axis=1)] * 2
            here = rng.choice(moves)(source)
        elif value.channels % 4 == 0:
            here = self.step("unflatten", source, option=(value.channels // 4, 2, 2))
        else:
            here = self.linear(source, 8)
        return self.norm(here) if self.chance(0.5) else here

    def pooled(self, source: int) -> int:
        """Vectors from whatever it is."""
        value = self.values[source]
        if value.tokens:
            return self.step("mean_tokens", source, axis=1)
        if value.image:
            small = math.prod(value.shape[1:]) <= 120
            ops = ("mean", "mean", "amax", "sum_space", *(["flatten"] * 2 if small else []))
            return self.step(self.rng.choice(ops), source)
        return source
