"""The norms that a model has of its own: where they are, on what, and whether another can stand in.

Whatever normalizes in a module is found by its class. A class with a forward of its own (timm's
norms with activation, its layer norm on the channels of images) is measured against what it
derives from, and can be swapped where it computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnify.borrow import copy_model, fused_attention, in_mode, seeded, training_possible
from bnify.layers import ChannelRMSNorm, TokenNorm, without_synchronisation
from bnify.norms import each_norm
from bnify.plan import Edit
from bnify.spec.usercode import user_code
from bnify.structure import Call

#: What is known to normalize; a subclass comes before what it is a subclass of.
_FAMILIES: Final[tuple[type[nn.Module], ...]] = (
    nn.SyncBatchNorm,
    _BatchNorm,
    _InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    ChannelRMSNorm,
    TokenNorm,
)
#: Families that normalize the last axis.
_LAST: Final = (nn.LayerNorm, nn.RMSNorm, TokenNorm)
#: Norms of other libraries, which share no class with torch's.
_NAMED_SO: Final = re.compile(r"(batch|layer|group|instance|rms|response|evo)_?norm", re.IGNORECASE)
#: What a norm with activation runs behind the norm, in this order (timm's names).
_BEHIND: Final = ("drop", "act")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnNorm:
    """One norm of the model, as a forward pass in eval mode used it.

    Attributes:
        path: Module path.
        type_name: Its class.
        calls: How often it ran.
        edit: Channels, axis and dimensions of its place; the kind of norm is put in later.
        per_channel: Elements of its input for each channel, over the whole batch.
        per_sample: Elements of its input for each sample and channel.
        keep: Children that run behind the norm in its own forward.
        settings: Family, groups, parameters: what norms of one kind have in common.
        eps: Its ε; None for the dtype's own, as RMS norm takes it.
        momentum: Of the running statistics; None where it has none.
        started: Where its scale or shift do not start at 1 and 0: ``"zero"`` for a scale with
            zeros, else ``"other"``.
        refusal: Why it stays as it is, in every arm; empty where it can go.
    """

    path: str
    type_name: str
    calls: int = 0
    edit: Edit = field(default_factory=lambda: Edit(layer=""))
    per_channel: int = 0
    per_sample: int = 0
    keep: tuple[str, ...] = ()
    settings: tuple[Any, ...] = ()
    eps: float | None = None
    momentum: float | None = None
    started: str = ""
    refusal: str = ""


def own_norms(model: nn.Module, call: Call) -> tuple[OwnNorm, ...]:
    """Every norm that is a module, in the order of registration; the model is not touched.

    Args:
        model: Any plain module.
        call: Example inputs, at the batch size of the training.

    Raises:
        SpecError: The forward pass raised.
    """
    norms = _modules(model)
    if not norms:
        return ()
    seen = _recorded(model, tuple(norms), call)
    return tuple(_examined(path, norms[path], seen[path]) for path in norms)


def settings_of(norm: nn.Module) -> tuple[Any, ...]:
    """What norms of one kind have in common: family, groups, statistics, parameters."""
    inner = inner_norm(norm)
    shapes = tuple((name, tuple(p.shape)) for name, p in inner.named_parameters(recurse=False))
    groups = getattr(inner, "num_groups", None)
    running = getattr(inner, "running_mean", None) is not None
    return _family(norm), _family(inner), groups, running, shapes


def inner_norm(norm: nn.Module) -> Any:
    """The norm that holds scale and shift: that inside of a :class:`TokenNorm`, else itself."""
    return each_norm(norm)[0]


def _family(norm: nn.Module) -> type[nn.Module] | None:
    return next((family for family in _FAMILIES if isinstance(norm, family)), None)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The norms by path; a norm inside another is part of it."""
    found: dict[str, nn.Module] = {}
    inside = None
    for path, module in model.named_modules():  # a module comes right before what is inside
        if inside is not None and path.startswith(inside):
            continue
        if _family(module) is not None or _is_foreign(module):
            found[path] = module
            inside = f"{path}." if path else ""
    return found


def _is_foreign(module: nn.Module) -> bool:
    """A norm by its name alone, with tensors of its own and none below."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    whole = [*module.parameters(), *module.buffers()]
    return bool(own) and len(own) == len(whole) and bool(_NAMED_SO.search(type(module).__name__))


@dataclass(slots=True)
class _Seen:
    """Shapes of a norm's inputs, and the first two samples of the first."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    sample: Tensor | None = None


