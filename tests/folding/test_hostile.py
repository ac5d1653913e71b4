"""What a hostile reviewer found in `bnify.fold`; each test states the right behaviour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnify
from bnify.errors import BnifyError


class Net(nn.Module):
    """Children, parameters and buffers as given; forward is a function of it and the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def hostile(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics, negative scales; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.3)
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            with torch.no_grad():
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int, seed: int = 2) -> nn.Parameter:
    return nn.Parameter(drawn(*shape, seed=seed))


def run(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(*(value.clone() for value in inputs))
    return result


def error(model: nn.Module, original: nn.Module, *inputs: Tensor) -> float:
    want = run(original, *inputs).double()
    got = run(model, *inputs).double()
    return float((got - want).abs().max() / want.abs().max())


X = drawn(2, 3, 8, 8)


# -- wrong at other sizes, and passes verification -------------------------------------------------


def sliced_positions() -> tuple[nn.Module, Tensor, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn((s.l(x) + s.pos[:, : x.shape[1]]).transpose(1, 2))

    net = Net(forward, l=nn.Linear(3, 4), pos=parameter(1, 10, 4), bn=nn.BatchNorm1d(4))
    return net, drawn(2, 6, 3), drawn(2, 9, 3)


def indexed_positions() -> tuple[nn.Module, Tensor, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn((s.l(x) + s.pos[torch.arange(x.shape[1])]).transpose(1, 2))

    net = Net(forward, l=nn.Linear(3, 4), pos=parameter(10, 4), bn=nn.BatchNorm1d(4))
    return net, drawn(2, 6, 3), drawn(2, 9, 3)


def cropped_map() -> tuple[nn.Module, Tensor, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn(s.c(x) + s.pos[:, :, : x.shape[2], : x.shape[3]])

    net = Net(
        forward, c=nn.Conv2d(3, 4, 3, padding=1), pos=parameter(1, 4, 12, 12), bn=nn.BatchNorm2d(4)
    )
    return net, X, drawn(2, 3, 10, 10)


def padding_of_nothing() -> tuple[nn.Module, Tensor, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)  # to an even size; the example's is even
        return s.bn(F.pad(y, (0, y.shape[3] % 2, 0, y.shape[2] % 2)))

    net = Net(forward, c=nn.Conv2d(3, 4, 3, padding=1), bn=nn.BatchNorm2d(4))
    return net, X, drawn(2, 3, 9, 9)


def others_read_nothing() -> tuple[nn.Module, Tensor, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.l(x)  # one token only in the example: the rest is empty
        return s.bn(y[:, 0]) + y[:, 1:].sum(1)

    net = Net(forward, l=nn.Linear(3, 4), bn=nn.BatchNorm1d(4))
    return net, drawn(2, 1, 3), drawn(2, 5, 3)


def one_element_of_a_table() -> tuple[nn.Module, Tensor, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn(s.c(x) * s.table[:, :, : x.shape[2], : x.shape[3]])

    net = Net(forward, c=nn.Conv2d(3, 4, 1), table=drawn(1, 1, 9, 9), bn=nn.BatchNorm2d(4))
    return net, drawn(2, 3, 1, 1), drawn(2, 3, 4, 4)


@pytest.mark.parametrize(
    "case",
    [
        sliced_positions,
        indexed_positions,
        cropped_map,
        padding_of_nothing,
        others_read_nothing,
        one_element_of_a_table,
    ],
    ids=lambda case: case.__name__,
)
def test_the_folded_model_is_right_at_other_sizes_than_the_example(case: Any) -> None:
    net, example, other = case()
    model = hostile(net)
    folded = bnify.fold(model, example).model
    assert error(folded, model, example) < 1e-5
    assert error(folded, model, other) < 1e-5


# -- the delivered model ---------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("average", torch.zeros(3))
        self.history = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.average.lerp_(x.mean((0, 2, 3)), 0.5)
        self.history.add_(1)
        return self.bn(self.c(x))


@pytest.mark.parametrize("verify", [True, False])
def test_verification_leaves_the_state_of_the_delivered_model_alone(verify: bool) -> None:
    model = hostile(Counting())
    folded = bnify.fold(model, X, verify=verify).model
    for left in (model, folded):
        assert not left.seen
        assert not left.average.any()
        assert not left.history.any()


def test_planning_leaves_the_random_state_alone() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn(s.c(x) + torch.randn(1, 4, 1, 1))

    model = hostile(Net(forward, c=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    before = torch.get_rng_state()
    bnify.fold(model, X, verify=False)
    assert torch.equal(before, torch.get_rng_state())


class NormAct(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_the_graph_of_a_fold_in_place_finds_the_activation_that_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, nn.PReLU()))
    model = hostile(net)
    want = run(model, X)
    result = bnify.fold(model, X, inplace=True)
    assert torch.allclose(run(result.graph, X), want, atol=1e-5)


def test_the_graph_is_that_of_the_fold_whatever_happens_to_the_original_since() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return F.batch_norm(F.conv2d(x, s.w), s.mean, s.var, s.g, s.b)

    parts = {"w": parameter(4, 3, 3, 3), "g": parameter(4, seed=3), "b": parameter(4, seed=4)}
    model = Net(forward, **parts, mean=drawn(4), var=drawn(4).abs() + 0.2).eval()
    result = bnify.fold(model, X)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(3)
    assert torch.allclose(run(result.graph, X), run(result.model, X), atol=1e-5)


def test_hooks_of_norms_with_one_activation_do_not_mix() -> None:
    act = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4, act), nn.Conv2d(4, 4, 3), NormAct(4, act))
    model = hostile(net)
    seen: list[str] = []
    model[1].register_forward_hook(lambda *_: seen.append("first"))
    folded = bnify.fold(model, X).model
    seen.clear()
    run(folded, X)
    assert seen == ["first"]


# -- saved and loaded ------------------------------------------------------------------------------


def reloaded(result: bnify.Result, fresh: nn.Module, folder: Path) -> nn.Module:
    result.save(folder / "saved", onnx=False)
    return bnify.load(folder / "saved", model=fresh)


class Unsaved(nn.Module):
    """A tensor that takes the norm and is in no state dict."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.bn = nn.BatchNorm1d(4)
        if kind == "attribute":
            self.w = drawn(3, 4)
        else:
            self.register_buffer("w", drawn(3, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x @ self.w)


@pytest.mark.parametrize("kind", ["attribute", "buffer"])
def test_a_saved_fold_loads_where_the_absorber_is_in_no_state_dict(
    kind: str, tmp_path: Path
) -> None:
    x = drawn(5, 3)
    result = bnify.fold(hostile(Unsaved(kind)), x)
    loaded = reloaded(result, Unsaved(kind), tmp_path)
    assert torch.equal(run(loaded, x), run(result.model, x))


class TwiceRegistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 3, 3)
        self.bn1 = nn.BatchNorm2d(3)
        self.bn2 = self.bn1

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.bn1(self.c(x)).relu())


def test_a_saved_untied_fold_loads_where_one_place_of_a_norm_stays(tmp_path: Path) -> None:
    result = bnify.fold(hostile(TwiceRegistered()), X, untie=True)
    assert len(result.plan.edits) == 1
    loaded = reloaded(result, TwiceRegistered(), tmp_path)
    assert torch.equal(run(loaded, X), run(result.model, X))


class TwiceWithAct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.bn1 = NormAct(3, nn.PReLU())
        self.bn2 = self.bn1

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.d(self.bn1(self.c(x))))


def test_a_saved_untied_fold_of_a_norm_with_activation_loads(tmp_path: Path) -> None:
    result = bnify.fold(hostile(TwiceWithAct()), X, untie=True)
    loaded = reloaded(result, TwiceWithAct(), tmp_path)
    assert torch.equal(run(loaded, X), run(result.model, X))


def test_a_saved_fold_of_an_old_spectral_norm_loads(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        with _quiet():
            conv = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))
        return nn.Sequential(conv, nn.BatchNorm2d(4))

    result = bnify.fold(hostile(fresh()), X)
    assert len(result.plan.edits) == 1
    loaded = reloaded(result, fresh(), tmp_path)
    assert torch.equal(run(loaded, X), run(result.model, X))


def _quiet() -> Any:
    import warnings

    return warnings.catch_warnings(action="ignore")


def with_dropped_biases() -> tuple[nn.Module, Tensor]:
    x = drawn(4, 3, 8, 8)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(64, 3))
    return hostile(bnify.insert(net, x, drop_bias=True).model), x


def test_a_fold_of_dropped_biases_takes_its_own_state_dict() -> None:
    model, x = with_dropped_biases()
    folded = bnify.fold(model, x).model
    folded.load_state_dict(folded.state_dict())


def test_a_saved_fold_of_dropped_biases_loads(tmp_path: Path) -> None:
    model, x = with_dropped_biases()
    result = bnify.fold(model, x)
    loaded = reloaded(result, with_dropped_biases()[0], tmp_path)
    assert torch.equal(run(loaded, x), run(result.model, x))


def test_strip_takes_the_norms_of_calls_off_once_all_are_folded() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.l(x)) + self.b(self.l(x.relu()))

    x = drawn(4, 5, 6)
    inserted = hostile(bnify.insert(Calls(), x, per_call=True, include="l").model)
    result = bnify.fold(inserted, x)
    assert not result.plan.skips
    stripped = result.strip()
    assert not [m for m in stripped.modules() if type(m).__module__.startswith("bnify")]


# -- tracebacks ------------------------------------------------------------------------------------


def masked(s: Any, x: Tensor) -> Tensor:
    return s.bn(s.c(x)[x.sum((1, 2, 3)) > -1e9])


def repeated(s: Any, x: Tensor) -> Tensor:
    return s.bn(s.c(x).repeat_interleave((x[:, 0, 0, 0] > -99).long() + 1, 0))


def reinterpreted(s: Any, x: Tensor) -> Tensor:
    return s.bn(s.c(x).view(torch.int32).bitwise_and(-1).view(torch.float32))


@pytest.mark.parametrize("forward", [masked, repeated, reinterpreted])
def test_what_moves_elements_by_value_is_refused_with_a_reason(forward: Any) -> None:
    model = hostile(Net(forward, c=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    result = bnify.fold(model, X)
    assert [skip.layer for skip in result.plan.skips] == ["bn"]


def test_a_parameter_larger_than_the_normalized_value_is_no_crash() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.l(s.bn(x.relu()).unsqueeze(1) + s.pos)

    parts = {"bn": nn.BatchNorm1d(6), "pos": parameter(1, 5, 6), "l": nn.Linear(6, 3)}
    model = hostile(Net(forward, **parts))
    result = bnify.fold(model, drawn(2, 6))
    assert error(result.model, model, drawn(2, 6)) < 1e-5


def test_a_factor_larger_than_the_normalized_value_is_no_crash() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.l(F.adaptive_avg_pool2d(s.bn(x.relu()), 1) * s.p)

    parts = {"bn": nn.BatchNorm2d(3), "p": parameter(1, 3, 4, 4), "l": nn.Conv2d(3, 3, 3)}
    model = hostile(Net(forward, **parts))
    assert error(bnify.fold(model, X).model, model, X) < 1e-5


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_made_under_inference_mode_folds_or_is_refused(inplace: bool) -> None:
    with torch.inference_mode():
        model = hostile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        want = run(model, X)
    try:
        folded = bnify.fold(model, X, inplace=inplace).model
    except BnifyError:
        return
    assert torch.allclose(run(folded, X), want, atol=1e-5)


def test_a_weight_that_repeats_its_memory_is_folded_or_refused_in_place() -> None:
    model = hostile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].weight = nn.Parameter(drawn(1, 1, 3, 3).expand(4, 3, 3, 3))
    want = run(model, X)
    try:
        folded = bnify.fold(model, X, inplace=True).model
    except BnifyError:
        folded = model
    assert torch.allclose(run(folded, X), want, atol=1e-5)


# -- wrong without verification, refused for the wrong reason with it ------------------------------


def integer_constant() -> tuple[nn.Module, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn(s.c(x) + s.k)

    k = torch.arange(4).view(1, 4, 1, 1)
    return Net(forward, c=nn.Conv2d(3, 4, 3, bias=False), k=k, bn=nn.BatchNorm2d(4)), X


def written_after_the_norm() -> tuple[nn.Module, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        value = x.relu()
        y = s.bn(value)
        value.add_(1)
        return s.l(y) + value.sum()

    return Net(forward, bn=nn.BatchNorm2d(3), l=nn.Conv2d(3, 4, 3)), X


def input_written_after_the_norm() -> tuple[nn.Module, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.bn(x)
        x.add_(1)
        return s.l(y) + x.sum()

    return Net(forward, bn=nn.BatchNorm2d(3), l=nn.Conv2d(3, 4, 3)), X


def written_behind_a_view() -> tuple[nn.Module, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        value = x.relu()
        y = s.bn(value.transpose(2, 3))
        y.add_(1)
        return s.l(y) + value.sum()

    return Net(forward, bn=nn.BatchNorm2d(3), l=nn.Conv2d(3, 4, 3)), X


def scale_is_the_shift() -> tuple[nn.Module, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        return F.batch_norm(s.c(x), s.mean, s.var, s.g, s.g)

    parts = {"mean": drawn(4), "var": drawn(4).abs() + 0.2, "g": parameter(4)}
    return Net(forward, c=nn.Conv2d(3, 4, 3), **parts), X


def narrow_value_beside_wide_statistics() -> tuple[nn.Module, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.d(s.bn(x @ s.w).relu())

    w = nn.Parameter(drawn(3, 4).bfloat16())
    net = Net(forward, w=w, bn=nn.BatchNorm1d(4), d=nn.Linear(4, 4).bfloat16())
    return net, drawn(5, 3).bfloat16()


def addend_by_row() -> tuple[nn.Module, Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn(torch.addmm(s.b, x, s.w))

    return Net(forward, b=parameter(4, 1), w=parameter(3, 4), bn=nn.BatchNorm1d(4)), drawn(4, 3)


@pytest.mark.parametrize(
    "case",
    [
        integer_constant,
        written_after_the_norm,
        input_written_after_the_norm,
        written_behind_a_view,
        scale_is_the_shift,
        narrow_value_beside_wide_statistics,
        addend_by_row,
    ],
    ids=lambda case: case.__name__,
)
def test_planning_alone_is_right(case: Any) -> None:
    net, x = case()
    model = hostile(net)
    result = bnify.fold(model, x, verify=False)
    limit = 1e-5 if x.dtype is torch.float32 else 2e-2
    assert error(result.model, model, x) < limit
    reasons = {skip.reason for skip in bnify.fold(model, x).plan.skips}
    assert bnify.Reason.VERIFICATION_FAILED not in reasons


def test_affine_by_one_parameter_twice_is_right_without_verification() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.c(x) * s.w + s.w

    model = Net(forward, c=nn.Conv2d(3, 4, 3), w=parameter(4, 1, 1)).eval()
    folded = bnify.fold(model, X, affines=True, verify=False).model
    assert error(folded, model, X) < 1e-5


def test_random_numbers_in_a_forward_are_no_constants() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn(s.c(x) + torch.randn(1, 4, 1, 1))

    model = hostile(Net(forward, c=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    folded = bnify.fold(model, X, verify=False).model
    torch.manual_seed(5)
    want = run(model, X)
    torch.manual_seed(5)
    assert torch.allclose(run(folded, X), want, atol=1e-4)


def test_a_branch_is_not_merged_where_its_value_is_kept() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.features = s.a(x)
        return s.features + s.b(x)

    model = Net(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3)).eval()
    folded = bnify.fold(model, X, merge=True).model
    run(model, X), run(folded, X)
    assert torch.allclose(folded.features, model.features, atol=1e-5)


def test_a_branch_whose_shape_is_asked_for_is_undone() -> None:
    # Reading a shape leaves no operator: only running the result shows it.
    def forward(s: Any, x: Tensor) -> Tensor:
        a, b = s.a(x), s.b(x)
        n, c, h, w = b.shape
        return (a + b).view(n, c, h * w)

    model = Net(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3)).eval()
    result = bnify.fold(model, X, merge=True)
    assert not result.plan.edits
    assert error(result.model, model, X) < 1e-5


def test_a_branch_whose_weight_is_read_elsewhere_is_not_merged_away() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.a(x) + s.b(x) + s.a.weight.sum()

    model = Net(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3)).eval()
    assert error(bnify.fold(model, X, merge=True, verify=False).model, model, X) < 1e-5


# -- exact, and refused; reasons; idempotence ------------------------------------------------------


def test_parameters_of_one_flat_tensor_are_not_tied() -> None:
    flat = drawn(4 * 27 + 4)
    model = hostile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].weight = nn.Parameter(flat[:108].view(4, 3, 3, 3))
    model[0].bias = nn.Parameter(flat[108:])
    result = bnify.fold(model, X)
    assert [edit.layer for edit in result.plan.edits] == ["1"]
    assert error(result.model, model, X) < 1e-5


class WrittenRMS(nn.Module):
    """As language models write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = parameter(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_the_scale_of_an_rms_norm_that_is_written_out_goes_too() -> None:
    model = nn.Sequential(WrittenRMS(6), nn.Linear(6, 3)).eval()
    x = drawn(2, 5, 6)
    result = bnify.fold(model, x, affines=True)
    assert [edit.layer for edit in result.plan.edits] == ["0"]
    assert error(result.model, model, x) < 1e-5


def test_a_norm_called_by_keyword_folds() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.bn(input=s.c(x))

    model = hostile(Net(forward, c=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    assert [edit.layer for edit in bnify.fold(model, X).plan.edits] == ["bn"]


def test_a_norm_that_does_nothing_any_more_is_not_folded_again() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return F.batch_norm(s.c(x), s.mean, s.var, s.g, s.b)

    parts = {"g": parameter(4, seed=3), "b": parameter(4, seed=4)}
    statistics = {"mean": drawn(4), "var": drawn(4).abs() + 0.2}
    model = Net(forward, c=nn.Conv2d(3, 4, 3), **parts, **statistics).eval()
    once = bnify.fold(model, X)
    assert len(once.plan.edits) == 1
    assert not bnify.fold(once.model, X).plan.edits


def test_a_tail_that_does_nothing_any_more_is_not_folded_again() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    for tensor in model.parameters():
        tensor.data.normal_().mul_(0.5)
    x = drawn(2, 5, 8)
    once = bnify.fold(model, x, affines=True)
    assert once.plan.edits
    assert not bnify.fold(once.model, x, affines=True).plan.edits


def test_a_plan_for_a_graph_cannot_be_carried_out_in_place() -> None:
    model = hostile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    plan = bnify.fold(model, X, emit="graph").plan
    with pytest.raises(BnifyError):
        bnify.apply(model, plan, X, inplace=True)
    with pytest.raises(BnifyError):
        bnify.fold(model, X, plan=plan, inplace=True)


def test_an_output_with_masked_values_can_be_verified() -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = s.bn(s.c(x))
        return y, x.masked_fill(x < 0, float("-inf"))

    model = hostile(Net(forward, c=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))
    result = bnify.fold(model, X)
    assert [edit.layer for edit in result.plan.edits] == ["bn"]
