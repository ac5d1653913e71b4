"""An averaged model beside the one that was averaged: norms by path, parameters compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from bnify.auditing.checkpoint import without_wrappers
from bnify.auditing.state import NormState, Vector
from bnify.auditing.subject import Subject

_AVERAGE: Final = re.compile(r"(?:^|[._])(?:ema|swa|averaged?|shadow)(?:$|[._])", re.IGNORECASE)


def refer(subject: Subject, other: Subject) -> None:
    """Put the norms of ``other`` beside those of ``subject``, which is an average of it.

    What wrappers put in front of paths (``module.`` of AveragedModel) is no difference.
    """
    pairs = _pairs(subject.norms, other.norms)
    subject.reference = pairs
    subject.reference_moved = _differ(subject.norms, pairs) or _parameters_differ(subject, other)
    if not pairs and subject.norms:
        subject.assumed.append(
            f"no norm of {other.target or 'the reference'} has the path of one that was audited"
        )


def refer_within(subject: Subject) -> None:
    """The same for a file that holds a model and its average, told by its key (ema, swa)."""
    averages = [part for part in subject.parts if _AVERAGE.search(part[0].part)]
    others = [part for part in subject.parts if not _AVERAGE.search(part[0].part)]
    if not averages or len(others) != 1:
        return
    pairs: dict[str, NormState] = {}
    for average in averages:
        pairs |= _pairs(average, others[0])
    if pairs:
        subject.reference = pairs
        subject.reference_moved = _differ(subject.norms, pairs)


def _pairs(norms: Sequence[NormState], others: Sequence[NormState]) -> dict[str, NormState]:
    """Path of a norm → its counterpart of as many channels."""
    known = dict(zip(_bare(others), others, strict=True))
    return {
        norm.path: known[path]
        for path, norm in zip(_bare(norms), norms, strict=True)
        if path in known and known[path].channels == norm.channels
    }


def _bare(norms: Sequence[NormState]) -> list[str]:
    """Their paths without the key of their state dict and without wrappers."""
    inside = [norm.path.removeprefix(f"{norm.part}.") if norm.part else norm.path for norm in norms]
    prefix, _ = without_wrappers(f"{path}." for path in inside)
    return [path.removeprefix(prefix.rstrip(".")).removeprefix(".") for path in inside]


def _differ(norms: Sequence[NormState], pairs: Mapping[str, NormState]) -> bool:
    return any(
        _other(getattr(norm, name), getattr(pairs[norm.path], name))
        for norm in norms
        if norm.path in pairs
        for name in ("weight", "bias")
    )


def _other(own: Vector | None, others: Vector | None) -> bool:
    return own is not None and others is not None and not np.array_equal(own, others)


def _parameters_differ(subject: Subject, reference: Subject) -> bool:
    """Whether any parameter differs; of files only scale and shift are known."""
    if subject.live is None or reference.live is None:
        return False
    import torch
    from torch import nn

    own, theirs = (dict(live.model.named_parameters()) for live in (subject.live, reference.live))
    _, own_names = without_wrappers(own)
    _, their_names = without_wrappers(theirs)
    pairs = [
        (own[n], theirs[their_names[bare]]) for bare, n in own_names.items() if bare in their_names
    ]
    return any(
        not torch.equal(one.detach().cpu(), other.detach().cpu().to(one.dtype))
        for one, other in pairs
        if not any(
            bool(nn.parameter.is_lazy(p)) or p.is_meta for p in (one, other)
        )  # have no values
    )
