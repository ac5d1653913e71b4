"""Whether a plan, perhaps edited by hand, can be carried out on a recording."""

from __future__ import annotations

from torch import fx, nn

from bnify.capture import Captured
from bnify.errors import PlanError
from bnify.fingerprint import fingerprint
from bnify.insertion.options import INITS
from bnify.layers import carries_norm
from bnify.norms import BATCH_KINDS, KINDS
from bnify.plan import Edit, Plan


def check_fingerprint(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        PlanError: It names the first difference.
    """
    difference = plan.fingerprint.difference(fingerprint(model))
    if difference is not None:
        raise PlanError(
            f"the plan does not fit this model: {difference}",
            hint="make the plan again: bnify insert SPEC --dry-run --format json",
        )


def check_edits(captured: Captured, plan: Plan) -> None:
    """Refuse edits that cannot be carried out, each with its layer's name.

    Raises:
        PlanError: The first edit that does not fit.
    """
    outputs: dict[str, tuple[fx.Node, ...]] = {}
    counts: dict[str, int] = {}
    for call in captured.calls:
        outputs.setdefault(call.path, call.outputs)
        counts[call.path] = counts.get(call.path, 0) + 1
    seen: set[str] = set()
    for edit in plan.edits:
        problem = _problem(captured, edit, outputs, counts)
        if problem is None and edit.carrier in seen:
            problem = f"two edits put a norm on {edit.carrier}"
        seen.add(edit.carrier)
        if problem is not None:
            raise PlanError(
                f"the plan's edit of {edit.layer or 'the root'} cannot be done: {problem}",
                hint="take the edit out of the plan, or make the plan again",
            )


def _problem(
    captured: Captured, edit: Edit, outputs: dict[str, tuple[fx.Node, ...]], counts: dict[str, int]
) -> str | None:
    at = edit.carrier
    if edit.kind != "insert-after":
        return f"kind {edit.kind!r} is no insertion"
    if edit.norm not in KINDS or edit.norm == "auto":
        return f"unknown norm {edit.norm!r}"
    for path in dict.fromkeys((edit.layer, at)):
        try:
            module = captured.model.get_submodule(path)
        except AttributeError:
            return f"the model has no module {path!r}"
        if carries_norm(module):
            return f"{path} carries a norm already"
        if hasattr(module, "norm"):
            return f"{path} has an attribute 'norm' of its own"
    if at not in outputs:
        return f"the forward pass does not call {at}"
    if len(outputs[at]) != 1:
        return f"{at} returns {len(outputs[at])} tensors"
    shape = outputs[at][0].meta["shape"]
    if edit.dims != len(shape) or not 0 < edit.axis < len(shape):
        return f"axis {edit.axis} of {edit.dims} dims, but the value has shape {list(shape)}"
    wanted = (
        len(shape) - 1 if isinstance(captured.model.get_submodule(edit.layer), nn.Linear) else 1
    )
    if edit.axis != wanted:
        return f"axis {edit.axis}, but the channels of {edit.layer_type or at} are axis {wanted}"
    if shape[edit.axis] != edit.channels:
        return f"{edit.channels} channels, but the value has shape {list(shape)}"
    if edit.scope and edit.scope not in counts:
        return f"the forward pass does not call its scope {edit.scope}"
    if counts[at] != edit.calls:
        return f"{edit.calls} norms, but {at} is called {counts[at]} times"
    if edit.groups is not None and (edit.groups < 1 or edit.channels % edit.groups):
        return f"{edit.groups} groups do not divide {edit.channels} channels"
    if edit.eps is not None and not 0 < edit.eps < float("inf"):
        return f"eps {edit.eps} is out of range"
    if edit.momentum is not None and not 0 < edit.momentum <= 1:
        return f"momentum {edit.momentum} is out of range"
    if edit.norm == "instance" and (edit.dims == 2 or edit.tokens):
        return "instance norm needs a spatial axis"
    if edit.drop_bias and (edit.norm not in BATCH_KINDS or at != edit.layer):
        return f"drop_bias does not go with {edit.norm} norm behind {at}"
    if edit.drop_bias and getattr(module, "bias", None) is None:
        return "drop_bias, but the layer has no bias"
    if edit.init not in INITS:
        return f"unknown init {edit.init!r}"
    if edit.init == "stats" and edit.norm not in BATCH_KINDS:
        return f"init 'stats' does not go with {edit.norm} norm"
    if edit.init == "preserve" and edit.norm not in ("batch", "sync"):
        return f"init 'preserve' does not go with {edit.norm} norm"
    return None
