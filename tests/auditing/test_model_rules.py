"""T1 rules: what fires, and the trap beside it that must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnify
import laws
from bnify.auditing.finding import Severity
from bnify.audits import audit
from patterns.kit import Line


def image(batch: int = 2, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size)


def found(model: nn.Module, inputs: Any, code: str, **options: Any) -> dict[str, Any]:
    """The findings of one rule by module."""
    report = audit(laws.hostile_(model), inputs, select=[code], **options)
    assert code not in report.unchecked, report.unchecked
    assert {finding.code for finding in report.findings} <= {code}
    modules = [finding.module for finding in report.findings]
    assert len(modules) == len(set(modules)), "one finding a module"
    return {finding.module: finding for finding in report.findings}


class Tokens(nn.Module):
    """Tokens flattened into the batch, as LeViT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


class Function(nn.Module):
    """A model of one expression over its children."""

    def __init__(self, forward: Any, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.function = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def frozen_norm(channels: int) -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(channels)


# -- BN201 -----------------------------------------------------------------------------------------

REDUNDANT = {
    "conv": (lambda: Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)), image, ["a"]),
    "transposed": (lambda: Line(a=nn.ConvTranspose2d(3, 4, 3), n=nn.BatchNorm2d(4)), image, ["a"]),
    "linear": (
        lambda: Line(a=nn.Linear(6, 4), n=nn.BatchNorm1d(4)),
        lambda: torch.randn(3, 6),
        ["a"],
    ),
    "tokens": (Tokens, lambda: torch.randn(2, 7, 6), ["linear"]),
    "flattened": (
        lambda: Line(a=nn.Conv2d(3, 4, 8), f=nn.Flatten(), n=nn.BatchNorm1d(4)),
        image,
        ["a"],
    ),
    "instance": (
        lambda: Line(a=nn.Conv2d(3, 4, 3), n=nn.InstanceNorm2d(4, track_running_stats=True)),
        image,
        ["a"],
    ),
    "functional": (
        lambda: Function(
            lambda m, x: F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var, m.n.weight),
            a=nn.Conv2d(3, 4, 3),
            n=nn.BatchNorm2d(4),
        ),
        image,
        ["a"],
    ),
}

KEPT = {
    "no bias": lambda: Line(a=nn.Conv2d(3, 4, 3, bias=False), n=nn.BatchNorm2d(4)),
    "activation between": lambda: Line(a=nn.Conv2d(3, 4, 3), r=nn.ReLU(), n=nn.BatchNorm2d(4)),
    "in-place activation": lambda: Line(
        a=nn.Conv2d(3, 4, 3), r=nn.ReLU(inplace=True), n=nn.BatchNorm2d(4)
    ),
    "also read elsewhere": lambda: Function(
        lambda m, x: m.n(y := m.a(x)) + y, a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)
    ),
    "an output": lambda: Function(
        lambda m, x: (y := m.a(x), m.n(y)), a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)
    ),
    "group norm": lambda: Line(a=nn.Conv2d(3, 4, 3), n=nn.GroupNorm(2, 4)),
    "untracked instance norm": lambda: Line(a=nn.Conv2d(3, 4, 3), n=nn.InstanceNorm2d(4)),
    "constant statistics": lambda: Line(a=nn.Conv2d(3, 4, 3), n=frozen_norm(4)),
    "two layers, one norm": lambda: Function(
        lambda m, x: m.n(m.a(x)) + m.n(m.b(x)),
        a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4),
    ),
    "padded": lambda: Line(a=nn.Conv2d(3, 4, 3), p=nn.ZeroPad2d(1), n=nn.BatchNorm2d(4)),
    "bias read elsewhere": lambda: Function(
        lambda m, x: m.n(m.a(x)) + m.a.bias.sum(), a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUNDANT)
def test_a_bias_that_a_norm_takes_away(name):
    make, inputs, wanted = REDUNDANT[name]
    assert list(found(make().eval(), inputs(), "BN201")) == wanted


@pytest.mark.parametrize("name", KEPT)
def test_a_bias_that_does_something(name):
    assert not found(KEPT[name]().eval(), image(), "BN201")


