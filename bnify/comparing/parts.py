"""Parts of a data set: images, tensors, or a Dataset of the user's, all read by indices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self, TypeAlias

from torch import Tensor
from torch.utils.data import Subset, default_collate

from bnify.errors import SpecError
from bnify.spec.usercode import a_type, user_code
from bnify.structure import Call, as_call

#: What becomes of a batch's targets.
Convert: TypeAlias = Callable[[Tensor], Tensor]


class Layout(StrEnum):
    """How a model gets its images (C, H, W)."""

    AS_THEY_ARE = "as they are"
    FLAT = "flat"  # (C·H·W,)
    COLOUR = "three channels"  # a grey image three times


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """Images in memory, standardised as they are read: ``pixel · scale + shift`` a channel.

    Attributes:
        images: (N, C, H, W), uint8 or float32.
        targets: (N,).
        scale: (C, 1, 1).
        shift: (C, 1, 1).
        layout: What the model gets.
    """

    images: Tensor
    targets: Tensor
    scale: Tensor
    shift: Tensor
    layout: Layout = Layout.AS_THEY_ARE

    def __len__(self) -> int:
        """Samples."""
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Call, Tensor]:
        """Images and targets of some samples."""
        # A copy, changed in place: a third of the time of indexing and one fused operation.
        images = self.images.index_select(0, indices).float().mul_(self.scale).add_(self.shift)
        if self.layout is Layout.FLAT:
            images = images.flatten(1)
        elif self.layout is Layout.COLOUR:
            images = images.expand(-1, 3, -1, -1)
        return Call((images,)), self.targets.index_select(0, indices)

    def with_targets(self, convert: Convert) -> Self:
        """The same with other targets."""
        return replace(self, targets=convert(self.targets))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """The user's own tensors: the first axis of each runs over the samples."""

    inputs: Call
    targets: Tensor

    def __len__(self) -> int:
        """Samples."""
        return len(self.targets)

    def batch(self, indices: Tensor) -> tuple[Call, Tensor]:
        """Inputs and targets of some samples."""
        return self.inputs.map(lambda tensor: _rows(tensor, indices)), _rows(self.targets, indices)

    def with_targets(self, convert: Convert) -> Self:
        """The same with other targets."""
        return replace(self, targets=convert(self.targets))

    def with_inputs(self, convert: Convert) -> Self:
        """The same with every input tensor converted."""
        return replace(self, inputs=self.inputs.map(convert))

    def subset(self, indices: Tensor) -> Self:
        """Some of the samples."""
        call, targets = self.batch(indices)
        return replace(self, inputs=call, targets=targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetPart:
    """The user's map-style Dataset of (x, y): its items are drawn when they are asked for.

    Attributes:
        dataset: With ``__len__`` and ``__getitem__``.
        name: Of the part, for errors: ``"the training part of data.py:datasets"``.
        on_inputs: Conversions of the input tensors of a batch, in order.
        on_targets: Conversions of the targets of a batch, in order.
    """

    dataset: Any
    name: str
    on_inputs: tuple[Convert, ...] = ()
    on_targets: tuple[Convert, ...] = ()

    def __len__(self) -> int:
        """Samples."""
        return len(self.dataset)

    def batch(self, indices: Tensor) -> tuple[Call, Tensor]:
        """Inputs and targets of some samples, collated as a DataLoader does it.

        Raises:
            SpecError: The Dataset raised, or an item is not (x, y).
        """
        with user_code(self.name):
            items = [self.dataset[index] for index in indices.tolist()]
        for item in items:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
                raise SpecError(
                    f"{self.name} yields {a_type(item)}{size}, not a pair (x, y)",
                    hint="let __getitem__ return (inputs, target)",
                )
        with user_code(f"collating items of {self.name}"):
            inputs, targets = default_collate(items)
        if not isinstance(targets, Tensor):
            raise SpecError(
                f"the targets of {self.name} are collated into {a_type(targets)}",
                hint="let y be a number or a tensor",
            )
        call = as_call(inputs)
        for convert in self.on_inputs:
            call = call.map(convert)
        for convert in self.on_targets:
            targets = convert(targets)
        return call, targets

    def with_targets(self, convert: Convert) -> Self:
        """The same with other targets."""
        return replace(self, on_targets=(*self.on_targets, convert))

    def with_inputs(self, convert: Convert) -> Self:
        """The same with every input tensor converted."""
        return replace(self, on_inputs=(*self.on_inputs, convert))

    def subset(self, indices: Tensor) -> Self:
        """Some of the samples."""
        return replace(self, dataset=Subset(self.dataset, indices.tolist()))


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    return tensor.index_select(0, indices.to(tensor.device))


OwnPart: TypeAlias = TensorPart | DatasetPart
AnyPart: TypeAlias = ImagePart | TensorPart | DatasetPart
#: Training, validation and test part.
Splits: TypeAlias = tuple[AnyPart, AnyPart, AnyPart]


def part_name(at: int, data: str) -> str:
    """For errors: ``"the training part of digits"``."""
    return f"the {('training', 'validation', 'test')[at]} part of {data}"


@dataclass(frozen=True, slots=True)
class Version:
    """The samples in one shape.

    Attributes:
        splits: Training, validation and test part.
        note: What a reader should know if this version is used.
    """

    splits: Splits
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """What a source gives, before it is fitted to a model and a task.

    Attributes:
        name: For titles: ``"digits"``.
        versions: The same samples in several shapes; the first one that the model takes is used.
        classes: How many there are; None where the targets have to tell.
        notes: What a reader should know, one sentence each.
    """

    name: str
    versions: tuple[Version, ...]
    classes: int | None = None
    notes: tuple[str, ...] = ()
