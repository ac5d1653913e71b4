"""From the words of ``--data`` to data: one reader a form, in the order that help lists them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from bnify.comparing.glyphs import CLASSES, draw_glyphs
from bnify.comparing.image_files import Labelled, read_cifar10, read_mnist
from bnify.comparing.image_folder import DEFAULT_SIZE, read_image_folder
from bnify.comparing.parts import ImagePart, Layout, Raw, Splits, Version, part_name
from bnify.comparing.splits import hold_out, split_three
from bnify.comparing.user_data import read_user_data
from bnify.errors import SpecError, UsageError

_MNIST_SIDE: Final = 28
#: Of a training part that brings no validation part: a sixth, and at most MNIST's usual number.
_MOST_VALIDATION: Final = 10_000


@dataclass(frozen=True, slots=True)
class Form:
    """One form of ``--data``.

    Attributes:
        word: What stands before the colon, or alone.
        takes_folder: Whether it is ``word:DIR``.
        says: What it is, for help.
        read: From (the folder, the seed, pixels a side of an image folder) to data.
    """

    word: str
    takes_folder: bool
    says: str
    read: Callable[[Path, int, int], Raw]

    @property
    def words(self) -> str:
        """As it is typed."""
        return f"{self.word}:DIR" if self.takes_folder else self.word


def read_source(source: Any, *, seed: int = 0, image_size: int | None = None) -> Raw:
    """Data from the words of ``--data``, or from what ``pkg.mod:datasets`` would return.

    Args:
        source: Words, a function, or the parts themselves.
        seed: Of random splits, and of images that are drawn.
        image_size: Pixels a side of the images of ``folder:DIR``; 32 if None.

    Raises:
        UsageError: The words cannot be right.
        SpecError: The data cannot be had, or are damaged.
    """
    word, colon, place = source.partition(":") if isinstance(source, str) else ("", "", "")
    form = next((form for form in FORMS if form.word == word), None)
    if image_size is not None and (word != "folder" or image_size < 1):
        raise UsageError(
            f"image_size={image_size}: "
            + ("at least 1 is needed" if word == "folder" else "only images of a folder have one"),
            hint=f"image_size={DEFAULT_SIZE} with folder:DIR",
        )
    if form is None:
        if isinstance(source, str) and not colon:
            raise _unknown(source)
        return read_user_data(source, seed)
    if form.takes_folder != bool(place) or (colon and not form.takes_folder):
        what = "names no folder" if form.takes_folder else "takes nothing after its name"
        raise UsageError(f"--data {source} {what}", hint=f"write {form.words}")
    folder = Path(place).expanduser() if place.startswith("~/") else Path(place)
    if form.takes_folder and not folder.is_dir():
        raise SpecError(f"--data {source}: there is no folder {place}", hint="check the path")
    try:
        return form.read(folder, seed, DEFAULT_SIZE if image_size is None else image_size)
    except OSError as error:
        raise SpecError(f"--data {source} cannot be read: {error}", hint="check it") from error


def _unknown(source: str) -> UsageError:
    known = ", ".join((*(form.words for form in FORMS), "pkg.mod:datasets", "file.py:datasets"))
    near = difflib.get_close_matches(source, [form.word for form in FORMS], n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return UsageError(f"--data {source!r} is no known data", hint=f"{meant}one of: {known}")


# -- readers -------------------------------------------------------------------------------------


def _digits(_: Path, seed: int, __: int) -> Raw:
    """1,797 images, at 28×28 (bilinear) and at their own 8×8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SpecError(
            "the data set digits comes with scikit-learn, which is not installed",
            hint="pip install 'bnify[demo]', or take --data glyphs",
        ) from error
    raw = load_digits()
    small = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    side = (_MNIST_SIDE, _MNIST_SIDE)
    large = F.interpolate(small, side, mode="bilinear", align_corners=False)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    chosen = split_three(len(labels), seed)
    sizes = [[Labelled(images, labels)[i] for i in chosen] for images in (large, small)]
    return _images("digits", CLASSES, *sizes)


