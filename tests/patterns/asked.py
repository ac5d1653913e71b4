"""What folds only when it is asked for: ``merge``, ``partial`` and ``untie``."""

from __future__ import annotations

import torch
from torch import nn

from patterns.kit import (
    ANY,
    IMAGE,
    VECTOR,
    Line,
    Net,
    Pattern,
    both,
    draw,
    pattern,
)

MERGE = {"merge": True}
PARTIAL = {"partial": True}
UNTIE = {"untie": True, "emit": "graph"}
#: An identity branch: its input has other readers, and nothing linear reads its sum.
IDENTITY = ("no-absorber", "another-consumer", "nonlinearity-between", "value-is-output")


def norms(count: int, channels: int = 4) -> dict[str, nn.Module]:
    return {f"n{i}": nn.BatchNorm2d(channels) for i in range(count)}


def rep_vgg(groups: int = 1, left: bool = True) -> nn.Module:
    """k×k convolution, 1×1 convolution and identity, each with its norm, summed."""

    def forward(m, x):
        x = m.stem(x).relu()
        a, b, c = m.n0(m.conv(x)), m.n1(m.point(x)), m.n2(x)
        return torch.relu(a + b + c if left else c + (b + a))

    return Net(
        forward,
        stem=nn.Conv2d(4, 4, 3),
        conv=nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=False),
        point=nn.Conv2d(4, 4, 1, groups=groups, bias=False),
        **norms(3),
    )


def mobile_one() -> nn.Module:
    """Several k×k branches beside a 1×1 branch and an identity."""

    def forward(m, x):
        x = m.stem(x).relu()
        out = m.n0(x) + m.n1(m.point(x))
        for norm, conv in ((m.n2, m.a), (m.n3, m.b), (m.n4, m.c)):
            out += norm(conv(x))
        return torch.relu(out)

    return Net(
        forward,
        stem=nn.Conv2d(4, 4, 3),
        point=nn.Conv2d(4, 4, 1, groups=4, bias=False),
        **{n: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False) for n in "abc"},
        **norms(5),
    )


def rep_ghost() -> nn.Module:
    """A depthwise convolution with a norm, plus a norm of the value itself."""
    return Net(
        lambda m, x: torch.relu(m.n0(m.conv(y := m.stem(x).relu())) + m.n1(y)),
        stem=nn.Conv2d(4, 4, 3),
        conv=nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        **norms(2),
    )


def rep_vit() -> nn.Module:
    """The norm is on the sum, and one summand is the value itself."""
    return Net(
        lambda m, x: m.bn(m.n0(m.conv(y := m.stem(x).relu())) + m.point(y) + y).tanh(),
        stem=nn.Conv2d(4, 4, 3),
        conv=nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        point=nn.Conv2d(4, 4, 1, groups=4),
        bn=nn.BatchNorm2d(4),
        **norms(1),
    )


ALL3 = ("n0", "n1", "n2")

