"""``init="stats"``: each norm has the statistics of its input, in the network as it has become."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify
import laws
import nets
from bnify import staged
from bnify.capture import record
from bnify.layers import CallNorms, carries_norm, norm_of
from bnify.norms import each_norm
from bnify.pooled import pool
from bnify.structure import as_call
from bnify.verification.standardised import NAME, check_standardised


def data_for(x: Tensor, count: int = 3) -> list[Tensor]:
    """Batches of several sizes whose statistics are not those of N(0, 1)."""
    sizes = [x.shape[0], 3, 1, 7][:count]
    return [
        (as_call(x).resized(size).redrawn(40 + i, 1.5).args[0] + 0.3 * i).to(x.dtype)
        for i, size in enumerate(sizes)
    ]


def norms_in_order(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The inserted norms, as one forward runs them."""
    norms = [n for m in model.modules() if carries_norm(m) for n in each_norm(norm_of(m))]
    ran: list[nn.Module] = []
    handles = [n.register_forward_hook(lambda m, _a, _o: ran.append(m)) for n in norms]
    with torch.no_grad():
        model(x.clone())
    for handle in handles:
        handle.remove()
    return ran


def calibrate_by_hand(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """One norm after the other: everything before it is done, and its inputs are concatenated."""
    model.eval()
    for norm in norms_in_order(model, data[0]):
        inputs: list[Tensor] = []
        handle = norm.register_forward_hook(
            lambda _m, a, _o, kept=inputs: kept.append(a[0].movedim(1, -1).flatten(0, -2))
        )
        with torch.no_grad():
            for batch in data:
                model(batch.clone())
        handle.remove()
        norm.running_var, norm.running_mean = torch.var_mean(torch.cat(inputs), 0)
    return model


def assert_as_by_hand(model: nn.Module, x: Tensor, data: list[Tensor], **options) -> bnify.Result:
    result = bnify.insert(model, x, init="stats", data=data, verify=False, **options)
    by_hand = bnify.insert(model, x, verify=False, **options).model
    if options.get("drop_bias"):
        by_hand = bnify.insert(model, x, verify=False).model
    calibrate_by_hand(by_hand, data)
    want, got = norms_in_order(by_hand, x), norms_in_order(result.model.eval(), x)
    assert len(want) == len(got) > 0
    if not options.get("drop_bias"):
        for a, b in zip(want, got, strict=True):
            for name in ("running_mean", "running_var"):
                u, v = getattr(a, name), getattr(b, name)
                assert float((u - v).abs().max() / (1 + u.abs().max())) < 1e-10, name
            if a.affine:
                assert torch.equal(b.weight, torch.ones_like(b.weight))
                assert not b.bias.any()
    with torch.no_grad():
        for batch in data:
            error = laws.worst_error([by_hand(batch.clone())], [result.model(batch.clone())])
            assert error < 1e-10
    return result


def cnn() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(128, 8),
        nn.Tanh(),
        nn.Linear(8, 2),
    ).double()


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "batch-noaffine"},
        {"norm": "sync"},
        {"position": "after-act"},
        {"drop_bias": True},
        {"eps": 0.1, "momentum": 0.3},
    ],
    ids=str,
)
def test_statistics_are_those_of_calibrating_one_norm_after_the_other(options):
    assert_as_by_hand(cnn(), X, data_for(X), **options)


@pytest.mark.parametrize("number", range(5))
def test_random_networks_are_calibrated_as_by_hand(number):
    done = 0
    for seed in laws.seeds(40)[number::5]:
        net, x = laws.random_network(seed, batch=16)
        net, x = net.double(), x.double()
        data = data_for(x)
        result = bnify.insert(net, x, init="stats", data=data, verify=False)
        if not result.plan.edits:
            continue
        by_hand = calibrate_by_hand(bnify.insert(net, x, verify=False).model, data)
        want = {n: t for n, t in by_hand.state_dict().items() if ".norm.running_" in n}
        got = result.model.state_dict()
        scale = max(1.0, 1e12 * laws.one_ulp_noise(by_hand, x))
        for name, value in want.items():
            error = float((value - got[name]).abs().max() / (1 + value.abs().max()))
            assert error < 1e-10 * scale, (seed, name)
        done += 1
    assert done


