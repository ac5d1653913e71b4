"""Which shape of the data a model takes, and whether its output fits the targets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bnify.borrow import evaluating
from bnify.comparing.parts import Splits, Version
from bnify.comparing.targets import CLASSIFICATION
from bnify.errors import SpecError
from bnify.spec.usercode import a_type, user_code
from bnify.structure import Call, outputs_of

_SAMPLES = 2


def fit(
    model: nn.Module, versions: Sequence[Version], *, name: str, task: str, classes: int | None
) -> tuple[Splits, tuple[str, ...]]:
    """The first version that the model runs on with an output that fits, and notes on changes.

    Args:
        model: Tried in eval mode without gradients; its modes are restored.
        versions: The same samples in several shapes, with the targets of the task.
        name: Of the data, for errors.
        task: ``"classification"`` or ``"regression"``.
        classes: How many, for a classification.

    Raises:
        SpecError: The model takes none of them, or its output fits no target.
    """
    failures: dict[str, SpecError] = {}
    misfit: SpecError | None = None
    for version in versions:
        train = version.splits[0]
        call, targets = train.batch(torch.arange(min(_SAMPLES, len(train))))
        words = input_words(call, model)
        try:
            output = _output(model, call, f"the model on inputs of {words}")
        except SpecError as error:
            failures[words] = error
            continue
        try:
            splits, note = _with_fitting_targets(version.splits, output, targets, task, classes)
        except SpecError as error:  # a wrong shape may run too: go on to the others
            misfit = misfit or error
        else:
            return splits, tuple(filter(None, (version.note, note)))
    raise misfit or _none_fits(failures, name)


def input_words(call: Call, model: nn.Module) -> str:
    """The shapes of one sample: ``"(1, 28, 28)"``, or ``"ids (16,), mask (16,)"`` for several."""
    tensors = call.tensors(model)
    if len(tensors) == 1:
        return str(tuple(tensors[0][1].shape[1:]))
    return ", ".join(f"{name} {tuple(tensor.shape[1:])}" for name, tensor in tensors)


def _output(model: nn.Module, call: Call, what: str) -> Tensor:
    """The first output tensor."""
    place = next((parameter.device for parameter in model.parameters()), None)
    with torch.no_grad(), evaluating(model), user_code(what):
        output = call.clone().to(device=place)(model)
    tensors = outputs_of(output)
    if not tensors:
        raise SpecError(f"the model returns {a_type(output)}, which holds no tensor")
    return tensors[0][1]


def _with_fitting_targets(
    splits: Splits, output: Tensor, targets: Tensor, task: str, classes: int | None
) -> tuple[Splits, str]:
    if task == CLASSIFICATION:
        _refuse_output(output, len(targets), classes or 0)
        return splits, ""
    wanted = tuple(output.shape[1:])
    if output.shape == targets.shape:
        return splits, ""
    if output.shape[:1] == targets.shape[:1] and (*targets.shape, 1) == tuple(output.shape):
        said = f"targets were reshaped to (N, {', '.join(map(str, wanted))}), the model's output"
    elif (*output.shape, 1) == tuple(targets.shape):
        said = "targets lost their last axis of length 1, which the model's output has not"
    else:
        raise SpecError(
            f"the model's output is {tuple(output.shape)} for targets of {tuple(targets.shape)}",
            hint="give both the same shape",
        )
    reshape = partial(_reshaped, wanted=wanted)
    train, validation, test = (part.with_targets(reshape) for part in splits)
    return (train, validation, test), said


def _reshaped(targets: Tensor, wanted: tuple[int, ...]) -> Tensor:
    return targets.reshape(len(targets), *wanted)


def _refuse_output(output: Tensor, samples: int, classes: int) -> None:
    if output.ndim != 2 or len(output) != samples or not output.is_floating_point():
        raise SpecError(
            f"the model's output is {tuple(output.shape)} for {samples} samples, not "
            f"({samples}, classes)",
            hint="a classification needs one number for each class",
        )
    if output.shape[1] < classes:
        raise SpecError(
            f"the model has {output.shape[1]} outputs for {classes} classes",
            hint=f"give its last layer {classes} outputs",
        )


def _none_fits(failures: dict[str, SpecError], name: str) -> SpecError:
    """The error of the only shape, or all shapes and the first one's error."""
    first = next(iter(failures.values()))
    if len(failures) == 1:
        return first
    return SpecError(
        f"the model takes {name} in none of the shapes {', '.join(failures)}; {first.message}",
        hint="let its forward() take one of them, or bring other data: pkg.mod:datasets",
    )
