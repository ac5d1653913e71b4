"""Runs the rules that there are inputs for, and says which input the others would need."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from bnify.auditing.finding import AuditReport, Finding
from bnify.auditing.rule import Need, Rule
from bnify.auditing.rules import RULES
from bnify.auditing.subject import Subject
from bnify.errors import UsageError


def chosen(
    select: Sequence[str] = (), ignore: Sequence[str] = (), extend: Sequence[str] = ()
) -> tuple[Rule, ...]:
    """The rules to run, by codes, prefixes of codes (``BN1``), names, or ``ALL``.

    Args:
        select: These instead of those that run by default.
        ignore: Not these.
        extend: These as well.

    Raises:
        UsageError: A word fits no rule.
    """
    select, ignore, extend = (_words(given) for given in (select, ignore, extend))
    for word in (*select, *ignore, *extend):
        if not any(_fits(rule, word) for rule in RULES):
            raise UsageError(
                f"{word!r} fits no rule", hint="bnify explain --all lists codes and names"
            )
    return tuple(
        rule
        for rule in RULES
        if (any(_fits(rule, w) for w in select) if select else rule.default)
        or any(_fits(rule, w) for w in extend)
        if not any(_fits(rule, w) for w in ignore)
    )


def _words(given: str | Sequence[str]) -> Sequence[str]:
    """Several words; one by itself, or some with commas between, is given as a text."""
    return given.split(",") if isinstance(given, str) else given


def _fits(rule: Rule, word: str) -> bool:
    return word in ("ALL", rule.name) or (word != "" and rule.code.startswith(word.upper()))


def run_rules(subject: Subject, rules: Sequence[Rule]) -> AuditReport:
    """Check what can be checked."""
    available = frozenset(_available(subject))
    findings: list[Finding] = []
    unchecked: dict[str, str] = {}
    for rule in rules:
        if not any(group <= available for group in rule.needs):
            unchecked[rule.code] = _missing(rule, available, subject)
        elif missing := rule.unmet(subject):
            unchecked[rule.code] = missing
        else:
            findings.extend(rule.check(subject))
    live = subject.live
    places = {f.module: live.place(f.module) for f in findings} if live is not None else {}
    return AuditReport(
        findings=tuple(findings),
        unchecked=unchecked,
        target=subject.target,
        kind=subject.kind,
        tiers=_tiers(subject),
        norms=_norms(subject),
        others=_others(subject),
        notes=tuple(_notes(subject)),
        digest=subject.digest,
        sources={path: place for path, place in places.items() if place is not None},
        modules=tuple(dict.fromkeys(_modules(subject))),
    )


def _available(subject: Subject) -> Iterator[Need]:
    """What this subject has."""
    live = subject.live
    if subject.kind in ("checkpoint", "onnx") or live is not None:
        yield Need.STATISTICS
    if subject.tensors is not None:
        yield Need.CHECKPOINT
    if subject.onnx is not None:
        yield Need.ONNX
    if live is not None:
        yield Need.MODULES
        if live.captured is not None:
            yield Need.FORWARD
            if not live.model.training:
                yield Need.EVAL
        if live.model.training or any(n.module.training for n in live.norms):
            yield Need.TRAIN
    if subject.optimizer is not None:
        yield Need.OPTIMIZER
    if subject.loader is not None:
        yield Need.LOADER
    world = os.environ.get("WORLD_SIZE", "")
    if world.isdecimal() and int(world) > 1:
        yield Need.WORLD
    if subject.measured is not None:
        yield Need.DATA
    if subject.observed is not None:
        yield Need.LOOP
    if subject.reference is not None:
        yield Need.REFERENCE
    if subject.precision is not None:
        yield Need.PRECISION


def _missing(rule: Rule, available: frozenset[Need], subject: Subject) -> str:
    """The input that would enable a rule: the alternative that lacks least."""
    lacks = min((group - available for group in rule.needs), key=len)
    ordered = [need for need in Need if need in lacks]
    live = subject.live
    if Need.FORWARD in lacks and live is not None and live.why_not:
        return f"a forward pass that can be recorded: {live.why_not}"
    return "; ".join(need.value for need in ordered)


def _tiers(subject: Subject) -> tuple[str, ...]:
    if subject.kind == "onnx":
        return ("T0x",)
    tiers = ["T0"]
    if subject.live is not None:
        tiers.append("T1")
    if subject.measured is not None:
        tiers.append("T2")
    if subject.observed is not None:
        tiers.append("T3")
    return tuple(tiers)


def _norms(subject: Subject) -> int:
    if subject.onnx is not None:
        return len(subject.onnx.norms)
    live = subject.live
    if live is None:
        return len(subject.norms)
    paths = {norm.path for norm in live.norms}
    # A norm at the root, or one of several in a module, goes by the name of a tensor.
    functional = {use.layer for use in live.uses if use.of_batch and use.layer not in paths}
    return len(paths) + sum(name.rpartition(".")[0] not in paths for name in functional)


def _others(subject: Subject) -> int:
    if subject.onnx is not None:
        return subject.onnx.others
    live = subject.live
    if live is None:
        return 0
    return len({use.layer for use in live.uses if not use.of_batch and not use.of_weight})


def _modules(subject: Subject) -> Iterator[str]:
    """Paths of modules: of the model, and what a file says of them."""
    if subject.live is not None:
        yield from subject.live.modules
    yield from (norm.path for norm in subject.norms)
    for name in subject.tensors or ():
        yield name.rpartition(".")[0]


def _notes(subject: Subject) -> Iterator[str]:
    yield from subject.assumed
    live = subject.live
    if live is None:
        return
    if live.why_not:
        yield f"no forward pass was recorded: {live.why_not}"
    if live.captured is not None:
        yield from live.captured.notes
    if subject.measured is not None:
        yield from subject.measured.notes
