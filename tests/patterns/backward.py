"""Absorbers backwards: every layer that can take the norm behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from patterns.kit import (
    ANY,
    IMAGE,
    SIGNAL,
    TOKENS,
    VECTOR,
    Line,
    Net,
    Pattern,
    both,
    draw,
    ids,
    pattern,
    values,
)


def conv(name: str, *shape: int, **options) -> Pattern:
    """Conv2d with these options, norm, activation."""
    before, after, kernel = shape
    return pattern(
        name,
        lambda: Line(
            conv=nn.Conv2d(before, after, kernel, **options),
            bn=nn.BatchNorm2d(after),
            act=nn.ReLU(),
        ),
        folds="bn",
        kind="fold-backward",
        inputs=draw(3, before, 8, 7),
    )


def up(dims: int, before: int, after: int, *shape: int, **options) -> Pattern:
    """ConvTranspose with these options, norm, activation."""
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    words = ", ".join(f"{key} {value}" for key, value in options.items())
    return pattern(
        f"transposed {dims}d {before}-{after} {shape} {words}".strip(),
        lambda: Line(up=layer(before, after, *shape, **options), bn=norm(after), act=nn.ReLU()),
        folds="bn",
        kind="fold-backward",
        inputs=draw(3, before, *(4, 5, 3)[:dims]),
    )


def embedding(**options) -> nn.Module:
    return Line(
        embed=nn.Embedding(11, 5, **options),
        turn=lambda x: x.transpose(1, 2),
        bn=nn.BatchNorm1d(5),
        act=nn.ReLU(),
    )


def weight_normed(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return Line(layer=parametrizations.weight_norm(layer), bn=norm, act=nn.ReLU())


def spectral(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return Line(layer=parametrizations.spectral_norm(layer), bn=norm, act=nn.ReLU())


class Siamese(nn.Module):
    """One encoder on two inputs: layer and norm run twice, always together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x, y):
        return torch.relu(self.bn(self.conv(x))), torch.relu(self.bn(self.conv(y)))


class OneNormTwoConvs(nn.Module):
    """One norm behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, dilation=2, padding=1)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return torch.relu(self.bn(self.a(x))), torch.relu(self.bn(self.b(x)))


class Attention(nn.Module):
    """Norm behind the projection of nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x):
        y, _ = self.mha(x, x * 2, x, need_weights=False)
        return torch.relu(self.bn(y.transpose(1, 2)))


