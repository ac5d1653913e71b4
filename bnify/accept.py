"""What bnify works on: a plain module with real, finite tensors. Everything else is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnify.errors import CaptureError, PlanError, WeightsError
from bnify.plan import Plan
from bnify.structure import Call, Inputs, as_call


def accept(model: nn.Module, *, statistics: bool = True, verb: str = "insert") -> None:
    """Refuse what cannot be worked on.

    Args:
        model: What the user passed.
        statistics: Refuse running statistics that are not finite.
        verb: What is to be done, for the lines to write instead.

    Raises:
        PlanError: The model is wrapped for distribution or compilation, or scripted.
        CaptureError: It is no module, or has parameters without values.
        WeightsError: A parameter or running statistic is not finite.
    """
    refuse_other_than_modules(model)
    refuse_wrapped(model, verb)
    _refuse_unmaterialised(model)
    _refuse_nonfinite(model, statistics=statistics)


def refuse_other_than_modules(model: Any, what: str = "model") -> None:
    """Refuse what is no module.

    Args:
        model: What was passed.
        what: What it is called in the error.

    Raises:
        CaptureError: It is none; of a class, the hint says to make an instance.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"the {what} is a {type(model).__name__}, no torch.nn.Module",
            hint="pass an instance: MyNetwork(), not MyNetwork"
            if isinstance(model, type)
            else "pass a torch.nn.Module",
        )


def unwrapped(model: Any, *wrappers: type[nn.Module]) -> Any:
    """The module within torch.compile, DistributedDataParallel and DataParallel.

    Args:
        model: Anything; what is no such wrapper is given back.
        wrappers: Further classes that keep it as ``module``.
    """
    known: Any = (nn.parallel.DistributedDataParallel, nn.DataParallel, *wrappers)
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            if not isinstance(model, known):
                return model
            inner = model.get_submodule("module")
        model = inner


def example_call(model: nn.Module, inputs: Inputs) -> Call:
    """The user's inputs as a call.

    Raises:
        CaptureError: They are no inputs, or hold NaN.
    """
    call = as_call(inputs)
    for name, tensor in call.tensors(model):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise CaptureError(
                f"the input {name} holds {int(tensor.isnan().sum())} NaN values",
                hint="pass finite inputs",
            )
    return call


def as_plan(plan: Plan | Mapping[str, Any] | str | Path) -> Plan:
    """A plan as it comes: itself, its data, its JSON, or a file or folder that holds it.

    Raises:
        PlanError: It is no plan.
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        inner = plan.get("plan")  # of a saved folder or a report
        return Plan.from_dict(dict(inner) if isinstance(inner, Mapping) else dict(plan))
    if not isinstance(plan, (str, Path)):
        raise PlanError(f"a plan is expected, not {plan!r}", hint="pass result.plan")
    if isinstance(plan, str) and plan.lstrip().startswith("{"):
        return as_plan(_json(plan, "the plan"))
    file = Path(plan) / "bnify.json" if Path(plan).is_dir() else Path(plan)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the plan {plan} cannot be read: {error}", hint="check the path") from None
    return as_plan(_json(text, f"the plan {plan}"))


def _json(text: str, what: str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"{what} is not JSON: {error}", hint="write it with to_json()") from None
    return data if isinstance(data, dict) else {}


def refuse_wrapped(model: nn.Module, verb: str = "insert") -> None:
    """Work before DDP, FSDP and torch.compile; the hint has the lines to write.

    Raises:
        PlanError: The model, or a part of it, is wrapped.
    """
    for path, module in model.named_modules():
        found = _wrapper(module)
        if found is None:
            continue
        name, inner, again = found
        where = f" at {path}" if path else ""
        if path and name == "torch.compile":
            continue  # a compiled part runs eagerly while recording
        raise PlanError(
            f"the model is wrapped by {name}{where}: work on the plain model first",
            hint=f"bnify.audit({inner}, inputs)"
            if verb == "audit"
            else f"model = bnify.{verb}({inner}, inputs).model\nmodel = {again}",
        )


def _wrapper(module: nn.Module) -> tuple[str, str, str] | None:
    """Name of a wrapper, how to reach what it wraps, and how to wrap again."""
    kind = type(module)
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "DistributedDataParallel", "model.module", "DistributedDataParallel(model)"
    if isinstance(module, nn.DataParallel):
        return "DataParallel", "model.module", "torch.nn.DataParallel(model)"
    if _is(module, "torch._dynamo.eval_frame", "OptimizedModule"):
        return "torch.compile", "model._orig_mod", "torch.compile(model)"
    if _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        return "FullyShardedDataParallel", "plain_model", "FullyShardedDataParallel(model)"
    if _is(module, "torch.distributed.fsdp", "FSDPModule"):
        return "fully_shard", "plain_model", "torch.distributed.fsdp.fully_shard(model)"
    if isinstance(module, torch.jit.ScriptModule):
        return f"TorchScript ({kind.__name__})", "plain_model", "torch.jit.script(model)"
    return None


def _is(module: nn.Module, home: str, name: str) -> bool:
    """Isinstance against a class whose module may never have been imported."""
    kind: Any = getattr(sys.modules.get(home), name, None)
    return kind is not None and isinstance(module, kind)


def _refuse_unmaterialised(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"{name} is not initialised yet (a lazy module)",
                hint="run one forward pass first: model(*inputs)",
            )
        if tensor.is_meta:
            raise CaptureError(
                f"{name} is on the meta device and has no values",
                hint="materialise the model first: model.to_empty(device=...) and load weights",
            )


def _refuse_nonfinite(model: nn.Module, *, statistics: bool) -> None:
    """Parameters and running statistics; other buffers hold masks of -inf by right."""
    named: list[tuple[str, torch.Tensor]] = [*model.named_parameters()]
    named += [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if statistics and name.rpartition(".")[2] in ("running_mean", "running_var")
    ]
    bad = [
        (name, int((~tensor.isfinite()).sum()))
        for name, tensor in named
        if tensor.is_floating_point() and not _finite(tensor)
    ]
    if bad:
        name, count = bad[0]
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise WeightsError(
            f"{name} holds {count} non-finite values{more}",
            hint="load a checkpoint from before the training diverged",
        )


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; a finite sum says so without a mask of the tensor's size."""
    return bool(tensor.detach().sum().isfinite()) or bool(tensor.isfinite().all())


def refuse_inference(model: nn.Module) -> None:
    """Refuse to edit tensors that were made under ``inference_mode``.

    Raises:
        CaptureError: The model has some.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_inference():
            raise CaptureError(
                f"{name} was made under inference_mode and cannot be edited",
                hint="leave inplace out, or load the model outside of inference_mode",
            )
