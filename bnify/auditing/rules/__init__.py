"""Every rule, in the order of reports. A rule is one file; a new one is added to the tuple."""

from __future__ import annotations

from typing import Final

from bnify.auditing.rule import Rule
from bnify.auditing.rules.bn101_nonfinite_stats import NonfiniteStatistics

RULES: Final[tuple[Rule, ...]] = (
    NonfiniteStatistics(),
)
