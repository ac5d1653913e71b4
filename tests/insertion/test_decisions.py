"""Which layers of known networks get a norm, and that every layer is looked at exactly once."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import nn

import bnify
import zoo
from bnify import api
from bnify.insertion.sites import LAYERS
from mlp import MyNetwork

Reason = bnify.Reason


def planned(name: str, **options) -> bnify.Plan:
    entry = zoo.entry(name)
    return api.plan(entry.build(), entry.inputs(), batch_size=32, **options)


def skipped(plan: bnify.Plan) -> dict[str, Reason]:
    return {skip.layer: skip.reason for skip in plan.skips}


def test_the_articles_network():
    plan = api.plan(MyNetwork(), zoo.entry("MyNetwork").inputs())
    assert [(e.layer, e.kind, e.norm, e.channels, e.axis) for e in plan.edits] == [
        ("fc1", "insert-after", "batch", 256, 1),
        ("fc2", "insert-after", "batch", 128, 1),
    ]
    assert skipped(plan) == {"fc3": Reason.OUTPUT_HEAD}


@pytest.mark.parametrize(
    ("name", "edits", "layers"),
    [
        pytest.param("vgg11", 10, 11, marks=pytest.mark.slow),
        pytest.param("alexnet", 7, 8, marks=pytest.mark.slow),
        ("squeezenet1_1", 25, 26),
        ("resnet18", 0, 21),
        ("densenet121", 0, 121),
    ],
)
def test_edits_of_known_networks(name, edits, layers):
    plan = planned(name)
    assert (len(plan.edits), len(plan.edits) + len(plan.skips)) == (edits, layers)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        pytest.param("convnext_tiny", 0, marks=pytest.mark.slow),
        ("mobilenet_v3_small", 1),
        pytest.param("vit_b_16", 1, marks=pytest.mark.slow),
    ],
)
def test_modern_networks_have_their_norms_already(name, most):
    assert len(planned(name).edits) <= most


@pytest.mark.parametrize(
    "name", ["vgg11", "alexnet", "squeezenet1_1", "resnet18", "mobilenet_v3_small"]
)
def test_the_head_is_the_head(name):
    """Not the last layer by position: squeezenet's head is a convolution followed by a ReLU."""
    plan = planned(name)
    heads = [layer for layer, reason in skipped(plan).items() if reason == Reason.OUTPUT_HEAD]
    wanted = {"vgg11": "classifier.6", "alexnet": "classifier.6", "squeezenet1_1": "classifier.1"}
    wanted |= {"resnet18": "fc", "mobilenet_v3_small": "classifier.3"}
    assert heads == [wanted[name]]


SMALL = list(zoo.small())
OWN = [e for e in SMALL if e.name.startswith("own:")]


@pytest.mark.parametrize(
    ("entry", "options"),
    [(entry, {"include": "*"}) for entry in SMALL]
    + [
        (entry, options)
        for entry in OWN
        for options in ({}, {"norm": "rms"}, {"position": "after-act"}, {"per_call": True})
    ],
    ids=lambda v: v.name if isinstance(v, zoo.Entry) else "-".join(map(str, v.values())),
)
def test_every_layer_is_an_edit_or_a_skip_exactly_once(entry, options):
    model = entry.build()
    plan = api.plan(model, entry.inputs(), batch_size=32, **options)
    seen = Counter([e.layer for e in plan.edits] + [s.layer for s in plan.skips])
    assert set(seen.values()) == {1}
    layers = {path for path, module in model.named_modules() if isinstance(module, LAYERS)}
    assert layers <= set(seen)
    extra = set(seen) - layers  # weights that no Linear or Conv owns, and recurrent modules
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in extra:
        assert name in parameters or isinstance(
            model.get_submodule(name), (nn.RNNBase, nn.RNNCellBase)
        )


OPTIONS = {
    "default": {},
    "include": {"include": "*"},
    "after-act": {"position": "after-act"},
    "after-act-include": {"position": "after-act", "include": "*"},
    "per-call": {"per_call": True},
    "group": {"norm": "group"},
    "layer-include": {"norm": "layer", "include": "*"},
    "rms-include": {"norm": "rms", "include": "*"},
    "instance": {"norm": "instance", "include": "*"},
    "noaffine": {"norm": "batch-noaffine"},
    "drop-bias": {"drop_bias": True, "include": "*"},
}


@pytest.mark.parametrize("entry", OWN, ids=lambda e: e.name.partition(":")[2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_second_insert_changes_nothing(entry, options):
    inputs = entry.inputs(batch=4)
    once = bnify.insert(entry.build(), inputs, verify=False, batch_size=32, **options)
    twice = api.plan(once.model, inputs, batch_size=32, **options)
    assert twice.edits == ()
    again = Counter(s.layer for s in twice.skips)
    assert set(again.values()) <= {1}
    assert {e.layer for e in once.plan.edits} <= set(again)


def test_a_layer_of_the_second_insert_says_who_put_the_norm_there():
    once = bnify.insert(MyNetwork(), zoo.entry("MyNetwork").inputs(), verify=False)
    twice = api.plan(once.model, zoo.entry("MyNetwork").inputs(), include="*")
    assert [(s.layer, s.reason) for s in twice.skips][:2] == [
        ("fc1", Reason.ALREADY_NORMED),
        ("fc2", Reason.ALREADY_NORMED),
    ]
    assert [e.layer for e in twice.edits] == ["fc3"]
