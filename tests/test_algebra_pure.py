"""The algebra of folding is pure, works in float64 on any layout, and checks shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from absorbing import randn
from bnify.algebra import (
    Affine,
    Kernel,
    chained_linear,
    embedding_rows,
    grouped_to,
    identity_kernel,
    norm_affine,
    padded_kernel,
    scaled,
    shifted,
)

CASES: dict[str, tuple[tuple[int, ...], Any]] = {
    "scaled-none": ((6, 2, 3, 3), lambda w, v: scaled(w, Kernel("conv", 3))),
    "scaled-conv": ((6, 2, 3, 3), lambda w, v: scaled(w, Kernel("conv", 3), v[:6], v[:6])),
    "scaled-transposed": (
        (6, 2, 3), lambda w, v: scaled(w, Kernel("conv_transpose", 2), v[:4], v[:6]),
    ),
    "scaled-matmul": ((6, 2), lambda w, v: scaled(w, Kernel("matmul"), v[:2], v[:6])),
    "scaled-vector": ((6,), lambda w, v: scaled(w, Kernel("vector"), v[:6])),
    "shifted": ((6, 2, 3, 3), lambda w, v: shifted(w, Kernel("conv", 3), v[:6])),
    "shifted-transposed": ((6, 2, 1), lambda w, v: shifted(w, Kernel("conv_transpose", 2), v[:6])),
    "embedding": ((5, 3), lambda w, v: embedding_rows(w, Affine(v[:3], v[3:6]))),
    "identity": ((6, 2, 3), lambda w, v: identity_kernel(w.shape, Kernel("conv", 3), v[:6])),
    "padded": ((6, 2, 1, 1), lambda w, v: padded_kernel(w, (3, 5))),
    "padded-not": ((6, 2, 1, 1), lambda w, v: padded_kernel(w, (1, 1))),
    "grouped": ((6, 2, 3), lambda w, v: grouped_to(w, 3, 1)),
    "grouped-same": ((6, 2, 3), lambda w, v: grouped_to(w, 3, 3)),
    "chained": ((4, 6, 3), lambda w, v: chained_linear(v.view(6, 2, 1), v[:6], w, v[:4])),
    "chained-bias": ((4, 6, 3), lambda w, v: chained_linear(v.view(6, 2, 1), None, w, v[:4])),
    "norm": ((6,), lambda w, v: norm_affine(w, v[:6], v[6:], v[:6].abs(), 1e-3)),
    "affine": ((6,), lambda w, v: Affine(w, v[:6]).then(Affine(v[6:], w))),
    "pick": ((6,), lambda w, v: Affine(w, v[:6]).pick(torch.tensor([5, 0, 0]))),
}  # fmt: skip


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Affine):
        return [result.scale, result.shift]
    return [t for t in (result if isinstance(result, tuple) else [result]) if t is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_pure_and_in_float64_from_any_dtype(case: str, dtype: torch.dtype) -> None:
    shape, run = CASES[case]
    weight, vector = torch.nn.Parameter(randn(*shape).to(dtype)), randn(12).to(dtype)
    kept = weight.detach().clone(), vector.clone()
    results = tensors_of(run(weight, vector))
    wants = tensors_of(run(weight.detach().double(), vector.double()))
    for got, want in zip(results, wants, strict=True):
        assert got.dtype == torch.float64
        assert not got.requires_grad
        assert torch.equal(got, want)
        got.add_(1.0)  # its own memory
    assert torch.equal(weight, kept[0])
    assert torch.equal(vector, kept[1])


@pytest.mark.parametrize("case", CASES)
def test_strides_of_the_weight_change_nothing(case: str) -> None:
    shape, run = CASES[case]
    weight, vector = randn(*shape), randn(12)
    strided = weight.movedim(0, -1).contiguous().movedim(-1, 0)
    sliced = torch.stack([weight, weight], dim=-1)[..., 0]
    want = tensors_of(run(weight, vector))
    for other in (strided, sliced):
        for a, b in zip(tensors_of(run(other, vector)), want, strict=True):
            assert torch.allclose(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_scaling_keeps_the_memory_format(kind: str) -> None:
    last = torch.channels_last
    weight = randn(6, 4, 3, 3).to(memory_format=last)
    kernel = Kernel(kind, 2)  # type: ignore[arg-type]
    factors = {
        "out": randn(kernel.outputs(weight.shape)),
        "inp": randn(kernel.inputs(weight.shape)),
    }
    for given_ in ({}, factors):
        assert scaled(weight, kernel, **given_).is_contiguous(memory_format=last)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_same_on_cuda(case: str) -> None:
    shape, run = CASES[case]
    weight, vector = randn(*shape), randn(12)
    want = tensors_of(run(weight, vector))
    for beside in (vector.cuda(), vector):  # also with the vectors left on the CPU
        for a, b in zip(tensors_of(run(weight.cuda(), beside)), want, strict=True):
            assert torch.allclose(a.cpu(), b, rtol=1e-12, atol=1e-12)


# -- misuse ----------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "group-of-linear": lambda: Kernel("linear", 2),
    "no-groups": lambda: Kernel("conv", 0),
    "indivisible": lambda: scaled(randn(5, 1, 3), Kernel("conv", 2)),
    "wrong-rank": lambda: Kernel("linear").outputs((3, 2, 1)),
    "vector-as-matrix": lambda: Kernel("linear").outputs((3,)),
    "inputs-of-embedding": lambda: scaled(randn(3, 2), Kernel("embedding"), inp=randn(3)),
    "inputs-of-vector": lambda: Kernel("vector").inputs((3,)),
    "shift-into-embedding": lambda: shifted(randn(3, 2), Kernel("embedding"), randn(3)),
    # One value would broadcast, and a wrong length only fail where it does not divide.
    "one-factor": lambda: scaled(randn(4, 2), Kernel("linear"), out=randn(1)),
    "swapped-factors": lambda: scaled(randn(4, 2), Kernel("linear"), out=randn(2)),
    "per-group-factors": lambda: scaled(randn(4, 2, 1), Kernel("conv", 2), inp=randn(2)),
    "one-shift": lambda: shifted(randn(4, 2), Kernel("linear"), randn(1)),
    "affine-lengths": lambda: Affine(randn(3), randn(1)),
    "affine-rank": lambda: Affine(randn(3, 1), randn(3, 1)),
    "then-lengths": lambda: Affine.identity(3).then(Affine.identity(1)),
    "norm-lengths": lambda: norm_affine(randn(1), None, randn(3), randn(3), 0.0),
    "rows-lengths": lambda: embedding_rows(randn(3, 2), Affine.identity(1)),
    "identity-even": lambda: identity_kernel((4, 4, 2), Kernel("conv")),
    "identity-not-square": lambda: identity_kernel((4, 2, 3), Kernel("conv")),
    "identity-transposed": lambda: identity_kernel((4, 4, 3), Kernel("conv_transpose")),
    "identity-scale": lambda: identity_kernel((4, 4, 3), Kernel("conv"), randn(1)),
    "pad-odd": lambda: padded_kernel(randn(2, 2, 3), (4,)),
    "pad-smaller": lambda: padded_kernel(randn(2, 2, 3), (1,)),
    "pad-rank": lambda: padded_kernel(randn(2, 2, 3), (3, 3)),
    "more-groups": lambda: grouped_to(randn(4, 4, 1), 1, 2),
    "groups-indivisible": lambda: grouped_to(randn(6, 1, 1), 3, 2),
    "groups-zero": lambda: grouped_to(randn(6, 1, 1), 3, 0),
    "chain-kernel": lambda: chained_linear(randn(3, 2, 3), None, randn(4, 3, 3), None),
    "chain-channels": lambda: chained_linear(randn(3, 2), None, randn(4, 2), None),
    "chain-rank": lambda: chained_linear(randn(3, 2, 1, 1), None, randn(4, 3, 3), None),
}


@pytest.mark.parametrize("case", WRONG)
def test_shapes_that_do_not_fit_raise(case: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        WRONG[case]()
