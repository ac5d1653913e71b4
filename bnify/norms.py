"""Norm kinds: from a name and a site to a module, and the rules that choose between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnify.errors import UsageError
from bnify.layers import CallNorms, ChannelRMSNorm, TokenNorm
from bnify.plan import Edit

KINDS: Final = (
    "batch",
    "batch-noaffine",
    "sync",
    "group",
    "layer",
    "instance",
    "rms",
    "auto",
)
#: Kinds that normalize over the batch: they keep running statistics and fold away.
BATCH_KINDS: Final = frozenset({"batch", "batch-noaffine", "sync"})
#: Kinds whose statistics pool every position of a channel, so one value per channel is no sample.
PER_CHANNEL_KINDS: Final = BATCH_KINDS | {"instance"}
#: Kinds with a scale and a shift per channel (rms has a scale only).
AFFINE_KINDS: Final = frozenset(KINDS) - {"batch-noaffine", "auto"}

_BATCH_NORMS: Final[Mapping[int, Any]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_INSTANCE_NORMS: Final[Mapping[int, Any]] = {
    3: nn.InstanceNorm1d,
    4: nn.InstanceNorm2d,
    5: nn.InstanceNorm3d,
}


def check_kind(norm: str) -> None:
    """Accept a known kind of norm.

    Raises:
        UsageError: It is none.
    """
    if norm not in KINDS:
        raise UsageError(f"unknown norm {norm!r}", hint="one of: " + ", ".join(KINDS))


def group_count(channels: int, *, linear: bool) -> int:
    """Number of groups of a group norm: the largest g ≤ 32 that leaves enough channels a group.

    At least 8 channels a group after a convolution, 16 after a Linear, where a group has no
    spatial extent to draw statistics from; 1 where no divisor does.
    """
    least = 16 if linear else 8
    fitting = (g for g in range(32, 1, -1) if channels % g == 0 and channels // g >= least)
    return next(fitting, 1)


def resolve(norm: str, *, linear: bool, batch_size: int, world_size: int) -> str:
    """The kind that ``auto`` stands for at this batch size per device; other kinds as they are.

    Batch norm needs about 16 samples (Wu & He, Group Normalization, 2018: its error rises from
    23.6 % at 32 samples to 34.7 % at 2, group norm's stays at 24.1 %).
    """
    if norm != "auto":
        return norm
    if batch_size >= 16:
        return "batch"
    if world_size > 1 and batch_size * world_size >= 16:
        return "sync"
    if batch_size >= 8:
        return "batch"
    return "layer" if linear else "group"


def build(edit: Edit, like: Tensor) -> nn.Module:
    """The norm module of an edit, with the dtype and on the device of ``like``.

    With several calls it is a :class:`bnify.layers.CallNorms` of one norm per call.
    """
    norms = [_build_one(edit) for _ in range(edit.calls)]
    module = norms[0] if edit.calls == 1 else CallNorms(norms)
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return module.to(device=like.device, dtype=dtype)


def _build_one(edit: Edit) -> nn.Module:
    channels, spatial = edit.channels, edit.dims > 2 and not edit.tokens
    options: dict[str, Any] = {} if edit.eps is None else {"eps": edit.eps}
    batch = options if edit.momentum is None else {**options, "momentum": edit.momentum}
    match edit.norm:
        case "batch" | "batch-noaffine":
            kind = nn.BatchNorm1d if edit.tokens else _BATCH_NORMS[edit.dims]
            affine = edit.norm == "batch"
            norm: nn.Module = kind(channels, affine=affine, **batch)
        case "sync":
            norm = nn.SyncBatchNorm(channels, **batch)
        case "group":
            groups = edit.groups or group_count(channels, linear=not spatial)
            norm = nn.GroupNorm(groups, channels, **options)
        case "layer" if spatial:
            norm = nn.GroupNorm(1, channels, **options)
        case "layer":
            return _zeroed(nn.LayerNorm(channels, **options), edit)
        case "rms" if spatial:
            norm = ChannelRMSNorm(channels, eps=edit.eps)
        case "rms":
            return _zeroed(nn.RMSNorm(channels, eps=edit.eps), edit)
        case "instance":
            norm = _INSTANCE_NORMS[edit.dims](channels, affine=True, **options)
        case _:
            raise UsageError(
                f"unknown norm {edit.norm!r} for {edit.layer}", hint="one of: " + ", ".join(KINDS)
            )
    _zeroed(norm, edit)
    return TokenNorm(norm) if edit.tokens else norm


def _zeroed(norm: nn.Module, edit: Edit) -> nn.Module:
    if edit.zero_gamma and isinstance(norm.weight, Tensor):
        nn.init.zeros_(norm.weight)
    return norm


def each_norm(module: nn.Module) -> tuple[nn.Module, ...]:
    """The torch norms behind what :func:`build` made, one per call, containers opened."""
    norms = module.norms() if isinstance(module, CallNorms) else (module,)
    return tuple(n.inner if isinstance(n, TokenNorm) else n for n in norms)


def effective_eps(edit: Edit) -> float:
    """The ε that the norm of this edit adds to a variance."""
    return 1e-5 if edit.eps is None else edit.eps
