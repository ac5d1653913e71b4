"""New parameters and the optimizer that was built before they existed."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bnify.errors import PlanError
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
    optimizer: torch.optim.Optimizer, model: nn.Module, plan: Plan, norms: Mapping[str, nn.Module]
) -> None:
    """Let an optimizer train the norms of the layers it trains: one new group per source group.

    A new group has the options of the group of its layers (learning rate, betas, momentum) and no
    weight decay. Dropped biases leave the optimizer, with their state. Schedulers of the optimizer
    treat a new group as its source group. The model is the one before the rewrite, so that it is
    untouched where the optimizer refuses.

    Args:
        optimizer: It is changed in place.
        model: The model without the norms.
        plan: Which layers get them.
        norms: The norms, by the path of the module that will carry them.

    Raises:
        PlanError: The optimizer takes no further group; it is as before.
    """
    before = len(optimizer.param_groups)
    gone = _gone(model, plan)
    sources = []
    try:
        for index, named in _fresh(optimizer, model, plan, norms, gone).items():
            optimizer.add_param_group(_new_group(optimizer.param_groups[index], named))
            sources.append(index)
            if isinstance(optimizer, torch.optim.Adagrad):
                # The one that makes its state when it is built, and not at the first step.
                parameters = list(named.values())
                optimizer.state.update(torch.optim.Adagrad(parameters, **optimizer.defaults).state)
    except Exception as error:  # an optimizer of anybody: anything can come out of it
        del optimizer.param_groups[before:]
        raise PlanError(
            f"{type(optimizer).__name__} takes no further parameter group: {error}",
            hint="insert first, then build the optimizer from result.model.parameters()",
        ) from error
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        for parameter in group["params"]:
            if id(parameter) in gone:
                optimizer.state.pop(parameter, None)
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in kept]
    _extend_schedulers(optimizer, sources)


def _gone(model: nn.Module, plan: Plan) -> set[int]:
    """The ids of dropped biases, without those that another module goes on using."""
    layers = {model.get_submodule(edit.layer) for edit in plan.edits if edit.drop_bias}
    others = (module for module in model.modules() if module not in layers)
    used = {id(p) for module in others for p in module.parameters(recurse=False)}
    return {id(layer.bias) for layer in layers} - used


def _fresh(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    plan: Plan,
    norms: Mapping[str, nn.Module],
    gone: set[int],
) -> dict[int, dict[str, nn.Parameter]]:
    """New parameters by name, for each group that holds their layers."""
    group_of = {
        id(parameter): index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    fresh: dict[int, dict[str, nn.Parameter]] = {}
    for edit in plan.edits:
        own = [p for p in model.get_submodule(edit.layer).parameters() if id(p) not in gone]
        groups = [group_of[id(p)] for p in own if id(p) in group_of]
        if not groups and any(p.requires_grad for p in own):
            continue  # another optimizer trains this layer
        prefix = f"{edit.carrier}.norm" if edit.carrier else "norm"
        new = dict(norms[edit.carrier].named_parameters(prefix))
        # No optimizer holds a frozen layer; its norm joins the first group.
        if new:
            fresh.setdefault(next(iter(groups), 0), {}).update(new)
    return dict(sorted(fresh.items()))


def _new_group(source: dict[str, Any], named: dict[str, nn.Parameter]) -> dict[str, Any]:
    # A learning rate may be a tensor, which schedulers write to: each group has its own.
    group = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in source.items()
        if key not in ("params", "param_names")
    }
    if "weight_decay" in group:
        group["weight_decay"] = 0.0
    group["params"] = list(named.items() if "param_names" in source else named.values())
    return group


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

    An optimizer does not know its schedulers, so the live objects of the process are searched;
    those from before a ``gc.freeze()`` are not found.
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
    notes = _scheduler_notes(optimizer)
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


def _scheduler_notes(optimizer: torch.optim.Optimizer) -> list[str]:
    found = schedulers_of(optimizer)
    lists = {one: _lists_of_its_own(one, len(optimizer.param_groups)) for one in found}
    driven = ", ".join(sorted({type(one).__name__ for one in found if not lists[one]}))
    new = "the optimizer has new parameter groups"
    if driven:
        new += f", and its {driven} drives them too"
    notes = [f"{new}; a scheduler of another library is built anew"]
    notes += [
        f"{type(one).__name__} is not extended for its own {', '.join(names)}: build it anew"
        for one, names in lists.items()
        if names
    ]
    if not any(one is optimizer for one in gc.get_objects()):
        notes.append("gc.freeze() hides schedulers, which are not extended: build them anew")
    return notes


def _lists_of_its_own(scheduler: LRScheduler, groups: int) -> list[str]:
    """What a scheduler that is not torch's may keep for each parameter group, by its length."""
    if type(scheduler).__module__.startswith("torch."):
        return []
    return [
        name
        for name, kept in vars(scheduler).items()
        if name not in _PER_GROUP and isinstance(kept, (list, tuple)) and len(kept) == groups
    ]


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
