"""Fold every model of the zoo with bnify and with every other tool: norms left, answers, time.

    python benchmarks/fold_zoo.py [--only 'timm:rep*'] [--quick] [--json fold_zoo.json]

Norms are counted by the operators that one eval forward executes, batch norm in any spelling; a
multiplication by one number per channel that a tool leaves in a norm's place counts as a norm
left. All statistics are hostile. The truth is the original in float64. An answer is wrong when its
error against the truth is above 10 times the float32 original's own, and above 1e-6. bnify's folds
are judged in float64 too, unverified by itself: wrong above max(1e-12, 100 times what a random
change of the weights by one ulp does).

Fails if a fold of bnify is wrong or changes the model, if it leaves norms without giving as many
reasons, or if another tool leaves fewer norms, or fewer LayerScales, than bnify with ``merge`` (and
``affines``).
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "stub"), str(TESTS), str(TESTS.parent / "examples")]

import torch
from fold_models import MODELS, QUICK, Entry, hostile
from peers import PEERS, NothingToDo, Peer, Unavailable, quietly
from torch import Tensor, nn

import counting
import laws
import torchvision_ops
from counting import NormCount, count_norms

torchvision_ops.install()
K = 10.0
FLOOR = 1e-6
LEAST_EXACT = 1e-12
#: One-ulp noise above which float64 cannot decide either.
ILL = 1e-6


def _fold(**options: Any) -> Callable[[nn.Module, Any], Any]:
    def fold(model: nn.Module, inputs: Any) -> Any:
        import bnify

        return bnify.fold(model, inputs, verify=False, **options)

    return fold


OURS = (
    Peer("fold", _fold(), "bnify.fold(model, inputs)"),
    Peer("merge", _fold(merge=True), "bnify.fold(model, inputs, merge=True)"),
    Peer("affines", _fold(merge=True, affines=True), "bnify.fold(..., merge=True, affines=True)"),
)
TOOLS = (*OURS, *PEERS)


@dataclass
class Outcome:
    """What one tool made of one model.

    Attributes:
        tool: Its short name.
        failure: Why there is no folded model; empty where there is one.
        left: Norms left.
        scales: LayerScales and the like left, but for those that multiply by 1.
        neutral: Multiplications by 1 left, where a forward writes them out.
        convolutions: Convolutions executed.
        seconds: CPU seconds of folding.
        error: Against the float64 original, in float32.
        exact: The same in float64 (bnify only); ``allowed`` is the bound.
        wrong: Why the answer is wrong; empty where it is right.
        reasons: Norms left by reason (bnify only).
    """

    tool: str
    failure: str = ""
    left: int = 0
    scales: int = 0
    neutral: int = 0
    convolutions: int = 0
    seconds: float = 0.0
    error: float = 0.0
    exact: float | None = None
    allowed: float | None = None
    wrong: str = ""
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def cell(self) -> str:
        """One entry of the table: norms left, marked where the answer is wrong."""
        if self.failure:
            return "–"
        return f"{self.left}{'!' if self.wrong else ''}"


@dataclass
class Row:
    """One model: what it runs, its own float32 error, and every tool's outcome."""

    name: str
    norms: int
    layer_scales: int
    convolutions: int
    own_error: float
    noise: float
    outcomes: dict[str, Outcome]


# -- one model -------------------------------------------------------------------------------------


