"""Reports: what they say at a glance, in every format, width and encoding."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

from bnify.errors import BnifyError, CaptureError, VerificationError
from bnify.plan import Edit, Fingerprint, Plan, Reason, Skip
from bnify.report import Format, render, render_error
from bnify.result import Result
from bnify.structure import Call
from bnify.verdict import Check, Drift, OutputVerdict, Verification

GOLDEN = Path(__file__).parents[1] / "golden"

PLAN = Plan(
    verb="insert",
    edits=(
        *(
            Edit(layer=f"layer{i}.{j}.conv{k}", layer_type="Conv2d", channels=64 * i, dims=4)
            for i in (1, 2)
            for j in range(3)
            for k in (1, 2)
        ),
        Edit(layer="stem", layer_type="Conv2d", channels=64, groups=8, norm="group", dims=4),
        Edit(
            layer="fc1",
            layer_type="Linear",
            channels=256,
            at="act1",
            init="preserve",
            eps=1e-3,
            detail="only 8 values a channel at batch size 8",
        ),
    ),
    skips=(
        *(
            Skip(
                layer=f"blocks.{i}.attn.qkv",
                layer_type="Linear",
                reason=Reason.ATTENTION_PROJECTION,
                detail=f"read by blocks.{i}.attn",
            )
            for i in range(12)
        ),
        Skip(layer="fc3", layer_type="Linear", reason=Reason.OUTPUT_HEAD),
        Skip(layer="[red]odd[/red]|name", layer_type="Conv2d", reason=Reason.NEVER_CALLED),
    ),
    fingerprint=Fingerprint(model="Net"),
    notes=("2 tensors were frozen: γ ≥ 0 — “as they were”",),
)
OUTPUT = OutputVerdict(
    name="output",
    rel_l2=1.23e-7,
    max_abs=4.5e-6,
    max_abs_over_rms=1e-5,
    budget_ratio=0.973,
    tolerance=2.1e-6,
    top1=1.0,
    passed=True,
)
GOOD = Verification(
    passed=True,
    algebra=3.1e-15,
    checks=(
        Check(name="recording = module, eval", passed=True, error=3.1e-15, threshold=1e-12),
        Check(name="every norm runs and learns", passed=True, detail="14 norms"),
        Check(name="own dtype", passed=None, detail="ill-conditioned"),
    ),
    outputs=(OUTPUT,),
    drift=(Drift(batch_size=8, rel_l2=0.774),),
    inputs=("example", "normal (seed 1)"),
    notes=("float64 was possible",),
)
BAD = Verification(
    passed=False,
    checks=(Check(name="eval", passed=False, error=math.inf, threshold=1e-12, detail="shape"),),
    outputs=(
        OutputVerdict(
            name="logits",
            rel_l2=math.nan,
            max_abs=math.inf,
            max_abs_over_rms=1.0,
            budget_ratio=528.0,
            tolerance=1.0,
            top1=0.25,
            passed=False,
            detail="non-finite values differ",
        ),
    ),
    first_divergent="fc1.norm",
)


def _result(plan: Plan = PLAN, verification: Verification | None = GOOD) -> Result:
    model = nn.Linear(2, 2)
    return Result(
        model, fx.symbolic_trace(nn.Identity()), plan, verification, Call((torch.ones(1),))
    )


ABOUT = {
    "files": {"weights": "out/model.safetensors", "onnx": "out/model.onnx"},
    "export": SimpleNamespace(
        path="out/model.onnx",
        opset=20,
        norms_before={"BatchNormalization": 14},
        norms_after={},
        verification=GOOD,
        notes=("ran at batch sizes 3 and 5",),
        log="",
    ),
    "environment": {
        "versions": {"bnify": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "seed": 7,
        "hashes": {"weights": "0123456789abcdef0123"},
    },
    "shown": {"code": "def forward(self, x):\n    return x"},
}


@pytest.fixture
def golden(request):
    """Compare with a golden file, or write it: pytest --overwrite-golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--overwrite-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text

    return check


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("insert_80.txt", {"fmt": "rich", "width": 80}),
        ("insert_120.txt", {"fmt": "rich", "width": 120}),
        ("insert_ascii.txt", {"fmt": "rich", "width": 80, "encoding": "ascii"}),
        ("insert.md", {"fmt": "md"}),
    ],
)
def test_golden_insert(golden, name, options):
    golden(name, render(_result(), **options, **ABOUT))


