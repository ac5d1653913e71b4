"""The straight line of a calibration: pool on every rank, merge, write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Final

import torch
from torch import nn

from bnify.accept import accept, example_call, unwrapped
from bnify.auditing.live import Live
from bnify.auditing.state import NormState
from bnify.auditing.verdict import holds_constants
from bnify.borrow import training_possible
from bnify.calibrating.loaders import rewound
from bnify.calibrating.ranks import Share, Whole, over_ranks
from bnify.calibrating.result import Calibrated, Calibration
from bnify.calibrating.shard import LEAST_BATCHES, run_shard, stream
from bnify.calibrating.writing import counted, refuse_expanded, updates, write
from bnify.errors import PlanError, UsageError
from bnify.fingerprint import fingerprint
from bnify.ranks import repeats_of, weights_of, world_size
from bnify.structure import Inputs, device_of

_STATISTICS: Final = ("running_mean", "running_var")


def calibrate(
    model: nn.Module,
    data: Any,
    batches: int | None = None,
    *,
    inputs: Inputs | None = None,
    tolerance: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Give every norm that keeps running statistics those of the data, in place, in one pass.

    Mean and variance of what reaches a norm are pooled over all batches and calls in float64
    (Chan, Golub & LeVeque, 1979): the same whatever the order and the sizes of the batches,
    without momentum. ``num_batches_tracked`` is raised to what a running average needs to be
    converged. Batch, sync and tracked instance norms are updated, subclasses, functional ones with
    buffers and those in eval mode included; look-alikes that hold constants are not. An instance
    norm gets averages over samples, as in training.

    During the pass all norms run with the statistics of their batch, so that wrong statistics of
    one reach no other, whatever the depth (Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021,
    call this precise batch norm). Its limit: in eval mode a deeper norm sees inputs that were
    normalized with the pooled statistics instead. With small batches, or sorted by class, the two
    differ: shuffle, and take batches as large as in training. Other layers run as in eval mode.

    The pass runs on a copy. Modes, hooks, random numbers and other tensors of the model stay as
    they are; if anything is raised, the statistics do too. A loader starts at a fixed random
    state, and a generator of its own gets its state back: the order is the same each time.

    Where ``torch.distributed`` is initialised, call it on every rank with the same weights, each
    with its share of the data, or none (``[]``): shares are merged in the order of ranks and all
    end with the same bits.

    Args:
        model: Any plain module, or one in DistributedDataParallel or torch.compile.
        data: One tensor or dict, or anything that yields batches: of inputs, or of inputs and
            labels. It is read once, one batch at a time and no further than needed.
        batches: How many batches to take at most, on each rank; None for all.
        inputs: Example inputs, where those of the first batch do not say what forward takes.
        tolerance: Stop after 8 batches or more, when in every channel that varies the standard
            error of mean and standard deviation is at most this share of the standard deviation.
            It is estimated from how far batches are apart, on each rank by itself: of sorted data
            it says nothing. None (the default) never stops early.
        progress: Called with a few words after each batch.

    Returns:
        What was found and done, norm by norm, float64.

    Raises:
        UsageError: ``batches`` or ``tolerance`` cannot be right.
        CaptureError: The model is no module, has tensors without values, or cannot be copied.
        WeightsError: A weight is not finite.
        PlanError: The model is sharded or scripted; there is no batch; one cannot be run, or holds
            NaN (its number is named); no norm could be updated, or one shares memory between its
            elements; another rank failed, or has another model or other weights.
    """
    plain = unwrapped(model)
    states: dict[str, NormState] = {}

    def run() -> Share:  # on every rank: what fails in it is told to the others
        _check(batches, tolerance)
        _accept(plain)
        example = None if inputs is None else example_call(plain, inputs)
        states.update((state.path, state) for state in Live.of(plain, None).states())
        constant = frozenset(path for path, state in states.items() if holds_constants(state))
        refuse_expanded(plain, (path for path in states if path not in constant))
        with rewound(data):
            shard = run_shard(
                plain,
                stream(data, batches, plain, example),
                constant,
                tolerance=tolerance,
                progress=progress or (lambda _: None),
            )
        return Share(
            shard=shard,
            constant=constant,
            tracked=counted(plain, shard, constant),
            structure=fingerprint(plain).digest,
            weights=weights_of(plain),
            repeats=repeats_of(data, shard.samples),
        )

    with training_possible():
        # What is no module is refused within, on every rank.
        is_module = isinstance(plain, nn.Module)
        whole = over_ranks(run, device_of(plain) if is_module else torch.device("cpu"))
        shard = whole.shard
        if not shard.batches:
            raise PlanError("the data holds no batch", hint="pass a loader that yields batches")
        planned = list(updates(plain, shard, states, whole.constant, whole.tracked))
        norms = tuple(update.norm for update in planned)
        found = Calibration(
            norms=norms,
            batches=shard.batches,
            samples=shard.samples,
            ranks=world_size(),
            stopped=shard.stopped,
            notes=tuple(_notes(plain, whole, norms, tolerance)),
        )
        if planned and not found.updated:
            first = found.norms[0]
            raise PlanError(
                f"no norm could be calibrated; {first.name or 'the norm'}: {first.notes[0]}",
                hint="look at the data and at the weights; bnify.audit(model, data=...) says more",
            )
        write(planned)
    return found


