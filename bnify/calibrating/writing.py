"""From pooled values to running statistics: all of them are written, or none."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
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


def updates(
    model: nn.Module, shard: Shard, states: Mapping[str, NormState], constant: Container[str]
) -> Iterator[Update]:
    """What each norm gets; nothing is written yet.

    Args:
        model: The model.
        shard: What reached its norms, on all ranks.
        states: The norms that are modules, as they are.
        constant: Paths of look-alikes that hold constants.
    """
    order = [path for path in shard.seen if path in shard.names]
    for path in (*order, *(path for path in states if path not in shard.seen)):
        mean, var = (tensor_at(model, name) for name in shard.names[path])
        if path in constant:
            yield Update(_as_it_is(model, path, (mean, var), shard, states.get(path), _CONSTANT))
        else:
            yield _update(model, path, (mean, var), shard, states.get(path))


def _update(
    model: nn.Module,
    path: str,
    buffers: tuple[Tensor, Tensor],
    shard: Shard,
    state: NormState | None,
) -> Update:
    seen = shard.seen.get(path)
    why = _why_not(seen, buffers[0].numel())
    norm = _as_it_is(model, path, buffers, shard, state, why)
    if why or seen is None:
        return Update(norm)
    pooled = seen.pooled
    spread = shard.spreads.get(path)
    values = [
        (tensor, as_stored(vector, tensor))
        for tensor, vector in zip(buffers, (pooled.mean, pooled.var), strict=True)
    ]
    owner = model.get_submodule(shard.names[path][0].rpartition(".")[0])
    counter = owner._buffers.get("num_batches_tracked")
    if counter is not None and counter.numel() == 1:
        enough = converged_after(state.momentum if state else None, shard.batches)
        values.append((counter, counter.new_full(counter.shape, max(int(counter), enough))))
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
    """Write every value; if one cannot be, those before it are taken back."""
    done: list[tuple[Tensor, Tensor]] = []
    try:
        for update in planned:
            for tensor, value in update.values:
                done.append((tensor, tensor.detach().clone()))
                _put(tensor, value)
    except BaseException:
        for tensor, before in reversed(done):
            _put(tensor, before)
        raise


def _put(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)
