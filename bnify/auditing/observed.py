"""What a training loop shows of its norms: their calls in the first steps, and their updates."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Calls:
    """The calls of one norm in train mode, in the passes that were looked at.

    Attributes:
        batch: Whether it is a batch norm; a tracked instance norm has other counts per statistic.
        total: How many calls; what a checkpoint repeats in the backward pass is not counted.
        values: Fewest values that shared a channel (on all devices, if synchronised).
        samples: Batch size of the pass with the fewest.
        synchronised: Whether it is a SyncBatchNorm.
        per_pass: Most calls in one forward pass of the model.
        different: Most different tensors that it was given in one.
        without_gradient: Calls under ``no_grad`` or ``inference_mode`` that no checkpoint repeated.
    """

    batch: bool = True
    total: int = 0
    values: int | None = None
    samples: int = 0
    synchronised: bool = False
    per_pass: int = 0
    different: int = 0
    without_gradient: int = 0


@dataclass(frozen=True, slots=True)
class Burst:
    """More updates of running statistics before one optimizer step than before those beside it.

    Attributes:
        step: The optimizer step.
        writes: How often the statistics were written before it.
        usual: The more of those before the steps beside it.
    """

    step: int
    writes: int
    usual: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What was seen of a training loop; norms go by their path.

    Attributes:
        calls: The calls of each norm in the first steps.
        bursts: Norms whose statistics were updated out of step.
        still: Of an averaged model: norms whose statistics are those of the start, while those of
            the model that is averaged have moved.
    """

    calls: Mapping[str, Calls] = field(default_factory=dict)
    bursts: Mapping[str, Burst] = field(default_factory=dict)
    still: Set[str] = frozenset()
