"""Every intermediate value of a model, by the names that the ONNX exporter gives them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bnify.borrow import copy_model, seeded
from bnify.quiet import captured_streams
from bnify.structure import Call, outputs_of
from bnify.verification.runners import in_float64


def exported_program(model: nn.Module, call: Call) -> ExportedProgram:
    """The program that the ONNX exporter writes for this model, with its final node names.

    Raises:
        Exception: Whatever the exporter raises; callers stand at the boundary.
    """
    with captured_streams(), torch.no_grad():
        program = torch.onnx.export(
            exportable(model, call),
            positional(call),
            kwargs=dict(call.clone().kwargs),
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None or program.exported_program is None:
        raise RuntimeError("the exporter kept no program")
    return program.exported_program


def exportable(model: nn.Module, call: Call) -> nn.Module:
    """A copy in eval mode on the CPU that the exporter takes.

    Where the model returns types that the exporter does not know (a plain dataclass), or values
    that are no tensors, the copy returns its tensors as a list, in the order of ``outputs_of``.
    Such a copy must not be copied again: its forward is its own.
    """
    copied = nn.Module.to(copy_model(model).eval(), "cpu")
    with torch.no_grad(), seeded(0):
        leaves = pytree.tree_leaves(call.clone()(copied))
    if all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
        return copied
    forward = copied.forward

    @functools.wraps(forward)
    def flat(*args: Any, **kwargs: Any) -> list[Tensor]:
        return [tensor for _, tensor in outputs_of(forward(*args, **kwargs))]

    copied.forward = flat
    return copied


def positional(call: Call) -> tuple[Any, ...]:
    """The positional arguments as ``torch.onnx.export`` takes them.

    It reads a dict in the last place as keyword arguments; an empty one behind it stops that.
    """
    args = call.clone().args
    return (*args, {}) if args and isinstance(args[-1], dict) and not call.kwargs else args


def values_of(
    program: ExportedProgram, call: Call, *, float64: bool, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Value of every node that is a tensor, by node name, in topological order.

    Args:
        program: From :func:`exported_program`.
        call: The inputs, of the shapes that the program was made for unless it is dynamic.
        float64: Compute in float64 instead of the model's own types.
        state: Parameters and buffers by name; those missing are the program's own.
    """
    inputs = iter(tensor for _, tensor in call.clone().tensors())
    feeds = []
    for spec in program.graph_signature.input_specs:
        value: Any
        if spec.kind is InputKind.USER_INPUT:
            constant = getattr(spec.arg, "value", None)
            value = constant if hasattr(spec.arg, "value") else next(inputs)
        else:
            value = _stored(program, spec.target or "", state)
        feeds.append(value.double() if float64 and _is_real(value) else value)
    recorder = _Recorder(program.graph_module)
    with torch.no_grad(), in_float64(float64):
        recorder.run(*feeds)
    return recorder.values


def _stored(program: ExportedProgram, name: str, state: Mapping[str, Tensor]) -> Any:
    for place in (state, program.state_dict, program.constants):
        if name in place:
            value = place[name]
            return value.detach() if isinstance(value, Tensor) else value
    raise KeyError(name)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Recorder(fx.Interpreter):
    """Runs a program and keeps what each node computed."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node; assertions about dtypes do not hold in float64 and are left out."""
        if n.op == "call_function" and "assert" in str(n.target):
            return None
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            # A copy: a later node may write into this value.
            self.values[n.name] = value.detach().clone()
        return value