ASKED_MERGES = (
    pattern("RepVGG", rep_vgg, IMAGE, ALL3, options=MERGE, convolutions=2),
    pattern("RepVGG, groups", lambda: rep_vgg(2), IMAGE, ALL3, options=MERGE, convolutions=2),
    pattern(
        "RepVGG, identity first",
        lambda: rep_vgg(left=False),
        IMAGE,
        ALL3,
        options=MERGE,
        convolutions=2,
    ),
    pattern("RepVGG, not asked", rep_vgg, IMAGE, ("n0", "n1"), {"n2": IDENTITY}),
    pattern(
        "RepVGG, graph", rep_vgg, IMAGE, ALL3, options={**MERGE, "emit": "graph"}, convolutions=2
    ),
    pattern(
        "MobileOne",
        mobile_one,
        IMAGE,
        tuple(f"n{i}" for i in range(5)),
        options={**MERGE, "emit": "graph"},
        convolutions=2,
    ),
    pattern(
        "MobileOne, module",
        mobile_one,
        IMAGE,
        tuple(f"n{i}" for i in range(5)),
        options=MERGE,
        convolutions=2,
        note="what stands on the left of += takes the kernel of the others",
    ),
    pattern("RepGhost", rep_ghost, IMAGE, ("n0", "n1"), options=MERGE, convolutions=2),
    pattern(
        "RepViT", rep_vit, IMAGE, ("n0", "bn"), options={**MERGE, "emit": "graph"}, convolutions=2
    ),
    pattern(
        "RepViT, module",
        rep_vit,
        IMAGE,
        ("n0", "bn"),
        options=MERGE,
        convolutions=2,
        note="x stays in the sum, the convolution makes up for its scale",
    ),
    pattern(
        "branches of two strides",
        lambda: Net(
            lambda m, x: torch.relu(m.n0(m.a(x)) + m.n1(m.b(x))),
            a=nn.Conv2d(4, 4, 3, 2, 1),
            b=nn.Conv2d(4, 4, 1, 2),
            **norms(2),
        ),
        IMAGE,
        ("n0", "n1"),
        options={**MERGE, "emit": "graph"},
        convolutions=1,
    ),
    pattern(
        "branches that pad differently",
        lambda: Net(
            lambda m, x: torch.relu(m.n0(m.a(x)) + m.n1(m.b(x))),
            a=nn.Conv2d(4, 4, 3, padding=1),
            b=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            **norms(2),
        ),
        IMAGE,
        ("n0", "n1"),
        options=MERGE,
    ),
    pattern(
        "a difference of branches",
        lambda: Net(
            lambda m, x: torch.relu(m.n0(m.a(x)) - m.n1(m.b(x))),
            a=nn.Conv2d(4, 4, 3, padding=1),
            b=nn.Conv2d(4, 4, 1),
            **norms(2),
        ),
        IMAGE,
        ("n0", "n1"),
        options={**MERGE, "emit": "graph"},
        convolutions=1,
    ),
    pattern(
        "a branch that is read twice",
        lambda: Net(
            lambda m, x: (y := m.n0(m.a(x))).tanh() + torch.relu(y + m.n1(m.b(x))),
            a=nn.Conv2d(4, 4, 3, padding=1),
            b=nn.Conv2d(4, 4, 1),
            **norms(2),
        ),
        IMAGE,
        ("n0", "n1"),
        options=MERGE,
        convolutions=2,
    ),
    pattern(
        "linear, linear",
        lambda: Line(a=nn.Linear(6, 8), b=nn.Linear(8, 3), act=nn.Tanh()),
        VECTOR,
        options=MERGE,
        either={"a": ANY, "b": ANY},
    ),
    *(
        pattern(
            name,
            lambda forward=forward: Net(forward, **{n: nn.Linear(6, 6) for n in "abc"}),
            VECTOR,
            options=MERGE,
            either={"a": ANY, "b": ANY, "c": ANY},
        )
        for name, forward in (
            ("linear branches, then linear", lambda m, x: m.c(m.a(x) + m.b(x)).tanh()),
            ("linear, linear in a branch", lambda m, x: (m.c(m.a(x)) + m.b(x)).tanh()),
            ("three linears in a row", lambda m, x: m.c(m.b(m.a(x))).tanh()),
        )
    ),
    pattern(
        "linear, linear: larger",
        lambda: Line(a=nn.Linear(6, 2), b=nn.Linear(2, 6)),
        VECTOR,
        options=MERGE,
        note="one layer would have more weights",
    ),
    pattern(
        "linear, norm, linear",
        lambda: Line(a=nn.Linear(6, 8), bn=nn.BatchNorm1d(8), b=nn.Linear(8, 3), act=nn.Tanh()),
        VECTOR,
        "bn",
        options=MERGE,
        either={"a": ANY, "b": ANY},
    ),
    pattern(
        "pointwise conv, conv",
        lambda: Line(
            a=nn.Conv2d(4, 8, 1), bn=nn.BatchNorm2d(8), b=nn.Conv2d(8, 4, 3), act=nn.Tanh()
        ),
        IMAGE,
        "bn",
        options={**MERGE, "emit": "graph"},
        either={"a": ANY, "b": ANY},
        convolutions=1,
    ),
    pattern(
        "pointwise conv with bias, padded conv",
        lambda: Line(a=nn.Conv2d(4, 8, 1), b=nn.Conv2d(8, 4, 3, padding=1), act=nn.Tanh()),
        IMAGE,
        options=MERGE,
        note="the bias is not in the border",
    ),
)

