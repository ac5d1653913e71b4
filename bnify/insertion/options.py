"""What a user can ask of an insertion, checked before any work is done."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import nn

from bnify.errors import OptionsError, PlanError, UsageError
from bnify.norms import AFFINE_KINDS, BATCH_KINDS, check_kind

POSITIONS: Final = ("before-act", "after-act")
INITS: Final = ("reset", "preserve", "stats")


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertOptions:
    """The options of ``bnify.insert`` that shape the plan; see there for their meaning."""

    norm: str = "batch"
    position: str = "before-act"
    init: str = "reset"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    batch_size: int | None = None
    eps: float | None = None
    momentum: float | None = None
    groups: int | None = None
    drop_bias: bool = False
    zero_gamma: bool = False
    per_call: bool = False
    skip_frozen: bool = False

    @property
    def after_act(self) -> bool:
        """Whether norms go behind the activation."""
        return self.position == "after-act"

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, JSON-ready."""
        default = InsertOptions()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value != getattr(default, name)
        }

    def check(self) -> None:
        """Refuse what cannot be right whatever the model is.

        Raises:
            UsageError: An unknown word or a number out of range.
            OptionsError: Options that contradict each other.
        """
        check_kind(self.norm)
        if self.position not in POSITIONS:
            raise UsageError(
                f"unknown position {self.position!r}", hint="one of: " + ", ".join(POSITIONS)
            )
        if self.init not in INITS:
            raise UsageError(f"unknown init {self.init!r}", hint="one of: " + ", ".join(INITS))
        for name in ("batch_size", "eps", "momentum", "groups"):
            value = getattr(self, name)
            whole = name in ("batch_size", "groups")
            if value is not None and not isinstance(value, int if whole else (int, float)):
                raise UsageError(f"{name}={value!r} is no number", hint=_RANGES[name])
        for name, value, good in (
            ("batch_size", self.batch_size, self.batch_size is None or self.batch_size >= 1),
            ("eps", self.eps, self.eps is None or 0 < self.eps < math.inf),
            ("momentum", self.momentum, self.momentum is None or 0 < self.momentum <= 1),
            ("groups", self.groups, self.groups is None or self.groups >= 1),
        ):
            if not good:
                raise UsageError(f"{name}={value} is out of range", hint=_RANGES[name])
        if self.init == "preserve" and self.norm not in ("batch", "sync"):
            raise OptionsError(
                f"init='preserve' needs a batch norm with scale and shift, not {self.norm!r}",
                hint="use norm='batch', or init='reset'",
            )
        if self.init == "stats" and self.norm not in BATCH_KINDS:
            raise OptionsError(
                f"init='stats' needs a norm with running statistics, not {self.norm!r}",
                hint="use norm='batch', or init='reset'",
            )
        if self.init == "preserve" and self.zero_gamma:
            raise OptionsError(
                "zero_gamma changes the function, init='preserve' keeps it",
                hint="use init='reset' with zero_gamma",
            )
        if self.init == "stats" and self.zero_gamma:
            raise OptionsError(
                "zero_gamma is for training from scratch, init='stats' for trained weights",
                hint="use init='reset' with zero_gamma",
            )
        if self.zero_gamma and self.norm not in AFFINE_KINDS | {"auto"}:
            raise OptionsError(f"{self.norm} has no scale to zero", hint="use norm='batch'")
        if self.drop_bias and self.norm not in BATCH_KINDS:
            raise OptionsError(
                f"drop_bias needs a batch norm: {self.norm!r} subtracts no mean per channel",
                hint="leave drop_bias out, or use norm='batch'",
            )
        if self.drop_bias and self.after_act:
            raise OptionsError(
                "drop_bias cannot pass an activation", hint="use position='before-act'"
            )
        if self.groups is not None and self.norm not in ("group", "auto"):
            raise OptionsError(f"groups is for group norm, not {self.norm!r}", hint="norm='group'")


_RANGES: Final = {
    "batch_size": "a whole number from 1",
    "eps": "a number above 0",
    "momentum": "a number above 0, at most 1",
    "groups": "a whole number from 1",
}


class Selection:
    """Which layers ``include``, ``exclude`` and ``only`` name.

    Raises:
        PlanError: A glob matches no layer.
    """

    def __init__(
        self,
        options: InsertOptions,
        layers: Sequence[tuple[tuple[str, ...], nn.Module | None]],
    ) -> None:
        self._options = options
        for option in ("include", "exclude", "only"):
            for glob in getattr(options, option):
                if not any(_matches(glob, names, module) for names, module in layers):
                    known = ", ".join(names[0] or "(root)" for names, _ in layers[:5])
                    raise PlanError(
                        f"{option} {glob!r} matches no Linear or Conv",
                        hint=f"layers are: {known}{', ...' if len(layers) > 5 else ''}",
                    )

    def excluded(self, names: tuple[str, ...], module: nn.Module | None) -> str | None:
        """Why the options leave this layer out, or None."""
        for glob in self._options.exclude:
            if _matches(glob, names, module):
                return f"by exclude {glob!r}"
        if self._options.only and not any(_matches(g, names, module) for g in self._options.only):
            return "not named by only"
        return None

    def included(self, names: tuple[str, ...], module: nn.Module | None) -> bool:
        """Whether the options ask for a norm here in spite of the policy."""
        return any(_matches(glob, names, module) for glob in self._options.include)


def _matches(glob: str, names: tuple[str, ...], module: nn.Module | None) -> bool:
    if glob.startswith("type:"):
        kinds = [kind.__name__ for kind in type(module).__mro__] if module is not None else []
        return any(fnmatch.fnmatchcase(kind, glob[5:]) for kind in kinds)
    return any(fnmatch.fnmatchcase(name, glob) for name in names)