def _check(batches: object, tolerance: object) -> None:
    if batches is not None:
        if not isinstance(batches, Integral):
            raise UsageError(f"batches={batches!r}: a whole number", hint="None takes all")
        if int(batches) < 1:
            raise UsageError(f"batches={batches}: at least one is needed", hint="None takes all")
    if tolerance is not None and not (isinstance(tolerance, Real) and 0 < float(tolerance) < 1):
        raise UsageError(
            f"tolerance={tolerance!r}: a share of the standard deviation", hint="for example 0.02"
        )


def _accept(model: nn.Module) -> None:
    try:
        accept(model, statistics=False, verb="calibrate")
    except PlanError as error:
        raise PlanError(
            error.message, hint="bnify.calibrate(plain_model, data), then wrap or script it"
        ) from None


def _notes(
    model: nn.Module, whole: Whole, norms: Sequence[Calibrated], tolerance: float | None
) -> Iterable[str]:
    others = _with_other_statistics(model)
    if others:
        path, kind, name = others[0]
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        yield (
            f"{path or 'the model'} ({kind}) keeps {name} alone: not of a kind that is "
            f"calibrated, left as it was{more}"
        )
    elif not norms:
        yield "no norm keeps running statistics: there is nothing to calibrate"
    if tolerance is not None:
        yield _precision(whole, norms, tolerance)
    if whole.repeated:
        yield whole.repeated


def _with_other_statistics(model: nn.Module) -> list[tuple[str, str, str]]:
    """Path, class and statistics of modules that keep a running mean or variance alone."""
    found = []
    for path, module in model.named_modules():
        kept = [name for name in _STATISTICS if module._buffers.get(name) is not None]
        if len(kept) == 1:
            found.append((path, type(module).__name__, kept[0]))
    return found


def _precision(whole: Whole, norms: Sequence[Calibrated], tolerance: float) -> str:
    """What came of a tolerance; of several ranks, what their merged batches show."""
    size, batches = world_size(), whole.shard.batches
    worst = max((norm.error for norm in norms if norm.error is not None), default=math.inf)
    few = f", with fewer than {LEAST_BATCHES} batches" if whole.longest < LEAST_BATCHES else ""
    if not whole.stopped and size == 1:
        return f"all {batches} batches were used: the tolerance {tolerance:g} was not met{few}"
    bound = f"at most {tolerance:g}" if worst <= tolerance else f"up to about {worst:.2g}"
    shown = f"the standard error of every mean and deviation is {bound} of the standard deviation"
    if size == 1:
        return f"stopped after {batches} batches: {shown}"
    if not whole.stopped:
        start = f"all {batches} batches were used: no rank met the tolerance {tolerance:g} alone"
        start += few and f"{few} on each"
    elif whole.stopped == size:
        start = f"stopped after {batches} batches on {size} ranks"
    else:
        start = f"{whole.stopped} of {size} ranks stopped early, {batches} batches in all"
    return f"{start}; over all ranks {shown}" if math.isfinite(worst) else start
