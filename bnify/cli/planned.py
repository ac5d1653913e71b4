"""What ``--dry-run`` has to show: a plan, and nothing done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bnify.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan in the form of a result, for the reports."""

    plan: Plan
    source: dict[str, Any]
    verification: None = None

    def to_dict(self) -> dict[str, Any]:
        """As a Result's, with nothing verified and nothing written."""
        return {
            "schema": 1,
            "verb": self.plan.verb,
            "plan": self.plan.to_dict(),
            "verification": None,
            "files": {},
        }
