"""Batches from the user's own code: ``--data pkg.mod:loader`` or ``file.py:loader``."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from bnify.errors import SpecError, UsageError
from bnify.spec.kinds import SpecKind, parse_spec
from bnify.spec.objects import import_folder, load_object
from bnify.spec.silence import user_output_to_stderr
from bnify.spec.usercode import a_type, article, call_factory, user_code


class Batches:
    """At most so many batches of a source; can be iterated again and again.

    A one-shot iterator is kept as it is read; a factory or a loader starts anew each time.

    Attributes:
        source: The user's loader, which may have a generator of its own; None of a function.
    """

    def __init__(
        self,
        spec: str,
        start: Callable[[], Iterator[Any]],
        limit: int | None,
        source: Iterable[Any] | None = None,
    ) -> None:
        self.spec = spec
        self.limit = limit
        self.source = source
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; what the user's code prints meanwhile goes to stderr.

        Raises:
            SpecError: The user's code raised, or there is no batch at all.
        """
        with user_output_to_stderr(), user_code(self.spec):
            source = self._start()
        count = 0
        while self.limit is None or count < self.limit:
            with user_output_to_stderr(), user_code(self.spec):
                try:
                    batch = next(source)
                except StopIteration:
                    break
            yield batch
            count += 1
        if not count:
            raise SpecError(f"{self.spec} yields no batch", hint="check the loader's data")


def load_data(spec: str, *, batches: int | None = 8) -> Iterable[Any]:
    """Batches of an iterable, a DataLoader, or a function without arguments that returns one.

    Args:
        spec: ``"pkg.mod:loader"`` or ``"file.py:loader"``.
        batches: How many to take at most; None for all.

    Raises:
        UsageError: The spec is no Python object, or ``batches`` is less than 1.
        SpecError: It cannot be loaded, or is nothing that yields batches.
    """
    if batches is not None and batches < 1:
        raise UsageError(f"--batches {batches}: at least one is needed", hint="--batches 8")
    target = parse_spec(spec)
    if target.kind not in (SpecKind.FILE, SpecKind.MODULE):
        kind = target.kind.value
        raise UsageError(
            f"--data {spec} is {article(kind)} {kind}, not a Python object",
            hint="write pkg.mod:loader or file.py:loader",
        )
    with user_output_to_stderr(), import_folder(target):
        value = load_object(target, batches=True).value
        made = inspect.isclass(value) or (callable(value) and not hasattr(value, "__iter__"))
        source = call_factory(value, {}, spec) if made else value
        _refuse_no_batches(source, spec)

    if iter(source) is not source:
        return Batches(spec, lambda: iter(source), batches, source)
    if made:  # a generator function: the first pass uses what is there, later ones a new one
        first = [source]
        return Batches(
            spec, lambda: iter(first.pop() if first else call_factory(value, {}, spec)), batches
        )
    kept: list[Any] = []
    return Batches(spec, lambda: _replayed(source, kept), batches)


def _replayed(source: Iterator[Any], kept: list[Any]) -> Iterator[Any]:
    """What was read of a one-shot iterator, then what is left of it."""
    for index in itertools.count():
        if index == len(kept):
            try:
                kept.append(next(source))
            except StopIteration:
                return
        yield kept[index]


def _refuse_no_batches(source: Any, spec: str) -> None:
    """Refuse what can be iterated, but not into batches."""
    hint = "name an iterable of batches, a DataLoader, or a function that returns one"
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise SpecError(
            f"{spec} is {a_type(source)}: a dataset yields samples, not batches",
            hint="wrap it: DataLoader(dataset, batch_size=32)",
        )
    if isinstance(source, (Tensor, Mapping, str, bytes)):
        raise SpecError(
            f"{spec} is one {type(source).__name__}, not an iterable of batches",
            hint="put it in a list to make it the only batch",
        )
    if not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        raise SpecError(f"{spec} is {a_type(source)}, which yields nothing", hint=hint)
