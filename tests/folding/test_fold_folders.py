"""A folder brings a folded model back, whatever the fold changed in its module tree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bnify
from bnify.structure import Call, as_call, outputs_of
from patterns import PATTERNS
from patterns.kit import IMAGE, Net, Pattern, pattern


def run(model: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad():
        return [tensor for _, tensor in outputs_of(call.clone()(model))]


def _one_layer_at_two_places() -> nn.Module:
    layer = nn.Conv2d(4, 6, 3)
    return Net(
        lambda m, x: m.n(m.a(x)).relu() + m.o(m.b(2 * x)).relu(),
        a=layer,
        b=layer,
        n=nn.BatchNorm2d(6),
        o=nn.BatchNorm2d(6),
    )


MORE = (
    pattern(
        "one layer at two places", _one_layer_at_two_places, IMAGE, ("n", "o"),
        options={"untie": True},
    ),
)  # fmt: skip


def changing(kind: str, most: int = 2) -> list[Pattern]:
    """Patterns whose fold changes the module tree in this way."""
    found = []
    for one in (*MORE, *PATTERNS):
        if one.options.get("emit") == "graph":
            continue
        result = folded(one)
        if any(change.kind == kind for change in result.structure):
            found.append(one)
        if len(found) == most:
            break
    return found


_FOLDED: dict[str, bnify.Result] = {}


def folded(one: Pattern) -> bnify.Result:
    if one.name not in _FOLDED:
        model, call = fresh(one)
        _FOLDED[one.name] = bnify.fold(model, call, verify=False, **one.options)
    return _FOLDED[one.name]


def fresh(one: Pattern) -> tuple[nn.Module, Call]:
    call = as_call(one.inputs()).to(dtype=one.dtype)
    return one.make().to(one.dtype), call


KINDS = (
    "identity", "children", "shift", "affine", "zero", "bias", "bake", "none", "weight", "clone",
    "constant",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_brings_back_every_change_of_the_tree(kind, tmp_path):
    patterns = changing(kind)
    assert patterns, f"no pattern has a change {kind!r}"
    for number, one in enumerate(patterns):
        result = folded(one)
        result.save(tmp_path / str(number), onnx=False)
        model, call = fresh(one)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(1.0)  # everything must come from the folder
        loaded = bnify.load(tmp_path / str(number), model)
        assert not any(module.training for module in loaded.modules())
        assert list(loaded.state_dict()) == list(result.model.state_dict())
        want, got = run(result.model, call), run(loaded, call)
        assert all(map(torch.equal, want, got)), one.name


#: Kinds that only the fixes of an audit make: tests/auditing/test_fixes.py saves and loads them.
OF_AUDITS = {"set", "float", "keep-eval"}


def test_every_kind_of_change_is_tried():
    from bnify.rewrite import folded as rewriting

    assert {*KINDS, *OF_AUDITS} == {*rewriting._REPLACEMENTS, *rewriting._CHANGES}
