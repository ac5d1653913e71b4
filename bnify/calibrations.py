"""The straight line of a calibration: pool on every rank, merge, write."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bnify.accept import accept, example_call, refuse_other_than_modules
from bnify.auditing.live import Live
from bnify.auditing.verdict import holds_constants
from bnify.borrow import training_possible
from bnify.calibrating.ranks import over_ranks, padding_of, world_size
from bnify.calibrating.result import Calibration
from bnify.calibrating.shard import LEAST_BATCHES, Shard, run_shard, stream
from bnify.calibrating.writing import updates, write
from bnify.errors import PlanError, UsageError
from bnify.structure import Inputs


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
    state, so that it gives the same order each time.

    Where ``torch.distributed`` is initialised, call it on every rank, each with its share of the
    data, or none: shares are merged in the order of ranks and all end with the same bits.

    Args:
        model: Any plain module, or one in DistributedDataParallel or torch.compile.
        data: One tensor or dict, or anything that yields batches: of inputs, or of inputs and
            labels. It is read once, one batch at a time and no further than needed.
        batches: How many batches to take at most, on each rank; None for all.
        inputs: Example inputs, where those of the first batch do not say what forward takes.
        tolerance: Stop after 8 batches or more, when in every channel that varies the standard
            error of mean and standard deviation is at most this share of the standard deviation.
            It is estimated from how far batches are apart, on this rank: of sorted data it says
            nothing. None (the default) never stops early.
        progress: Called with a few words after each batch.

    Returns:
        What was found and done, norm by norm, float64.

    Raises:
        UsageError: ``batches`` or ``tolerance`` cannot be right.
        CaptureError: The model is no module, has tensors without values, or cannot be copied.
        WeightsError: A weight is not finite.
        PlanError: The model is sharded or scripted; there is no batch; one cannot be run, or holds
            NaN (its number is named); no norm could be updated; another rank failed.
    """
    _check(batches, tolerance)
    plain = unwrapped(model)
    refuse_other_than_modules(plain)
    size = world_size()

    def run() -> Shard:
        _accept(plain)
        example = None if inputs is None else example_call(plain, inputs)
        return run_shard(
            plain,
            stream(data, batches, plain, example),
            constant,
            tolerance=tolerance,
            progress=progress or (lambda _: None),
        )

    with training_possible():
        states = {state.path: state for state in Live.of(plain, None).states()}
        constant = frozenset(path for path, state in states.items() if holds_constants(state))
        shard = over_ranks(run, plain)
        if not shard.batches:
            raise PlanError("the data holds no batch", hint="pass a loader that yields batches")
        planned = list(updates(plain, shard, states, constant))
        found = Calibration(
            norms=tuple(update.norm for update in planned),
            batches=shard.batches,
            samples=shard.samples,
            ranks=size,
            stopped=shard.stopped,
            notes=tuple(_notes(shard, data, tolerance, size, any_norm=bool(planned))),
        )
        if planned and not found.updated:
            first = found.norms[0]
            raise PlanError(
                f"no norm could be calibrated; {first.name or 'the norm'}: {first.notes[0]}",
                hint="look at the data and at the weights; bnify.audit(model, data=...) says more",
            )
        write(planned)
    return found


def unwrapped(model: Any) -> nn.Module:
    """The module in DistributedDataParallel, DataParallel and torch.compile: its own tensors."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, parallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model  # type: ignore[no-any-return]  # accept() looks at what it is


def _check(batches: int | None, tolerance: float | None) -> None:
    if batches is not None and batches < 1:
        raise UsageError(f"batches={batches}: at least one is needed", hint="None takes all")
    if tolerance is not None and not 0 < tolerance < 1:
        raise UsageError(
            f"tolerance={tolerance}: a share of the standard deviation", hint="for example 0.02"
        )


def _accept(model: nn.Module) -> None:
    try:
        accept(model, statistics=False, verb="calibrate")
    except PlanError as error:
        raise PlanError(
            error.message, hint="bnify.calibrate(plain_model, data), then wrap or script it"
        ) from None


def _notes(
    shard: Shard, data: Any, tolerance: float | None, size: int, *, any_norm: bool
) -> Iterable[str]:
    if not any_norm:
        yield "no norm keeps running statistics: there is nothing to calibrate"
    if shard.stopped:
        yield (
            f"stopped after {shard.batches} batches: the standard error of every mean and "
            f"deviation is at most {tolerance:g} of the standard deviation"
        )
    elif tolerance is not None:
        few = f", with fewer than {LEAST_BATCHES} batches" if shard.batches < LEAST_BATCHES else ""
        yield f"all {shard.batches} batches were used: the tolerance {tolerance:g} was not met{few}"
    padding = padding_of(data) if size > 1 else ""
    if padding:
        yield padding
