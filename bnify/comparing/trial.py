"""One training run and what came of it: plain data, one JSON file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training run. Two trials that are equal have equal results on the same machine.

    Attributes:
        norm: The arm: a kind of norm, ``"none"`` or ``"as-is"``.
        lr: Learning rate.
        batch_size: Samples per step.
        init_scale: Factor on the initial weights (not on biases, scales and shifts).
        steps: Optimizer steps.
        seed: Of initial weights, batch order and whatever is random in the forward pass.
    """

    norm: str
    lr: float
    batch_size: int
    steps: int
    seed: int
    init_scale: float = 1.0

    @property
    def key(self) -> str:
        """A name for files: ``"batch-lr0.1-b32-x1-n500-s3"``."""
        return (
            f"{self.norm}-lr{self.lr:g}-b{self.batch_size}-x{self.init_scale:g}"
            f"-n{self.steps}-s{self.seed}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a trial. Lists run along ``steps``, the steps after which it was looked at.

    "Metric" is the accuracy (0 to 1) of a classification, and the loss otherwise. A run that
    diverged is worth what the most frequent class is, or the loss of the untrained model, on the
    same data: finite numbers.

    Attributes:
        trial: What was run.
        steps: Steps done at each look; the first is 0, before training.
        train: Metric on a fixed sample of the training data, in eval mode; the last one on a larger
            sample.
        train_loss: Loss on that sample.
        validation: Metric on a fixed sample of the validation data, in eval mode.
        validation_loss: Loss on that sample.
        spread: Largest over smallest gradient norm per weight norm, over the layers' weights, of
            the step that came before the look (of the first step, at 0).
        final_validation: Metric on all validation data at the end.
        test: Metric on the test data at the end.
        test_loss: Loss on the test data at the end; infinite where it diverged.
        diverged: Step at which the loss was no longer finite; None where it always was.
        seconds: Wall-clock time of the training steps, looks left out. Not reproducible.
        elapsed: Seconds since the comparison began when it was finished. Not reproducible.
        error: One line, where the user's code raised; then the rest is empty.
    """

    trial: Trial
    steps: tuple[int, ...] = ()
    train: tuple[float, ...] = ()
    train_loss: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()
    validation_loss: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    final_validation: float = 0.0
    test: float = 0.0
    test_loss: float = 0.0
    diverged: int | None = None
    seconds: float = 0.0
    elapsed: float = 0.0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The outcome as data for :func:`bnify.strict_json.dumps`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` and ``dumps`` wrote, bit for bit.

        Raises:
            KeyError: An entry is missing.
            TypeError: An entry is of another type, or unknown.
            ValueError: A number is none.
        """
        values = dict(data)
        for field in fields(cls):
            value = values[field.name]
            if isinstance(value, list):
                values[field.name] = tuple(
                    int(v) if field.name == "steps" else float(v) for v in value
                )
            elif isinstance(value, str) and field.name != "error":  # "inf" and "nan"
                values[field.name] = float(value)
        return cls(**{**values, "trial": Trial(**data["trial"])})
