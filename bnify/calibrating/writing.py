"""From pooled values to running statistics: all of them are written, or none."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor, nn

from bnify.auditing.probe import Seen
from bnify.auditing.recalibrate import as_stored, converged_after
from bnify.auditing.state import EPS, NormState
from bnify.calibrating.result import Calibrated
from bnify.calibrating.shard import Shard
from bnify.capture import tensor_at
from bnify.errors import PlanError

_FEW: Final = 1000
_CONSTANT: Final = "a look-alike without momentum, whose statistics are constants"


@dataclass(slots=True)
class Update:
    """New values of the tensors of one norm.

    Attributes:
        norm: What the report says of it.
        values: Pairs of a tensor of the model and what it gets.
    """

    norm: Calibrated
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def counted(model: nn.Module, shard: Shard, constant: Container[str]) -> dict[str, int]:
    """How many batches each norm has counted so far, by path.

    Args:
        model: The model.
        shard: What reached its norms.
        constant: Paths of look-alikes that hold constants.
    """
    found = {}
    for path, names in shard.names.items():
        counter = _counter(model, names[0])
        if counter is not None and path not in constant and path in shard.seen:
            found[path] = int(counter)
    return found


def refuse_expanded(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse norms whose statistics cannot be written.

    Args:
        model: The model.
        paths: Paths of norms.

    Raises:
        PlanError: Elements of a running mean or variance share memory.
    """
    for path in paths:
        for name in ("running_mean", "running_var"):
            tensor = model.get_submodule(path)._buffers[name]
            if tensor is not None and _expanded(tensor):
                raise PlanError(
                    f"the elements of {f'{path}.{name}'.lstrip('.')} share memory (an expanded "
                    "tensor): they cannot have values of their own",
                    hint="give the buffer memory of its own: buffer.clone()",
                )


def _expanded(tensor: Tensor) -> bool:
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and step == 0 for size, step in sides)


def _counter(model: nn.Module, mean: str) -> Tensor | None:
    """The counter of batches beside a running mean, where the norm has one."""
    counter = model.get_submodule(mean.rpartition(".")[0])._buffers.get("num_batches_tracked")
    return counter if counter is not None and counter.numel() == 1 else None


def updates(
    model: nn.Module,
    shard: Shard,
    states: Mapping[str, NormState],
    constant: Container[str],
    tracked: Mapping[str, int],
) -> Iterator[Update]:
    """What each norm gets; nothing is written yet.

    Args:
        model: The model.
        shard: What reached its norms, on all ranks.
        states: The norms that are modules, as they are.
        constant: Paths of look-alikes that hold constants.
        tracked: How many batches each norm has counted, the most of all ranks.
    """
    order = [path for path in shard.seen if path in shard.names]
    for path in (*order, *(path for path in states if path not in shard.seen)):
        mean, var = (tensor_at(model, name) for name in shard.names[path])
        if path in constant:
            yield Update(_as_it_is(model, path, (mean, var), shard, states.get(path), _CONSTANT))
        else:
            count = tracked.get(path, 0)
            yield _update(model, path, (mean, var), shard, states.get(path), count)


def _update(
    model: nn.Module,
    path: str,
    buffers: tuple[Tensor, Tensor],
    shard: Shard,
    state: NormState | None,
    count: int,
) -> Update:
    seen = shard.seen.get(path)
    why = _why_not(seen, buffers[0].numel())
    if seen is None and path in shard.unclear:
        why = "its channels could be on two axes of its input"
    norm = _as_it_is(model, path, buffers, shard, state, why)
    if why or seen is None:
        return Update(norm)
    pooled = seen.pooled
    spread = shard.spreads.get(path)
    values = [
        (tensor, as_stored(vector, tensor))
        for tensor, vector in zip(buffers, (pooled.mean, pooled.var), strict=True)
    ]
    counter = _counter(model, shard.names[path][0])
    if counter is not None:
        enough = converged_after(state.momentum if state else None, shard.batches)
        values.append((counter, counter.new_full(counter.shape, max(count, enough))))
    norm = replace(
        norm,
        mean=pooled.mean,
        var=pooled.var,
        updated=True,
        error=None if spread is None else spread.error(pooled),
        notes=tuple(_notes(seen, buffers)),
    )
    return Update(norm, values)


def _as_it_is(
    model: nn.Module,
    path: str,
    buffers: tuple[Tensor, Tensor],
    shard: Shard,
    state: NormState | None,
    why: str,
) -> Calibrated:
    mean, var = (tensor.detach().double().cpu().flatten() for tensor in buffers)
    return Calibrated(
        name=path,
        kind="" if state is None else type(model.get_submodule(path)).__name__,
        count=shard.seen[path].pooled.count if path in shard.seen else 0,
        mean_before=mean.clone(),  # the model's own memory, if it is float64 itself
        var_before=var.clone(),
        mean=mean.clone(),
        var=var.clone(),
        eps=EPS if state is None else state.eps,
        updated=False,
        notes=(why,) if why else (),
    )


def _why_not(seen: Seen | None, channels: int) -> str:
    """Why a norm keeps its statistics; empty if it does not."""
    if seen is None:
        return "the data did not reach it"
    if seen.pooled.mean.numel() != channels:
        return f"its input has {seen.pooled.mean.numel()} channels, its statistics {channels}"
    if seen.pooled.count < 2 and not seen.instance:
        return "a single value a channel has no variance"
    if not seen.pooled.count:
        return "a single value a channel in every sample has no variance"
    finite = seen.pooled.mean.isfinite() & seen.pooled.var.isfinite()
    if not bool(finite.all()):
        return f"what reaches it is not finite in {int((~finite).sum())} of {channels} channels"
    return ""


def _notes(seen: Seen, buffers: tuple[Tensor, Tensor]) -> Iterator[str]:
    pooled = seen.pooled
    if not seen.instance and pooled.count < _FEW:
        yield f"only {pooled.count} values a channel; {_FEW} or more are steadier"
    still = int(pooled.still.sum())
    if still:
        yield f"{still} of {pooled.still.numel()} channels do not vary on this data"
    alone = seen.sizes.get(1, 0)
    if alone and not seen.instance:
        calls = "call" if alone == 1 else "calls"
        yield f"{alone} {calls} with a single value a channel, which gave β to what follows"
    dtype = buffers[1].dtype
    if torch.finfo(dtype).bits < 32:
        limit = torch.finfo(dtype).max
        beyond = int(((pooled.mean.abs() > limit) | (pooled.var > limit)).sum())
        name = str(dtype).removeprefix("torch.")
        held = f", and {beyond} channels were beyond its range {limit:g}" if beyond else ""
        yield f"rounded to {name}{held}: norms are better kept in float32 (.float())"


def write(planned: Iterable[Update]) -> None:
    """Write every value; if one cannot be, all are taken back.

    Raises:
        PlanError: A tensor refuses its values; the norm is named.
    """
    done: list[tuple[Tensor, Tensor]] = []
    try:
        for update in planned:
            for tensor, value in update.values:
                done.append((tensor, tensor.detach().clone()))
                try:
                    _put(tensor, value)
                except Exception as error:  # a tensor's class can be the user's
                    lines = str(error).strip().splitlines() or [type(error).__name__]
                    raise PlanError(
                        f"the statistics of {update.norm.name or 'the norm'} cannot be written: "
                        f"{lines[0]}",
                        hint="make its buffers plain tensors with memory of their own",
                    ) from error
    except BaseException:
        for tensor, before in reversed(done):
            with suppress(Exception):  # what refused its values may refuse the old ones too
                _put(tensor, before)
        raise


def _put(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)