def test_golden_failure(golden):
    golden("failed_80.txt", render(_result(verification=BAD), "rich", width=80))
    golden("verify_80.txt", render(BAD, "rich", width=80, target="net.py:Net model.onnx"))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("verification", [GOOD, BAD, None])
def test_no_line_is_wider_than_the_terminal(width, verification):
    about = {key: value for key, value in ABOUT.items() if key != "shown"}
    text = render(_result(verification=verification), "rich", width=width, **about)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [40, 80])
def test_nothing_is_lost_on_a_narrow_terminal(width):
    text = "".join(render(_result(verification=BAD), "rich", width=width).split())
    for words in ("non-finite values differ", "attention-projection", "read by blocks.0.attn"):
        assert "".join(words.split()) in text if width == 40 else words.split()[-1] in text
    assert "528×" in text
    assert "non-finite" in text


def test_every_layer_is_named_and_every_reason_explained():
    text = " ".join(render(_result(), "rich", width=200).split())
    for word in ("layer1.0-2.conv1-2", "layer2.0-2.conv1-2", "×6", "stem", "fc1", "fc3", "×12"):
        assert word in text
    assert "blocks.0-11.attn.qkv" in text
    assert "for example read by blocks.0.attn" in text
    for skip in PLAN.skips:
        assert skip.reason.value in text
        assert skip.reason.sentence in text
    assert "14 of 28 layers got norms; 14 left alone" in text
    assert "77.4 %" in text
    assert "batch size 8" in text


def test_the_verdict_is_a_word_whatever_the_colour():
    for color in (False, True):
        assert "PASS" in render(_result(), "rich", color=color)
        assert "FAIL" in render(_result(verification=BAD), "rich", color=color)
        assert "NOT VERIFIED" in render(_result(verification=None), "rich", color=color)
    assert "\x1b[" in render(_result(), "rich", color=True)
    assert "\x1b[" not in render(_result(), "rich", color=False)


def test_a_failed_onnx_file_is_the_verdict_even_after_a_good_insertion():
    export = SimpleNamespace(**{**vars(ABOUT["export"]), "verification": BAD})
    last = render(_result(), "rich", width=200, export=export).rstrip().splitlines()[-1]
    assert last.startswith("FAIL")


def test_nothing_to_insert_says_so():
    none = Plan(verb="insert", edits=(), skips=PLAN.skips, fingerprint=PLAN.fingerprint)
    text = render(_result(none), "rich", width=200)
    assert "Nothing to insert: all 14 layers are left alone" in text
    assert "In train mode" not in text, "nothing was inserted, so nothing drifts"
    empty = Plan(verb="insert", edits=(), skips=(), fingerprint=PLAN.fingerprint)
    assert "the model runs no Linear and no Conv" in render(_result(empty), "rich", width=200)


def test_many_rows_are_collapsed_over_their_channels():
    edits = tuple(
        Edit(layer=f"blocks.{i}.conv", layer_type="Conv2d", channels=8 + i) for i in range(60)
    )
    plan = Plan(verb="insert", edits=edits, skips=(), fingerprint=PLAN.fingerprint)
    text = render(_result(plan), "rich", width=100)
    assert "blocks.0-59.conv" in text
    assert "8 to 67" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "no-such-encoding"])
def test_ascii_where_the_output_lacks_characters(encoding):
    text = render(_result(), "rich", encoding=encoding)
    if encoding in ("ascii", "latin-1"):
        text.encode(encoding)
    assert "gamma >= 0" in text
    assert "─" not in text


def test_control_characters_of_user_code_do_not_reach_the_terminal():
    skip = Skip(
        layer="a\x1b[2Jb", layer_type="Conv2d", reason=Reason.EXCLUDED, detail="x\x07\u202ey"
    )
    plan = Plan(verb="insert", edits=(), skips=(skip,), fingerprint=PLAN.fingerprint)
    for fmt in ("rich", "md"):
        text = render(_result(plan), fmt)
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "\x1b" not in render_error(BnifyError("bad \x1b[31mred"), "insert", "rich")


