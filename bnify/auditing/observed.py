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
    """More updates of running statistics before one optimizer step than before others.

    Attributes:
        step: The optimizer step; after the last one, that which would be the next.
        writes: How often the statistics were written since the step before it.
        usual: How often they were written at most between other steps that are alike.
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
        trained: Norms whose scale or shift took gradients in the last ten steps.
        ungraded: Norms whose statistics moved in so many last steps, while scale and shift, which
            take gradients, got none.
        still: Of an averaged model: norms whose statistics are those of the last look, while those
            of the model that is averaged have moved.
    """

    calls: Mapping[str, Calls] = field(default_factory=dict)
    bursts: Mapping[str, Burst] = field(default_factory=dict)
    trained: Set[str] = frozenset()
    ungraded: Mapping[str, int] = field(default_factory=dict)
    still: Set[str] = frozenset()
