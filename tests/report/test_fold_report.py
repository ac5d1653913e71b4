"""The report on a fold: what went where, what it saves, in every width and encoding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bnify.cost import Cost
from bnify.figures import Figures
from bnify.latency import Latency
from bnify.onnx_sizes import OnnxSize, OnnxSizes
from bnify.plan import Edit, Fingerprint, Plan, Reason, Skip
from bnify.ranges import RangeWarning
from bnify.report import render
from bnify.report.folds import fold_headline
from bnify.report.numbers import change, seconds, short
from bnify.verdict import Check, OutputVerdict, Verification


def _edit(layer, into, kind="fold-backward", norm="batch", channels=64, **more):
    into = (into,) if isinstance(into, str) else into
    type_name = {"batch": "BatchNorm2d"}.get(norm, "")
    return Edit(layer=layer, into=into, kind=kind, norm=norm, channels=channels,
                layer_type=type_name, **more)  # fmt: skip


BLOCKS = tuple(
    _edit(f"layer{i}.{j}.bn{k}", f"layer{i}.{j}.conv{k}", channels=64 * i)
    for i in (1, 2)
    for j in (0, 1)
    for k in (1, 2)
)
FORWARD = _edit("head.bn", ("head.a", "head.b"), "fold-forward", channels=7, calls=2,
                detail="shift left")  # fmt: skip
MERGED = _edit("skip.bn", "conv", "merge")
LAYER = _edit("point", "conv", "merge", norm="")
SCALE = _edit("gamma", "conv", norm="affine")
TAIL = _edit("ln", ("q", "k", "v"), "fold-forward", norm="layer")
LEFT = tuple(
    Skip(
        layer=f"dense.{i}.norm1",
        reason=Reason.ANOTHER_CONSUMER,
        layer_type="BatchNorm2d",
        detail=f"before it: dense.{i}.cat.a_rather_long_name is also read by "
        f"dense.{i + 1}.cat.a_rather_long_name; after it: dense.{i}.norm1.activation.relu",
    )
    for i in range(3)
)
VERDICT = Verification(
    passed=True,
    algebra=3.1e-15,
    checks=(Check(name="result = original, float64", passed=True, error=1e-15, threshold=1e-12),),
    outputs=(
        OutputVerdict(
            name="output",
            rel_l2=1e-7,
            max_abs=1e-6,
            max_abs_over_rms=1e-6,
            budget_ratio=0.9,
            tolerance=1e-6,
            top1=1.0,
            passed=True,
        ),
    ),
)
FIGURES = Figures(
    before=Cost(parameters=5_293_272, flops=4_312_345_678, norms=226, weighted=192),
    after=Cost(parameters=2_076_568, flops=1_134_000_000, norms=3, weighted=44),
    samples=2,
    magnified=("layer1.0.conv1.weight", 3.25),
    warnings=tuple(
        RangeWarning(f"layer1.{i}.conv1", "int8", 0.5, 0.01, f"layer1.{i}.conv1.weight: narrow")
        for i in (0, 1)
    ),
)


def _plan(edits=(), skips=(), **options) -> Plan:
    return Plan(
        verb="fold",
        edits=edits,
        skips=skips,
        fingerprint=Fingerprint(model="Net"),
        options=options,
    )


def _result(plan, figures=FIGURES, latency=(), onnx=None, notes=()):
    return SimpleNamespace(
        plan=plan,
        verification=VERDICT,
        source={"target": "net.py:Net"},
        figures=figures,
        latency=list(latency),
        onnx=onnx,
        notes=list(notes),
    )


FULL = _result(
    _plan((*BLOCKS, FORWARD, MERGED, LAYER), LEFT),
    latency=(Latency("eager", 0.0123, 0.0101, 40), Latency("onnxruntime", 2e-4, 1e-4, 90)),
    onnx=OnnxSizes(OnnxSize(120, 30), OnnxSize(80, 2)),
    notes=("something could not be timed",),
)


def _flat(result, **options) -> str:
    return " ".join(render(result, "rich", **{"width": 100, **options}).split())


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (_plan(), "Nothing to fold: no norm runs in this model's forward pass."),
        (_plan(skips=LEFT[:1]), "Nothing to fold: the one norm is left alone, for the reason bel"),
        (_plan(skips=LEFT), "Nothing to fold: all 3 norms are left alone, each for the reason b"),
        (_plan(BLOCKS), "All 8 norms are folded backwards, into what makes their input."),
        (_plan(BLOCKS[:1]), "The one norm is folded backwards, into what makes its input."),
        (_plan((FORWARD,)), "The one norm is folded forwards, into what reads its result."),
        (
            _plan((*BLOCKS, FORWARD, MERGED), LEFT[:1]),
            "10 of 11 norms are folded (8 backwards, 1 forwards, 1 merged); 1 left alone, for the",
        ),
        (_plan((MERGED, LAYER)), "beside it. 1 layer is merged into another."),
        (_plan((LAYER, LAYER)), "2 layers are merged into others."),
        (
            _plan((*BLOCKS, SCALE, TAIL), affines=True),
            "(9 backwards, 1 forwards). Of the folded, 1 is a scale or shift without a norm, and",
        ),
        (_plan((SCALE, TAIL), affines=True), "without a norm, and 1 norm stays without scale and"),
        (_plan(skips=LEFT, affines=True), "all 3 norms and affine maps are left alone"),
        (_plan(affines=True), "no norm or affine map runs in this model's forward pass"),
    ],
)
def test_the_headline_counts_norms_and_tells_the_rest_apart(plan, said):
    assert said in fold_headline(plan, dry_run=False)


def test_a_dry_run_folds_nothing():
    text = fold_headline(_plan((*BLOCKS, LAYER)), dry_run=True)
    assert "All 8 norms would be folded" in text
    assert "1 layer would be merged" in text
    assert "are folded" not in text


def test_alike_norms_share_a_row_and_so_do_their_layers():
    lines = render(FULL, "rich", width=110).splitlines()
    first = next(line for line in lines if line.startswith("layer1"))
    assert first.split() == ["layer1.0-1.bn1-2", "×4", "backward", "BatchNorm2d", "64",
                             "layer1.0-1.conv1-2"]  # fmt: skip
    head = next(line for line in lines if line.startswith("head.bn"))
    assert head.split() == ["head.bn", "forward", "BatchNorm2d", "7", "head.a,", "head.b", "2",
                            "calls;", "shift", "left"]  # fmt: skip
    merged = next(line for line in lines if line.startswith("point"))
    assert merged.split() == ["point", "merge", "64", "conv"]


def test_norms_of_one_pattern_that_go_elsewhere_have_rows_of_their_own():
    edits = (_edit("a.0.bn", "a.0.conv"), _edit("a.1.bn", "a.1.fc"), _edit("a.2.bn", "a.2.conv"))
    text = _flat(_result(_plan(edits)))
    assert "a.0,2.bn ×2 backward BatchNorm2d 64 a.0,2.conv" in text
    assert "a.1.bn backward BatchNorm2d 64 a.1.fc" in text


def test_what_it_saves_is_told_before_and_after():
    text = _flat(FULL)
    assert "Norms that run 226 3" in text
    assert "Linear and conv layers that run 192 44" in text
    assert "Parameters 5,293,272 2,076,568 −60.8 %" in text
    assert "FLOPs a sample 2.16 G 567 M −73.7 %" in text
    assert "Latency, eager 12.3 ms 10.1 ms 0.821×" in text
    assert "Latency, onnxruntime 200 µs 100 µs 0.5×" in text
    assert "Operators in the ONNX file 120 80" in text
    assert "Norms in the ONNX file 30 2" in text
    assert "medians of at least 40 calls" in text
    assert "something could not be timed" in text
    assert "the weight that grew most is layer1.0.conv1.weight, by a factor of 3.25" in text
    assert "layer1.0-1.conv1 ×2: for example layer1.0.conv1.weight: narrow" in text


def test_the_verdict_is_the_last_line():
    assert render(FULL, "rich", width=100).rstrip().splitlines()[-1].startswith("PASS")
    assert "**PASS**" in render(FULL, "md").rstrip().splitlines()[-1]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_width_and_encoding_shows_everything(width, encoding):
    text = render(FULL, "rich", width=width, encoding=encoding)
    assert max(map(len, text.splitlines())) <= width
    text.encode(encoding)
    squeezed = "".join(text.split())
    for word in ("head.bn", "another-consumer", "backward", "layer2.0-1.", "conv1-2", "5,293,272"):
        assert word in squeezed, word


def test_paths_break_behind_their_dots():
    long = "features.denseblock1.denselayer1"
    edits = (_edit(f"{long}.norm2", f"{long}.conv1"),)
    text = render(_result(_plan(edits)), "rich", width=80)
    assert "denselayer1.norm2" in text or "denselayer1.\n" in text
    for line in text.splitlines():
        for word in line.split():
            if word.startswith(("feat", "dense", "norm2", "conv1")):
                assert word.endswith((".", "norm2", "conv1")), word


def test_what_was_not_counted_is_not_shown():
    nothing = Figures(before=None, after=None, notes=("parameters and operations: why",))
    text = _flat(_result(_plan(BLOCKS), nothing))
    assert "Before and after" not in text
    assert "parameters and operations: why" in text
    still = Figures(before=FIGURES.before, after=FIGURES.after, magnified=("w", 0.97))
    assert "Range: no weight grew by more than rounding." in _flat(_result(_plan(BLOCKS), still))
    text = _flat(_result(_plan(skips=LEFT), FIGURES))
    assert "Before and after" not in text, "nothing was done"


def test_nothing_of_a_plan_alone_needs_figures():
    planned = SimpleNamespace(plan=_plan(BLOCKS, LEFT), verification=None, source={})
    text = render(planned, "rich", dry_run=True)
    assert "would be folded" in text
    assert "Before and after" not in text
    assert "Norm" in render(planned, "md", dry_run=True)


def test_numbers():
    assert [short(n) for n in (0, 999, 12_345, 999_999, 1_000_000, 999_600_000, 7.27e9, 3e12)] == [
        "0", "999", "12,345", "999,999", "1 M", "1000 M", "7.27 G", "3 T"]  # fmt: skip
    assert [change(*pair) for pair in ((100, 100), (0, 5), (200, 150), (1000, 999), (4, 6))] == [
        "", "", "−25.0 %", "−0.10 %", "+50.0 %"]  # fmt: skip
    assert [seconds(s) for s in (2.5, 0.0123, 4.5e-4, 0.9999, 12.0, 1234.0)] == [
        "2.5 s", "12.3 ms", "450 µs", "1000 ms", "12 s", "1234 s"]  # fmt: skip
