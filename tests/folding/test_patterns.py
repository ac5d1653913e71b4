"""Every named pattern: what must fold does, what must stay says why, and the function stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnify
import laws
from bnify.structure import Call, as_call, outputs_of
from counting import count_norms
from patterns import PATTERNS, Pattern
from replaying import assert_untouched, fingerprint_of

each = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
folding = [p for p in PATTERNS if p.folds]


def example(pattern: Pattern) -> tuple[nn.Module, Call]:
    """The pattern's model and inputs in its own dtype."""
    call = as_call(pattern.inputs()).to(dtype=pattern.dtype)
    return pattern.make().to(pattern.dtype), call


def outputs(model: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad():
        return [tensor for _, tensor in outputs_of(call.clone()(model))]


def match(names: str, listed: Mapping[str, Any]) -> list[str]:
    """Those of the names ``a|b`` that are listed."""
    return [name for name in names.split("|") if name in listed]


# -- the patterns themselves -----------------------------------------------------------------------


def tensors_at(model: nn.Module, names: str) -> Iterator[Tensor]:
    """The tensors of a norm, by module path or by the name of one of them."""
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    known = [name for name in names.split("|") if name in modules or name in tensors]
    assert known, f"{names} is nowhere in the model"
    for name in known:
        if name in tensors:
            yield tensors[name]
        elif name:
            yield from modules[name].parameters(recurse=False)
            yield from (b for b in modules[name].buffers(recurse=False) if b.is_floating_point())


def test_patterns_have_names_of_their_own():
    names = [pattern.name for pattern in PATTERNS]
    assert len(set(names)) == len(names)
    known = set(bnify.Reason)
    for pattern in PATTERNS:
        for reasons in (*pattern.skips.values(), *pattern.either.values()):
            given = {reasons} if isinstance(reasons, str) else set(reasons)
            assert given <= known, pattern.name


@each
def test_a_pattern_is_sound(pattern: Pattern):
    """It runs, is finite, is the same each time, and every norm that it names matters."""
    model, call = example(pattern)
    model.eval()
    want = outputs(model, call)
    assert all(value.isfinite().all() for value in want)
    assert laws.worst_error(want, outputs(pattern.make().to(pattern.dtype).eval(), call)) == 0
    assert pattern.norms or pattern.options or "not asked" in pattern.name
    for names in pattern.norms:
        shaken = pattern.make().to(pattern.dtype).eval()
        tensors = list(tensors_at(shaken, names))
        with torch.no_grad():
            for tensor in tensors:
                tensor.add_(torch.arange(tensor.numel()).view(tensor.shape) * 0.3 + 0.1)
        if tensors:
            assert laws.worst_error(want, outputs(shaken, call)) > 1e-4, names


# -- folding ---------------------------------------------------------------------------------------


def fold(pattern: Pattern, **options: Any) -> tuple[nn.Module, Call, bnify.Result]:
    """Fold the pattern; the model is left as it was."""
    model, call = example(pattern)
    before = fingerprint_of(model)
    shown = str(model)
    result = bnify.fold(model, call, **{**pattern.options, **options})
    assert_untouched(before, fingerprint_of(model))
    assert str(model) == shown
    assert not any(module.training for module in result.model.modules())
    return model, call, result


def assert_exact(model: nn.Module, result: nn.Module, call: Call) -> None:
    """The same function: in float64 to rounding, in other types within ten times their own error.

    On the example, on other values, and at another batch size where the original takes one.
    """
    model.eval()
    for inputs in (call, call.redrawn(11), call.redrawn(12, 3.0)):
        compare(model, result, inputs)
    try:
        outputs(model, call.resized(5))
    except RuntimeError:
        return  # its own view has the batch size in it
    compare(model, result, call.resized(5))


def compare(model: nn.Module, result: nn.Module, call: Call) -> None:
    dtypes = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    if dtypes == {torch.float64}:
        laws.assert_same_function(model, result, call)
        return
    truth = laws.run64(model, call)
    own = laws.worst_error(truth, [t.double() for t in outputs(model, call)])
    error = laws.worst_error(truth, [t.double() for t in outputs(result, call)])
    assert error <= max(1e-6, 10 * own)
    assert [t.dtype for t in outputs(result, call)] == [t.dtype for t in outputs(model, call)]


def assert_listed(pattern: Pattern, plan: bnify.Plan) -> None:
    """What must fold is an edit, what must stay is a skip with a true reason, and that is all."""
    edits = {edit.layer: edit for edit in plan.edits}
    skips = {skip.layer: skip for skip in plan.skips}
    for names in pattern.folds:
        found = match(names, edits)
        assert found, f"{names} was not folded: {skips}"
        assert not match(names, skips), f"{names} is an edit and a skip"
        if pattern.kind:
            assert edits[found[0]].kind == pattern.kind
        assert edits[found[0]].into or pattern.options, f"{names} was folded into nothing"
    for names, reasons in pattern.skips.items():
        assert not match(names, edits), f"{names} was folded"
        found = match(names, skips)
        assert found, f"{names} is not listed: {plan.skips}"
        assert_reason(skips[found[0]], reasons)
    for names, reasons in pattern.either.items():
        for name in match(names, skips):
            assert_reason(skips[name], reasons)
    named = {name for names in pattern.norms for name in names.split("|")}
    merged = {edit.layer for edit in plan.edits if edit.kind == "merge"}  # layers, too
    assert {*edits, *skips} - merged <= named, "the plan lists what is no norm"


def assert_reason(skip: bnify.Skip, reasons: str | tuple[str, ...]) -> None:
    allowed = (reasons,) if isinstance(reasons, str) else reasons
    assert not allowed or skip.reason in allowed, f"{skip.layer}: {skip.reason} ({skip.detail})"


@each
def test_a_pattern_folds_or_says_why_not(pattern: Pattern):
    model, call, result = fold(pattern)
    assert_exact(model, result.model, call)
    assert_listed(pattern, result.plan)
    assert result.verification.passed


@each
def test_what_is_left_of_a_pattern(pattern: Pattern):
    """Counted by what runs, not by what the plan says."""
    model, call, result = fold(pattern, verify=False)
    before, after = count_norms(model, call), count_norms(result.model, call)
    expected = len(pattern.skips) + len(pattern.either) if pattern.left is None else pattern.left
    if pattern.options.get("affines"):
        assert after.batch + after.scales <= expected
        assert_neutral(pattern, result.model)
    else:
        assert after.left(before) <= expected
    if pattern.convolutions is None:
        assert after.convolutions == before.convolutions
    else:
        assert after.convolutions <= pattern.convolutions < before.convolutions or (
            pattern.convolutions == before.convolutions == after.convolutions
        )


def assert_neutral(pattern: Pattern, model: nn.Module) -> None:
    """A norm whose tail was folded has none: no scale that is not 1, no shift that is not 0."""
    modules = dict(model.named_modules())
    for name in (name for names in pattern.folds for name in names.split("|")):
        norm = modules.get(name)
        for leaf, value in (("weight", 1.0), ("bias", 0.0)):
            tensor = getattr(norm, leaf, None)
            assert not isinstance(tensor, Tensor) or bool((tensor == value).all()), name


@each
def test_a_pattern_as_a_graph(pattern: Pattern):
    """A graph can drop more than a module tree, never less."""
    model, call, result = fold(pattern, emit="graph", verify=False)
    assert isinstance(result.model, torch.fx.GraphModule)
    compare(model, result.model, call)
    compare(model, result.model, call.redrawn(11))
    edits = {edit.layer: edit for edit in result.plan.edits}
    for names in pattern.folds:
        assert match(names, edits), f"{names} was not folded"


@pytest.mark.parametrize("pattern", folding[::7], ids=lambda p: p.name)
def test_a_wrong_fold_would_be_seen(pattern: Pattern):
    """Weights off by a ten-millionth, as float32 would have them, and the comparison fails."""
    if pattern.dtype != torch.float64:
        pytest.skip("compared by budget")
    model, call, result = fold(pattern, verify=False)
    with torch.no_grad():
        for tensor in (*result.model.parameters(), *result.model.buffers()):
            if tensor.ndim > 1:
                tensor += 1e-7
    with pytest.raises(AssertionError, match="outputs differ"):
        compare(model, result.model, call)


in_modules = [p for p in folding if p.options.get("emit") != "graph"]


@pytest.mark.parametrize("pattern", in_modules[::5], ids=lambda p: p.name)
def test_folding_twice_finds_nothing_more(pattern: Pattern):
    _, call, result = fold(pattern, verify=False)
    again = bnify.fold(result.model, call, **pattern.options)
    assert again.plan.edits == ()