def test_a_wrong_axis_makes_no_bias_redundant():
    net = Line(a=nn.Linear(6, 5), n=nn.BatchNorm1d(5)).eval()
    x = torch.randn(3, 5, 6)  # the norm takes axis 1, which is as long as the layer is wide
    assert not found(net, x, "BN201")
    assert list(found(net, x, "BN207")) == ["n"]


@pytest.mark.parametrize("seed", laws.seeds(40))
def test_only_redundant_biases_can_be_moved_in_training(seed):
    """The law: in train mode the outputs do not see a redundant bias, and do see any other."""
    net, x = laws.random_network(seed)
    redundant = set(found(net, x, "BN201"))
    net = net.double().train()
    for path, module in net.named_modules():
        if getattr(module, "bias", None) is None or path not in redundant:
            continue
        before = laws.run64(net, x, train=True)
        with torch.no_grad():
            module.bias += torch.randn_like(module.bias)
        assert laws.worst_error(before, laws.run64(net, x, train=True)) < 1e-9, path


# -- BN202 -----------------------------------------------------------------------------------------


def test_dropout_in_front_of_a_norm():
    net = Line(a=nn.Conv2d(3, 4, 3), d=nn.Dropout(0.3), b=nn.Conv2d(4, 4, 3), n=nn.BatchNorm2d(4))
    (finding,) = found(net, image(), "BN202").values()
    assert (finding.module, finding.values) == ("n", {"p": 0.3, "dropout": "d"})


@pytest.mark.parametrize(
    "between",
    [
        nn.Dropout(0.0),
        nn.Dropout2d(0.3),
        nn.AlphaDropout(0.3),
        nn.Sequential(nn.Dropout(0.3), nn.BatchNorm2d(4), nn.ReLU()),  # that norm has the finding
        nn.Sequential(nn.Dropout(0.3), *[nn.ReLU() for _ in range(4)]),
    ],
    ids=["p = 0", "channels", "alpha", "a norm between", "far away"],
)
def test_dropout_that_shifts_no_variance_here(between):
    net = Line(a=nn.Conv2d(3, 4, 3), d=between, n=nn.BatchNorm2d(4))
    assert "n" not in found(net, image(), "BN202")


def test_functional_dropout_counts():
    net = Function(
        lambda m, x: m.n(F.dropout(x, 0.2, training=m.training)), n=nn.BatchNorm2d(3)
    ).eval()
    assert list(found(net, image(), "BN202")) == ["n"]


# -- BN203, BN204 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "proposed"),
    [(0.99, "0.01"), (0.9997, "0.0003"), (0.9, "0.1"), (0.5, "0.1"), (1.0, "0.1"), (0.0, "0.1")],
)
def test_momentum_out_of_range(momentum, proposed):
    net = Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4, momentum=momentum))
    (finding,) = found(net, None, "BN203").values()
    assert finding.values == {"momentum": momentum, "proposed": proposed}
    assert f"set momentum to {proposed}" in finding.fix
    assert finding.severity is Severity.ERROR


@pytest.mark.parametrize("momentum", [None, 0.1, 0.01, 0.4999])
def test_momentum_in_range(momentum):
    net = Line(n=nn.BatchNorm2d(3, momentum=momentum), i=nn.InstanceNorm2d(3, momentum=0.9))
    assert not found(net, None, "BN203")
    untracked = Line(
        n=nn.BatchNorm2d(3, momentum=0.99, track_running_stats=False), f=frozen_norm(3)
    )
    assert not found(untracked, None, "BN203")


def test_norms_that_differ_are_one_finding():
    net = Line(
        a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3, eps=1e-3, momentum=0.01), c=nn.BatchNorm2d(3)
    )
    (finding,) = found(net, None, "BN204").values()
    assert finding.message == "eps: 1e-05 in 2, 0.001 in 1; momentum: 0.1 in 2, 0.01 in 1"
    assert not found(Line(a=nn.BatchNorm2d(3), b=nn.BatchNorm2d(3, momentum=0.2)), None, "BN204")


