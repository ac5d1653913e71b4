"""float64 copies of models that stay in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnify.borrow import copy_model


def double(model: nn.Module) -> nn.Module:
    """A float64 copy of a model: parameters, buffers and plain tensor attributes."""
    # Parameters are widened on the way, instead of copied first.
    wide = {
        id(p): nn.Parameter(_widest(p.detach()).clone(), requires_grad=p.requires_grad)
        if p.dtype is torch.float64
        else nn.Parameter(_widest(p.detach()), requires_grad=p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter and (p.is_floating_point() or p.is_complex())
    }
    # Not model.double(): people give their own methods that name.
    copied: nn.Module = nn.Module._apply(copy_model(model, wide), _widest)  # type: ignore[no-untyped-call]
    for module in copied.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(module, name, value.double())
    return copied


def _widest(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():  # Module.to(torch.float64) would discard the imaginary part
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def widened(value: Any) -> Any:
    """float64 for every floating-point dtype; anything else as it is."""
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


class StayInFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Casts to other floating-point types, and tensors made in them, are float64.

    Without it a ``.float()`` inside the model, usual around norms and softmax, would put float32
    rounding into what is meant to be the truth, or make the next product fail.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see Recorder: the wrapper costs an import of torch._dynamo

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator with every floating-point dtype widened."""
        del types
        args = tuple(widened(value) for value in args)
        return func(*args, **{key: widened(value) for key, value in (kwargs or {}).items()})
