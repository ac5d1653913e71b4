"""The contract of ``bnify.fold``: options, plans, results, and what a folder brings back."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bnify
import laws
from bnify.errors import OptionsError
from bnify.structure import as_call, outputs_of, run_graph
from counting import count_norms
from foldparts import NormAct
from patterns.kit import Line, Net
from replaying import assert_untouched, fingerprint_of

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(2))


class Model(nn.Module):
    """Two norms fold backwards, one forwards, one stays."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, 5, 3), NormAct(5)
        self.late = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 4)
        self.stuck = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.nb(self.b(torch.tanh(self.na(self.a(x)))))
        x = self.late(torch.tanh(x.mean((2, 3))))
        return torch.tanh(self.stuck(torch.tanh(self.head(x))))


def build(seed: int = 4, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    return laws.hostile_(Model(**arguments).eval(), seed)


FOLDED = ("na", "nb", "late")


def run(model: nn.Module, call: Any) -> list[Tensor]:
    with torch.no_grad():
        return [tensor for _, tensor in outputs_of(as_call(call).clone()(model))]


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["modules", "", "GRAPH", "onnx"])
def test_an_unknown_emit_is_a_usage_error_that_lists_the_words(word):
    with pytest.raises(bnify.UsageError, match="unknown emit") as info:
        bnify.fold(build(), X, emit=word)
    assert "module" in info.value.hint
    assert "graph" in info.value.hint
    assert info.value.exit_code == 2


@pytest.mark.parametrize("name", ["affines", "merge", "partial", "untie"])
def test_an_option_that_is_no_truth_value_is_a_usage_error(name):
    with pytest.raises(bnify.UsageError, match=f"{name}='no'"):
        bnify.fold(build(), X, **{name: "no"})


def test_a_graph_cannot_be_made_in_place():
    model = build()
    before = fingerprint_of(model)
    with pytest.raises(OptionsError, match="inplace"):
        bnify.fold(model, X, emit="graph", inplace=True)
    assert_untouched(before, fingerprint_of(model))


def test_what_is_no_module_is_refused():
    with pytest.raises(bnify.BnifyError):
        bnify.fold(lambda x: x, X)


# -- plans -----------------------------------------------------------------------------------------


def test_a_plan_survives_json_and_applies_to_a_fresh_instance():
    result = bnify.fold(build().double(), X.double())
    plan = bnify.Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    assert plan.verb == "fold"
    assert tuple(edit.layer for edit in plan.edits) == FOLDED
    fresh = build(seed=8).double()  # other weights, the same structure
    for again in (
        bnify.apply(fresh, plan, X.double()),
        bnify.apply(fresh, plan),  # inputs are drawn
        bnify.apply(fresh, json.loads(plan.to_json()), X.double()),
        bnify.fold(fresh, X.double(), plan=plan),
    ):
        assert again.passed
        assert again.plan.edits == plan.edits
        laws.assert_same_function(fresh, again.model, X)


def test_a_plan_can_be_read_from_a_file(tmp_path):
    plan = bnify.fold(build(), X, verify=False).plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    again = bnify.fold(build(), X, plan=tmp_path / "plan.json")
    assert again.plan.edits == plan.edits


@pytest.mark.parametrize("gone", FOLDED)
def test_an_edit_taken_out_by_hand_is_not_made(gone):
    model = build().double()
    whole = bnify.fold(model, X.double()).plan
    data = whole.to_dict()
    data["edits"] = [edit for edit in data["edits"] if edit["layer"] != gone]
    result = bnify.apply(model, data, X.double())
    assert {edit.layer for edit in result.plan.edits} == set(FOLDED) - {gone}
    assert {s.layer: s.reason.value for s in result.plan.skips}[gone] == "not-planned"
    assert type(result.model.get_submodule(gone)) is type(model.get_submodule(gone))
    assert count_norms(result.model, X.double()).batch == 2
    laws.assert_same_function(model, result.model, X)


def test_an_empty_plan_changes_nothing():
    model = build()
    plan = replace(bnify.fold(model, X, verify=False).plan, edits=())
    result = bnify.apply(model, plan, X)
    assert result.passed
    assert all(map(torch.equal, model.state_dict().values(), result.model.state_dict().values()))


def test_a_plan_of_an_insertion_is_refused():
    plan = bnify.insert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), X, verify=False).plan
    with pytest.raises(bnify.PlanError, match="insert"):
        bnify.fold(build(), X, plan=plan)
    with pytest.raises(bnify.PlanError, match="fold"):
        bnify.insert(build(), X, plan=bnify.fold(build(), X, verify=False).plan)


