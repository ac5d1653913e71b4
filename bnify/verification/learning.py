"""Whether every inserted norm runs once and learns wherever the original's own layer does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bnify.borrow import copy_model
from bnify.layers import CallNorms, carries_norm, norm_of
from bnify.norms import each_norm
from bnify.plan import Edit
from bnify.verdict import Check
from bnify.verification.bench import Bench, Trained


def check_learning(bench: Bench, tree: nn.Module, trained: Trained) -> Check:
    """Every inserted norm ran once, and each of its parameters has a gradient.

    A norm needs none where the original's own layer gets none, in that call: under ``no_grad``,
    behind a detach, in a reentrant checkpoint on inputs without gradients.
    """
    silent: list[str] = []
    idle: list[tuple[Edit, int, str]] = []
    for edit in bench.plan.edits:
        layer = tree.get_submodule(edit.carrier)
        if not carries_norm(layer):
            silent.append(f"{edit.carrier} has no norm")
            continue
        norm = norm_of(layer)
        for call, one in enumerate(each_norm(norm)):
            tracked = trained.batches.get(id(one), 1)
            if tracked != 1:
                silent.append(f"{edit.layer}: ran {tracked} times")
            for name, parameter in one.named_parameters():
                if trained.gradients and parameter.grad is None:
                    idle.append((edit, call, name))
        if isinstance(norm, CallNorms) and (ran := trained.calls[id(norm)]) != edit.calls:
            silent.append(f"{edit.layer}: {ran} calls, planned {edit.calls}")
    if idle:
        reached, learned = _gradients_of_original(bench)
        for edit, call, name in idle:
            path = edit.layer
            original = bench.model.get_submodule(path)
            own = {n for n, p in original.named_parameters(prefix=path) if p.requires_grad}
            same = f"{path}.{name}" if path else name
            if same in own:  # a bias that nothing depends on: the norm's is no better off
                own = {same}
            if own & learned and (edit.calls == 1 or (edit.carrier, call) in reached):
                silent.append(f"{path}: no gradient for {name}")
    count = len(bench.plan.edits)
    detail = f"{count} norm{'s' * (count != 1)}"
    if idle and not silent:
        where = dict.fromkeys(
            f"call {call + 1} of {edit.layer}" if edit.calls > 1 else edit.layer
            for edit, call, _ in idle
        )
        layers = ", ".join(list(where)[:3]) + ", ..." * (len(where) > 3)
        detail += f"; no gradient reaches {layers} (in the original neither)"
        bench.notes.append(f"norms that never learn, since no gradient reaches them: {layers}")
    return Check(
        name="every norm runs and learns",
        passed=not silent,
        detail="; ".join(silent[:3]) or detail,
    )


def _gradients_of_original(bench: Bench) -> tuple[set[tuple[str, int]], set[str]]:
    """What a gradient reaches in the original: calls of carriers by number, and parameters."""
    model = copy_model(bench.model).train()
    reached: set[tuple[str, int]] = set()

    def watch(edit: Edit) -> Callable[..., None]:
        numbers = itertools.count()

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            call = edit.carrier, next(numbers) % edit.calls
            if output.requires_grad:
                output.register_hook(lambda _gradient: reached.add(call))  # type: ignore[no-untyped-call]

        return hook

    for edit in bench.plan.edits:
        model.get_submodule(edit.carrier).register_forward_hook(watch(edit), prepend=True)
    return reached, set(Trained(bench, model).gradients)
