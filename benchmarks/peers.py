"""The other tools that fold norms, each as one function on a copy of the model.

A peer takes a model in eval mode and its inputs, and returns something that can be called with the
same inputs. Where it cannot, it raises ``Unavailable`` (not installed here), ``NothingToDo`` (the
tool has no work on this model), or whatever the tool raises. Nothing here uses bnify.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from counting import arguments, map_tree, tensors_of


class Unavailable(Exception):  # noqa: N818 - not an error of ours
    """The tool is not installed here, or this version has it no more."""


class NothingToDo(Exception):  # noqa: N818
    """The tool is made for models of another kind."""


@dataclass(frozen=True)
class Peer:
    """One tool: its short name and ``fold(model, inputs) -> folded``."""

    name: str
    fold: Callable[[nn.Module, Any], Callable[..., Any]]
    says: str


def fx_fuse(model: nn.Module, inputs: Any) -> Callable[..., Any]:
    """``torch.fx.experimental.optimization.fuse``: symbolic tracing, then pairs of modules."""
    del inputs
    from torch.fx.experimental import optimization

    return optimization.fuse(model)  # copies by itself


def fuse_fx(model: nn.Module, inputs: Any) -> Callable[..., Any]:
    """``torch.ao.quantization.quantize_fx.fuse_fx``: the first step of FX quantization."""
    del inputs
    try:
        from torch.ao.quantization import quantize_fx
    except ImportError as error:
        raise Unavailable("this torch has no torch.ao.quantization.quantize_fx") from error
    return quantize_fx.fuse_fx(copy.deepcopy(model))


def jit_freeze(model: nn.Module, inputs: Any) -> Callable[..., Any]:
    """``torch.jit.trace`` and ``torch.jit.freeze``, which folds while it freezes."""
    flat = Flat(model, inputs)  # freezing copies what it changes
    with torch.no_grad():
        traced = torch.jit.trace(flat, flat.tensors(inputs), check_trace=False, strict=False)
        frozen = torch.jit.freeze(traced.eval())
    return Unflattened(frozen, flat)


def timm_reparameterize(model: nn.Module, inputs: Any) -> Callable[..., Any]:
    """``timm.utils.reparameterize_model``: the modules' own hand-written merges."""
    del inputs
    if importlib.util.find_spec("timm") is None:
        raise Unavailable("timm is not installed")
    from timm.utils.model import reparameterize_model

    methods = ("fuse", "reparameterize", "switch_to_deploy")
    if not any(hasattr(module, method) for module in model.modules() for method in methods):
        raise NothingToDo("no module has a method for it")
    return reparameterize_model(model, inplace=False)


def timm_then_fuse(model: nn.Module, inputs: Any) -> Callable[..., Any]:
    """Timm's own merges, and ``torch.fx`` fuse on what they leave."""
    return fx_fuse(timm_reparameterize(model, inputs), inputs)


def aimet(model: nn.Module, inputs: Any) -> Callable[..., Any]:
    """``aimet_torch.batch_norm_fold.fold_all_batch_norms``, where it is installed."""
    if importlib.util.find_spec("aimet_torch") is None:
        raise Unavailable("aimet_torch is not installed")
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    working = copy.deepcopy(model)
    tensors = tuple(Flat(model, inputs).tensors(inputs))
    fold_all_batch_norms(working, [tuple(t.shape) for t in tensors], dummy_input=tensors)
    return working


#: In the order of the table. The first three are general, the next two know their own models.
PEERS = (
    Peer("fx.fuse", fx_fuse, "torch.fx.experimental.optimization.fuse"),
    Peer("fuse_fx", fuse_fx, "torch.ao.quantization.quantize_fx.fuse_fx"),
    Peer("jit.freeze", jit_freeze, "torch.jit.trace, then torch.jit.freeze"),
    Peer("timm", timm_reparameterize, "timm.utils.reparameterize_model"),
    Peer("timm+fuse", timm_then_fuse, "timm.utils.reparameterize_model, then torch.fx fuse"),
    Peer("aimet", aimet, "aimet_torch.batch_norm_fold.fold_all_batch_norms"),
)


def peer(name: str) -> Peer:
    """The peer of this name."""
    return next(one for one in PEERS if one.name == name)


def quietly(tool: Peer, model: nn.Module, inputs: Any) -> Callable[..., Any]:
    """Run a tool without its warnings: all of them warn of their own deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tool.fold(model, inputs)


class Flat(nn.Module):
    """The model as a function of tensors to tensors, which is what tracing takes."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        self._template = arguments(inputs)
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Put the tensors where the model's arguments have theirs; its outputs flat."""
        rest = iter(tensors)
        args, kwargs = map_tree(lambda _: next(rest), self._template)
        return tuple(tensors_of(self.model(*args, **kwargs)))

    def tensors(self, inputs: Any) -> tuple[Tensor, ...]:
        """The tensors of the inputs in the order that ``forward`` takes them."""
        return tuple(tensors_of(arguments(inputs)))


class Unflattened:
    """What tracing made, called like the model it was made of."""

    def __init__(self, program: Callable[..., Any], flat: Flat) -> None:
        self.program = program
        self._tensors = flat.tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it on the tensors of these arguments."""
        from types import SimpleNamespace

        return self.program(*self._tensors(SimpleNamespace(args=args, kwargs=kwargs)))