@pytest.mark.parametrize("options", [{"merge": True}, {"affines": True}, {"emit": "graph"}])
def test_options_beside_a_plan_are_refused(options):
    plan = bnify.fold(build(), X, verify=False).plan
    with pytest.raises(bnify.PlanError, match=next(iter(options))):
        bnify.fold(build(), X, plan=plan, **options)


def test_a_plan_for_another_model_names_the_first_difference():
    plan = bnify.fold(build(), X, verify=False).plan
    for refuse in (
        lambda: bnify.apply(build(width=7), plan, X),
        lambda: bnify.fold(build(width=7), X, plan=plan),
    ):
        with pytest.raises(bnify.PlanError, match=r"a\.weight is \[6, 3, 3, 3\]"):
            refuse()
    with pytest.raises(bnify.PlanError, match="Sequential"):
        bnify.apply(nn.Sequential(nn.ReLU()), plan, X)


def test_a_plan_whose_condition_on_values_is_violated_names_the_edit():
    """It folds through a maximum where every scale is positive; here one is not."""

    def pooled(sign: float) -> nn.Module:
        torch.manual_seed(1)
        model = Line(
            conv=nn.Conv2d(3, 4, 3), pool=nn.MaxPool2d(2), bn=nn.BatchNorm2d(4), act=nn.Tanh()
        ).eval()
        laws.hostile_(model, 1)
        with torch.no_grad():
            model.bn.weight.abs_().clamp_(min=0.4)
            model.bn.weight[2] *= sign
        return model

    plan = bnify.fold(pooled(1.0), X).plan
    assert [edit.layer for edit in plan.edits] == ["bn"]
    before = fingerprint_of(model := pooled(-1.0))
    with pytest.raises(bnify.PlanError, match="edit of bn cannot be done") as info:
        bnify.apply(model, plan, X)
    assert "max_pool" in info.value.message
    assert_untouched(before, fingerprint_of(model))


def test_a_plan_whose_absorber_was_changed_by_hand_names_the_edit():
    plan = bnify.fold(build(), X, verify=False).plan
    wrong = replace(plan.edits[0], into=("b",))
    with pytest.raises(bnify.PlanError, match="edit of na cannot be done: it would go"):
        bnify.apply(build(), replace(plan, edits=(wrong, *plan.edits[1:])), X)
    unknown = replace(plan.edits[0], layer="nowhere")
    with pytest.raises(bnify.PlanError, match=r"nowhere.*runs no such norm"):
        bnify.apply(build(), replace(plan, edits=(unknown,)), X)


# -- in place, modes, progress ---------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_in_place_keeps_the_model_its_layers_and_its_parameters(verify):
    model, twin = build().double(), build().double()
    layers = {name: model.get_submodule(name) for name in ("a", "b", "head")}
    kept = {n: p for n, p in model.named_parameters() if n.partition(".")[0] in layers}
    result = bnify.fold(model, X.double(), inplace=True, verify=verify)
    assert result.model is model
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in kept.items())
    assert isinstance(model.na, nn.Identity)
    laws.assert_same_function(twin, model, X)
    assert result.passed is (True if verify else None)
    assert laws.worst_error(run(model, X.double()), run(result.graph, X.double())) <= 1e-12


def test_a_copy_shares_nothing_with_the_model():
    model = build()
    result = bnify.fold(model, X)
    want = run(model, X)
    with torch.no_grad():
        for tensor in (*result.model.parameters(), *result.model.buffers()):
            tensor.zero_()
        _ = result.graph
    assert laws.worst_error(want, run(model, X)) == 0


@pytest.mark.parametrize("train", [True, False])
def test_the_result_is_in_eval_mode_and_a_note_says_if_the_model_was_not(train):
    model = build().double().train(train)
    result = bnify.fold(model, X.double())
    assert all(module.training is train for module in model.modules())
    assert not any(module.training for module in result.model.modules())
    assert any("train mode" in note for note in result.plan.notes) is train
    laws.assert_same_function(model, result.model, X)


def test_progress_is_told_the_stages_in_order():
    said: list[str] = []
    bnify.fold(build(), X, progress=said.append)
    assert said == ["recording", "folding", "verifying"]
    said.clear()
    bnify.fold(build(), X, verify=False, progress=said.append)
    assert said == ["recording", "folding"]


