"""A plan is data: it survives JSON, can be edited by hand, and knows the model it is for."""

from __future__ import annotations

import json
import string
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import bnify
import laws
import nets
import zoo
from bnify import api
from bnify.plan import Edit, Fingerprint, InputSpec, Plan, Reason, Skip
from bnify.structure import describe, draw

NAMES = st.text(string.ascii_letters + string.digits + "._-é 名", max_size=12)
SMALL = st.integers(0, 2**40)
FLOATS = st.floats(1e-12, 1e3, allow_nan=False)
EDITS = st.builds(
    Edit,
    layer=NAMES,
    kind=NAMES,
    norm=NAMES,
    channels=SMALL,
    axis=st.integers(-4, 9),
    into=st.lists(NAMES, max_size=2).map(tuple),
    detail=NAMES,
    at=NAMES,
    layer_type=NAMES,
    dims=st.integers(0, 6),
    calls=st.integers(1, 5),
    groups=st.none() | st.integers(1, 64),
    eps=st.none() | FLOATS,
    momentum=st.none() | FLOATS,
    drop_bias=st.booleans(),
    zero_gamma=st.booleans(),
    init=st.sampled_from(("reset", "preserve")),
)
SKIPS = st.builds(Skip, layer=NAMES, reason=st.sampled_from(Reason), detail=NAMES, layer_type=NAMES)
SHAPES = st.lists(SMALL, max_size=4).map(tuple)
SPECS = st.builds(
    InputSpec,
    name=NAMES,
    shape=SHAPES,
    dtype=st.sampled_from(("float32", "int64", "bool")),
    low=st.none() | st.integers(-5, 5),
    high=st.none() | st.integers(-5, 5),
    value=st.none() | st.integers(-5, 5),
)
PRINTS = st.builds(
    Fingerprint,
    model=NAMES,
    tensors=st.dictionaries(NAMES, st.tuples(SHAPES, NAMES), max_size=4).map(
        lambda d: tuple((name, shape, dtype) for name, (shape, dtype) in d.items())
    ),
)
PLANS = st.builds(
    Plan,
    edits=st.lists(EDITS, max_size=3).map(tuple),
    skips=st.lists(SKIPS, max_size=3).map(tuple),
    fingerprint=PRINTS,
    inputs=st.lists(SPECS, max_size=2).map(tuple),
    call=st.just({"args": [{"$": 0}], "kwargs": {}}),
    options=st.dictionaries(NAMES, NAMES | st.integers() | st.booleans(), max_size=3),
    notes=st.lists(NAMES, max_size=2).map(tuple),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(PLANS)
def test_json_keeps_everything(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


@pytest.mark.parametrize("entry", list(zoo.small())[:20], ids=lambda e: e.name)
def test_plans_of_real_models_survive_json(entry):
    plan = api.plan(entry.build(), entry.inputs(), include="*", per_call=True)
    assert Plan.from_json(plan.to_json()) == plan


def test_plans_are_frozen():
    plan = api.plan(nn.Linear(3, 2), torch.zeros(2, 3))
    with pytest.raises(FrozenInstanceError):
        plan.edits = ()


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def edited(change) -> str:
    data = api.plan(model(), X).to_dict()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema=2), "schema 2"),
        (lambda d: d.pop("schema"), "schema None"),
        (lambda d: d.pop("edits"), "'edits'"),
        (lambda d: d.update(skips={}), "'skips'"),
        (lambda d: d.pop("fingerprint"), "no plan"),
        (lambda d: d["fingerprint"].pop("model"), "fingerprint"),
        (lambda d: d["fingerprint"].update(tensors=[1]), "fingerprint"),
        (lambda d: d["fingerprint"]["tensors"].update({"x": 3}), "fingerprint"),
        (lambda d: d["fingerprint"].update(model="Other"), "digest"),
        (lambda d: d["edits"][1].pop("layer"), "edits[1] of the plan lacks 'layer'"),
        (lambda d: d["edits"][1].update(chanels=3), "edits[1] of the plan has an unknown key"),
        (lambda d: d["edits"].append("fc1"), "edits[2] of the plan is no object"),
        (lambda d: d["edits"][0].update(channels="8"), "edits[0].channels"),
        (lambda d: d["edits"][0].update(channels=None), "edits[0].channels"),
        (lambda d: d["edits"][0].update(eps="1e-5"), "edits[0].eps"),
        (lambda d: d["edits"][0].update(momentum=[0.1]), "edits[0].momentum"),
        (lambda d: d["edits"][0].update(groups="4"), "edits[0].groups"),
        (lambda d: d["edits"][0].update(drop_bias="yes"), "edits[0].drop_bias"),
        (lambda d: d["edits"][0].update(init=3), "edits[0].init"),
        (lambda d: d["edits"][0].update(layer=None), "edits[0].layer"),
        (lambda d: d["edits"][0].update(into="fc2"), "edits[0].into"),
        (lambda d: d["skips"][0].update(reason="because"), "unknown reason 'because'"),
        (lambda d: d["skips"][0].pop("reason"), "skips[0] of the plan lacks 'reason'"),
        (lambda d: d["inputs"][0].update(shape=4), "inputs[0].shape"),
        (lambda d: d["inputs"][0].update(dtype=None), "inputs[0].dtype"),
    ],
)
def test_a_plan_that_cannot_be_read(change, words):
    with pytest.raises(bnify.PlanError) as caught:
        Plan.from_json(edited(change))
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"plan"', "{}", '{"edits": []}'])
def test_what_is_no_plan(text):
    with pytest.raises(bnify.PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["inputs"][0].update(shape=["a", 6]),
        lambda d: d["inputs"][0].update(shape=[-4, 6]),
        lambda d: d["inputs"][0].update(dtype="float99"),
        lambda d: d["inputs"].clear(),
        lambda d: d["call"]["args"].append({"$": 5}),
    ],
)
def test_inputs_that_cannot_be_drawn(change):
    plan = Plan.from_json(edited(change))
    with pytest.raises(bnify.BnifyError):
        bnify.apply(model(), plan)
    # With inputs of one's own they do not matter.
    assert bnify.apply(model(), plan, X).verification.passed