class Truth:
    """The original in float64, and what its float32 run and its weights' last bits are worth."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.outputs = laws.run64(model, inputs)
        self.own_error = laws.worst_error(self.outputs, counting.call(model, inputs))
        self.noise = laws.one_ulp_noise(model, inputs)
        self.allowed = max(LEAST_EXACT, 100 * self.noise)

    def wrong(self, got: list[Tensor]) -> tuple[float, str]:
        """Error of a float32 answer, and why it is wrong."""
        error, most = laws.worst_error(self.outputs, got), max(K * self.own_error, FLOOR)
        if error <= most:
            return error, ""
        return error, f"float32 error {error:.1e}, allowed {most:.1e}"


def measure(entry: Entry) -> Row | None:
    """Fold one model with every tool; None for a model without norms and LayerScales."""
    model, inputs = hostile(entry), entry.inputs()
    before = count_norms(copy.deepcopy(model), inputs)
    layer_scales = before.scales - before.frozen
    if not before.affine and not layer_scales:
        return None
    truth = Truth(model, inputs)
    outcomes = {}
    for tool in TOOLS:
        if tool.name == "affines" and not layer_scales:
            continue  # the same as merge
        outcomes[tool.name] = _outcome(tool, model, inputs, before, truth)
        gc.collect()
    return Row(
        entry.name,
        before.affine,
        layer_scales,
        before.convolutions,
        truth.own_error,
        truth.noise,
        outcomes,
    )


def _outcome(tool: Peer, model: nn.Module, inputs: Any, before: NormCount, truth: Truth) -> Outcome:
    outcome = Outcome(tool.name)
    ours = tool in OURS
    print_of_it = fingerprint(model)
    try:
        started = time.process_time()
        made = quietly(tool, model, inputs)
        outcome.seconds = time.process_time() - started
        folded = made.model if ours else made
        after = count_norms(folded, inputs)
        outcome.error, outcome.wrong = truth.wrong(counting.call(folded, inputs))
    except (Unavailable, NothingToDo) as reason:
        outcome.failure = f"{type(reason).__name__}: {reason}"
        return outcome
    except Exception as error:  # a benchmark reports what any tool raises and goes on
        first = str(error).strip().splitlines() or [""]
        outcome.failure = f"{type(error).__name__}: {first[0][:100]}"
        return outcome
    outcome.left, outcome.convolutions = after.left(before), after.convolutions
    outcome.scales, outcome.neutral = after.scales - after.neutral, after.neutral
    if ours:
        outcome.reasons = dict(Counter(str(skip.reason) for skip in made.plan.skips))
        del made, folded
        _judge_in_float64(outcome, tool, model, inputs, truth)
    if fingerprint(model) != print_of_it:
        outcome.wrong = "the original was changed"
    return outcome


def _judge_in_float64(
    outcome: Outcome, tool: Peer, model: nn.Module, inputs: Any, truth: Truth
) -> None:
    """Fold a float64 copy, whose weights are not rounded, and compare within the one-ulp rule."""
    outcome.allowed = truth.allowed
    args, kwargs = counting.map_tree(_double, counting.arguments(inputs))
    wide = _Call(args, kwargs)
    try:
        folded = quietly(tool, copy.deepcopy(model).double(), bnify_call(wide)).model
        outcome.exact = laws.worst_error(truth.outputs, counting.call(folded, wide))
    except Exception as error:  # as above
        first = str(error).strip().splitlines() or [""]
        outcome.wrong = f"in float64 {type(error).__name__}: {first[0][:100]}"
        return
    if outcome.exact > truth.allowed:
        outcome.wrong = f"float64 error {outcome.exact:.1e}, allowed {truth.allowed:.1e}"


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def bnify_call(call: _Call) -> Any:
    """The inputs as bnify takes them."""
    from bnify.structure import Call

    return Call(call.args, call.kwargs)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes with any number, mode, class or name in the model."""
    numbers = 0
    for tensor in (*model.parameters(), *model.buffers()):
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        numbers = zlib.crc32(memoryview(data), numbers)
    modules = tuple((n, type(m), m.training) for n, m in model.named_modules())
    return numbers, hash(modules), hash(tuple(model.state_dict()))


# -- what is printed -------------------------------------------------------------------------------


def header(tools: tuple[Peer, ...]) -> str:
    """The first line of the table."""
    names = "".join(f"{tool.name:>11}" for tool in tools)
    return f"{'model':40}{'norms':>6}{names}   convs{'fold s':>9}{'freeze s':>9}{'fuse s':>8}"


def line(row: Row, tools: tuple[Peer, ...]) -> str:
    """One model: norms left by each tool, convolutions before → after merging, seconds."""
    cells = "".join(
        f"{row.outcomes[t.name].cell if t.name in row.outcomes else '':>11}" for t in tools
    )
    merged = row.outcomes["merge"]
    convolutions = "" if merged.failure else f"{row.convolutions:>4}→{merged.convolutions}"
    times = "".join(
        f"{'–' if row.outcomes[name].failure else format(row.outcomes[name].seconds, '.2f'):>{w}}"
        for name, w in (("fold", 9), ("jit.freeze", 9), ("fx.fuse", 8))
    )
    return f"{row.name:40}{row.norms:>6}{cells}  {convolutions:9}{times}"