def _recorded(model: nn.Module, paths: Sequence[str], call: Call) -> dict[str, _Seen]:
    """The inputs of these modules in a forward pass in eval mode, fused kernels left out."""
    copied = without_synchronisation(copy_model(model))
    seen = {path: _Seen() for path in paths}

    def watch(path: str) -> None:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = (*args, *kwargs.values())[0]
            seen[path].shapes.append(tuple(x.shape))
            if seen[path].sample is None:
                seen[path].sample = x[:2].detach().clone() if x.ndim else x

        copied.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)

    for path in paths:
        watch(path)
    with (
        training_possible(),
        torch.no_grad(),
        seeded(0),
        fused_attention(enabled=False),
        in_mode(copied, train=False),
        user_code(type(model).__name__),
    ):
        call.clone()(copied)
    return seen


def _examined(path: str, module: nn.Module, seen: _Seen) -> OwnNorm:
    name, family = type(module).__name__, _family(module)
    found = OwnNorm(path=path, type_name=name, calls=len(seen.shapes))
    if seen.sample is None:
        return replace(found, refusal="the forward pass in eval mode never runs it")
    if family is None:
        return replace(found, refusal="its class is none of torch's norms")
    if refusal := _place_refusal(path, module, sorted({len(shape) for shape in seen.shapes})):
        return replace(found, refusal=refusal)
    shape = seen.shapes[0]
    axis = len(shape) - 1 if family in _LAST else 1
    keep: tuple[str, ...] = ()
    if type(module).forward is not family.forward or "forward" in vars(module):
        names = tuple(n for n in _BEHIND if isinstance(getattr(module, n, None), nn.Module))
        fitting = [a for a in (axis, 1) if _computes(module, family, a, names, seen.sample)]
        if not fitting:
            return replace(found, refusal="its own forward computes something else")
        axis, keep = fitting[0], names
    inner = inner_norm(module)
    values = min(torch.Size(s).numel() // max(s[axis], 1) for s in seen.shapes)
    return replace(
        found,
        edit=Edit(layer=path, channels=shape[axis], axis=axis, dims=len(shape), layer_type=name),
        per_channel=values,
        per_sample=values // max(shape[0], 1),
        keep=keep,
        settings=settings_of(module),
        eps=getattr(inner, "eps", None),
        momentum=getattr(inner, "momentum", None),
        started=_started(inner),
    )


def _place_refusal(path: str, module: nn.Module, dims: list[int]) -> str | None:
    """Why no other norm can stand where this one does, or None."""
    inner = inner_norm(module)
    if not path:
        return "it is the model itself"
    if len(dims) > 1:
        return f"it runs on inputs of {' and '.join(map(str, dims))} dimensions"
    if len(getattr(inner, "normalized_shape", (1,))) > 1:
        return f"it normalizes {len(inner.normalized_shape)} axes at once"
    unbatched = inner._get_no_batch_dim() if isinstance(inner, _InstanceNorm) else 1  # type: ignore[no-untyped-call]
    if dims[0] <= unbatched:
        return "its input has no batch axis"
    for name in ("weight", "bias"):
        if getattr(inner, name, None) is not None and name not in inner._parameters:
            return f"its {name} is computed at every call"
    return None


def _started(inner: nn.Module) -> str:
    """Where scale and shift begin elsewhere than at 1 and 0."""
    scale, shift = getattr(inner, "weight", None), getattr(inner, "bias", None)
    if scale is not None and bool((scale == 0).any()):
        return "zero"
    elsewhere = (scale is not None and bool((scale != 1).any())) or (
        shift is not None and bool((shift != 0).any())
    )
    return "other" if elsewhere else ""


def _computes(
    module: nn.Module, family: type[nn.Module], axis: int, behind: Sequence[str], x: Tensor
) -> bool:
    """Whether a forward of its own is the family's over this axis, and then these children.

    Measured in both modes on copies with random scales, shifts and statistics, of which any other
    use shows; up to rounding in single precision.
    """
    for train in (False, True):
        try:
            want = _once(module, train, lambda copied: copied(x.clone()))
            got = _once(module, train, lambda copied: _known(copied, family, axis, behind, x))
        except Exception:  # their code on an axis that is not theirs: it computes something else
            return False
        if not isinstance(want, Tensor) or want.shape != got.shape:
            return False
        if not torch.allclose(want.float(), got.float(), rtol=1e-3, atol=1e-4):
            return False
    return True


def _once(module: nn.Module, train: bool, run: Any) -> Any:
    """What comes of one run of a copy with random tensors; the same tensors every time."""
    with training_possible(), torch.no_grad(), seeded(1):
        copied = without_synchronisation(copy_model(module)).train(train)
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
        return run(copied)


def _known(module: nn.Module, family: Any, axis: int, behind: Sequence[str], x: Tensor) -> Tensor:
    if family in _LAST:
        y = family.forward(module, x.movedim(axis, -1)).movedim(-1, axis)
    else:
        y = family.forward(module, x.clone())
    for name in behind:
        y = module.get_submodule(name)(y)
    return y  # type: ignore[no-any-return]
