"""BN103: a checkpoint that lacks running statistics."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from math import prod
from typing import TypeAlias

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

#: Shapes of a module's own tensors, by their names in it.
_Own: TypeAlias = Mapping[str, tuple[int, ...]]
_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"


class StatisticsMissing(Rule):
    """A checkpoint has the weight of a batch norm and not its running statistics.

    What it checks:
        With the model: each norm that tracks statistics and has a weight, but no running mean or
        variance, in the file. Without it: a norm whose ``num_batches_tracked`` was left behind;
        one that is called bn while another of that name has statistics; one whose twin in a block
        of the same structure has them (``layer1.0.norm2`` and ``layer1.1.norm2``). Layer norms
        have none, and one part of a split checkpoint proves nothing.

    Why it is bad:
        Loaded with ``strict=False``, the norm keeps mean 0 and variance 1. Nothing fails, and
        eval mode computes another function than training did.

    Example:
        ``torch.save(dict(model.named_parameters()), "a.pt")``: buffers are no parameters.

    How to fix it:
        Save ``model.state_dict()`` where the model was trained and load that; if it is gone,
        recalibrate the statistics on data (``--unsafe-fixes --data``).

    Fix safety:
        Needs data; the new statistics are proved on a copy first.

    Source:
        PyTorch documentation of ``nn.Module.register_buffer`` and of ``load_state_dict``.
    """

    code = "BN103"
    name = "stats-missing"
    severity = Severity.ERROR
    tiers = ("T0",)
    needs = needs(Need.CHECKPOINT)
    fix = "save model.state_dict() again where it was trained, or recalibrate"
    safety = Safety.DATA
    cost = "loaded with strict=False, eval mode computes another function than training did"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm, with what says that there were statistics."""
        if subject.tensors is None:
            return
        own = _by_module(subject)
        missing = (
            _lacked_by_model(subject, own) if subject.live is not None else _lacked_by_siblings(own)
        )
        for path, why in missing:
            absent = [name for name in _STATISTICS if name not in own[path]]
            yield self.finding(
                path,
                f"{' and '.join(absent)} missing from the checkpoint, while {why}",
                {"missing": absent},
            )


def _by_module(subject: Subject) -> dict[str, dict[str, tuple[int, ...]]]:
    """Module path → its tensors; under a model, names are as the model has them."""
    tensors = {name: shape for name, (shape, _) in (subject.tensors or {}).items()}
    if subject.live is not None:
        known = subject.live.model.state_dict(keep_vars=True)
        prefix = _prefix(tensors, known.keys())
        tensors = {n.removeprefix(prefix): s for n, s in tensors.items() if n.startswith(prefix)}
    own: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in tensors.items():
        path, _, leaf = name.rpartition(".")
        own[path][leaf] = shape
    return own


def _prefix(names: Mapping[str, tuple[int, ...]], known: Set[str]) -> str:
    """What stands in front of the model's names in the file: where most of them are found."""
    found: Counter[str] = Counter()
    for name in names:
        at = 0
        while at >= 0:
            if name[at:] in known:
                found[name[:at]] += 1
            at = name.find(".", at) + 1 or -1
    return found.most_common(1)[0][0] if found else ""


def _lacked_by_model(subject: Subject, own: Mapping[str, _Own]) -> Iterator[tuple[str, str]]:
    if subject.live is None:
        return
    for norm in subject.live.norms:
        held = own.get(norm.path, {})
        if norm.tracked and _is_vector(held.get("weight", ())) and not _complete(held):
            yield norm.path, "the model has it"


def _lacked_by_siblings(own: Mapping[str, _Own]) -> Iterator[tuple[str, str]]:
    """Norms that once had statistics, as far as a file can tell, and what says so."""
    named: dict[str, str] = {}
    twins: dict[str, list[str]] = defaultdict(list)
    for path, held in own.items():
        if _complete(held):
            named.setdefault(_pattern(path.rpartition(".")[2]), path)
            twins[_pattern(path)].append(path)
    structures: dict[str, frozenset[tuple[str, int]]] = {}
    blocks = _blocks(own)

    def structure(path: str) -> frozenset[tuple[str, int]]:
        block = path.rpartition(".")[0]
        if block not in structures:
            structures[block] = _structure(own, blocks[block], block)
        return structures[block]

    for path, held in own.items():
        if _complete(held) or not _could_be_a_norm(held):
            continue
        last = path.rpartition(".")[2]
        other = named.get(_pattern(last)) if re.search("bn|batch", last.lower()) else None
        if other is None:
            other = next(
                (
                    twin
                    for twin in twins[_pattern(path)]
                    if twin.rpartition(".")[0] != path.rpartition(".")[0]
                    and structure(twin) == structure(path)
                ),
                None,
            )
        if _COUNTER in held:
            yield path, f"its {_COUNTER} is there"
        elif other is not None and "weight" in held:
            yield path, f"{other} has it"


def _could_be_a_norm(held: _Own) -> bool:
    """A vector for a weight, and a bias of the same size if any; or the counter of a norm."""
    weight = held.get("weight")
    if weight is None:
        return _COUNTER in held
    return len(weight) == 1 and held.get("bias", weight) == weight


def _complete(held: _Own) -> bool:
    return all(name in held for name in _STATISTICS)


def _is_vector(shape: tuple[int, ...]) -> bool:
    return bool(shape) and prod(shape) == max(shape)


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _blocks(own: Mapping[str, _Own]) -> dict[str, list[str]]:
    """Module path → the modules in it that have tensors, itself included."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for path in own:
        block = path
        blocks[block].append(path)
        while block:
            block = block.rpartition(".")[0]
            blocks[block].append(path)
    return blocks


def _structure(
    own: Mapping[str, _Own], inside: list[str], block: str
) -> frozenset[tuple[str, int]]:
    """Names and numbers of dimensions of what is in a block, statistics left out."""
    return frozenset(
        (f"{path[len(block) :]}.{leaf}", len(shape))
        for path in inside
        for leaf, shape in own[path].items()
        if leaf not in (*_STATISTICS, _COUNTER)
    )
