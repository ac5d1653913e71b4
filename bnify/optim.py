"""New parameters and the optimizer that was built before they existed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from bnify.errors import PlanError
from bnify.layers import norm_of
from bnify.plan import Plan


def check_optimizer(optimizer: Any, model: nn.Module, *, inplace: bool) -> None:
    """Refuse an optimizer that cannot be extended.

    Raises:
        PlanError: It would hold the parameters of a dead original, or is for another model.
    """
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise PlanError(f"optimizer is a {type(optimizer).__name__}, no torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise PlanError(
            "LBFGS takes one parameter group only and cannot be extended",
            hint="insert first, then build the optimizer from result.model.parameters()",
        )
    if type(optimizer).__name__ == "Muon":
        raise PlanError(
            "Muon trains matrices only, and the parameters of a norm are vectors",
            hint="insert first, and give the norms to an optimizer of their own (AdamW)",
        )
    if not inplace:
        raise PlanError(
            "optimizer= needs inplace=True: it holds the parameters of this very model, not of a "
            "copy",
            hint="result = bnify.insert(model, inputs, optimizer=optimizer, inplace=True)",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise PlanError(
            "the optimizer holds no parameter of this model",
            hint="build it from model.parameters()",
        )


def extend_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, plan: Plan, dropped: list[nn.Parameter]
) -> None:
    """Let an optimizer train the norms of the layers it trains: one new group per source group.

    A new group has the options of the group of its layers (learning rate, betas, momentum) and no
    weight decay. Dropped biases leave the optimizer, with their state. Schedulers of the optimizer
    treat a new group as its source group.
    """
    group_of = {
        id(parameter): index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    fresh: dict[int, list[nn.Parameter]] = {}
    for edit in plan.edits:
        layer = model.get_submodule(edit.layer)
        norm = norm_of(model.get_submodule(edit.carrier))
        new = set(map(id, norm.parameters()))
        own = [p for p in layer.parameters() if id(p) not in new]
        groups = [group_of[id(p)] for p in own if id(p) in group_of]
        if not groups and any(p.requires_grad for p in own):
            continue  # another optimizer trains this layer
        # No optimizer holds a frozen layer; its norm joins the first group.
        fresh.setdefault(next(iter(groups), 0), []).extend(norm.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    gone = {id(bias) for bias in dropped}
    for bias in dropped:
        optimizer.state.pop(bias, None)
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in kept]
    sources = []
    for index, parameters in sorted(fresh.items()):
        source_group = optimizer.param_groups[index]
        options = {k: v for k, v in source_group.items() if k not in ("params", "param_names")}
        if "weight_decay" in options:
            options["weight_decay"] = 0.0
        named = "param_names" in source_group
        new_parameters: list[Any] = [(names[id(p)], p) if named else p for p in parameters]
        if parameters:
            optimizer.add_param_group({**options, "params": new_parameters})
            sources.append(index)
        if parameters and isinstance(optimizer, torch.optim.Adagrad):
            # The one that makes its state when it is built, and not at the first step.
            optimizer.state.update(torch.optim.Adagrad(parameters, **optimizer.defaults).state)
    _extend_schedulers(optimizer, sources)


#: What torch's schedulers keep for each parameter group.
_PER_GROUP: Final = (
    "base_lrs",
    "lr_lambdas",
    "max_lrs",
    "min_lrs",
    "base_momentums",
    "max_momentums",
    "_last_lr",
)


def schedulers_of(optimizer: torch.optim.Optimizer) -> list[LRScheduler]:
    """Every scheduler that drives this optimizer, those inside ``SequentialLR`` too.

    An optimizer does not know its schedulers, so the live objects of the process are searched.
    """
    # By type(), not isinstance(): the latter runs code of proxy objects that are none of ours.
    schedulers = [one for one in gc.get_objects() if issubclass(type(one), LRScheduler)]
    return [one for one in schedulers if getattr(one, "optimizer", None) is optimizer]


def _extend_schedulers(optimizer: torch.optim.Optimizer, sources: Sequence[int]) -> None:
    """Give every scheduler of an optimizer an entry for each new group: that of its source group.

    Without it ``LambdaLR``, ``CosineAnnealingLR`` and others fail at their next step, which zips
    what they keep with the groups.
    """
    before = len(optimizer.param_groups) - len(sources)
    for scheduler in schedulers_of(optimizer):
        for name in _PER_GROUP:
            kept = vars(scheduler).get(name)
            if isinstance(kept, list) and len(kept) == before:
                kept.extend(kept[index] for index in sources)


def optimizer_notes(model: nn.Module, plan: Plan, optimizer: Any, inplace: bool) -> list[str]:
    """What a person has to know who built an optimizer or a scheduler before the insertion."""
    if not plan.edits or not inplace:
        return []
    if optimizer is None:
        return ["an optimizer built before does not know the new parameters: pass optimizer="]
    schedulers = ", ".join(sorted({type(one).__name__ for one in schedulers_of(optimizer)}))
    notes = [
        f"the optimizer has new parameter groups, and its {schedulers} drives them too"
        if schedulers
        else "the optimizer has new parameter groups: a scheduler of another library is built anew"
    ]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = []
    for edit in plan.edits:
        own = [p for p in model.get_submodule(edit.layer).parameters() if p.requires_grad]
        if own and not any(id(p) in held for p in own):
            others.append(edit.layer)
    if others:
        named = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        notes.append(f"the optimizer does not train {named}, and so not the norms there either")
    return notes


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: norms and biases take no weight decay.

    Returns:
        Two groups, ``{"params": ..., "weight_decay": weight_decay}`` for weights of two or more
        dimensions and one with weight decay 0 for everything else.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
