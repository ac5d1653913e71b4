"""Another kind of norm, or none, in the places of a model's own norms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from bnify.borrow import evaluating
from bnify.comparing.own_norms import OwnNorm, inner_norm, settings_of
from bnify.errors import PlanError
from bnify.norms import BATCH_KINDS, PER_CHANNEL_KINDS, build, group_count
from bnify.plan import Edit
from bnify.structure import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """What becomes of one norm of the model.

    Attributes:
        path: Module path.
        was: Class of the module there.
        norm: ``"as-is"`` (it starts afresh), ``"none"`` (its input passes), or a kind of norm.
        edit: How the new norm is built; None where there is none.
        keep: Children of the old module that stay behind the norm.
    """

    path: str
    was: str
    norm: str
    edit: Edit | None = None
    keep: tuple[str, ...] = ()


# -- deciding --------------------------------------------------------------------------------------


def refusal(norm: OwnNorm, kind: str) -> str | None:
    """Why this kind of norm cannot take the place of this one, or None."""
    if kind in ("as-is", "none"):
        return None
    tokens = norm.edit.tokens
    if kind == "instance" and tokens:
        return "instance norm has no form for tokens"
    if kind in PER_CHANNEL_KINDS:
        values = norm.per_sample if kind == "instance" else norm.per_channel
        return "one value per channel" if values < 2 else None
    values = norm.edit.channels * (1 if tokens else norm.per_sample)
    return "a norm of one value is a constant" if values < 2 else None


def swap_for(norm: OwnNorm, kind: str) -> Swap:
    """The swap of a norm for ``"as-is"``, ``"none"`` or a kind that is not refused there."""
    edit = None if kind in ("as-is", "none") else _edit(norm, kind)
    return Swap(path=norm.path, was=norm.type_name, norm=kind, edit=edit, keep=norm.keep)


def _edit(norm: OwnNorm, kind: str) -> Edit:
    """As an insertion decides: too few channels for groups of a Linear's output are one layer."""
    if kind != "group":
        return replace(norm.edit, norm=kind)
    spatial = norm.edit.dims > 2 and not norm.edit.tokens
    groups = group_count(norm.edit.channels, linear=not spatial)
    if groups == 1 and not spatial:
        return replace(norm.edit, norm="layer")
    return replace(norm.edit, norm="group", groups=groups)


def are_all(norms: Sequence[OwnNorm], kind: str) -> bool:
    """Whether norms are of this kind already, all with the same ε and momentum."""
    if len({(norm.eps, norm.momentum) for norm in norms}) != 1:
        return False
    for norm in norms:
        if refusal(norm, kind) is not None:
            return False
        momentum = norm.momentum if kind in BATCH_KINDS else None
        edit = replace(_edit(norm, kind), eps=norm.eps, momentum=momentum)
        if settings_of(build(edit, torch.empty(0))) != norm.settings:
            return False
    return True


# -- doing it --------------------------------------------------------------------------------------


def replace_norms(model: nn.Module, swaps: Iterable[Swap]) -> nn.Module:
    """Carry out the swaps, in place; returns the model. All other tensors keep their bits.

    Raises:
        PlanError: The model has another module there: it is not the one that was looked at.
    """
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    old = {swap: _submodule(model, swap) for swap in swaps}  # refused before anything is changed
    fresh: set[nn.Module] = set()
    for swap, norm in old.items():
        if swap.norm == "as-is":
            _start_afresh(norm)
            continue
        new = _replacement(model, norm, swap)
        fresh.add(new)
        for place in places[norm]:
            parent, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
    _leave_fast_path(model, fresh)
    return model


def never_run(model: nn.Module, swaps: Iterable[Swap], call: Call) -> list[str]:
    """Swapped norms that eval mode without gradients passes by: somebody reads their tensors.

    Args:
        model: With the swaps, a copy: its own hooks see one more run.
        swaps: What was carried out.
        call: Example inputs.
    """
    seen: set[str] = set()
    waiting = [swap.path for swap in swaps if swap.norm != "as-is"]
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: seen.add(path))
        for path in waiting
    ]
    with torch.no_grad(), evaluating(model):
        call.clone()(model)
    for handle in handles:
        handle.remove()
    return [path for path in waiting if path not in seen]


def _submodule(model: nn.Module, swap: Swap) -> nn.Module:
    hint = "build on a fresh instance of the model that the arms were planned for"
    try:
        found = model.get_submodule(swap.path)
    except AttributeError:
        raise PlanError(f"the model has no module {swap.path}", hint=hint) from None
    name = type(found).__name__
    if name != swap.was:
        raise PlanError(f"{swap.path} is a {name} in this model, not a {swap.was}", hint=hint)
    return found


def _start_afresh(norm: nn.Module) -> None:
    """γ = 1, β = 0, no statistics yet."""
    inner = inner_norm(norm)
    if isinstance(inner, _NormBase):
        inner.reset_running_stats()
    with torch.no_grad():
        for name, value in _STARTS.items():
            tensor = getattr(inner, name, None)
            if tensor is not None:
                tensor.fill_(value)


_STARTS: Final = {"weight": 1.0, "bias": 0.0}


def _replacement(model: nn.Module, old: nn.Module, swap: Swap) -> nn.Module:
    """What stands in the norm's place: in its mode, with its hooks, frozen where it was."""
    new: nn.Module = nn.Identity()
    if swap.edit is not None:
        tensors = (*old.parameters(), *old.buffers(), *model.parameters())
        new = build(swap.edit, next((t for t in tensors if t.is_floating_point()), torch.empty(0)))
        trained = [p.requires_grad for p in inner_norm(old).parameters(recurse=False)]
        new.requires_grad_(any(trained) or not trained)
    new.train(old.training)
    if swap.keep:
        behind = {name: old.get_submodule(name) for name in swap.keep}
        new = nn.Sequential(OrderedDict({"norm": new, **behind}))
        new.training = old.training
    for name, hooks in vars(old).items():
        if name.startswith("_forward") and "hooks" in name:
            getattr(new, name).update(hooks)
    return new


def _leave_fast_path(model: nn.Module, fresh: set[nn.Module]) -> None:
    """Encoder layers with other norms must not take the fused path, which is layer norm's alone.

    ``nn.TransformerEncoderLayer`` takes it in eval mode without gradients whenever
    ``activation_relu_or_gelu`` says that its activation is one the kernel knows.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            if not fresh.isdisjoint(module.modules()):
                module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and not fresh.isdisjoint(module.modules()):
            module.enable_nested_tensor = False  # nested tensors exist for the fused path only
            module.use_nested_tensor = False