def test_neutral_norms_fold_and_change_no_weight():
    """γ = 1, β = 0, mean 0 and variance 1 − ε: the function stays, and so do the weights."""
    torch.manual_seed(3)
    model = Line(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), act=nn.Tanh()).double().eval()
    with torch.no_grad():
        model.bn.running_var.fill_(1 - model.bn.eps)
    result = bnify.fold(model, X.double())
    assert [edit.layer for edit in result.plan.edits] == ["bn"]
    assert laws.relative_error(model.conv.weight, result.model.conv.weight) <= 1e-15
    assert laws.relative_error(model.conv.bias, result.model.conv.bias) <= 1e-15


def test_a_norm_without_gamma_and_beta_folds():
    model = Line(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4, affine=False), act=nn.Tanh())
    model = laws.hostile_(model.eval(), 3).double()
    result = bnify.fold(model, X.double())
    assert result.plan.skips == ()
    laws.assert_same_function(model, result.model, X)


def test_a_model_without_norms_comes_back_as_a_copy():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    result = bnify.fold(model, X)
    assert result.passed
    assert result.model is not model
    assert result.plan.edits == result.plan.skips == ()
    assert laws.worst_error(run(model, X), run(result.model, X)) == 0


# -- the result ------------------------------------------------------------------------------------


def test_the_graph_is_built_when_it_is_asked_for_and_once():
    result = bnify.fold(build(), X)
    assert not isinstance(result._graph, fx.GraphModule)
    graph = result.graph
    assert isinstance(graph, fx.GraphModule)
    assert result.graph is graph
    assert count_norms(graph, X).batch == 1


@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_graph_runs_at_other_batch_sizes(emit, batch):
    model = build().double()
    result = bnify.fold(model, X.double(), emit=emit)
    call = (
        as_call(X.double()).resized(batch)
        if batch < 4
        else as_call(X.double()).grown(batch, seed=3)
    )
    want = run(model, call)
    allowed = max(1e-12, 100 * laws.one_ulp_noise(model, X))
    assert laws.worst_error(want, run_graph(result.graph, call)) <= allowed
    assert laws.worst_error(want, run(result.model, call)) <= allowed


def test_an_emitted_graph_is_the_result():
    model = build()
    result = bnify.fold(model, X, emit="graph")
    assert isinstance(result.model, fx.GraphModule)
    assert result.graph is result.model
    assert result.passed
    assert not result.model.training
    assert result.plan.options == {"emit": "graph"}
    mine = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert not mine & {p.data_ptr() for p in result.model.state_dict().values()}


def test_the_result_is_json_and_one_line():
    result = bnify.fold(build(), X)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["verb"] == "fold"
    assert data["verification"]["passed"] is True
    assert [edit["layer"] for edit in data["plan"]["edits"]] == list(FOLDED)
    assert "\n" not in repr(result)
    assert "3 edited, 1 left alone, PASS" in repr(result)


def test_norms_are_listed_in_the_order_of_execution():
    model = Net(
        lambda m, x: m.z(m.first(x)).relu() + m.a(m.last(x)).relu(),
        last=nn.Conv2d(3, 4, 3),
        a=nn.BatchNorm2d(4),
        first=nn.Conv2d(3, 4, 3),
        z=nn.BatchNorm2d(4),
    ).eval()
    plan = bnify.fold(laws.hostile_(model, 1), X, verify=False).plan
    assert [edit.layer for edit in plan.edits] == ["z", "a"]
    assert [edit.into for edit in plan.edits] == [("first",), ("last",)]
    assert {edit.kind for edit in plan.edits} == {"fold-backward"}
    assert {(edit.norm, edit.channels, edit.axis) for edit in plan.edits} == {("batch", 4, 1)}


# -- folders ------------------------------------------------------------------------------------


def test_a_folder_does_not_fit_another_model(tmp_path):
    bnify.fold(build(), X).save(tmp_path / "out", onnx=False)
    with pytest.raises(bnify.PlanError, match=r"a\.weight is"):
        bnify.load(tmp_path / "out", build(width=7))


def test_a_loaded_fold_can_be_folded_and_exported_again(tmp_path):
    model = build()
    bnify.fold(model, X).save(tmp_path / "out", onnx=False)
    loaded = bnify.load(tmp_path / "out", copy.deepcopy(model))
    again = bnify.fold(loaded, X)
    assert again.plan.edits == ()
    assert [skip.layer for skip in again.plan.skips] == ["stuck"]
    export = bnify.export(again.model, X, tmp_path / "again.onnx")
    assert export.verification.passed
