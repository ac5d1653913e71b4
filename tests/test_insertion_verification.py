"""Planted faults: each is caught, and the layer that has it is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import bnify
import laws
from bnify import inserts
from bnify.layers import detach
from bnify.norms import each_norm
from bnify.realise import Realisations


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 8),
        nn.Tanh(),
        nn.Linear(8, 2),
    )


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FAULTY = "2"


class Faulty(Realisations):
    """Carries out a plan, with a fault in the module tree or in the recording."""

    in_tree: Callable[[nn.Module], object] | None = None
    in_graph: Callable[[fx.GraphModule], object] | None = None

    def tree(self) -> nn.Module:
        tree = super().tree()
        if self.in_tree is not None:
            self.in_tree(tree)
        return tree

    def graph(self, *, train: bool) -> fx.GraphModule:
        graph = super().graph(train=train)
        if self.in_graph is not None:
            self.in_graph(graph)
            graph.recompile()
        return graph


def judge(in_tree=None, in_graph=None, **options) -> bnify.Verification:
    net = model()
    result = bnify.insert(net, X, verify=False, **options)
    statistics = None
    if options.get("init") == "preserve":
        from bnify.pooled import pool
        from bnify.rewrite import points

        statistics = pool(net, [result.call], points(result.plan))
    realised = Faulty(net, result.plan, result.call, statistics)
    realised.in_tree, realised.in_graph = in_tree, in_graph
    return inserts.verify_insertion(realised, net, result.model, result.graph, [result.call])


def norm_of(tree: nn.Module) -> nn.Module:
    return each_norm(tree.get_submodule(FAULTY).norm)[0]


@torch.no_grad()
def shifted_beta(tree: nn.Module) -> None:
    """One channel's β off by 1 %."""
    norm_of(tree).bias[5] *= 1.01


def dropped_eps(tree: nn.Module) -> None:
    norm_of(tree).eps = 0.0


