"""Every intermediate value of a model, by the names that the ONNX exporter gives them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from bnify.borrow import copy_model, seeded
from bnify.errors import ExportError
from bnify.quiet import captured_streams
from bnify.structure import Call, outputs_of
from bnify.verification.runners import in_float64


def exported_program(
    model: nn.Module, call: Call, *, dynamic_batch: bool = False
) -> ExportedProgram:
    """The program that the ONNX exporter writes for this model, with its final node names.

    Names are numbered in another way where the batch is dynamic: it must be as in the file.

    Raises:
        Exception: Whatever the exporter raises; callers stand at the boundary.
    """
    if dynamic_batch and call.batch == 1:
        call = call.resized(2)  # axes of length 1 are taken for constants
    with captured_streams(), torch.no_grad():
        program = torch.onnx.export(
            exportable(model, call),
            positional(call),
            kwargs=dict(call.clone().kwargs),
            dynamo=True,
            optimize=False,
            verbose=False,
            dynamic_shapes=dynamic_shapes(model, call) if dynamic_batch else None,
        )
    if program is None or program.exported_program is None:
        raise RuntimeError("the exporter kept no program")
    return program.exported_program


def dynamic_shapes(model: nn.Module, call: Call) -> dict[str, Any]:
    """The first axis of every tensor that is as long as the batch, marked by parameter name.

    A bare name is the one form that the exporter neither turns into a static axis silently nor
    into a symbolic one that fails.
    """
    size = call.batch

    def mark(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return {0: "batch"} if tree.ndim and tree.shape[0] == size else None
        if isinstance(tree, Mapping):
            return {key: mark(value) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return (
                type(tree)(map(mark, tree)) if type(tree) in (list, tuple) else [*map(mark, tree)]
            )
        return None

    try:
        bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise ExportError(
            f"the inputs do not fit {type(model).__name__}.forward: {error}",
            hint="pass a tensor, a tuple of positional inputs, or a dict of keyword inputs",
        ) from error
    return {name: mark(value) for name, value in bound.arguments.items()}


def exportable(model: nn.Module, call: Call) -> nn.Module:
    """A copy in eval mode on the CPU that the exporter takes.

    Where the model returns types that the exporter does not know (a plain dataclass), or values
    that are no tensors, the copy returns its tensors as a list, in the order of ``outputs_of``.
    Such a copy must not be copied again: its forward is its own.

    Raises:
        ExportError: The model returns no tensor.
    """
    copied = nn.Module.to(copy_model(model).eval(), "cpu")
    with torch.no_grad(), seeded(0):
        value = call.clone()(copied)
    if not outputs_of(value):
        raise ExportError(
            f"{type(model).__name__} returns no tensor: there is nothing to export",
            hint="let forward() return what it computes",
        )
    leaves = pytree.tree_leaves(value)
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
