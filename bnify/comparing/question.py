"""What is asked of a comparison: its options, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from bnify.errors import UsageError
from bnify.norms import KINDS

#: The arms that are no norm: the model without norms, and a model with its own.
PLAIN: Final = ("none", "as-is")
NORMS: Final = ("none", "batch", "batch-noaffine", "group", "layer", "instance", "rms")
#: Of the default norms, those that a budget drops, the first one first.
DROPPED_FIRST: Final = ("rms", "batch-noaffine", "instance")
OPTIMIZERS: Final = ("sgd", "adam", "adamw")
SWEEPS: Final = ("lr", "batch", "init")
#: Half-decades. Adaptive optimizers scale their steps themselves and want about a tenth.
LEARNING_RATES: Final[Mapping[str, tuple[float, ...]]] = {
    "sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "adam": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    "adamw": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}
BATCH_SIZES: Final = (2, 8, 32, 128)
INIT_SCALES: Final = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The options of ``bnify.compare`` that shape the numbers; see there for their meaning."""

    norms: tuple[str, ...] = NORMS
    #: Ten: six norms need 8 and ten claims 9 for Holm's correction to reach 5 % at all.
    seeds: int = 10
    budget: float = 120.0
    epochs: float = 15.0
    batch_size: int = 32
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    lrs: tuple[float, ...] = ()
    tuning_seeds: int = 2
    sweep: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    init_scales: tuple[float, ...] = INIT_SCALES
    target: float | None = None
    task: str = "auto"
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be right whatever the model is.

        Raises:
            UsageError: An unknown word, a number out of range.
        """
        known = {"norms": (*PLAIN, *KINDS), "sweep": SWEEPS}
        for name, words in known.items():
            for word in getattr(self, name):
                if word not in words or word == "auto":
                    raise UsageError(
                        f"unknown {name.removesuffix('s')} {word!r}",
                        hint="one of: " + ", ".join(w for w in words if w != "auto"),
                    )
        for name, words in (
            ("optimizer", OPTIMIZERS),
            ("task", ("auto", "classification", "regression")),
        ):
            if getattr(self, name) not in words:
                raise UsageError(
                    f"unknown {name} {getattr(self, name)!r}", hint="one of: " + ", ".join(words)
                )
        if not self.norms:
            raise UsageError("no norms to compare", hint="norms=" + ",".join(NORMS))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not (least <= number < math.inf):
                    raise UsageError(f"{name}={number:g} is out of range", hint=f"from {least:g}")
        for name in ("lrs", "init_scales"):
            if not all(0 < number < math.inf for number in getattr(self, name)):
                raise UsageError(f"{name} are numbers above 0", hint=f"{name}=0.01,0.1,1")
        if not 0 < self.epochs < math.inf:
            raise UsageError(f"epochs={self.epochs:g} is out of range", hint="epochs=15")
        if self.target is not None and not math.isfinite(self.target):
            raise UsageError(f"target={self.target:g} is no target", hint="target=0.95")
        if not 0 <= self.seed < _MOST_SEEDS:
            raise UsageError(f"seed={self.seed} is out of range", hint=f"0 to {_MOST_SEEDS - 1}")

    @property
    def grid(self) -> tuple[float, ...]:
        """The learning rates to try, ascending."""
        return tuple(sorted(set(self.lrs or LEARNING_RATES[self.optimizer])))

    def to_dict(self) -> dict[str, Any]:
        """The question as JSON-ready data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


_MOST_SEEDS: Final = 2**31
_LEAST: Final[Mapping[str, float]] = {
    "seeds": 2,
    "budget": 0,
    "batch_size": 1,
    "momentum": 0,
    "weight_decay": 0,
    "tuning_seeds": 1,
    "batch_sizes": 1,
}
