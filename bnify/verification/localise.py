"""Where a candidate leaves the reference: the first node, or module, over its budget.

Each value of the reference is computed in float64 and in its own precision. Going through the
nodes in order, the first at which the candidate's error exceeds k times the reference's own is
named: a planted fault of 1 % on one channel stands out between neighbours at about 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from bnify.structure import Call, outputs_of
from bnify.verification.measures import is_exact, mismatch, relative_l2
from bnify.verification.program import exported_program, values_of
from bnify.verification.rules import FLOOR
from bnify.verification.runners import OnnxRunner, Runner, TorchRunner, root_cause

_MAX_BYTES: Final = 1_500_000_000  # a file with every value as an output is held in memory
_SCOPES: Final = "pkg.torch.onnx.name_scopes"


def first_divergence(
    reference: Runner, candidate: Runner, call: Call, k: float = 10.0
) -> tuple[str | None, str | None]:
    """The first node or module of the candidate over its budget, and a note where none is found.

    Args:
        reference: Must be a model: files have no float64 values.
        candidate: A model or a file.
        call: An input on which the candidate failed.
        k: As in the verdict.
    """
    if not isinstance(reference, TorchRunner):
        return None, "not localised: the reference is an ONNX file"
    try:
        if isinstance(candidate, OnnxRunner):
            found = first_divergent(reference.model, candidate.source, call, k)
        elif isinstance(candidate, TorchRunner):
            found = first_divergent_module(reference.model, candidate.model, call, k)
        else:
            return None, f"not localised: no look inside {type(candidate).__name__} objects"
    except Exception as error:  # exporter, runtime and user code run here, after the verdict fell
        return None, f"not localised: {root_cause(error)}"
    if found is None:
        return None, "not localised: every value that both sides share is within its budget"
    return found, None


def first_divergent(
    model: nn.Module,
    source: str | Path | bytes,
    call: Call,
    k: float = 10.0,
    program: ExportedProgram | None = None,
) -> str | None:
    """The first node of an ONNX file whose value leaves its budget; None if there is none.

    Args:
        model: The reference.
        source: The file, or a serialized model.
        call: The inputs.
        k: How many times the reference's own error is allowed.
        program: The exported program the file was written from; None exports the model again.

    Returns:
        ``"getitem_3 (BatchNormalization, layer1.bn2)"``: the value, the operator and the module.
        Values of the reference that the file lacks on the way there are named too: a norm that
        was left out is among them.
    """
    import onnx

    proto = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(str(source))
    if program is None:
        program = exported_program(model, call, dynamic_batch=_is_dynamic(proto))
    state = dict(model.state_dict())
    truth = values_of(program, call, float64=True, state=state)
    own = values_of(program, call, float64=False, state=state)
    if proto.ByteSize() > _MAX_BYTES:
        raise ValueError("the file is too large to hold with every value as an output")
    producers = {name: node for node in proto.graph.node for name in node.output}
    values = _all_values(proto, [name for name in truth if name in producers], model, call)
    good: set[str] = set()
    for node in program.graph.nodes:
        name = node.name
        if name not in values or name not in own:
            continue  # fused into another value, or a shape
        if _within(values[name], own[name], truth[name], k):
            good.add(name)
            continue
        return _named(name, producers[name], _missing_before(node, good, truth, producers))
    return None


def _is_dynamic(proto: Any) -> bool:
    shapes = [value.type.tensor_type.shape.dim for value in proto.graph.input]
    return any(shape and shape[0].dim_param for shape in shapes)


def _all_values(
    proto: Any, names: Sequence[str], model: nn.Module, call: Call
) -> dict[str, Tensor]:
    """Run the file once, unoptimised, with these values as outputs."""
    import onnx

    present = {output.name for output in proto.graph.output}
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in present
    )
    return dict(OnnxRunner(proto.SerializeToString(), optimize=False, model=model).run(call))


def _within(got: Tensor, own: Tensor, truth: Tensor, k: float) -> bool:
    """Whether one value is inside its budget; the reference may itself be non-finite there."""
    if mismatch(got, own) is not None:
        return False
    if is_exact(own):
        return torch.equal(got, own)
    finite = torch.isfinite(truth) & torch.isfinite(own)
    got, own, truth = (torch.where(finite, t.double(), 0.0) for t in (got, own, truth))
    return relative_l2(got, truth) <= max(k * relative_l2(own, truth), FLOOR)


def _missing_before(
    node: fx.Node, good: set[str], truth: Mapping[str, Tensor], producers: Mapping[str, Any]
) -> list[str]:
    """Values between this node and the last good ones that the file does not have."""
    missing: list[str] = []
    waiting, seen = list(node.all_input_nodes), set()
    while waiting:
        parent = waiting.pop()
        if parent in seen or parent.name in good or parent.op != "call_function":
            continue
        seen.add(parent)
        waiting.extend(parent.all_input_nodes)
        if parent.name in truth and parent.name not in producers:
            missing.append(_with_scope(parent.name, _module_of(parent)))
    return missing


def _module_of(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    for source in node.all_input_nodes if not stack else ():
        stack = list((source.meta.get("nn_module_stack") or {}).values()) or stack
    return str(stack[-1][0]) if stack else ""


def _with_scope(name: str, scope: str) -> str:
    return f"{name} ({scope})" if scope else name


def _named(name: str, producer: Any, missing: Sequence[str]) -> str:
    scopes = next((p.value for p in producer.metadata_props if p.key == _SCOPES), "")
    # The value reads "['', 'layer1', 'layer1.bn2', 'conv2d_3']": modules, then the node itself.
    parts = [part.strip(" '\"[]") for part in scopes.split(",")]
    module = parts[-2] if len(parts) > 1 else ""
    said = f"{name} ({producer.op_type}{f', {module}' if module else ''})"
    return f"{said}; the file has no {', '.join(missing)} before it" if missing else said


def first_divergent_module(
    reference: nn.Module, candidate: nn.Module, call: Call, k: float = 10.0
) -> str | None:
    """Path of the first module, in order of completion, whose output leaves its budget.

    Modules are matched by path and number of call; those that only one side has are left out.
    Children complete before their parents, so the innermost one is named.
    """
    truth = _module_values(TorchRunner(reference, dtype=torch.float64), call)
    own = _module_values(TorchRunner(reference), call)
    got = _module_values(TorchRunner(candidate), call)
    for key, values in own.items():
        if key not in got or key not in truth:
            continue  # only one side has this module
        if len(got[key]) != len(values) or not all(
            _within(c, r, t, k) for c, r, t in zip(got[key], values, truth[key], strict=True)
        ):
            path, number = key
            return (path or "the model itself, after all its modules") + (
                f" (call {number + 1})" if number else ""
            )
    return None


def _module_values(runner: TorchRunner, call: Call) -> dict[tuple[str, int], list[Tensor]]:
    values: dict[tuple[str, int], list[Tensor]] = {}
    calls: Counter[str] = Counter()
    handles = []
    for path, module in runner.model.named_modules():

        def keep(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
            number = calls[path]
            calls[path] += 1
            values[path, number] = [t.detach().cpu().clone() for _, t in outputs_of(output)]

        handles.append(module.register_forward_hook(keep))
    try:
        runner.run(call)
    finally:
        for handle in handles:
            handle.remove()
    return values
