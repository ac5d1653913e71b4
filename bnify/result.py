"""What a rewrite gives back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from bnify.borrow import copy_model, evaluating, seeded
from bnify.capture import Captured
from bnify.changes import Change
from bnify.errors import PlanError
from bnify.frozen import give_back_train
from bnify.layers import (
    CallNorms,
    ChannelRMSNorm,
    TokenNorm,
    carries_norm,
    detach,
    norm_of,
    restart_calls,
)
from bnify.plan import Plan
from bnify.structure import Call, outputs_of
from bnify.verdict import Verification


@dataclass(slots=True, repr=False)
class Result:
    """A rewritten model and everything that is known about the rewrite.

    Attributes:
        model: What to use from now on.
        plan: What was done, and why not elsewhere.
        verification: What was measured; None with ``verify=False``.
        call: The example inputs.
        source: What is known of where the model came from: SPEC, arguments, hashes, seed.
        before: The module tree before the rewrite, as text.
        files: What :meth:`save` wrote, by role.
        structure: How a fold changed the module tree; empty after an insertion.
        captured: The recording of the original, after a fold that did not replace it.
    """

    model: nn.Module
    _graph: fx.GraphModule | Callable[[], fx.GraphModule]
    plan: Plan
    verification: Verification | None
    call: Call
    source: Mapping[str, Any] = field(default_factory=dict)
    before: str = ""
    files: dict[str, str] = field(default_factory=dict)
    structure: tuple[Change, ...] = ()
    captured: Captured | None = None

    @property
    def graph(self) -> fx.GraphModule:
        """The rewritten recording of one eval-mode forward pass, on its own copies of the tensors.

        Its inputs are the tensors of the call, flat and in order. A fold builds it when it is
        first asked for.
        """
        if not isinstance(self._graph, fx.GraphModule):
            self._graph = self._graph()
        return self._graph

    @property
    def reference(self) -> nn.Module | None:
        """What an exported file has to compute: the original, if this is a fold that kept it."""
        return None if self.captured is None else self.captured.model

    @property
    def passed(self) -> bool | None:
        """The verdict; None when nothing was verified."""
        return None if self.verification is None else self.verification.passed

    def __repr__(self) -> str:
        verdict = {None: "not verified", True: "PASS", False: "FAIL"}[self.passed]
        name = type(self.model).__name__
        edits, skips = len(self.plan.edits), len(self.plan.skips)
        return f"Result({name}: {edits} edited, {skips} left alone, {verdict})"

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        return {
            "schema": 1,
            "verb": self.plan.verb,
            "plan": self.plan.to_dict(),
            "verification": None if self.verification is None else self.verification.to_dict(),
            "files": dict(self.files),
        }

    def save(self, dir: str | Path, onnx: bool = True, force: bool = False) -> Path:
        """Write weights, plan, report and (unless ``onnx=False``) the verified ONNX file.

        Returns:
            The folder; :func:`bnify.load` reads it.

        Raises:
            UsageError: The folder exists and ``force`` is not set.
            ExportError: The model cannot be exported; nothing is written.
        """
        from bnify.saved import save

        return save(self, dir, onnx=onnx, force=force)

    def strip(self) -> nn.Module:
        """A copy of the model that does not need bnify to be unpickled.

        A layer whose norm was folded away (``nn.Identity``) becomes its plain class again; a layer
        that still has a norm becomes ``nn.Sequential(layer, norm)``, so its tensors are called
        ``fc1.0.weight`` and ``fc1.1.weight`` from then on: for shipping, not for old checkpoints.

        Raises:
            PlanError: A norm has no form in torch (tokens, several calls, rms on convolutions), or
                the model reads the layer in a way that ``nn.Sequential`` does not allow.
        """
        plain = copy_model(self.model)
        paths: dict[nn.Module, list[str]] = {}
        for path, module in plain.named_modules(remove_duplicate=False):
            if carries_norm(module):
                paths.setdefault(module, []).append(path)
        for layer, (path, *others) in paths.items():
            norm = norm_of(layer)
            if _is_folded_away(norm):
                norm = nn.Identity()
            if isinstance(norm, (TokenNorm, CallNorms, ChannelRMSNorm)):
                raise PlanError(
                    f"{path or 'the root'} has a {type(norm).__name__}, which torch has no module "
                    "for",
                    hint="ship the model with bnify installed, or its state_dict",
                )
            if not path and not isinstance(norm, nn.Identity):
                raise PlanError("the root itself carries a norm and cannot be replaced")
            detach(layer)
            if not isinstance(norm, nn.Identity):
                pair = nn.Sequential(OrderedDict([("0", layer), ("1", norm)]))
                pair.train(layer.training)
                for place in (path, *others):  # a layer may be registered more than once
                    parent, _, name = place.rpartition(".")
                    setattr(plain.get_submodule(parent), name, pair)
        for number, hook in list(plain._forward_pre_hooks.items()):
            if hook is restart_calls:
                del plain._forward_pre_hooks[number]
        for module in plain.modules():
            give_back_train(module)
        self._same_function(plain)
        return plain

    def _same_function(self, plain: nn.Module) -> None:
        try:
            outputs = []
            for model in (copy_model(self.model), copy_model(plain)):
                with torch.no_grad(), seeded(0), evaluating(model):
                    outputs.append([t for _, t in outputs_of(self.call.clone()(model))])
            same = all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
        except (AttributeError, TypeError, RuntimeError) as error:
            raise PlanError(
                f"the model reads a layer in a way that nn.Sequential does not allow: {error}",
                hint="ship the model with bnify installed",
            ) from error
        if not same:
            raise PlanError(
                "the stripped model does not compute the same outputs: the model looks at its "
                "layers' classes",
                hint="ship the model with bnify installed",
            )


def _is_folded_away(norm: nn.Module) -> bool:
    """Whether nothing is left of a norm, or of all norms in a container."""
    containers = (TokenNorm, CallNorms)
    inside = [m for m in norm.modules() if not isinstance(m, containers)]
    return bool(inside) and all(isinstance(module, nn.Identity) for module in inside)
