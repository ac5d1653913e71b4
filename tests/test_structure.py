"""Trees of tensors: calls, outputs, inputs as data, batches of data."""

from __future__ import annotations

import json
from collections import defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnify.errors import CaptureError, PlanError
from bnify.structure import (
    Call,
    as_call,
    describe,
    draw,
    map_tensors,
    match_batch,
    named_tensors,
    outputs_of,
)

Pair = namedtuple("Pair", "left right")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@dataclass
class Record:
    a: Tensor
    b: list[Tensor]
    text: str = "kept"


class Forward(nn.Module):
    def forward(self, x, y=None, *, mask=None):
        return x


def tensor_of(shape: list[int], dtype: torch.dtype) -> Tensor:
    return (
        (torch.arange(int(torch.tensor(shape).prod()) if shape else 1) % 5).reshape(shape).to(dtype)
    )


tensors = st.builds(tensor_of, st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES))
leaves = st.one_of(tensors, st.none(), st.booleans(), st.integers(-3, 3), st.text(max_size=3))
trees = st.recursive(
    leaves,
    lambda child: st.one_of(
        st.lists(child, max_size=3),
        st.lists(child, max_size=3).map(tuple),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), child, max_size=3),
        st.tuples(child, child).map(lambda pair: Pair(*pair)),
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(max_examples=60, deadline=None)
@given(trees)
def test_mapping_the_identity_keeps_the_tree(tree):
    assert same(map_tensors(lambda t: t, tree), tree)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_mapping_visits_what_naming_names_in_the_same_order(tree):
    visited: list[Tensor] = []
    map_tensors(lambda t: visited.append(t) or t, tree)
    named = list(named_tensors(tree))
    assert [id(t) for t in visited] == [id(t) for _, t in named]


@settings(max_examples=60, deadline=None)
@given(st.lists(trees, min_size=1, max_size=3))
def test_a_call_survives_json(args):
    call = Call(tuple(args), {"mask": torch.ones(2, 2)})
    skeleton, specs = describe(call, Forward())
    text = json.dumps([skeleton, [s.shape for s in specs]], allow_nan=False)
    assert json.loads(text)[0] == skeleton
    again = draw(skeleton, specs)
    assert [(t.shape, t.dtype) for _, t in again.tensors()] == [
        (t.shape, t.dtype) for _, t in call.tensors()
    ]
    assert same(list(draw(skeleton, specs).args), list(again.args))


def test_special_containers_survive():
    tree = (
        defaultdict(list, {"a": torch.ones(2)}),
        Record(torch.ones(2), [torch.zeros(3)]),
        torch.Size((2, 3)),
        torch.max(torch.ones(2, 2), dim=0),
    )
    doubled = map_tensors(lambda t: t * 2, tree[:3])
    assert type(doubled[0]) is defaultdict
    assert doubled[0].default_factory is list
    assert doubled[1].text == "kept"
    assert float(doubled[1].a[0]) == 2.0
    assert type(doubled[2]) is torch.Size
    assert [name for name, _ in named_tensors(tree)] == ["0.a", "1.a", "1.b.0", "3.0", "3.1"]


def test_outputs_have_names():
    assert [name for name, _ in outputs_of(torch.ones(1))] == ["output"]
    nested = {"logits": torch.ones(1), "states": (None, Pair(torch.ones(1), 3))}
    assert [name for name, _ in outputs_of(nested)] == ["logits", "states.1.left"]
    assert outputs_of(None) == []


def test_tensors_are_named_after_forward():
    call = Call((torch.ones(1), [torch.ones(1)]), {"mask": torch.ones(1)})
    assert [n for n, _ in call.tensors(Forward())] == ["x", "y.0", "mask"]
    assert [n for n, _ in call.tensors()] == ["input_0", "input_1.0", "mask"]


def test_a_clone_is_distinct_and_free():
    x = torch.ones(2, requires_grad=True)
    call = Call((x, x * 2)).clone()
    (_, a), (_, b) = call.tensors()
    assert a.data_ptr() != x.data_ptr()
    assert not a.requires_grad
    assert not b.requires_grad
    shared = Call((x, x)).clone()
    assert shared.args[0] is not shared.args[1]