class AttentionValues(nn.Module):
    """Norm behind softmax(q kᵀ) v: each row of the softmax sums to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x):
        y = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
        return torch.relu(self.bn(y.flatten(0, 1)))


def flat_relu(m, y):
    """Tokens as rows, norm, activation."""
    return torch.relu(m.bn(y.flatten(0, 1)))


BACKWARD: tuple[Pattern, ...] = (
    conv("groups", 4, 6, 3, groups=2),
    conv("depthwise", 4, 4, 3, groups=4, padding=1),
    conv("depthwise, multiplied", 4, 8, 3, groups=4, bias=False),
    conv("no bias", 4, 6, 3, bias=False),
    conv("stride", 4, 6, 3, stride=2, padding=1),
    conv("dilation", 4, 6, 3, dilation=2, padding=2),
    conv("asymmetric kernel", 4, 6, (3, 1), padding=(1, 0)),
    conv("pointwise", 6, 6, 1),
    conv("reflect padding", 4, 6, 3, padding=1, padding_mode="reflect"),
    conv("circular padding", 4, 6, 3, padding=1, padding_mode="circular"),
    conv("replicate padding", 4, 6, 3, padding=1, padding_mode="replicate", bias=False),
    conv("string padding same", 4, 6, 3, padding="same"),
    conv("string padding valid", 4, 6, 3, padding="valid"),
    conv("string padding same, reflect", 4, 6, 3, padding="same", padding_mode="reflect"),
    conv("string padding same, dilated depthwise", 4, 4, 3, padding="same", dilation=2, groups=4),
    conv("one channel in", 1, 4, 3),
    up(1, 4, 5, 3, 2),
    up(1, 4, 4, 3, 2, bias=False),
    up(2, 4, 6, 3, 2, 1),
    up(2, 4, 4, 3),
    up(2, 4, 6, 2, 2, groups=2),
    up(2, 6, 6, 3, 2, groups=6, output_padding=1),
    up(2, 4, 4, 3, groups=2, bias=False),
    up(2, 4, 8, 3, groups=4, dilation=2),
    up(3, 2, 4, 2, 2, groups=2),
    pattern(
        "linear, no bias",
        lambda: Line(fc=nn.Linear(6, 5, bias=False), bn=nn.BatchNorm1d(5), act=nn.ReLU()),
        VECTOR,
        "bn",
    ),
    pattern(
        "linear on tokens, rows",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(m.fc(x).flatten(0, 1)).view(3, 5, 6)),
            fc=nn.Linear(6, 6),
            bn=nn.BatchNorm1d(6),
        ),
        TOKENS,
        "bn",
    ),
    pattern("embedding", embedding, ids(11, 3, 4), "bn"),
    pattern("embedding with padding", lambda: embedding(padding_idx=2), ids(11, 3, 4), "bn"),
    pattern(
        "embedding, rows",
        lambda: Line(
            embed=nn.Embedding(11, 5),
            rows=lambda x: x.flatten(0, 1),
            bn=nn.BatchNorm1d(5),
            act=nn.ReLU(),
        ),
        ids(11, 3, 4),
        "bn",
    ),
    pattern(
        "embedding that changes its weight",
        lambda: embedding(max_norm=0.5),
        ids(11, 3, 4),
        skips={"bn": ("no-absorber", "extra-computation", "computed-weight")},
    ),
    pattern(
        "functional conv, shift left",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(F.conv2d(x, m.w, padding=1))),
            w=values(6, 4, 3, 3),
            bn=nn.BatchNorm2d(6),
        ),
        folds="bn",
    ),
    pattern(
        "functional conv with bias",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(F.conv2d(x, m.w, m.b))),
            w=values(6, 4, 3, 3),
            b=values(6),
            bn=nn.BatchNorm2d(6),
        ),
        folds="bn",
    ),
    pattern(
        "functional conv with the weight of a module",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(F.conv2d(x, m.conv.weight))),
            conv=nn.Conv2d(4, 6, 3, bias=False),
            bn=nn.BatchNorm2d(6),
        ),
        folds="bn",
        note="a bias added to the module would not be read",
    ),
    pattern(
        "functional linear, shift left",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(F.linear(x, m.w))), w=values(5, 6), bn=nn.BatchNorm1d(5)
        ),
        VECTOR,
        "bn",
    ),
    pattern(
        "functional linear with bias",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(F.linear(x, m.w, m.b))),
            w=values(5, 6),
            b=values(5),
            bn=nn.BatchNorm1d(5),
        ),
        VECTOR,
        "bn",
    ),
    pattern(
        "x @ W, shift left",
        lambda: Net(lambda m, x: torch.relu(m.bn(x @ m.w)), w=values(6, 5), bn=nn.BatchNorm1d(5)),
        VECTOR,
        "bn",
    ),
    pattern(
        "x @ W on tokens",
        lambda: Net(lambda m, x: flat_relu(m, x @ m.w), w=values(6, 5), bn=nn.BatchNorm1d(5)),
        TOKENS,
        "bn",
    ),
    pattern(
        "x @ Wᵀ",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(x @ m.w.t())), w=values(5, 6), bn=nn.BatchNorm1d(5)
        ),
        VECTOR,
        "bn",
    ),
    pattern(
        "x @ W + b",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(x @ m.w + m.b)),
            w=values(6, 5),
            b=values(5),
            bn=nn.BatchNorm1d(5),
        ),
        VECTOR,
        "bn",
    ),
    pattern(
        "addmm",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(torch.addmm(m.b, x, m.w))),
            w=values(6, 5),
            b=values(5),
            bn=nn.BatchNorm1d(5),
        ),
        VECTOR,
        "bn",
    ),
    pattern(
        "einsum",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(torch.einsum("ni,oi->no", x, m.w))),
            w=values(5, 6),
            bn=nn.BatchNorm1d(5),
        ),
        VECTOR,
        either={"bn": ANY},
    ),
    pattern(
        "weight norm, conv",
        lambda: weight_normed(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
        folds="bn",
    ),
    pattern(
        "weight norm, no bias",
        lambda: weight_normed(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
        folds="bn",
    ),
    pattern(
        "weight norm, transposed",
        lambda: weight_normed(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        folds="bn",
    ),
    pattern(
        "spectral norm, linear",
        lambda: spectral(nn.Linear(6, 5), nn.BatchNorm1d(5)),
        VECTOR,
        "bn",
    ),
    pattern(
        "spectral norm, conv", lambda: spectral(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), folds="bn"
    ),
    *(
        pattern(
            f"parametrized layer between two norms, {kind}{'' if bias else ', no bias'}",
            lambda kind=kind, bias=bias: Line(
                act=nn.ReLU(),
                before=nn.BatchNorm1d(6),
                fc=getattr(parametrizations, kind)(nn.Linear(6, 5, bias=bias)),
                after=nn.BatchNorm1d(5),
                end=nn.ReLU(),
            ),
            VECTOR,
            ("before", "after"),
        )
        for kind in ("weight_norm", "spectral_norm")
        for bias in (True, False)
    ),
    pattern("siamese", Siamese, both(IMAGE, draw(3, 4, 6, 6)), "bn"),
    pattern("one norm behind two layers", OneNormTwoConvs, folds="bn"),
    pattern(
        "multihead attention",
        Attention,
        TOKENS,
        either={"bn": ANY},
        note="out_proj is read by another module, but its bias is there",
    ),
    pattern("attention values", AttentionValues, TOKENS, either={"bn": ANY}),
    pattern(
        "bilinear layer",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(m.two(x, x))),
            two=nn.Bilinear(6, 6, 5),
            bn=nn.BatchNorm1d(5),
        ),
        VECTOR,
        either={"bn": ANY},
    ),
    pattern(
        "a weight that is computed",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(F.conv2d(x, m.w * m.mask))),
            w=values(6, 4, 3, 3),
            mask=torch.tensor([1.0, 0.0, 1.0]),
            bn=nn.BatchNorm2d(6),
        ),
        either={"bn": ANY},
    ),
    pattern(
        "recurrent layer",
        lambda: Net(
            lambda m, x: torch.relu(m.bn(m.lstm(x)[0].transpose(1, 2))),
            lstm=nn.LSTM(6, 5, batch_first=True),
            bn=nn.BatchNorm1d(5),
        ),
        TOKENS,
        skips={"bn": ("no-absorber", "nonlinearity-between")},
    ),
    pattern(
        "conv 1d, no bias",
        lambda: Line(conv=nn.Conv1d(4, 5, 3, bias=False), bn=nn.BatchNorm1d(5), act=nn.ReLU()),
        SIGNAL,
        "bn",
    ),
)
