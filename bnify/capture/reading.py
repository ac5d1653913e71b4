"""What the recorder reads off models, return values, operator schemas and the call stack."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, fx, nn


def output_of(value: Any, node_of: Any) -> Any:
    """The return value with nodes for tensors, in containers that fx can hold."""
    if isinstance(value, Tensor):
        return node_of(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, dict)):
        names = [f.name for f in dataclasses.fields(value)]
        return {name: output_of(getattr(value, name), node_of) for name in names}
    if hasattr(value, "items"):
        return {str(key): output_of(item, node_of) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {n: output_of(item, node_of) for n, item in zip(value._fields, value, strict=True)}
    if isinstance(value, (list, tuple)):
        return tuple(output_of(item, node_of) for item in value)
    return value if isinstance(value, (bool, int, float, str)) else None


def function_running() -> Any:
    """The ``autograd.Function`` whose forward is on the stack: it runs without gradients too."""
    forwards: dict[Any, Any] = {}
    pending: list[Any] = [torch.autograd.Function]
    while pending:
        for function in pending.pop().__subclasses__():
            pending.append(function)
            forward = getattr(function, "forward", None)
            forwards[getattr(forward, "__code__", None)] = function
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code in forwards:
            return forwards[frame.f_code]
    return None


def first_names(model: nn.Module) -> dict[int, str]:
    """The first name of every parameter and buffer, by object identity."""
    state = (*model.named_parameters(), *model.named_buffers())
    return {id(tensor): name for name, tensor in state}


def tensor_names(model: nn.Module) -> tuple[dict[int, list[str]], dict[int, Tensor]]:
    """All names of every parameter, buffer and plain tensor attribute, by object identity."""
    names: dict[int, list[str]] = {}
    owned: dict[int, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        names.setdefault(id(tensor), []).append(name)
        owned[id(tensor)] = tensor

    for name, parameter in model.named_parameters(remove_duplicate=False):
        add(name, parameter)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        add(name, buffer)
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and id(value) not in owned:
                add(f"{path}.{attribute}" if path else attribute, value)
    return names, owned


_BATCH_STATISTICS = ("aten::batch_norm", "aten::native_batch_norm", "aten::instance_norm")


def writes_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kind: type[Any] = fx.Node
) -> tuple[Any, ...]:
    """The nodes (or tensors, by ``kind``) whose memory the operator writes, from its schema."""
    written: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        info = argument.alias_info
        if info is None or not info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        written.extend(v for v in values if isinstance(v, kind))
    # batch_norm's schema does not say that training updates the running statistics.
    if func._schema.name in _BATCH_STATISTICS and args[5]:
        written.extend(v for v in args[3:5] if isinstance(v, kind))
    return tuple(written)
