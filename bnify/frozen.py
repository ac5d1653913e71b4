"""Modules that stay in eval mode whatever ``train()`` is called on the model around them.

A class swap in place (:mod:`bnify.made`) does it, and is undone by another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bnify.errors import PlanError
from bnify.made import Made, class_of, is_made, made_class, swap_class


class _KeptInEval(Made):
    """What :func:`keep_in_eval` adds to a class: a ``train()`` of nothing."""

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode, children included."""
        del mode
        return super().train(False)  # type: ignore[misc]


class _Frozen(Made):
    """What :func:`freeze_norms` adds to a class: a ``train()`` that leaves its own statistics."""

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode; an activation or dropout that is a child follows the model."""
        super().train(mode)  # type: ignore[misc]
        self.training = False
        return self


def _kept_class(plain: type[nn.Module]) -> type[nn.Module]:
    return made_class(_KeptInEval, plain, _kept_class)


def _frozen_class(plain: type[nn.Module]) -> type[nn.Module]:
    return made_class(_Frozen, plain, _frozen_class)


def keep_in_eval(module: nn.Module) -> None:
    """Let a module and its children stay in eval mode from now on, in place.

    The object, its tensors and their names stay; ``isinstance`` with the plain class holds.
    """
    if not isinstance(module, _KeptInEval):
        swap_class(module, _kept_class(class_of(module)))
    module.eval()


def give_back_train(module: nn.Module) -> None:
    """Undo :func:`keep_in_eval` or a freeze, in place: the plain class, in eval mode for now."""
    while is_made(module, _KeptInEval) or is_made(module, _Frozen):
        made: Any = module
        swap_class(module, made.plain)


def is_frozen(module: nn.Module) -> bool:
    """Whether :func:`freeze_norms` has frozen this module."""
    return isinstance(module, _Frozen)


def freeze_norms(model: nn.Module, *, affine: bool = False) -> tuple[str, ...]:
    """Let every norm with running statistics keep them, whatever ``train()`` is called, in place.

    A frozen norm normalizes with its running statistics and does not move them, as in eval mode;
    the usual choice when a trained network is fine-tuned on small batches. It is known by its
    ``running_mean`` and ``running_var``, so batch norm, tracking instance norm, subclasses with a
    forward of their own and look-alikes are all frozen; the names in a checkpoint do not change.
    Layer, group and rms norms keep no statistics and are left alone.

    Copies and pickles are frozen too. ``SyncBatchNorm.convert_sync_batchnorm``, and a fresh model
    that loads the state dict or the saved folder, are not; ``train()`` on what ``torch.jit.script``
    made of the model moves the statistics again.

    Args:
        model: Any module; norms that ``bnify.insert`` put in are found too.
        affine: Also take scale and shift out of training (``requires_grad=False``); otherwise they
            go on learning.

    Returns:
        Module paths of the norms that are frozen now.

    Raises:
        PlanError: A norm is lazy and has no statistics yet, or is a ScriptModule.
    """
    norms = {path: m for path, m in model.named_modules() if _keeps_statistics(m)}
    for path, norm in norms.items():
        if isinstance(norm, torch.jit.ScriptModule):
            raise PlanError(
                f"{path or 'the norm'} is a ScriptModule, whose class is fixed",
                hint="call it on the model itself, and script that model in eval mode",
            )
        if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
            raise PlanError(
                f"{path or 'the norm'} is lazy and has no statistics to keep yet",
                hint="run the model once on a batch, then freeze",
            )
    for norm in norms.values():
        if not is_frozen(norm):
            swap_class(norm, _frozen_class(class_of(norm)))
        norm.training = False
        if affine:
            _freeze_affine(norm)
    return tuple(norms)


def thaw_norms(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`freeze_norms`, in place; each norm takes the mode of the module around it.

    Scale and shift that ``affine=True`` took out of training learn again, whatever was set in
    between; those that did not learn before the freeze still do not.

    Returns:
        Module paths of the norms that were frozen.
    """
    norms = {path: m for path, m in model.named_modules() if is_frozen(m)}
    for path, norm in norms.items():
        give_back_train(norm)
        taken = vars(norm).pop(_TAKEN, ())
        for name, parameter in _affine(norm):
            if name in taken:
                parameter.requires_grad_(True)
        if path:
            norm.training = model.get_submodule(path.rpartition(".")[0]).training
    return tuple(norms)


#: Where a frozen norm remembers which of its own tensors learned before.
_TAKEN = "_taken_out_of_training"


def _freeze_affine(norm: nn.Module) -> None:
    taken = [(name, parameter) for name, parameter in _affine(norm) if parameter.requires_grad]
    for _, parameter in taken:
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimizer moves what has a gradient, by its momentum too
    vars(norm)[_TAKEN] = (*vars(norm).get(_TAKEN, ()), *(name for name, _ in taken))


def _affine(norm: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A norm's own parameters, each with the tensor's name, parametrized ones too."""
    own = list(norm.named_parameters(recurse=False))
    if nn.utils.parametrize.is_parametrized(norm):
        beneath = norm.get_submodule("parametrizations").named_parameters()
        own += [(name.partition(".")[0], parameter) for name, parameter in beneath]
    return own


def _keeps_statistics(module: nn.Module) -> bool:
    # Not _buffers, which a ScriptModule has in another form.
    return {"running_mean", "running_var"} <= {n for n, _ in module.named_buffers(recurse=False)}
