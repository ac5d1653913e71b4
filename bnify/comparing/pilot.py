"""How long a training step takes with each norm, measured side by side before anything is run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import nn

from bnify.borrow import seeded
from bnify.comparing.training import Setup, backward, make_optimizer
from bnify.errors import BnifyError, SpecError
from bnify.spec.usercode import user_code

if TYPE_CHECKING:
    from bnify.comparing.arms import ArmPlan

_WARM_UP: Final = 2
_ROUNDS: Final = 31
_LEAST: Final = 3
#: A turn is at least this long, in seconds: one step of a small model is shorter than the noise.
_TURN: Final = 0.004


@dataclass(frozen=True, slots=True, kw_only=True)
class Pilot:
    """Times of training steps: wall clock, in one process, without another trial beside it.

    Attributes:
        step_ms: Norm → median milliseconds a step at the usual batch size.
        ratio: Norm → median over rounds of its time to the reference's in the same round.
        size_ms: Batch size → median milliseconds of the reference's step.
        failed: Norm → why it cannot be trained, one line.
        loading: Seconds that model and data took to load.
    """

    step_ms: Mapping[str, float]
    ratio: Mapping[str, float]
    size_ms: Mapping[int, float]
    failed: Mapping[str, str] = field(default_factory=dict)
    loading: float = 0.0

    def seconds(self, norm: str, batch_size: int, usual: int) -> float:
        """Seconds of a step of this norm at this batch size."""
        share = self.size_ms.get(batch_size, 1.0) / self.size_ms.get(usual, 1.0)
        return self.step_ms[norm] * share / 1000

    def to_dict(self) -> dict[str, Any]:
        """The times as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote; JSON made texts of the batch sizes."""
        sizes = {int(size): float(ms) for size, ms in data["size_ms"].items()}
        return cls(**{**data, "size_ms": sizes})


def measure_steps(
    build: Callable[[int], nn.Module],
    arms: Sequence[ArmPlan],
    setup: Setup,
    *,
    reference: str,
    sizes: Sequence[int],
    seconds: float,
    loading: float = 0.0,
) -> Pilot:
    """Time the steps of all arms in turns, then the reference's at other batch sizes.

    Args:
        build: The model's factory.
        arms: Those that can be run.
        setup: Data, loss and optimizer.
        reference: The arm that ratios are to.
        sizes: Batch sizes of a sweep.
        seconds: About how long to measure; at least three rounds are made.
        loading: To be kept with the rest.

    Raises:
        SpecError: The reference cannot be trained at a batch size.
    """
    usual = setup.question.batch_size
    failed: dict[str, str] = {}
    turns: dict[str, Callable[[], float]] = {}
    for arm in arms:
        try:
            with user_code(f"training with {arm.norm}"):
                turns[arm.norm] = _turn(arm.build(build(0)), setup, usual)
        except BnifyError as error:
            failed[arm.norm] = error.message
    spent = _interleaved(turns, seconds * 0.7, failed)
    medians = {norm: statistics.median(times) * 1000 for norm, times in spent.items()}
    base = spent.get(reference, [])
    ratio = {
        norm: statistics.median(a / b for a, b in zip(times, base, strict=True))
        for norm, times in spent.items()
        if base
    }
    size_ms: dict[int, float] = {}
    plain = next((arm for arm in arms if arm.norm == reference), None)
    if plain is not None and reference in spent:
        named = {f"batches of {size}": size for size in sorted({usual, *sizes})}
        others = {}
        for name, size in named.items():
            with user_code(f"training with {name}"):
                others[name] = _turn(plain.build(build(0)), setup, size)
        refused: dict[str, str] = {}
        size_ms = {
            named[name]: statistics.median(times) * 1000
            for name, times in _interleaved(others, seconds * 0.3, refused).items()
        }
        if refused:
            raise SpecError(next(iter(refused.values())), hint="mend the model or the loss")
    return Pilot(step_ms=medians, ratio=ratio, size_ms=size_ms, failed=failed, loading=loading)


def _turn(model: nn.Module, setup: Setup, batch_size: int) -> Callable[[], float]:
    """What trains for a few steps and returns the seconds of one; warmed up."""
    model = model.to(setup.device).train()
    optimizer = make_optimizer(model, setup.question.grid[0], setup.question)
    indices = torch.arange(min(batch_size, len(setup.data.train)))
    repeats = 1

    def run() -> float:
        with seeded(0):
            _wait(setup.device)
            started = time.perf_counter()
            for _ in range(repeats):
                if backward(model, optimizer, indices, setup):
                    optimizer.step()
            _wait(setup.device)
            return (time.perf_counter() - started) / repeats

    for _ in range(_WARM_UP):
        took = run()
    repeats = max(1, round(_TURN / max(took, 1e-9)))
    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _interleaved(
    turns: Mapping[str, Callable[[], float]], seconds: float, failed: dict[str, str]
) -> dict[str, list[float]]:
    """Times of all sides, round after round, in alternating order; one that raises is out."""
    spent: dict[str, list[float]] = {name: [] for name in turns}
    started = time.perf_counter()
    for number in range(_ROUNDS if turns else 0):
        if number >= _LEAST and time.perf_counter() - started >= seconds:
            break
        for name in sorted(spent, reverse=bool(number % 2)):
            try:
                with user_code(f"training with {name}"):
                    spent[name].append(turns[name]())
            except BnifyError as error:
                failed[name] = error.message
                del spent[name]
    return spent