# -- BN205 -----------------------------------------------------------------------------------------


def pooled() -> nn.Module:
    return Line(p=nn.AdaptiveAvgPool2d(1), a=nn.Conv2d(3, 4, 1), n=nn.BatchNorm2d(4))


def loader(samples: int, batch: int, *, drop_last: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(samples, 1)), batch_size=batch, drop_last=drop_last)


def test_one_value_a_channel():
    assert found(pooled(), image(), "BN205")["n"].severity is Severity.WARNING
    wide = Line(a=nn.Conv2d(3, 4, 1), n=nn.BatchNorm2d(4))
    assert not found(wide, image(), "BN205")
    assert not found(Line(p=nn.AdaptiveAvgPool2d(1), f=frozen_norm(3)), image(), "BN205")


@pytest.mark.parametrize(
    ("given", "severity"),
    [
        (loader(9, 4), Severity.ERROR),
        (loader(3, 1), Severity.ERROR),
        (loader(10, 4), Severity.WARNING),
        (loader(9, 4, drop_last=True), Severity.WARNING),
    ],
)
def test_a_last_batch_of_one_is_an_error(given, severity):
    assert found(pooled(), image(), "BN205", loader=given)["n"].severity is severity


def test_tokens_in_the_batch_are_counted_not_divided():
    """Two samples of 7 tokens are 14 values; one sample has 7, and not 14 / 2 by accident."""
    assert not found(Tokens(), torch.randn(2, 7, 6), "BN205")
    assert list(found(Tokens(), torch.randn(2, 1, 6), "BN205")) == ["norm"]


# -- BN206 to BN210 --------------------------------------------------------------------------------


def test_a_norm_for_several_values():
    net = Function(
        lambda m, x: m.n(m.a(x)) + m.n(m.b(x)),
        a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4),
    )  # fmt: skip
    assert found(net, image(), "BN206")["n"].values == {"calls": 2, "values": 2}
    same = Function(
        lambda m, x: m.n(y := m.a(x)) + m.n(y), a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)
    )
    assert not found(same, image(), "BN206")
    constant = Function(lambda m, x: m.n(x) + m.n(2 * x), n=frozen_norm(3))
    assert not found(constant, image(), "BN206")


def test_a_norm_over_tokens():
    for before in (nn.Linear(6, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 6), nn.GELU())):
        net = Line(a=before, n=nn.BatchNorm1d(5))
        assert list(found(net, torch.randn(3, 5, 6), "BN207")) == ["n"]
    right = Function(
        lambda m, x: m.n(m.a(x).transpose(1, 2)), a=nn.Linear(6, 5), n=nn.BatchNorm1d(5)
    )
    assert not found(right, torch.randn(3, 5, 6), "BN207")
    conv = Line(a=nn.Conv1d(5, 4, 1), n=nn.BatchNorm1d(4))
    assert not found(conv, torch.randn(3, 5, 6), "BN207")


def test_a_norm_behind_a_norm():
    net = Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4), i=nn.Identity(), m=nn.BatchNorm2d(4))
    assert found(net, image(), "BN208")["n"].values == {"second": "m"}
    apart = Line(n=nn.BatchNorm2d(3), r=nn.ReLU(), m=nn.BatchNorm2d(3))
    assert not found(apart, image(), "BN208")
    branch = Function(lambda m, x: m.m(y := m.n(x)) + y, n=nn.BatchNorm2d(3), m=nn.BatchNorm2d(3))
    assert not found(branch, image(), "BN208")
    other = Line(n=nn.LayerNorm([3, 8, 8]), m=nn.BatchNorm2d(3))
    assert not found(other, image(), "BN208")


def test_a_norm_at_the_output_only_when_asked():
    net = Line(a=nn.Linear(6, 4), n=nn.BatchNorm1d(4)).eval()
    x = torch.randn(3, 6)
    assert list(found(net, x, "BN209")) == ["n"]
    assert "BN209" not in {f.code for f in audit(net, x).findings}
    assert not found(Line(a=nn.Linear(6, 4), n=nn.BatchNorm1d(4), r=nn.ReLU()), x, "BN209")


