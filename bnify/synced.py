"""Batch norms that take their statistics over all processes, and back.

``nn.SyncBatchNorm.convert_sync_batchnorm`` puts a plain ``SyncBatchNorm`` in the place of every
subclass of batch norm, so that an activation which the subclass runs itself (timm's
``BatchNormAct2d``) is lost without a word. Here the object stays, with its forward.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules import batchnorm
from torch.nn.modules._functions import SyncBatchNorm as SynchronisedFunction
from torch.overrides import TorchFunctionMode

from bnify.frozen import is_frozen
from bnify.made import Made, class_of, is_made, made_class, swap_class


class BatchNormNd(batchnorm._BatchNorm):
    """Batch norm of (N, C, *): what ``SyncBatchNorm`` is in a single process."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of 2 dims or more, got {input.dim()}")


#: Classes that do nothing but what ``SyncBatchNorm`` does.
_PLAIN: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormNd)


class _Synced(Made):
    """What :func:`sync_norms` adds to a subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The subclass's forward, its batch statistics over all processes."""
        with _Synchronising(self) as calls:
            result = super().forward(*args, **kwargs)  # type: ignore[misc]
        norm: Any = self
        if norm.training and not calls.reached and _world(norm.process_group) > 1:
            raise RuntimeError(
                f"{norm.plain.__name__} calls no batch norm of torch, and the statistics that it "
                "computes itself cannot be synchronized: bnify.unsync_norms(model) takes it back"
            )
        return result


def _synced_class(plain: type[nn.Module]) -> type[nn.Module]:
    return made_class(_Synced, plain, _synced_class, nn.SyncBatchNorm)


class _Synchronising(TorchFunctionMode):
    """Batch norm in train mode takes the statistics of all processes of a norm's group."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self._group = norm.process_group
        self.reached = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function of torch."""
        del types
        if func in (F.batch_norm, torch.batch_norm):
            self.reached = True
            if _world(self._group) > 1:
                ours = _functional if func is F.batch_norm else _batch_norm
                return ours(self._group, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _functional(
    group: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, whose arguments are in another order."""
    cudnn = torch.backends.cudnn.enabled
    statistics = running_mean, running_var
    return _batch_norm(group, input, weight, bias, *statistics, training, momentum, eps, cudnn)


def _batch_norm(
    group: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """``torch.batch_norm`` as ``nn.SyncBatchNorm.forward`` has it, with its refusal on CPU."""
    if not training:
        statistics = running_mean, running_var
        return torch.batch_norm(
            input, weight, bias, *statistics, False, momentum, eps, cudnn_enabled
        )
    if input.device.type == "cpu":
        raise ValueError(
            "synchronized batch norm does not run on CPU: bnify.unsync_norms(model) takes it back"
        )
    group = group or distributed.group.WORLD
    world = _world(group)
    result: Tensor = SynchronisedFunction.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, running_mean, running_var, eps, momentum, group, world
    )
    return result


def _world(group: Any) -> int:
    """How many processes a group has; one before there are any."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(group)
    return 1


def sync_norms(model: nn.Module, process_group: Any = None) -> tuple[str, ...]:
    """Let batch norms take their statistics over all processes, in place.

    Like ``nn.SyncBatchNorm.convert_sync_batchnorm``, but the objects stay, with their hooks and
    with what a subclass adds in its forward: timm's ``BatchNormAct2d`` keeps its activation. Norms
    on tokens keep their container, so tokens never become channels. Call it before the model goes
    into DDP, and train on GPUs: synchronized batch norm refuses CPU tensors in train mode. Frozen
    norms (:func:`bnify.freeze_norms`) and lazy ones, which have no channels yet, are left alone.

    What is synchronized is the subclass's ``F.batch_norm`` or ``torch.batch_norm``. One that
    computes its statistics itself cannot be: its forward in train mode raises ``RuntimeError`` as
    soon as there is more than one process.

    Args:
        model: Any module.
        process_group: Whose statistics; all processes by default.

    Returns:
        Module paths of the norms that were changed.
    """
    changed = []
    for path, norm in model.named_modules():
        others = (nn.SyncBatchNorm, nn.modules.lazy.LazyModuleMixin)
        if not isinstance(norm, batchnorm._BatchNorm) or isinstance(norm, others):
            continue
        if is_frozen(norm):
            continue
        plain = class_of(norm)
        if plain in _PLAIN:
            swap_class(norm, nn.SyncBatchNorm)
            vars(norm)["unsynced"] = plain
        else:
            swap_class(norm, _synced_class(plain))
        vars(norm)["process_group"] = process_group
        changed.append(path)
    return tuple(changed)


def unsync_norms(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`sync_norms`, in place; ``nn.SyncBatchNorm`` of another origin goes as well.

    For one process, for CPU ranks, and for code that does not know ``SyncBatchNorm``. Frozen norms
    are left alone, as :func:`sync_norms` leaves them; in eval mode they wait for no other process.

    Returns:
        Module paths of the norms that were changed.
    """
    changed = []
    for path, norm in model.named_modules():
        if is_made(norm, _Synced):
            made: Any = norm
            swap_class(norm, made.plain)
        elif class_of(norm) is nn.SyncBatchNorm:
            swap_class(norm, vars(norm).pop("unsynced", BatchNormNd))
        else:
            continue
        vars(norm).pop("process_group", None)
        changed.append(path)
    return tuple(changed)


class LocalSyncBatchNorm(nn.SyncBatchNorm):
    """Synchronized batch norm that asks no other process: what one process can check alone."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *) → (N, C, *), with the statistics of this process."""
        return batchnorm._BatchNorm.forward(self, input)
