"""A checkpoint file as the subject of an audit: its norms as vectors, and what had to be assumed.

torch is imported for pickles only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import Final

import numpy as np

from bnify.auditing.state import EPS, MOMENTUM, NormState, Vector
from bnify.auditing.stored import Stored, Tensors, read_stored
from bnify.auditing.subject import Subject
from bnify.spec.formats import printable, shard_of

#: What wrappers put in front of every name: DataParallel and AveragedModel, torch.compile,
#: Lightning.
WRAPPERS: Final = ("module.", "_orig_mod.", "model.")
#: What AveragedModel keeps beside the model.
_BESIDE: Final = frozenset({"n_averaged"})
_STATISTICS: Final = ("running_mean", "running_var")
_COUNTER: Final = "num_batches_tracked"


def checkpoint_subject(path: Path, name: str, *, key: str | None = None) -> Subject:
    """What a checkpoint says of its norms.

    Of a .safetensors file only the header and the vectors of norms are read, without torch.

    Args:
        path: A .safetensors file, or one that ``torch.save`` wrote.
        name: What the report calls it.
        key: Dotted key of the weights to audit; every state dict with norms if None.

    Raises:
        WeightsError: It cannot be read, is a part of a distributed checkpoint or a pickle that
            wants more than weights, or has nothing under the key.
    """
    stored = read_stored(path, key)
    models = [model for model in map(_Model.of, stored) if model.prefixes] or [
        _Model.of(_largest(stored))
    ]
    several = len(models) > 1
    norms: list[NormState] = []
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    notes: list[str] = []
    for model in models:
        at = f"{printable(model.stored.key)}." if several else ""
        norms += model.norms(at)
        tensors |= {at + printable(n): model.stored.tensors[s] for n, s in model.names.items()}
        notes += model.notes(said=not several and key is None)
    if several:
        keys = ", ".join(printable(model.stored.key) for model in models)
        notes.insert(0, f"{len(models)} sets of weights were audited: {keys}")
    shard = shard_of(path)
    if shard is not None:
        notes.append(
            f"this is part {shard[0]} of {shard[1]} of a checkpoint: norms in the other parts, "
            "and norms cut in two, were not audited"
        )
    if norms:
        notes.append(
            f"a checkpoint says neither eps nor momentum: 1e{log10(EPS):.0f} and {MOMENTUM} were "
            "assumed"
        )
    return Subject(
        target=name,
        kind="checkpoint",
        norms=tuple(norms),
        # What one part of a checkpoint lacks may be in another.
        tensors=None if shard else tensors,
        assumed=notes,
        digest=_digest(tensors),
    )


def checkpoint_tensors(path: Path, *, key: str | None = None) -> Tensors:
    """Name → shape and dtype of every tensor in a checkpoint, as it names them.

    Of a .safetensors file only the header is read. Where there are several state dicts, names
    begin with their keys.

    Raises:
        WeightsError: As :func:`checkpoint_subject`.
    """
    stored = read_stored(path, key)
    at = {s.key: f"{s.key}." if len(stored) > 1 else "" for s in stored}
    return {at[s.key] + name: tensor for s in stored for name, tensor in s.tensors.items()}


def without_wrappers(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The prefix that wrappers put in front of all names, and the rest of each name → the name."""
    whole = list(names)
    rest = [name for name in whole if name not in _BESIDE]
    prefix = ""
    while rest:
        first = next((w for w in WRAPPERS if rest[0].startswith(prefix + w)), None)
        if first is None or not all(name.startswith(prefix + first) for name in rest):
            break
        prefix += first
    return prefix, {name.removeprefix(prefix): name for name in whole}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Model:
    """One state dict, its names without what wrappers put in front of them.

    Attributes:
        stored: The state dict.
        stripped: The prefix of every name that was dropped.
        names: Names from here on → names in the file.
        prefixes: Module paths of its norms.
    """

    stored: Stored
    stripped: str
    names: dict[str, str]
    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, stored: Stored) -> _Model:
        stripped, names = without_wrappers(stored.tensors)
        found = []
        for name in names:
            path, _, leaf = name.rpartition(".")
            mean, var = (names.get(_join(path, s), "") for s in _STATISTICS)
            if leaf == _STATISTICS[0] and stored.is_vector(mean) and stored.is_vector(var):
                found.append(path)
        return cls(stored=stored, stripped=stripped, names=names, prefixes=tuple(found))

    def norms(self, at: str) -> Iterator[NormState]:
        """Its norms; ``at`` goes in front of their paths."""
        for path in self.prefixes:
            mean, var = (self._vector(path, statistic) for statistic in _STATISTICS)
            if mean is None or var is None or mean.size != var.size:
                continue  # notes() tells
            weight, bias = (self._vector(path, name) for name in ("weight", "bias"))
            counter = self._vector(path, _COUNTER)
            yield NormState(
                path=printable((at + path).removesuffix("." if not path else "")),
                mean=mean,
                var=var,
                weight=weight if weight is not None and weight.size == mean.size else None,
                bias=bias if bias is not None and bias.size == mean.size else None,
                batches=_count(counter),
                dtype=self.stored.tensors[self.names[_join(path, _STATISTICS[1])]][1],
                part=at.removesuffix("."),
            )

    def notes(self, *, said: bool) -> Iterator[str]:
        """What was adapted, and what could not be audited."""
        if said and self.stored.key:
            yield f"the weights under {self.stored.key!r} were audited"
        if self.stripped:
            yield f"the prefix {self.stripped!r} was stripped from every name"
        for path in self.prefixes:
            sizes = [self.stored.tensors[self.names[_join(path, s)]][0] for s in _STATISTICS]
            if sizes[0] != sizes[1]:
                yield (
                    f"{printable(path)} was not audited: its running mean is {list(sizes[0])}, "
                    f"its running variance {list(sizes[1])}"
                )

    def _vector(self, path: str, leaf: str) -> Vector | None:
        name = self.names.get(_join(path, leaf))
        return self.stored.vector(name) if name and self.stored.is_vector(name) else None


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _count(counter: Vector | None) -> int | None:
    """``num_batches_tracked`` as a number; None for anything else in its place."""
    if counter is None or counter.size != 1 or not np.isfinite(counter).all():
        return None
    return int(counter[0])


def _largest(stored: tuple[Stored, ...]) -> Stored:
    return max(stored, key=lambda state: len(state.tensors))


def _digest(tensors: Tensors) -> str:
    """SHA-256 over names, shapes and dtypes, hexadecimal, whatever their order in the file."""
    entries = [[name, *tensor] for name, tensor in sorted(tensors.items())]
    return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()