def test_tokens_and_layers_called_several_times():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.up(x))
            for _ in range(3):  # the second call rests on the norm of the first
                x = x + F.relu(self.inner(x))
            return self.head(x.mean(1))

    x = torch.randn(8, 5, 6, dtype=torch.float64)
    options = {"include": ("up", "inner"), "per_call": True}
    result = assert_as_by_hand(Twice().double(), x, data_for(x), **options)
    assert isinstance(result.model.inner.norm, CallNorms)
    plan, captured = result.plan, record(Twice().double(), x)
    assert [len(stage) for stage in staged.stages(captured, plan)] == [1, 1, 1, 1]


# -- how many passes -------------------------------------------------------------------------------


class Counted(list):
    passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return super().__iter__()


class Branches(nn.Module):
    """Three branches that do not depend on each other, and one layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.after, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)) + F.relu(self.b(x)) + F.relu(self.c(x))
        return self.head(F.relu(self.after(y)))


class WrittenInPlace(nn.Module):
    """The value that ``second`` reads has been written to by then with what ``first`` gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        buffer = x * 1.0
        buffer[:, :4] = torch.tanh(self.first(x))[:, :4]
        return self.head(torch.relu(self.second(buffer)))


class Escaping(nn.Module):
    """What the second layer gets depends on the first through a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = float(self.first(x).abs().mean())
        return self.head(torch.relu(self.second(x * scale)))


@pytest.mark.parametrize(
    ("make", "wanted"), [(Branches, [3, 1]), (WrittenInPlace, [1, 1]), (Escaping, [1, 1])]
)
def test_as_many_passes_as_sites_lie_behind_one_another(make, wanted):
    model, x = make().double(), torch.randn(8, 6, dtype=torch.float64)
    options = {} if make is not Escaping else {"include": "*", "exclude": "head"}
    data = Counted(data_for(x))
    result = bnify.insert(model, x, init="stats", data=data, verify=False, **options)
    assert data.passes == len(wanted)
    order = staged.stages(record(model, x), result.plan)
    assert [len(stage) for stage in order] == wanted
    assert_as_by_hand(model, x, list(data), **options)


def test_a_one_shot_iterator_is_kept_and_said_to_be():
    data = data_for(X)
    streamed = bnify.insert(cnn(), X, init="stats", data=iter(data))
    listed = bnify.insert(cnn(), X, init="stats", data=data)
    for a, b in zip(
        streamed.model.state_dict().values(), listed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert any("3 batches were kept in memory" in note for note in streamed.plan.notes)
    assert not any("kept in memory" in note for note in listed.plan.notes)


def test_what_stats_says():
    notes = " ".join(bnify.insert(cnn(), X, init="stats", verify=False).plan.notes)
    assert "pass data for" in notes
    assert "only 8 values a channel (behind 3 layers, fewest 5)" in notes
    assert "stats changes the function" in notes


# -- verification ----------------------------------------------------------------------------------


def check_of(result: bnify.Result) -> object:
    return next(check for check in result.verification.checks if check.name == NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"drop_bias": True}, {"position": "after-act"}], ids=str)
def test_the_result_is_verified_on_the_data(dtype, options):
    data = [batch.to(dtype) for batch in data_for(X)]
    result = bnify.insert(cnn().to(dtype), X.to(dtype), init="stats", data=data, **options)
    assert result.verification.passed
    check = check_of(result)
    assert check.passed
    assert check.error < check.threshold < 0.1
    assert [d.batch_size for d in result.verification.drift] == [2, 8]


def test_one_pass_on_the_original_is_caught():
    """The planted fault: every norm has the statistics that its input had before there were norms.

    It is what a single pass gives, and what took a trained network from 0.984 to 0.292.
    """
    model, data = cnn(), data_for(X)
    result = bnify.insert(model, X, init="stats", data=data, verify=False)
    wrong = bnify.insert(model, X, init="preserve", data=data, verify=False).model
    order = staged.stages(record(model, X), result.plan)

    def over_data(net, points):
        return pool(net, [as_call(batch) for batch in data], points)

    statistics = staged.measure_staged(model, result.plan, order, over_data, lambda _: None)
    good = check_standardised(result.model, order, statistics, over_data)
    assert good.passed
    for layer in wrong.modules():
        if carries_norm(layer):
            nn.init.ones_(layer.norm.weight)
            nn.init.zeros_(layer.norm.bias)
    found = check_standardised(wrong, order, statistics, over_data)
    assert found.passed is False
    assert found.error > 100 * found.threshold
    assert found.detail == "worst at 2" or found.detail == "worst at 5"


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_single_wrong_channel_is_caught(name):
    model, data = cnn(), data_for(X)
    result = bnify.insert(model, X, init="stats", data=data, verify=False)
    order = staged.stages(record(model, X), result.plan)

    def over_data(net, points):
        return pool(net, [as_call(batch) for batch in data], points)

    statistics = staged.measure_staged(model, result.plan, order, over_data, lambda _: None)
    with torch.no_grad():
        getattr(result.model[2].norm, name)[3] += 1e-3
    found = check_standardised(result.model, order, statistics, over_data)
    assert (found.passed, found.detail) == (False, "worst at 2")


def test_data_that_changes_decides_nothing():
    class Fresh:
        def __iter__(self) -> Iterator[Tensor]:
            generator = torch.Generator()
            generator.seed()
            yield torch.randn(X.shape, generator=generator, dtype=X.dtype)

    result = bnify.insert(cnn(), X, init="stats", data=Fresh())
    check = check_of(result)
    assert (check.passed, check.detail) == (None, "the data is not the same twice")
    assert result.verification.passed


# -- options, plans, folders -----------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "layer", "instance", "rms", "auto"])
def test_kinds_without_running_statistics_are_refused(norm):
    with pytest.raises(bnify.PlanError, match="running statistics") as caught:
        bnify.insert(cnn(), X, norm=norm, init="stats")
    assert caught.value.hint


def test_zero_gamma_is_refused():
    with pytest.raises(bnify.PlanError, match="from scratch"):
        bnify.insert(cnn(), X, init="stats", zero_gamma=True)


def test_a_plan_says_stats_and_is_carried_out_again():
    data = data_for(X)
    result = bnify.insert(cnn(), X, init="stats", data=data)
    text = result.plan.to_json()
    assert all(edit["init"] == "stats" for edit in json.loads(text)["edits"])
    again = bnify.apply(cnn(), bnify.Plan.from_json(text), X, data=data)
    for a, b in zip(
        again.model.state_dict().values(), result.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    edited = json.loads(text)
    edited["edits"][0]["norm"] = "group"
    with pytest.raises(bnify.PlanError, match="init 'stats' does not go with group norm"):
        bnify.apply(cnn(), edited, X, data=data)


def test_a_saved_folder_holds_the_statistics(tmp_path):
    result = bnify.insert(cnn().float(), X.float(), init="stats", data=[X.float()])
    result.save(tmp_path / "out", onnx=False)
    loaded = bnify.load(tmp_path / "out", model=cnn().float())
    with torch.no_grad():
        assert torch.equal(loaded(X.float()), result.model.eval()(X.float()))
    assert loaded[2].norm.running_var.ne(1).all()


def test_a_layer_that_the_data_never_reaches_is_named():
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            if x.shape[0] != 3:
                y = F.relu(self.b(y))
            return self.head(y)

    x = torch.randn(8, 6)
    with pytest.raises(bnify.PlanError, match="b never ran on this data"):
        bnify.insert(Skipping(), x, init="stats", data=[x[:3]])


def test_statistics_fold_into_the_weights_exactly():
    model, x = nets.PlainResidual().double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    inserted = bnify.insert(model, x, init="stats", data=[x, 2 * x + 1], verify=False)
    folded = bnify.fold(inserted.model, x, verify=False)
    assert folded.plan.skips == ()
    laws.assert_same_function(inserted.model, folded.model, x)


def test_the_command_line_takes_stats(run_cli, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))\n"
        "loader = [torch.randn(600, 6) + 2, torch.randn(600, 6)]\n"
    )
    ran = run_cli(
        *("insert", "net.py:Net", "--input", "8,6", "--data", "net.py:loader"),
        *("--init", "stats", "--no-onnx", "-o", "out", "--format", "json"),
        cwd=tmp_path,
    )
    assert ran.code == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["plan"]["edits"][0]["init"] == "stats"
    checks = {check["name"]: check["passed"] for check in report["verification"]["checks"]}
    assert checks[NAME]
