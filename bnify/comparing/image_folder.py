"""Images in folders named after their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from bnify.comparing.image_files import Labelled
from bnify.comparing.splits import by_class, fifth, hold_out, split_three
from bnify.errors import SpecError
from bnify.spec.usercode import first_line

DEFAULT_SIZE: Final = 32
_SPLITS: Final = (("train",), ("val", "validation"), ("test",))
_LEAST: Final = 3  # images of a class that can be split in three


def read_image_folder(
    folder: Path, size: int, seed: int
) -> tuple[tuple[Labelled, Labelled, Labelled], int, tuple[str, ...]]:
    """Training, validation and test images, the number of classes, and notes.

    Either a folder a class, split 60/20/20 at random within each class, or ``train/``,
    ``val/`` or ``validation/``, and ``test/`` with such folders; where one of the last two is
    missing, a fifth of the training images stands for it.

    Args:
        folder: The folder.
        size: Pixels a side; images are resized, not cropped.
        seed: Of the split.

    Raises:
        SpecError: Pillow is missing, an image cannot be read, or classes are missing.
    """
    reader = _Reader(size)
    found = [_split_folder(folder, names) for names in _SPLITS]
    if found[0] is None:
        for other in found[1:]:
            if other is not None:
                raise SpecError(
                    f"{folder} has {other.name}/ but no train/", hint="add the training images"
                )
        whole, classes = reader.read(folder, None)
        parts = _split_three(whole, folder, classes, seed)
    else:
        parts, classes = _read_splits(found[0], found[1:], reader, seed)
    train, validation, test = reader.without_equal_channels(parts)
    return (train, validation, test), len(classes), tuple(reader.notes)


def _split_folder(folder: Path, names: Sequence[str]) -> Path | None:
    there = [folder / name for name in names if (folder / name).is_dir()]
    if len(there) > 1:
        raise SpecError(f"there are both {there[0]} and {there[1]}", hint="keep one of them")
    return there[0] if there else None


def _split_three(
    whole: Labelled, folder: Path, classes: Sequence[str], seed: int
) -> tuple[Labelled, ...]:
    _refuse_rare(whole, folder, classes)
    chosen = by_class(whole.labels, lambda samples: split_three(samples, seed))
    return tuple(whole[indices] for indices in chosen)


def _refuse_rare(images: Labelled, folder: Path, classes: Sequence[str]) -> None:
    for label, name in enumerate(classes):
        if (count := int((images.labels == label).sum())) < _LEAST:
            raise SpecError(
                f"{folder / name} has {count} images: too few to split",
                hint="bring more images, or make train/, val/ and test/ folders",
            )


def _read_splits(
    training: Path, others: Sequence[Path | None], reader: _Reader, seed: int
) -> tuple[tuple[Labelled, ...], list[str]]:
    """The parts that have folders, and fifths of the training images for those that have none."""
    train, classes = reader.read(training, None)
    held = [None if folder is None else reader.read(folder, classes)[0] for folder in others]
    if all(part is None for part in held):
        reader.notes.append("validation and test data are a fifth each of train/")
        return _split_three(train, training, classes, seed), classes
    parts = []
    for part, name in zip(held, ("validation", "test"), strict=True):
        if part is None:
            _refuse_rare(train, training, classes)
            rest, taken = by_class(train.labels, lambda count: hold_out(count, fifth(count), seed))
            train, part = train[rest], train[taken]
            reader.notes.append(f"{name} data are a fifth of train/: they have no folder")
        parts.append(part)
    return (train, *parts), classes


class _Reader:
    """Reads folders of images at one size, as RGB."""

    def __init__(self, size: int) -> None:
        try:
            from PIL import Image
        except ImportError as error:
            raise SpecError(
                "reading an image folder needs Pillow, which is not installed",
                hint="pip install pillow",
            ) from error
        Image.init()
        self._image: Any = Image
        # Pillow hands EPS files to Ghostscript, and WMF files to Windows: no images of a data set.
        self._formats = [name for name in Image.OPEN if name not in ("EPS", "WMF")]
        self._suffixes = {s for s, name in Image.EXTENSION.items() if name in self._formats}
        self._size = size
        self.notes: list[str] = []

    def read(self, folder: Path, classes: list[str] | None) -> tuple[Labelled, list[str]]:
        """The images of a folder, and its classes: those given, or as many as it has."""
        there = sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.is_dir() and not entry.name.startswith((".", "__"))
        )
        if classes is None and len(there) < 2:
            raise SpecError(
                f"{folder} has {len(there)} class folders",
                hint="put the images of each class in a folder of its own: DIR/cat/1.png",
            )
        for name in sorted(set(classes or there) ^ set(there)):
            missing = "has no images of the class" if name not in there else "has one class more:"
            raise SpecError(
                f"{folder} {missing} {name}", hint="every part needs the classes of train/"
            )
        images, labels, others = [], [], 0
        for label, name in enumerate(there):
            files = [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
            chosen = [path for path in files if path.suffix.lower() in self._suffixes]
            others += len(files) - len(chosen)
            if not chosen:
                raise SpecError(f"{folder / name} has no image that Pillow can read")
            images += [self._pixels(path) for path in chosen]
            labels += [label] * len(chosen)
        if others:
            self.notes.append(f"{others} files in {folder.name}/ are no images and were left out")
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return Labelled(pixels, torch.tensor(labels)), there

    def _pixels(self, path: Path) -> npt.NDArray[np.uint8]:
        """One image as (size, size, 3)."""
        try:
            with self._image.open(path, formats=self._formats) as image:
                image.load()
                if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
                    wide = np.asarray(image).astype(np.float64) / 257
                    image = self._image.fromarray(np.clip(wide, 0, 255).round().astype(np.uint8))
                elif image.mode == "F":
                    raise ValueError("its pixels are floating-point numbers of an unknown range")
                elif image.mode == "P":  # its transparency has to be resolved first
                    image = image.convert("RGBA")
                resampling = self._image.Resampling.BILINEAR
                resized = image.convert("RGB").resize((self._size, self._size), resampling)
                return np.array(resized, dtype=np.uint8)
        except Exception as error:  # decoders fail in many ways
            raise SpecError(
                f"{path} cannot be read: {first_line(error)}", hint="remove or repair the file"
            ) from error

    @staticmethod
    def without_equal_channels(parts: Sequence[Labelled]) -> Sequence[Labelled]:
        """One channel where the three are equal in every image."""
        for part in parts:
            if not torch.equal(part.images, part.images[:, :1].expand_as(part.images)):
                return parts
        return [Labelled(part.images[:, :1].contiguous(), part.labels) for part in parts]
