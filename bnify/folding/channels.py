"""Which channel each element of a value belongs to, and an affine map by channel.

The usual case, channels along one axis, is kept as that axis; anything else is a tensor of channel
numbers in the shape of the value. An operator that only moves elements is not analysed: it is run,
on the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bnify.algebra import Affine
from bnify.folding.refusal import Refused
from bnify.reason import Reason

#: An element that nobody reads: any channel would do.
FREE = -1


@dataclass(frozen=True)
class Flow:
    """An affine map of a value: element e becomes ``scale[k]·x + shift[k]`` with its channel k.

    Attributes:
        affine: Scale and shift by channel number, float64, (K,).
        shape: Shape of the value.
        axis: The axis that the channels lie along, K elements long; None if they lie otherwise.
        index: Else the channel number of each element, int64, in the shape of the value; FREE
            where nobody reads the element.
    """

    affine: Affine
    shape: tuple[int, ...]
    axis: int | None = None
    index: Tensor | None = None

    @classmethod
    def along(cls, affine: Affine, shape: Sequence[int], axis: int) -> Flow:
        """Channels along one axis."""
        return cls(affine, tuple(shape), axis % len(shape))

    @cached_property
    def dense(self) -> Tensor:
        """The channel number of each element, int64, in the shape of the value."""
        if self.index is not None:
            return self.index
        numbers = torch.arange(len(self.affine.scale))
        view = [1] * len(self.shape)
        view[self.axis or 0] = -1
        return numbers.view(view).expand(self.shape)

    @cached_property
    def used(self) -> Tensor:
        """The channel numbers that occur."""
        if self.index is None:
            return torch.arange(len(self.affine.scale))
        numbers: Tensor = torch.unique(self.index)
        return numbers[numbers != FREE]

    @property
    def shifts(self) -> bool:
        """Whether anything is added."""
        return bool(self.affine.shift[self.used].any())

    @property
    def negative(self) -> int:
        """How many channels have a scale below zero, which turns maxima into minima."""
        return int((self.affine.scale[self.used] < 0).sum())

    def without_shift(self) -> Flow:
        """The scale alone."""
        return replace(self, affine=Affine(self.affine.scale, torch.zeros_like(self.affine.shift)))

    def vector(self, axis: int) -> Affine:
        """The affine map by position along an axis, (length of the axis,).

        Raises:
            Refused: The channels lie along another axis, or several in one position.
        """
        axis %= len(self.shape)
        if self.axis == axis:
            return self.affine
        if self.index is None and len(self.affine.scale) > 1 and self.shape[axis] != 1:
            raise Refused(
                Reason.WRONG_AXIS,
                f"the norm's channels are axis {self.axis}, the layer's are axis {axis}",
            )
        return self._picked(self.reduced_to([axis]).view(-1))

    def elementwise(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scale and shift for each element of a tensor that broadcasts to the value, in its shape.

        Raises:
            Refused: Elements of different channels read the same element of it.
        """
        numbers = self.operand(shape).dense
        affine = self._picked(numbers.reshape(-1))
        return affine.scale.view(numbers.shape), affine.shift.view(numbers.shape)

    def _picked(self, numbers: Tensor) -> Affine:
        """The map at these channel numbers; nothing where the element is FREE."""
        scale, shift = self.affine.scale, self.affine.shift
        free = numbers == FREE
        at = numbers.clamp(min=0)
        return Affine(
            torch.where(free, torch.ones_like(scale[at]), scale[at]),
            torch.where(free, torch.zeros_like(shift[at]), shift[at]),
        )

    def reduced_to(self, axes: Sequence[int]) -> Tensor:
        """The channel numbers along these axes, with 1 for all others, if the others have no say.

        Raises:
            Refused: They do.
        """
        dense = self.dense
        for axis in range(dense.ndim):
            if axis in axes or dense.shape[axis] == 1:
                continue
            merged = dense.amax(axis, keepdim=True)
            if not bool(((dense == merged) | (dense == FREE)).all()):
                raise Refused(
                    Reason.WRONG_AXIS,
                    f"one channel of the layer meets several channels of the norm (axis {axis})",
                )
            dense = merged
        return dense

    # -- to a value that this one is made of -----------------------------------------------------

    def moved_back(self, positions: Tensor, shape: Sequence[int]) -> Flow:
        """The flow of the value whose elements an operator moved.

        Args:
            positions: For each element of this value, its place in the other (flat), int64.
            shape: Shape of the other value.

        Raises:
            Refused: One element would belong to two channels.
        """
        numel = 1
        for size in shape:
            numel *= size
        numbers = torch.full((numel,), FREE)
        flat, places = self.dense.reshape(-1), positions.reshape(-1)
        read = flat != FREE
        numbers[places[read]] = flat[read]
        if not bool((numbers[places[read]] == flat[read]).all()):
            raise Refused(Reason.WRONG_AXIS, "the same element is read for several channels")
        return replace(self, shape=tuple(shape), axis=None, index=numbers.view(*shape))

    def leaving(self, read_by_others: Tensor) -> Flow:
        """The flow that leaves elements as they are which somebody else reads.

        Args:
            read_by_others: Flat places, int64.

        Raises:
            Refused: One of them is read by us too.
        """
        numbers = self.dense.reshape(-1).clone()
        if bool((numbers[read_by_others] != FREE).any()):
            raise Refused(Reason.ANOTHER_CONSUMER)
        numbers[read_by_others] = len(self.affine.scale)
        one = torch.ones(1, dtype=torch.float64)
        affine = Affine(
            torch.cat([self.affine.scale, one]), torch.cat([self.affine.shift, 0 * one])
        )
        return Flow(affine, self.shape, None, numbers.view(*self.shape))

    def spread(self, axes: Sequence[int], shape: Sequence[int]) -> Flow:
        """The flow of a value that was averaged, or compared, over these axes.

        Args:
            axes: The axes, of equal meaning in both values.
            shape: Shape of the other value.

        Raises:
            Refused: This value has several channels along one of the axes.
        """
        if self.axis is not None and self.axis not in axes:
            return replace(self, shape=tuple(shape))
        kept = [axis for axis in range(len(self.shape)) if axis not in axes]
        numbers = self.reduced_to(kept).expand(shape)
        return replace(self, shape=tuple(shape), axis=None, index=numbers)

    def operand(self, shape: Sequence[int]) -> Flow:
        """The flow of an operand of an elementwise operator, which may have been broadcast.

        Raises:
            Refused: One of its elements meets several channels.
        """
        if tuple(shape) == self.shape:
            return self
        missing = len(self.shape) - len(shape)
        kept = [
            axis
            for axis in range(missing, len(self.shape))
            if shape[axis - missing] == self.shape[axis]
        ]
        numbers = self.reduced_to(kept).reshape(tuple(shape))
        return replace(self, shape=tuple(shape), axis=None, index=numbers)

    def part(self, axis: int, start: int, length: int, shape: Sequence[int]) -> Flow:
        """The flow of one input of a concatenation."""
        if self.axis is not None and self.axis != axis:
            return replace(self, shape=tuple(shape))
        if self.axis == axis:
            some = slice(start, start + length)
            affine = Affine(self.affine.scale[some], self.affine.shift[some])
            return Flow(affine, tuple(shape), axis)
        return replace(
            self, shape=tuple(shape), axis=None, index=self.dense.narrow(axis, start, length)
        )

    # -- with tensors that do not depend on the input ---------------------------------------------

    def by_channel(self, value: Tensor) -> Tensor | None:
        """A tensor that broadcasts to the value as one number a channel, (K,), if it is that."""
        channels = len(self.affine.scale)
        if value.numel() == 1:
            return value.reshape(()).expand(channels)
        if self.axis is not None:
            shape = (1,) * (len(self.shape) - value.ndim) + tuple(value.shape)
            if shape[self.axis] == channels and value.numel() == channels:
                return value.reshape(-1)
            if shape[self.axis] == value.numel() == 1:
                return value.reshape(1).expand(channels)
        numbers, read = self.dense, self.dense != FREE
        full = value.expand(self.shape)
        found = torch.zeros(channels, dtype=value.dtype)
        found[numbers[read]] = full[read]
        return found if bool((found[numbers[read]] == full[read]).all()) else None
