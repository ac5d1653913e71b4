"""What a watcher says: a line on stderr, a log record, or whatever the user makes of a finding."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch.distributed as dist

from bnify.auditing.finding import Finding, Severity

_LEVELS: Final = {
    Severity.ERROR: logging.ERROR,
    Severity.WARNING: logging.WARNING,
    Severity.INFO: logging.INFO,
}


def line_of(findings: Sequence[Finding], step: int) -> str:
    """Findings of one rule as one line: the first one's words, and how many others there are."""
    first, more = findings[0], len(findings) - 1
    where = first.module or "(model)"
    where = f"{more + 1} layers: {where} …" if more else where
    lead = f"bnify watch: step {step}: {first.severity} {first.code} {first.name}: {where}: "
    fix = f"fix: {first.fix}" if first.fix else ""
    said = "; ".join(part for part in (first.message, first.cost, fix) if part)
    return " ".join(f"{lead}{said}".splitlines())


def announce(
    findings: Sequence[Finding],
    step: int,
    to: Callable[[Finding], Any] | logging.Logger | None,
) -> None:
    """Say what is new.

    A callback gets one finding at a time, all of them even if it raises. A logger and stderr get
    one line for each rule; stderr that of rank 0 only, where there are several processes.
    """
    if callable(to):
        with contextlib.ExitStack() as calls:  # backwards; what is raised goes on to the caller
            for finding in reversed(findings):
                calls.callback(to, finding)
        return
    groups: dict[tuple[str, Severity], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.code, finding.severity), []).append(finding)
    for (_, severity), group in groups.items():
        write(line_of(group, step), to, severity)


def write(line: str, to: Any, severity: Severity = Severity.INFO) -> None:
    """One line to a logger, or to stderr."""
    if isinstance(to, logging.Logger):
        to.log(_LEVELS[severity], line)
    elif sys.stderr is not None and not (
        dist.is_available() and dist.is_initialized() and dist.get_rank()
    ):
        sys.stderr.write(f"{line}\n")
