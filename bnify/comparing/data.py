"""The data of a comparison: three parts, in the shape that the model takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from bnify.borrow import seeded
from bnify.comparing.fitting import fit, input_words
from bnify.comparing.parts import AnyPart, DatasetPart, Raw, Splits, Version, part_name
from bnify.comparing.sources import read_source
from bnify.comparing.targets import CLASSIFICATION, TASKS, prepared, task_of
from bnify.errors import SpecError, UsageError
from bnify.spec.silence import user_output_to_stderr
from bnify.structure import Call

#: Samples of each part of a Dataset that are looked at before training.
_LOOK: Final = 2_000
#: Classes that a note names; more are left to its dots.
_SHOWN: Final = 5


class Part(Protocol):
    """Samples of one split."""

    def __len__(self) -> int:
        """How many."""
        ...

    def batch(self, indices: Tensor) -> tuple[Call, Tensor]:
        """Inputs and targets (B, ...) of the samples of ``indices``, int64 (B,)."""
        ...


@dataclass(frozen=True)
class Data:
    """What a comparison trains on, chooses by and reports.

    Attributes:
        name: ``"digits"``.
        train: For the weights.
        validation: For the learning rate and the learning curves.
        test: For the figures.
        task: ``"classification"`` (targets int64 (N,)) or ``"regression"`` (float32).
        classes: How many; None for a regression.
        words: ``"digits: 1,077 / 360 / 360 samples of (784,), 10 classes"``.
        notes: What a reader should know, one sentence each.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    task: str
    classes: int | None
    words: str
    notes: tuple[str, ...] = ()


def load_data(
    source: Any,
    model: nn.Module,
    *,
    task: str = "auto",
    seed: int = 0,
    image_size: int | None = None,
) -> Data:
    """Data in the shape that a model takes; the same for the same seed, in any process.

    Images are standardised by the training part's mean and standard deviation a channel; the
    user's own data are taken as they are. Random numbers and the model are left as they were.

    Args:
        source: The words of ``--data`` (``"digits"``, ``"mnist:DIR"``, ``"file.py:datasets"``; see
            :data:`bnify.comparing.sources.FORMS`), a function, or what such a function returns:
            (train, validation, test), (train, test) or a dict of these, each a Dataset of (x, y)
            or tensors (X, Y).
        model: Run on two samples, in eval mode.
        task: ``"auto"``: integer targets are classes, floats a regression.
        seed: Of random splits, of drawn images, and of the random state the user's code runs in.
        image_size: Pixels a side of the images of ``folder:DIR``; 32 if None.

    Raises:
        UsageError: The words or the options cannot be right.
        SpecError: The data cannot be had, are unusable, or do not fit the model.
    """
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}", hint="one of: " + ", ".join(TASKS))
    with user_output_to_stderr(), seeded(seed):
        raw = read_source(source, seed=seed, image_size=image_size)
        _, targets = raw.versions[0].splits[0].batch(torch.zeros(1, dtype=torch.int64))
        task = task_of(targets, task)
        versions = [_of_task(version, task, raw.name) for version in raw.versions]
        classes, looked = _classes(versions[0].splits, task, raw)
        splits, changed = fit(model, versions, name=raw.name, task=task, classes=classes)
        words = _words(splits, raw.name, classes, model)
    train, validation, test = splits
    notes = (*raw.notes, *looked, *changed)
    return Data(raw.name, train, validation, test, task, classes, words, notes)


def _of_task(version: Version, task: str, name: str) -> Version:
    train, validation, test = (
        part.with_targets(partial(prepared, task=task, part=part_name(at, name)))
        for at, part in enumerate(version.splits)
    )
    return replace(version, splits=(train, validation, test))


def _classes(splits: Splits, task: str, raw: Raw) -> tuple[int | None, list[str]]:
    """The number of classes, and notes on what was not looked at; reads targets of all parts."""
    found, notes = [], []
    for at, part in enumerate(splits):
        targets = _targets(part)
        found.append(targets)
        if len(targets) < len(part):
            notes.append(
                f"of {part_name(at, raw.name)} {len(targets):,} of {len(part):,} samples were "
                "looked at before training"
            )
    if task != CLASSIFICATION:
        return None, notes
    if bool((found[0] == found[0][0]).all()):
        raise SpecError(
            f"{part_name(0, raw.name)} has a single class, {int(found[0][0])}: nothing to learn",
            hint="bring data of two classes or more",
        )
    unseen = set(torch.cat(found[1:]).tolist()) - set(found[0].tolist())
    if unseen and not any(len(part) > len(seen) for part, seen in zip(splits, found, strict=True)):
        named = ", ".join(map(str, sorted(unseen)[:_SHOWN])) + ", ..." * (len(unseen) > _SHOWN)
        notes.append(f"no training sample is of class {named}, which validation or test data have")
    return raw.classes or 1 + max(int(targets.max()) for targets in found), notes


def _targets(part: AnyPart) -> Tensor:
    """All targets in memory; of a Dataset those of samples spread evenly over it."""
    if not isinstance(part, DatasetPart):
        return part.targets
    spread = torch.linspace(0, len(part) - 1, min(len(part), _LOOK), dtype=torch.float64).long()
    return torch.cat([part.batch(indices)[1] for indices in torch.split(spread, 256)])


def _words(splits: Splits, name: str, classes: int | None, model: nn.Module) -> str:
    sizes = " / ".join(f"{len(part):,}" for part in splits)
    call, _ = splits[0].batch(torch.zeros(1, dtype=torch.int64))
    end = "regression" if classes is None else f"{classes} classes"
    return f"{name}: {sizes} samples of {input_words(call, model)}, {end}"
