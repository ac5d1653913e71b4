"""The inputs that a verdict rests on, and what the reference makes of each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnify.errors import CaptureError
from bnify.structure import Call, match_batch
from bnify.verification.runners import Outputs, Runner, TorchRunner, first_line

OTHER_BATCHES: Final = (1, 5, 3)


def redrawn_seeds(seed: int) -> tuple[int, int]:
    """The seeds of redrawn inputs that follow from the one seed that the user gives."""
    return seed + 1, seed + 2


class Origin(StrEnum):
    """Where an input comes from, which decides what a failure of the reference means."""

    GIVEN = "given"
    REDRAWN = "redrawn"
    ZEROS = "zeros"
    RESIZED = "resized"


@dataclass(frozen=True, slots=True)
class Case:
    """One input with what the reference makes of it.

    Attributes:
        label: ``"example"``, ``"normal x10 (seed 2)"``, ``"batch 5 (seed 1)"``, ``"data 0"``.
        call: The input.
        origin: Given by the user, redrawn, zeros, or redrawn at another batch size.
        reference: The reference's own outputs, in its own precision.
        truth: Its outputs in float64; None where float64 is impossible.
    """

    label: str
    call: Call
    origin: Origin
    reference: Outputs
    truth: Outputs | None


@dataclass(frozen=True, slots=True)
class Measured:
    """The reference, measured once; any number of candidates can be judged against it.

    Attributes:
        runner: The reference.
        call: The example.
        cases: The inputs that count, the example or the user's data first.
        failure: Why no candidate can pass (the example itself is not finite); else None.
        unavailable: Why there is no float64 truth; None where there is.
        notes: Inputs that were dropped, and why.
    """

    runner: Runner
    call: Call
    cases: tuple[Case, ...]
    failure: str | None
    unavailable: str | None
    notes: tuple[str, ...]


def measure(
    reference: Runner,
    call: Call,
    *,
    data: Iterable[Any] | None = None,
    batches: int = 8,
    seeds: Sequence[int] = (1, 2),
    other_batches: bool = True,
) -> Measured:
    """Run the reference, in its own precision and in float64, on every input to be tried.

    Args:
        reference: The reference; float64 is possible for a :class:`TorchRunner` only.
        call: The example.
        data: The user's batches; they replace the example and the redrawn inputs.
        batches: How many batches of ``data`` to take.
        seeds: One set of redrawn inputs for each.
        other_batches: Also try two batch sizes that are not the example's.

    Raises:
        CaptureError: The reference raises on the example or on the user's data, or there are no
            data.
        PlanError: A batch of the data has nothing with the structure of the example.
    """
    truth, unavailable = _float64(reference, call)
    cases: list[Case] = []
    notes: list[str] = []
    failure = None
    for label, drawn, origin in _inputs(reference, call, data, batches, seeds, other_batches):
        try:
            own = reference.run(drawn)
        except Exception as error:  # the user's model runs: anything can come out of it
            if origin is Origin.GIVEN:
                raise CaptureError(
                    f"the reference raises on the input '{label}': {first_line(error)}",
                    hint="pass inputs that its forward() accepts",
                ) from error
            notes.append(f"dropped {label}: the reference raises: {first_line(error)}")
            continue
        finite = all(is_finite(tensor) for _, tensor in own)
        if not finite and origin is Origin.GIVEN:
            failure = f"the reference's outputs on the input '{label}' are not finite"
        elif not finite:
            notes.append(f"dropped {label}: the reference's outputs are not finite")
            continue
        exact = None
        if truth is not None:
            try:
                exact = truth.run(drawn)
            except Exception as error:  # as above
                notes.append(f"dropped {label}: the float64 run raises: {first_line(error)}")
                continue
        cases.append(Case(label, drawn, origin, own, exact))
    return Measured(reference, call, tuple(cases), failure, unavailable, tuple(notes))


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite; integers always are."""
    return bool(torch.isfinite(tensor).all())


def _float64(reference: Runner, call: Call) -> tuple[TorchRunner | None, str | None]:
    """The reference in float64, or why that is impossible."""
    if not isinstance(reference, TorchRunner):
        return None, "the reference is an ONNX file, and onnxruntime computes in no float64"
    try:
        truth = TorchRunner(reference.model, "cpu", torch.float64)
        outputs = truth.run(call)
        own = reference.run(call)
    except Exception as error:  # the user's model runs: a locked dtype, or no memory
        return None, f"the model does not run in float64: {first_line(error)}"
    if [tensor.shape for _, tensor in outputs] != [tensor.shape for _, tensor in own]:
        return None, "in float64 the model returns other shapes"
    for name, tensor in outputs:
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            return None, f"{name} stays {tensor.dtype} when the model is float64"
    return truth, None


def _inputs(
    reference: Runner,
    call: Call,
    data: Iterable[Any] | None,
    batches: int,
    seeds: Sequence[int],
    other_batches: bool,
) -> Iterator[tuple[str, Call, Origin]]:
    if data is None:
        yield "example", call, Origin.GIVEN
        yield from _redrawn(call, seeds)
    else:
        first = None
        for i, given in enumerate(_given(reference, call, data, batches)):
            first = given if first is None else first
            yield f"data {i}", given, Origin.GIVEN
        if first is None:
            raise CaptureError("the data yield no batch", hint="check the loader's data")
        call = first
    size = call.batch
    if not other_batches or size is None or getattr(reference, "static_batch", None) is not None:
        return
    seed = seeds[0] if seeds else 0
    for other in [n for n in OTHER_BATCHES if n != size][:2]:
        resized = call.resized(other)
        # Distinct rows, so that samples that change places are noticed; user data has no twins
        # to redraw, and is repeated.
        drawn = resized.redrawn(seed) if data is None else resized
        suffix = f" (seed {seed})" if data is None else ""
        yield f"batch {other}{suffix}", drawn, Origin.RESIZED


def _given(reference: Runner, call: Call, data: Iterable[Any], batches: int) -> Iterator[Call]:
    """The user's batches, as calls; one tensor, dict or call is the only batch."""
    model = reference.model if isinstance(reference, TorchRunner) else nn.Identity()
    several = [data] if isinstance(data, (Tensor, Mapping, Call)) else data
    for batch in islice(several, batches):
        yield batch if isinstance(batch, Call) else match_batch(batch, call, model)


def _redrawn(call: Call, seeds: Sequence[int]) -> Iterator[tuple[str, Call, Origin]]:
    floats = any(tensor.is_floating_point() for _, tensor in call.tensors())
    if _same(call.redrawn(0), call.redrawn(1)):
        return  # nothing but masks: there is nothing to redraw
    drawn = Origin.REDRAWN
    for seed in seeds:
        yield f"{'normal' if floats else 'integers'} (seed {seed})", call.redrawn(seed), drawn
        if floats:
            yield f"normal x10 (seed {seed})", call.redrawn(seed, 10.0), drawn
    if floats:
        zeros = call.map(lambda t: torch.zeros_like(t) if t.is_floating_point() else t)
        yield "zeros", zeros, Origin.ZEROS


def _same(one: Call, other: Call) -> bool:
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)