# -- fingerprint -----------------------------------------------------------------------------------


def variant(change) -> nn.Module:
    changed = model()
    return change(changed) or changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: nn.ModuleList(m), "for a Sequential, this is a ModuleList"),
        (lambda m: m.__setitem__(2, nn.Linear(8, 8, bias=False)), "'2.bias' [8]"),
        (lambda m: m.__setitem__(4, nn.Linear(8, 3)), "4.weight is [2, 8] float32 in the plan, [3"),
        (lambda m: m.append(nn.Linear(2, 2)), "a tensor '5.weight' [2, 2]"),
        (lambda m: m.double() and None, "0.weight is [8, 6] float32 in the plan, [8, 6] float64"),
        (lambda m: m.register_buffer("extra", torch.zeros(3)), "'extra' [3]"),
    ],
)
def test_the_first_difference_is_named(change, words):
    plan = api.plan(model(), X)
    with pytest.raises(bnify.PlanError) as caught:
        bnify.apply(variant(change), plan, X)
    assert words in caught.value.message
    assert "make the plan again" in caught.value.hint


def test_values_do_not_matter():
    plan = api.plan(model(), X)
    other = model()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    assert bnify.apply(other, plan, X).verification.passed


# -- apply -----------------------------------------------------------------------------------------

APPLIED = [e for e in zoo.small() if e.name.startswith("own:")]


@pytest.mark.parametrize("entry", APPLIED, ids=lambda e: e.name)
def test_apply_equals_insert(entry):
    inputs = entry.inputs(batch=4)
    inserted = bnify.insert(entry.build(), inputs, verify=False, per_call=True, batch_size=32)
    plan = Plan.from_json(inserted.plan.to_json())
    applied = bnify.apply(entry.build(), plan, inputs, verify=False)
    assert str(applied.graph.graph) == str(inserted.graph.graph)
    want, got = inserted.model.state_dict(), applied.model.state_dict()
    assert list(want) == list(got)
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert str(applied.model) == str(inserted.model)


@pytest.mark.parametrize("entry", APPLIED, ids=lambda e: e.name)
def test_apply_without_inputs_draws_them(entry):
    plan = Plan.from_json(api.plan(entry.build(), entry.inputs(batch=4)).to_json())
    assert bnify.apply(entry.build(), plan).verification.passed


def test_drawn_integers_stay_in_range_and_masks_stay():
    model = nets.BertLike()
    from bnify.structure import as_call

    inputs = {
        "input_ids": torch.randint(3, 100, (4, 12)),
        "attention_mask": torch.ones(4, 12, dtype=torch.long),
    }
    call, specs = describe(as_call(inputs), model)
    text = json.dumps([call, [s.name for s in specs]])
    assert "input_ids" in text
    for seed in range(20):
        drawn = draw(call, specs, seed).kwargs
        ids = inputs["input_ids"]
        assert int(drawn["input_ids"].min()) >= int(ids.min())
        assert int(drawn["input_ids"].max()) <= int(ids.max())
        assert torch.equal(drawn["attention_mask"], inputs["attention_mask"])
        assert drawn["input_ids"].dtype == torch.int64


def test_a_preserve_plan_measures_the_new_weights():
    plan = api.plan(model(), X, init="preserve")
    other = model().double().float()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    result = bnify.apply(other, plan, X, data=[X * 2, X + 1])
    assert laws.relative_error(other(X), result.model.eval()(X)) < 1e-5
    assert result.verification.passed


def test_notes_are_added_not_replaced():
    plan = replace(api.plan(model(), X), notes=("a",))
    assert plan.with_notes("b", "c").notes == ("a", "b", "c")