ASKED_MORE = (
    pattern(
        "partial concat, not asked",
        lambda: Net(
            lambda m, x: m.bn(torch.cat([m.conv(x), x], 1)).relu(),
            conv=nn.Conv2d(4, 6, 1),
            bn=nn.BatchNorm2d(10),
        ),
        IMAGE,
        skips={"bn": ("no-absorber", "another-consumer", "nonlinearity-between")},
    ),
    pattern(
        "partial concat",
        lambda: Net(
            lambda m, x: m.bn(torch.cat([m.conv(x), x], 1)).relu(),
            conv=nn.Conv2d(4, 6, 1),
            bn=nn.BatchNorm2d(10),
        ),
        IMAGE,
        options=PARTIAL,
        either={"bn": ANY},
        left=1,
    ),
    pattern(
        "partial concat, graph",
        lambda: Net(
            lambda m, x: m.bn(torch.cat([m.conv(x), x.tanh()], 1)).relu(),
            conv=nn.Conv2d(4, 6, 1),
            bn=nn.BatchNorm2d(10),
        ),
        IMAGE,
        "bn",
        options={**PARTIAL, "emit": "graph"},
        left=1,
    ),
    pattern(
        "partial sum",
        lambda: Net(
            lambda m, x: m.bn(m.conv(x) + x).relu(), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)
        ),
        IMAGE,
        options=PARTIAL,
        either={"bn": ANY},
        left=1,
    ),
    pattern(
        "untie, two norms",
        lambda: Net(
            lambda m, x: m.n0(m.conv(x)).relu() + m.n1(m.conv(x * 2)).relu(),
            conv=nn.Conv2d(4, 4, 3),
            **norms(2),
        ),
        IMAGE,
        ("n0", "n1"),
        options=UNTIE,
    ),
    pattern(
        "untie, two inputs",
        lambda: Net(
            lambda m, x, y: m.n0(m.conv(x)).relu() + m.n1(m.conv(y)).relu(),
            conv=nn.Conv2d(4, 4, 3, groups=2, bias=False),
            **norms(2),
        ),
        both(IMAGE, draw(3, 4, 8, 8)),
        ("n0", "n1"),
        options=UNTIE,
    ),
    pattern(
        "untie, one call without a norm",
        lambda: Net(
            lambda m, x: m.n0(m.conv(x)).relu() + m.conv(x * 2).relu(),
            conv=nn.Conv2d(4, 4, 3),
            **norms(1),
        ),
        IMAGE,
        "n0",
        options=UNTIE,
    ),
    pattern("untie, tied weights", lambda: _tied(), IMAGE, ("n0", "n1"), options=UNTIE),
    pattern(
        "untie, forwards",
        lambda: Net(
            lambda m, x: m.conv(m.n0(x.relu())) * m.conv(x), conv=nn.Conv2d(4, 4, 3), **norms(1)
        ),
        IMAGE,
        "n0",
        options=UNTIE,
    ),
)


def _tied() -> nn.Module:
    model = Net(
        lambda m, x: m.n0(m.a(x)).relu() + m.n1(m.b(x)).relu(),
        a=nn.Conv2d(4, 4, 3),
        b=nn.Conv2d(4, 4, 3),
        **norms(2),
    )
    model.b.weight = model.a.weight
    return model


ASKED: tuple[Pattern, ...] = (*ASKED_MERGES, *ASKED_MORE)