def summary(rows: list[Row]) -> Iterator[str]:
    """Each tool over all models that have norms, and LayerScales over those that have them."""
    scaled = [row for row in rows if row.layer_scales and not row.outcomes["affines"].failure]
    if scaled:
        before = sum(row.layer_scales for row in scaled)
        after = sum(row.outcomes["affines"].scales for row in scaled)
        freeze = sum(row.outcomes["jit.freeze"].scales for row in scaled)
        neutral = sum(row.outcomes["affines"].neutral for row in scaled)
        yield (
            f"LayerScales and the like in {len(scaled)} models: {before}; left with affines "
            f"{after} (and {neutral} that multiply by 1), by jit.freeze {freeze}"
        )
    rows = [row for row in rows if row.norms]
    total = sum(row.norms for row in rows)
    if not total:
        return
    yield f"{len(rows)} models, {total} norms executed"
    yield f"{'tool':12}{'models':>8}{'norms folded':>16}{'complete':>10}{'wrong':>7}"
    for tool in TOOLS:
        found = [(row, row.outcomes[tool.name]) for row in rows if tool.name in row.outcomes]
        done = [(row, o) for row, o in found if not o.failure and not o.wrong]
        if tool.name == "affines" or not any(not o.failure for _, o in found):
            continue
        folded = sum(row.norms - o.left for row, o in done)
        complete = sum(o.left == 0 for _, o in done)
        wrong = sum(bool(o.wrong) for _, o in found)
        yield (
            f"{tool.name:12}{len(done) + wrong:>8}{folded:>9}{folded / total:>7.1%}"
            f"{complete:>4}{complete / len(rows):>6.0%}{wrong:>7}"
        )
    best = sum(row.norms - min(_lefts(row, PEERS), default=row.norms) for row in rows)
    yield f"{'best of all others':20}{best:>17}{best / total:>7.1%}"
    for name in ("fold", "merge"):
        reasons: Counter[str] = Counter()
        for row in rows:
            reasons.update(row.outcomes[name].reasons)
        if reasons:
            words = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            yield f"{name}, reasons of all norms that stay (other kinds too): {words}"


def _lefts(row: Row, tools: tuple[Peer, ...]) -> Iterator[int]:
    for tool in tools:
        outcome = row.outcomes.get(tool.name)
        if outcome is not None and not outcome.failure and not outcome.wrong:
            yield outcome.left


def faults(rows: list[Row]) -> Iterator[str]:
    """What must not be: wrong answers of ours, and models where another tool leaves fewer."""
    for row in rows:
        for tool in OURS:
            outcome = row.outcomes.get(tool.name)
            if outcome is not None and outcome.wrong and row.noise > ILL:
                yield f"note: {row.name} is ill-conditioned ({row.noise:.0e}): {outcome.wrong}"
            elif outcome is not None and outcome.wrong:
                yield f"WRONG {row.name}, {tool.name}: {outcome.wrong}"
            elif outcome is not None and outcome.failure:
                yield f"FAIL {row.name}, {tool.name}: {outcome.failure}"
            elif outcome is not None and sum(outcome.reasons.values()) < outcome.left:
                named = sum(outcome.reasons.values())
                yield f"SILENT {row.name}, {tool.name}: {outcome.left} left, {named} reasons"
        ours = row.outcomes["merge"]
        for tool in PEERS:
            other = row.outcomes[tool.name]
            if other.wrong:
                yield f"note: {row.name}, {tool.name} is wrong: {other.wrong}"
            if other.failure or other.wrong or ours.failure:
                continue
            affines = row.outcomes.get("affines")
            if affines is not None and not affines.failure and other.scales < affines.scales:
                yield (
                    f"FEWER {row.name}: {tool.name} leaves {other.scales} LayerScales, "
                    f"affines {affines.scales}"
                )
            if other.left < ours.left:
                yield f"FEWER {row.name}: {tool.name} leaves {other.left}, merge {ours.left}"
            if other.left <= ours.left and other.convolutions < ours.convolutions:
                yield (
                    f"FEWER {row.name}: {tool.name} leaves {other.convolutions} convolutions, "
                    f"merge {ours.convolutions}"
                )


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="a pattern, as of file names")
    parser.add_argument("--quick", action="store_true", help="one model of each family")
    parser.add_argument("--json", default="", metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tools = tuple(t for t in TOOLS if t.name not in ("affines", "aimet"))
    rows: list[Row] = []
    print(header(tools))
    for entry in MODELS:
        names = (entry.name, entry.name.partition(":")[2])
        if options.quick and entry.name not in QUICK:
            continue
        if options.only and not any(fnmatch.fnmatch(name, options.only) for name in names):
            continue
        try:
            row = measure(entry)
        except Exception as error:  # a model that cannot be built here is no tool's fault
            print(f"{entry.name:40} not measured: {type(error).__name__}: {error}", flush=True)
            continue
        if row is not None:
            rows.append(row)
            print(line(row, tools), flush=True)
        gc.collect()
    print("\nnorms left; ! wrong answer, – not processed; convolutions before→after merge\n")
    print("\n".join(summary(rows)))
    found = list(faults(rows))
    print("\n".join(("", *found)) if found else "\nno fault")
    if options.json:
        data = {
            "torch": torch.__version__,
            "threads": 1,
            "rows": [asdict(row) for row in rows],
            "faults": found,
        }
        Path(options.json).write_text(json.dumps(data, indent=1), encoding="utf-8")
    return 1 if any(not fault.startswith("note") for fault in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
