"""Parameters that a model can do without: a layer scale that is None where it is not wanted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bnify.borrow import evaluating, fused_attention, seeded
from bnify.capture import Captured
from bnify.changes import Change
from bnify.folding import IN_FORWARD, Folded
from bnify.rewrite import folded_copy
from bnify.structure import outputs_of


def drop_optional(captured: Captured, folded: Folded) -> Folded:
    """Set parameters that multiply by 1 to None, where the model then leaves the operator out.

    Many models write ``if self.gamma is not None: x = x * self.gamma``. Whether this one does is
    tried: it must run without, and give the same bits.
    """
    neutral = folded.changes.neutral
    if not neutral:
        return folded
    tree = folded_copy(captured.model, folded.changes)
    want = _outputs(tree, captured)
    alike: dict[tuple[type[nn.Module], str], list[str]] = {}
    for name in neutral:
        path, _, leaf = name.rpartition(".")
        owner = tree.get_submodule(path)
        if leaf in owner._parameters:
            alike.setdefault((type(owner), leaf), []).append(name)
    dropped: set[str] = set()
    for names in alike.values():
        if _does_without(tree, names, captured, want):
            dropped.update(names)
    changes = folded.changes
    for name in dropped:
        path, _, leaf = name.rpartition(".")
        del changes.values[name]
        changes.tree.append(Change(kind="none", path=path, names=(leaf,)))
    changes.neutral = [name for name in neutral if name not in dropped]
    edits = tuple(
        replace(edit, detail="") if edit.layer in dropped and edit.detail == IN_FORWARD else edit
        for edit in folded.edits
    )
    return replace(folded, edits=edits)


def _does_without(
    tree: nn.Module, names: Iterable[str], captured: Captured, want: list[Tensor]
) -> bool:
    """Try a model without some of its parameters; they come back if it does not go."""
    kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = tree.get_submodule(path)
        kept.append((owner, leaf, owner._parameters[leaf]))
        owner._parameters[leaf] = None
    try:
        got = _outputs(tree, captured)
    except Exception:  # forward() is user code, and reads the parameter
        got = []
    if len(got) == len(want) and all(map(torch.equal, got, want)):
        return True
    for owner, leaf, parameter in kept:
        owner._parameters[leaf] = parameter
    return False


def _outputs(model: nn.Module, captured: Captured) -> list[Tensor]:
    with torch.no_grad(), seeded(0), fused_attention(enabled=False), evaluating(model):
        return [tensor for _, tensor in outputs_of(captured.call.clone()(model))]