def _glyphs(_: Path, seed: int, __: int) -> Raw:
    images, labels = draw_glyphs(seed=seed)
    whole = Labelled(torch.from_numpy(images)[:, None], torch.from_numpy(labels))
    return _images("glyphs", CLASSES, [whole[i] for i in split_three(len(labels), seed)])


def _mnist(name: str) -> Callable[[Path, int, int], Raw]:
    def read(folder: Path, seed: int, _: int) -> Raw:
        return _images(name, CLASSES, _with_validation(*read_mnist(folder), seed))

    return read


def _cifar10(folder: Path, seed: int, _: int) -> Raw:
    train, test, notes = read_cifar10(folder)
    return _images("cifar10", CLASSES, _with_validation(train, test, seed), notes=notes)


def _folder(folder: Path, seed: int, size: int) -> Raw:
    parts, classes, notes = read_image_folder(folder, size, seed)
    return _images(f"folder:{folder}", classes, parts, notes=notes)


#: In the order of help.
FORMS: Final = (
    Form("digits", False, "1,797 handwritten digits, bundled with scikit-learn", _digits),
    Form("glyphs", False, "3,000 images of digits, drawn from a bitmap font", _glyphs),
    Form("mnist", True, "MNIST's idx files, also .gz", _mnist("mnist")),
    Form("fashion-mnist", True, "Fashion-MNIST's idx files, also .gz", _mnist("fashion-mnist")),
    Form("cifar10", True, "CIFAR-10, the Python or the binary version", _cifar10),
    Form("folder", True, "images in folders named after their classes", _folder),
)


# -- images as parts -----------------------------------------------------------------------------


def _with_validation(train: Labelled, test: Labelled, seed: int) -> Sequence[Labelled]:
    count = min(_MOST_VALIDATION, max(1, len(train.labels) // 6))
    rest, held = hold_out(len(train.labels), count, seed)
    return train[rest], train[held], test


def _images(
    name: str, classes: int, *sizes: Sequence[Labelled], notes: tuple[str, ...] = ()
) -> Raw:
    """Images of three parts, at one or several sizes, in every layout that a model may want."""
    for images in sizes:
        for at, part in enumerate(images):
            if not part.images.numel():
                raise SpecError(f"{part_name(at, name)} is empty", hint="check the files")
            if part.images.shape[1:] != images[0].images.shape[1:]:
                shapes = [tuple(p.images.shape[1:]) for p in (images[0], part)]
                raise SpecError(
                    f"the images of {name} are of {shapes[0]} for training, but of {shapes[1]} in "
                    f"{part_name(at, name)}",
                    hint="check the files",
                )
    versions = tuple(Version(splits) for images in sizes for splits in _layouts(images))
    return Raw(name=name, versions=versions, classes=classes, notes=notes)


def _layouts(parts: Sequence[Labelled]) -> list[Splits]:
    mean, deviation = _statistics(parts[0].images)
    unit = 255.0 if parts[0].images.dtype is torch.uint8 else 1.0
    scale = (1 / (unit * deviation)).float()[:, None, None]
    shift = (-mean / deviation).float()[:, None, None]
    layouts = [Layout.AS_THEY_ARE, Layout.FLAT]
    if parts[0].images.shape[1] == 1:
        layouts.append(Layout.COLOUR)
    return [
        (split(parts[0]), split(parts[1]), split(parts[2]))
        for split in (_in_layout(layout, scale, shift) for layout in layouts)
    ]


def _in_layout(layout: Layout, scale: Tensor, shift: Tensor) -> Callable[[Labelled], ImagePart]:
    return lambda part: ImagePart(
        images=part.images, targets=part.labels, scale=scale, shift=shift, layout=layout
    )


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (over all pixels) of each channel in [0, 1]; 1 for a constant."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for block in torch.split(
        images, 4096
    ):  # the whole would take eight times the memory of its bytes
        pixels = block.double()
        total += pixels.sum((0, 2, 3))
        squares += pixels.square().sum((0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    unit = 255.0 if images.dtype is torch.uint8 else 1.0
    deviation = variance.sqrt() / unit
    return mean / unit, torch.where(deviation > 1e-6, deviation, 1.0)