def test_moving_to_a_dtype_leaves_integers():
    call = Call((torch.ones(2), torch.ones(2, dtype=torch.long), torch.ones(2).bool()))
    assert [t.dtype for _, t in call.to(dtype=torch.float64).tensors()] == [
        torch.float64,
        torch.int64,
        torch.bool,
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_resizing_repeats_and_drops_samples(size):
    x, other = torch.arange(6.0).reshape(3, 2), torch.ones(5)
    call = Call((x,), {"y": other, "z": torch.tensor(3.0)}).resized(size)
    assert call.batch == size
    assert torch.equal(call.args[0], x[torch.arange(size) % 3])
    assert call.kwargs["y"] is other


def test_resizing_nothing_is_refused_in_words():
    with pytest.raises(CaptureError, match="no sample"):
        Call((torch.ones(0, 3),)).resized(2)
    assert Call((torch.ones(0, 3),)).resized(0).batch == 0


def test_redrawing_keeps_masks_and_ranges():
    ids = torch.tensor([[3, 9], [4, 4]])
    call = Call(
        (torch.ones(2, 3), ids, torch.ones(2).bool(), torch.full((2,), 7), torch.zeros(0, 2).long())
    )
    again = call.redrawn(1, 50.0)
    assert not torch.equal(again.args[0], call.args[0])
    assert float(again.args[0].abs().max()) > 5
    assert int(again.args[1].min()) >= 3
    assert int(again.args[1].max()) <= 9
    assert again.args[2] is call.args[2]
    assert again.args[3] is call.args[3]
    assert torch.equal(call.redrawn(1).args[0], call.redrawn(1).args[0])
    assert not torch.equal(call.redrawn(1).args[0], call.redrawn(2).args[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.int16])
def test_redrawing_survives_the_ends_of_integer_types(dtype):
    info = torch.iinfo(dtype)
    call = Call((torch.tensor([info.min, info.max], dtype=dtype),))
    assert call.redrawn(0).args[0].dtype == dtype


@pytest.mark.parametrize("inputs", [None, 3, "text", {1, 2}, [], {}, [1, "a"]])
def test_what_is_no_input(inputs):
    with pytest.raises(CaptureError) as error:
        as_call(inputs)
    assert error.value.hint


def test_what_is_an_input():
    x = torch.ones(2)
    assert as_call(x).args == (x,)
    assert as_call((x, x)).args == (x, x)
    assert as_call([x, 3]).args == (x, 3)
    assert as_call({"x": x}).kwargs == {"x": x}
    call = Call((x,))
    assert as_call(call) is call


@pytest.mark.parametrize(
    ("skeleton", "message"),
    [
        ({"args": [{"$": 5}], "kwargs": {}}, "fit"),
        ({"args": 3}, "fit"),
        ({"args": [{"$": "x"}]}, "fit"),
    ],
)
def test_a_plan_whose_call_does_not_fit_is_refused(skeleton, message):
    _, specs = describe(Call((torch.ones(2),)), Forward())
    with pytest.raises(PlanError, match=message):
        draw(skeleton, specs)
    with pytest.raises(PlanError, match="no inputs"):
        draw(skeleton, ())


# -- batches of data -------------------------------------------------------------------------------

IMAGE, LABEL, IDS = torch.ones(4, 3, 8, 8), torch.ones(4).long(), torch.ones(4, 7).long()


class Text(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return input_ids


class Anything(nn.Module):
    def forward(self, **kwargs):
        return kwargs


@pytest.mark.parametrize(
    ("batch", "call", "model", "want"),
    [
        (IMAGE, Call((torch.ones(2, 3, 6, 6),)), Forward(), Call((IMAGE,))),
        ([IMAGE, LABEL], Call((torch.ones(2, 3, 6, 6),)), Forward(), Call((IMAGE,))),
        ((IMAGE, LABEL, 3), Call((torch.ones(2, 3, 6, 6),)), Forward(), Call((IMAGE,))),
        ([(IMAGE, IDS), LABEL], Call((IMAGE, IDS)), Forward(), Call((IMAGE, IDS))),
        ((IMAGE, IDS, LABEL), Call((IMAGE, IDS)), Forward(), Call((IMAGE, IDS))),
        (
            {"input_ids": IDS, "attention_mask": IDS, "labels": LABEL},
            Call((), {"input_ids": IDS}),
            Text(),
            Call((), {"input_ids": IDS, "attention_mask": IDS}),
        ),
        (
            {"a": IDS, "labels": LABEL},
            Call((), {"a": IDS}),
            Anything(),
            Call((), {"a": IDS}),
        ),
        (
            [{"input_ids": IDS}, LABEL],
            Call((), {"input_ids": IDS}),
            Text(),
            Call((), {"input_ids": IDS}),
        ),
        ({"input_ids": IDS}, Call((IDS,)), Text(), Call((), {"input_ids": IDS})),
    ],
)
def test_the_part_of_a_batch_that_is_the_input(batch, call, model, want):
    found = match_batch(batch, call, model)
    assert same(list(found.args), list(want.args))
    assert same(dict(found.kwargs), dict(want.kwargs))


def test_a_list_of_samples_may_be_of_any_length_where_that_is_asked_for():
    call, model = Call(([IMAGE, IMAGE],)), nn.Identity()
    one, other = ([IMAGE], [LABEL]), ([IMAGE, LABEL], [LABEL])
    assert same(list(match_batch(one, call, model, any_length=True).args), [[IMAGE]])
    with pytest.raises(PlanError):
        match_batch(one, call, model)
    with pytest.raises(PlanError):
        match_batch(other, call, model, any_length=True)


@pytest.mark.parametrize(
    "batch", [LABEL, [LABEL, IMAGE], 3, None, {"image": IMAGE}, [], "text", {"x": LABEL, "y": 2}]
)
def test_a_batch_of_something_else_is_refused_with_both_shapes(batch):
    with pytest.raises(PlanError) as error:
        match_batch(batch, Call((IMAGE,)), nn.Conv2d(3, 3, 1))
    assert "float tensor of 4 dims" in str(error.value)
    assert error.value.hint
