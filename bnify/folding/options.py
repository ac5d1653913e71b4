"""What a user can ask of a fold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from bnify.errors import OptionsError, PlanError, UsageError
from bnify.plan import Plan

EMITS: Final = ("module", "graph")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldOptions:
    """The options of ``bnify.fold`` that shape the plan; see there for their meaning."""

    affines: bool = False
    merge: bool = False
    partial: bool = False
    untie: bool = False
    emit: str = "module"

    @property
    def as_graph(self) -> bool:
        """Whether the result is a graph, which can drop what is written out in a forward."""
        return self.emit == "graph"

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """The options that a plan was made with.

        Raises:
            PlanError: They are none of a fold.
        """
        try:
            options = cls(**plan.options)
            options.check()
        except (TypeError, UsageError) as error:
            raise PlanError(
                f"the plan's options are none of a fold: {error}", hint="make the plan again"
            ) from None
        return options

    def check(self, *, inplace: bool = False) -> None:
        """Refuse what cannot be right whatever the model is.

        Raises:
            UsageError: ``emit`` is an unknown word.
            OptionsError: Options that contradict each other.
        """
        for name in ("affines", "merge", "partial", "untie"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name}={getattr(self, name)!r} is neither True nor False")
        if self.emit not in EMITS:
            raise UsageError(f"unknown emit {self.emit!r}", hint="one of: " + ", ".join(EMITS))
        if inplace and self.as_graph:
            raise OptionsError(
                "emit='graph' makes a new module, so inplace=True has nothing to edit",
                hint="leave inplace out",
            )

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, JSON-ready."""
        default = FoldOptions()
        return {k: v for k, v in asdict(self).items() if v != getattr(default, k)}