def test_a_norm_that_never_runs():
    net = Function(lambda m, x: m.n(x), n=nn.BatchNorm2d(3), idle=nn.BatchNorm2d(3))
    assert list(found(net, image(), "BN210")) == ["idle"]
    read = Function(
        lambda m, x: F.batch_norm(x, m.n.running_mean, m.n.running_var), n=nn.BatchNorm2d(3)
    )
    assert not found(read, image(), "BN210")


# -- BN211 to BN213 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "shape", "fires"),
    [
        (nn.GroupNorm(4, 4), (2, 4, 1, 1), True),
        (nn.GroupNorm(4, 4), (2, 4), True),
        (nn.GroupNorm(2, 4), (2, 4), False),
        (nn.GroupNorm(4, 4), (2, 4, 2, 2), False),
        (nn.LayerNorm(1), (2, 4, 1), True),
        (nn.LayerNorm(4), (2, 4), False),
        (nn.InstanceNorm2d(4), (2, 4, 2, 1), False),
        (nn.BatchNorm1d(4), (2, 4), False),
    ],
)
def test_a_norm_over_one_element(norm, shape, fires):
    net = Line(n=norm).eval()
    x = torch.randn(shape)
    assert bool(found(net, x, "BN211")) is fires
    # Whether the output depends on the input, measured.
    constant = bool((net(x) - net(x + torch.randn(shape))).abs().max() < 1e-3)
    assert constant is fires


def test_lazy_modules_are_named():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    report = audit(net, image(), select=["BN212", "BN201"])
    assert [f.module for f in report.findings] == ["0", "1"]
    assert "lazy" in report.unchecked["BN201"]
    net(image())
    assert not audit(net, image(), select=["BN212"]).findings


def test_no_norms_only_when_asked():
    deep = nn.Sequential(*[nn.Linear(6, 6) for _ in range(8)])
    x = torch.randn(3, 6)
    assert found(deep, x, "BN213")[""].values == {"layers": 8}
    assert not audit(deep, x).findings
    assert not found(nn.Sequential(*[nn.Linear(6, 6) for _ in range(7)]), x, "BN213")
    normed = nn.Sequential(*[nn.Linear(6, 6) for _ in range(8)], nn.LayerNorm(6))
    assert not found(normed, x, "BN213")


# -- BN301, BN302, BN308 ---------------------------------------------------------------------------


def half_frozen() -> nn.Module:
    net = Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)).train()
    for parameter in net.n.parameters():
        parameter.requires_grad = False
    return net


def test_a_norm_that_is_frozen_by_half():
    net = half_frozen()
    assert found(net, None, "BN301")["n"].severity is Severity.ERROR
    net.n.eval()  # frozen on purpose
    assert not found(net, None, "BN301")
    free = half_frozen()
    free.n.bias.requires_grad = True
    assert not found(free, None, "BN301")
    constant = Line(f=frozen_norm(3), n=nn.BatchNorm2d(3, affine=False)).train()
    assert not found(constant, None, "BN301")


def test_several_devices_without_synchronisation(monkeypatch):
    net = Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4), s=nn.SyncBatchNorm(4))
    assert "BN302" in audit(net, image(), select=["BN302"]).unchecked
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert list(found(net, image(), "BN302")) == ["n"]
    assert not found(net, image(), "BN302", loader=loader(64, 16))
    assert list(found(Line(n=nn.BatchNorm1d(3)), torch.randn(2, 3), "BN302", loader=loader(64, 16)))


def test_weight_decay_on_norms():
    net = Line(a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4), g=nn.GroupNorm(2, 4))
    decayed = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=1e-4)
    assert list(found(net, None, "BN308", optimizer=decayed)) == ["n"]
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    assert not found(net, None, "BN308", optimizer=plain)
    groups = bnify.param_groups(net, weight_decay=1e-4)
    assert not found(net, None, "BN308", optimizer=torch.optim.AdamW(groups, lr=0.1))