def test_markup_and_markdown_of_user_code_mean_themselves():
    assert "[red]odd[/red]|name" in render(_result(), "rich", width=200)
    row = next(line for line in render(_result(), "md").splitlines() if "odd" in line)
    assert row.startswith("| `[red]odd[/red]\\|name` |")


def test_json_is_strict_and_complete():
    def no_constants(text: str) -> float:
        raise AssertionError(f"{text} is no JSON")

    text = render(_result(verification=BAD), "json", **ABOUT)
    data = json.loads(text, parse_constant=no_constants)
    assert data["schema"] == 1
    assert data["verb"] == "insert"
    assert len(data["plan"]["edits"]) == 14
    assert data["plan"]["skips"][12] == {
        "layer": "fc3",
        "layer_type": "Linear",
        "reason": "output-head",
        "detail": "",
    }
    assert data["verification"]["passed"] is False
    assert data["verification"]["outputs"][0]["rel_l2"] == "nan"
    assert data["verification"]["checks"][0]["error"] == "inf"
    assert data["files"]["onnx"] == "out/model.onnx"
    assert data["export"]["opset"] == 20
    assert data["environment"]["seed"] == 7
    assert data["code"].startswith("def forward")


def test_json_of_the_other_kinds():
    assert json.loads(render(GOOD, "json"))["verb"] == "verify"
    export = json.loads(render(ABOUT["export"], "json"))
    assert export["verb"] == "export"
    assert export["files"] == {"onnx": "out/model.onnx"}
    assert export["norms_before"] == {"BatchNormalization": 14}


def test_errors_in_every_format():
    error = CaptureError("cannot capture Net: it branches", hint="pass real inputs\nor exclude it")
    text = render_error(error, "insert", Format.RICH)
    assert text.splitlines() == [
        "error: cannot capture Net: it branches",
        "  try: pass real inputs",
        "       or exclude it",
    ]
    assert "cannot capture" in render_error(error, "insert", "md")
    assert json.loads(render_error(error, "insert", "json")) == {
        "schema": 1,
        "verb": "insert",
        "error": {
            "kind": "CaptureError",
            "message": "cannot capture Net: it branches",
            "hint": "pass real inputs\nor exclude it",
        },
    }
    assert render_error(BnifyError("γ"), None, "rich", encoding="ascii") == "error: ?\n"


def test_a_failed_verification_brings_its_numbers():
    error = VerificationError("wrong", result=_result(verification=BAD))
    data = json.loads(render_error(error, "insert", "json"))
    assert data["error"]["kind"] == "VerificationError"
    assert data["verification"]["first_divergent"] == "fc1.norm"
    assert data["plan"]["edits"]


def test_one_is_no_plural():
    def said(edits: int, skips: int) -> str:
        plan = dataclasses.replace(PLAN, edits=PLAN.edits[:edits], skips=PLAN.skips[:skips])
        result = Result(nn.Identity(), fx.GraphModule({}, fx.Graph()), plan, None, Call(()))
        return render(result, "md").splitlines()[2]

    assert said(1, 1) == "1 of 2 layers got a norm; 1 left alone, for the reason below."
    assert said(2, 2) == "2 of 4 layers got norms; 2 left alone, each for the reason below."
    assert said(1, 0) == "1 of 1 layer got a norm."
    assert said(0, 1).endswith("the one layer is left alone, for the reason below.")


def test_wrapped_lines_of_a_list_keep_their_indent():
    text = render(_result(verification=BAD), "rich", width=40)
    lines = text.splitlines()
    row = lines.index("    Why: query, key, value or output")
    assert lines[row + 1].startswith("    projection of attention")


def test_headings_wrap_before_a_table_becomes_a_list():
    text = render(BAD, "rich", width=76, target="a b")
    assert "Allclose at" not in text
    assert "Output: logits" not in text
    assert max(map(len, text.splitlines())) <= 76