class Swapped(nn.Module):
    """The norm, with two channels of its output swapped."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        order = [1, 0, *range(2, 8)]
        return self.norm(x)[:, order]


def swapped_channels(tree: nn.Module) -> None:
    tree.get_submodule(FAULTY).norm = Swapped(tree.get_submodule(FAULTY).norm)


def left_out(tree: nn.Module) -> None:
    tree.get_submodule(FAULTY).norm = nn.Identity()


def plain_layer(tree: nn.Module) -> None:
    detach(tree.get_submodule(FAULTY))


class Twice(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x))


def twice(tree: nn.Module) -> None:
    tree.get_submodule(FAULTY).norm = Twice(tree.get_submodule(FAULTY).norm)


def other_kind(tree: nn.Module) -> None:
    tree.get_submodule(FAULTY).norm = nn.GroupNorm(1, 8).double()


TREE_FAULTS = [dropped_eps, swapped_channels, left_out, plain_layer, twice, other_kind]


@pytest.mark.parametrize("init", ["reset", "preserve"])
@pytest.mark.parametrize("fault", TREE_FAULTS, ids=lambda f: f.__name__)
def test_a_fault_in_the_tree_is_caught_and_named(fault, init):
    verdict = judge(in_tree=fault, init=init)
    assert not verdict.passed
    assert verdict.first_divergent == FAULTY


def test_beta_off_by_one_percent_on_one_channel():
    verdict = judge(in_tree=shifted_beta, init="preserve")
    assert (verdict.passed, verdict.first_divergent) == (False, FAULTY)
    assert verdict.algebra > 1e-6


def momentum(tree: nn.Module) -> None:
    norm_of(tree).momentum = 0.2


def frozen_scale(tree: nn.Module) -> None:
    norm_of(tree).weight.requires_grad_(False)


def always_eval(tree: nn.Module) -> None:
    norm_of(tree).train = lambda mode=True: norm_of(tree)


def no_statistics(tree: nn.Module) -> None:
    norm_of(tree).track_running_stats = False


@pytest.mark.parametrize(
    "fault", [momentum, frozen_scale, always_eval, no_statistics], ids=lambda f: f.__name__
)
def test_a_fault_that_shows_in_train_mode_only(fault):
    assert not judge(in_tree=fault).passed


# -- faults in the recording -----------------------------------------------------------------------


def norms(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if "norm_of" in node.meta]


def graph_without(graph: fx.GraphModule) -> None:
    node = next(n for n in norms(graph) if n.meta["norm_of"] == FAULTY)
    node.replace_all_uses_with(node.args[0])
    graph.graph.erase_node(node)


def graph_eps(graph: fx.GraphModule) -> None:
    node = next(n for n in norms(graph) if n.meta["norm_of"] == FAULTY)
    node.args = (*node.args[:7], 1e-3, *node.args[8:])


def graph_activation(graph: fx.GraphModule) -> None:
    """A change elsewhere: not at a norm, but behind the first."""
    relu = next(n for n in graph.graph.nodes if "relu" in str(n.target))
    relu.target = torch.ops.aten.sigmoid.default


@pytest.mark.parametrize(
    ("fault", "named"), [(graph_eps, FAULTY), (graph_without, None), (graph_activation, FAULTY)]
)
def test_a_fault_in_the_recording_is_caught(fault, named):
    verdict = judge(in_graph=fault)
    assert not verdict.passed
    if named is not None:
        assert verdict.first_divergent == named


# -- no false alarm, and the numbers ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"init": "preserve"}, {"norm": "group"}, {"norm": "rms"}, {"drop_bias": True}],
    ids=str,
)
def test_without_a_fault_it_passes(options):
    verdict = judge(**options)
    assert verdict.passed
    assert verdict.algebra <= 1e-12
    assert verdict.first_divergent is None
    names = {check.name for check in verdict.checks}
    assert "every norm runs and learns" in names
    assert all(check.passed is not False for check in verdict.checks)


def test_the_delivered_model_itself_is_run():
    """The float64 copies may be right and the object that is handed out wrong."""
    net = model()
    result = bnify.insert(net, X, verify=False)
    realised = Realisations(net, result.plan, result.call, None)
    with torch.no_grad():
        result.model[2].norm.bias[5] += 0.1
    verdict = inserts.verify_insertion(realised, net, result.model, result.graph, [result.call])
    assert not verdict.passed
    assert [c.name for c in verdict.checks if c.passed is False] == [
        "result.graph = result.model, own dtype"
    ]


def test_a_delivered_graph_with_too_few_outputs():
    net = model()
    result = bnify.insert(net, X, verify=False)
    realised = Realisations(net, result.plan, result.call, None)
    two = fx.GraphModule(result.graph, result.graph.graph)
    output = next(n for n in two.graph.nodes if n.op == "output")
    output.args = ((output.args[0], output.args[0]),)
    two.recompile()
    verdict = inserts.verify_insertion(realised, net, result.model, two, [result.call])
    assert not verdict.passed


def test_a_failed_verification_leaves_the_users_model_alone(monkeypatch):
    monkeypatch.setattr(Faulty, "in_tree", staticmethod(dropped_eps))
    monkeypatch.setattr(inserts, "Realisations", Faulty)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(bnify.VerificationError) as caught:
        bnify.insert(net, X, inplace=True, optimizer=optimizer)
    assert caught.value.exit_code == 1
    assert caught.value.result.verification.first_divergent == FAULTY
    assert caught.value.result.model is not net
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert len(optimizer.param_groups) == 1
    assert [type(m).__name__ for m in net] == [type(m).__name__ for m in model()]


def test_verification_leaves_fresh_norms_fresh():
    result = bnify.insert(model(), X)
    for index in (0, 2, 5):
        norm = result.model[index].norm
        assert int(norm.num_batches_tracked) == 0
        assert not norm.running_mean.any()
        assert norm.weight.grad is None


def test_drift_is_measured_at_the_batch_size_of_training():
    (drift,) = bnify.insert(model(), X, batch_size=32).verification.drift
    assert drift.batch_size == 32
    assert drift.rel_l2 > 0.05  # equal in eval says nothing about training
    (drift,) = bnify.insert(model(), X).verification.drift
    assert drift.batch_size == 8


def test_random_networks_with_a_planted_fault():
    """On any network a lost ε at the last norm is seen."""
    caught = 0
    for seed in laws.seeds(12):
        net, x = laws.random_network(seed, batch=16)
        result = bnify.insert(net, x, verify=False)
        if not result.plan.edits:
            continue
        at = result.plan.edits[-1].carrier

        def fault(tree, at=at):
            each_norm(tree.get_submodule(at).norm)[0].eps = 1e-4

        realised = Faulty(net, result.plan, result.call, None)
        realised.in_tree = fault
        verdict = inserts.verify_insertion(realised, net, result.model, result.graph, [result.call])
        assert not verdict.passed, seed
        assert verdict.first_divergent == at, seed
        caught += 1
    assert caught >= 6
