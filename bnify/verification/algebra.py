"""The algebra of an insertion, in float64: the rewritten recording against the rewritten module.

Two realisations of one plan are made from float64 copies and run against each other, in eval and
in train mode: outputs, buffers, gradients. With ``init="preserve"`` the original is compared with
the result as well. Correct edits land near 1e-14; what the conditioning of the network adds is
measured by moving its weights by one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnify.borrow import copy_model, fused_attention, seeded
from bnify.capture import attribute_name
from bnify.errors import BnifyError
from bnify.layers import norm_of
from bnify.structure import outputs_of, run_graph
from bnify.verdict import Check
from bnify.verification.bench import (
    SEED,
    Bench,
    Realised,
    Trained,
    distance,
    one_ulp_noise,
    preserving_noise,
)
from bnify.verification.learning import check_learning


@dataclass(slots=True)
class Algebra:
    """What the algebra found: ``checks`` in order, and the first edit that diverges, if any."""

    checks: list[Check] = field(default_factory=list)
    first_divergent: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float | None:
        """Worst relative error over all checks that have one; None if there is none."""
        return max((c.error for c in self.checks if c.error is not None), default=None)


def check_insertion(realised: Realised) -> Algebra:
    """Run every algebra check of an insertion."""
    bench = Bench(realised)
    algebra = Algebra(notes=bench.notes)
    for check in (_graph_in_eval, _preserved, _fast_path, _other_batch, _graph_in_train):
        try:
            algebra.checks.extend(check(bench))
        except BnifyError as error:
            algebra.checks.append(
                Check(name=_NAMES[check], passed=None, detail=f"not possible: {error.message}")
            )
        except Exception as error:  # forward() is user code, and what we made of it raised
            lines = str(error).strip().splitlines() or [type(error).__name__]
            algebra.checks.append(
                Check(name=_NAMES[check], passed=False, detail=f"the result raised: {lines[0]}")
            )
    if any(check.passed is False for check in algebra.checks):
        algebra.checks = _excused(bench, realised.baked, algebra.checks)
    if any(check.passed is False for check in algebra.checks):
        algebra.first_divergent = _first_divergent(bench)
    return algebra


def _excused(bench: Bench, baked: str, checks: list[Check]) -> list[Check]:
    """Checks that fail for what the original does, and not for the edit, decide nothing."""
    why = baked or _own_fault(bench)
    if not why:
        return checks
    return [
        replace(check, passed=None, error=None, detail=why)
        if check.passed is False and check.name.startswith("recording = module")
        else check
        for check in checks
    ]


def _own_fault(bench: Bench) -> str:
    """What keeps two runs of the original from being compared; empty if nothing does."""
    try:
        for train in (False, True):
            runs = [bench.outputs(copy_model(bench.model), bench.call, train=train) for _ in "ab"]
            error, why = distance(*runs)
            if error or why:
                return "two runs of the original differ: it draws numbers of its own"
        Trained(bench, copy_model(bench.model).train())
    except Exception as error:  # the original's own forward and backward
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the original does not train either: {lines[0][:80]}"
    return ""


def _first_divergent(bench: Bench) -> str | None:
    """The first carrier of a norm behind which recording and module differ, eval mode first."""
    for train in (False, True):
        try:
            found = _divergent_in(bench, train=train)
        except Exception:  # what does not run cannot be compared
            continue
        if found is not None:
            return found
    return None


def _divergent_in(bench: Bench, *, train: bool) -> str | None:
    # Not the tree of the checks: they have moved its state.
    tree, graph = bench.fresh_tree(), bench.graph(train=train)
    values: dict[str, Tensor] = {}
    handles = [
        tree.get_submodule(edit.carrier).register_forward_hook(
            lambda _m, _a, out, at=edit.carrier: values.setdefault(at, out.detach().clone()),
            prepend=True,
        )
        for edit in bench.plan.edits
    ]
    try:
        bench.outputs(tree, bench.call, train=train)
    finally:
        for handle in handles:
            handle.remove()
    found: list[str] = []

    class Comparing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            at = n.meta.get("norm_of")
            if at in values and at not in found and not found:
                error, why = distance([result], [values.pop(at)])
                if why or error > 1e-9:
                    found.append(at)
            return result

    inputs = [tensor for _, tensor in bench.call.clone().tensors()]
    with torch.no_grad():
        bench.guarded(lambda: [Comparing(graph).run(*inputs)])
    return found[0] if found else None


# -- checks --------------------------------------------------------------------------------------


def _graph_in_eval(bench: Bench) -> Iterator[Check]:
    tree, graph = bench.tree, bench.graph(train=False)
    for label, call in (("example", bench.call), ("fresh input", bench.fresh())):
        if call is not bench.call and not bench.original_runs(call):
            why = "the original does not run on it"
            yield Check(name=f"recording = module, eval, {label}", passed=None, detail=why)
            continue
        with torch.no_grad():
            got = bench.guarded(lambda c=call: run_graph(graph, c))  # type: ignore[misc]
        want = bench.outputs(tree, call)
        check = bench.error(
            got,
            want,
            lambda c=call: one_ulp_noise(bench, tree, c),  # type: ignore[misc]
            f"recording = module, eval, {label}",
        )
        if check.passed is False and call is not bench.call and not bench.recording_holds(call):
            why = "this input takes another path through the model than the recorded one"
            check = replace(check, passed=None, error=None, detail=why)
        yield check


def _graph_in_train(bench: Bench) -> Iterator[Check]:
    name = _NAMES[_graph_in_train]
    # A fresh tree: a model may have moved its state in eval mode already.
    tree, graph = bench.fresh_tree().train(), bench.graph(train=True)
    before = {name: buffer.clone() for name, buffer in tree.named_buffers()}
    want, got = Trained(bench, tree), Trained(bench, graph)

    def noise() -> float:
        return one_ulp_noise(bench, tree, bench.call, train=True)

    yield bench.error(got.outputs, want.outputs, noise, f"{name}, outputs")
    written = [n for n, b in want.buffers.items() if not torch.equal(b, before[n])]
    moved = [n for n in want.gradients if n in got.gradients or bool(want.gradients[n].any())]
    for what, names, a, b in (
        ("buffers", written, got.buffers, want.buffers),
        ("gradients", moved, got.gradients, want.gradients),
    ):
        lost = [n for n in names if attribute_name(n) not in a]
        check = bench.error(
            [a[attribute_name(n)] for n in names if n not in lost],
            [b[n] for n in names if n not in lost],
            noise,
            f"{name}, {what}",
            f"{len(names)} compared",
        )
        if what == "gradients" and graph.meta.get("custom_gradients"):
            why = "the model has gradients of its own (autograd.Function), which no graph shows"
            check = replace(check, passed=None, error=None, detail=why)
        elif lost:
            check = replace(check, passed=False, detail=f"the recording has none for {lost[0]}")
        elif what == "gradients" and check.passed is False:
            check = replace(check, detail=_recomputed(bench, tree, want) or check.detail)
        yield check
    yield check_learning(bench, tree, want)


def _recomputed(bench: Bench, tree: nn.Module, trained: Trained) -> str:
    """Norms per call whose layer is called again in the backward pass may change places there."""
    for edit in bench.plan.edits:
        norm = norm_of(tree.get_submodule(edit.carrier)) if edit.calls > 1 else None
        if norm is not None and trained.calls_after[id(norm)] > trained.calls[id(norm)]:
            return (
                f"activation checkpointing calls {edit.layer} again in the backward pass, where "
                "its calls cannot be told apart: leave per_call out, or the checkpointing"
            )
    return ""


def _preserved(bench: Bench) -> Iterator[Check]:
    if not bench.preserves:
        return
    tree = bench.tree
    calls = [("example", bench.call), ("fresh input", bench.fresh())]
    others = [(f"input {seed}", bench.call.redrawn(seed)) for seed in (2, 3, 4)]
    decided = False
    for label, call in calls + others:
        if decided and (label, call) in others:
            return  # they are for networks that no input has decided yet
        if call is not bench.call and not bench.original_runs(call):
            continue
        check = bench.error(
            bench.outputs(tree, call),
            bench.outputs(bench.model, call),
            lambda c=call: preserving_noise(bench, c),  # type: ignore[misc]
            f"result = original, eval, {label}",
        )
        decided = decided or check.passed is not None
        yield check
    if not decided:
        why = "ill-conditioned on every input tried: whether the function is kept is not known"
        yield Check(name=_NAMES[_preserved], passed=False, detail=why)


def _fast_path(bench: Bench) -> Iterator[Check]:
    """The fused attention path must give what the plain one gives: it may skip a norm."""
    fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    if not any(isinstance(module, fused) for module in bench.model.modules()):
        return
    tree = bench.tree
    with torch.no_grad(), seeded(SEED), fused_attention(enabled=True):
        got = [t for _, t in outputs_of(bench.call.clone()(tree))]
    want = bench.outputs(tree, bench.call)
    yield bench.error(
        got,
        want,
        lambda: one_ulp_noise(bench, tree, bench.call),
        _NAMES[_fast_path],
    )


def _other_batch(bench: Bench) -> Iterator[Check]:
    """The result runs at another batch size wherever the original does."""
    size = bench.call.batch
    if size is None:
        return
    call = bench.call.resized(size + 1)
    try:
        want = bench.outputs(bench.model, call)
    except Exception:  # the user's model may be made for one batch size
        yield Check(
            name=_NAMES[_other_batch],
            passed=None,
            detail=f"the original does not run at batch size {size + 1}",
        )
        return
    tree = bench.tree
    try:
        got = bench.outputs(tree, call)
    except (RuntimeError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[:1]
        yield Check(name=_NAMES[_other_batch], passed=False, detail="".join(first))
        return
    if bench.preserves:
        yield bench.error(
            got,
            want,
            lambda: preserving_noise(bench, call),
            f"result = original, eval, batch {size + 1}",
        )
    else:
        same = [a.shape for a in got] == [b.shape for b in want]
        yield Check(name=_NAMES[_other_batch], passed=same, detail=f"batch size {size + 1}")


_NAMES = {
    _graph_in_eval: "recording = module, eval",
    _graph_in_train: "recording = module, train",
    _preserved: "result = original, eval",
    _fast_path: "fused attention = plain attention",
    _other_batch: "another batch size",
}
