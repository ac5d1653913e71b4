"""What a model does on data: with its running statistics, and with those of each batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median_low
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bnify.auditing.batches import Batch, first_batches, read
from bnify.auditing.live import Live
from bnify.auditing.owners import Norms
from bnify.auditing.passes import Passes
from bnify.auditing.probe import Probe, Seen
from bnify.auditing.state import NormState, Vector
from bnify.auditing.verdict import holds_constants
from bnify.borrow import copy_model
from bnify.errors import PlanError
from bnify.layers import without_synchronisation

if TYPE_CHECKING:
    from bnify.auditing.recalibrate import Proof

#: So many batches of so many samples are needed to judge one mode against the other.
BATCHES, SAMPLES = 8, 32


@dataclass(frozen=True, slots=True, eq=False)
class NormData:
    """What reached one norm, pooled over all batches.

    Attributes:
        path: The norm's path.
        instance: Whether it is an instance norm, whose statistics are averages over samples.
        count: Number of values a channel (of samples, for an instance norm).
        mean: Mean of its input with all norms in eval mode, float64, shape (C,).
        var: Unbiased variance likewise.
        per_batch: Number of values that shared a channel in one call; the median.
        constant: Whether it has no train mode: a look-alike with constant statistics.
    """

    path: str
    instance: bool
    count: int
    mean: Vector
    var: Vector
    per_batch: int
    constant: bool


@dataclass(eq=False)  # no slots: the proof is computed once, when it is asked for
class Measured:
    """What a model did on data.

    Attributes:
        norms: What reached each norm, in the order of execution.
        states: The norms' own statistics.
        sizes: Number of samples in each batch.
        accuracy: With the norms in eval mode; None where not every batch has labels.
        train_accuracy: With the norms in train mode, and nothing else.
        agreement: Share of predictions that are the same in both.
        distance: Relative distance of the outputs in eval mode from those in train mode of the
            norms, where they are no scores of classes.
        chance: Share of the most frequent label.
        why_not: Why predictions could not be compared; empty where they were.
        nonfinite: Number of outputs in eval mode that are NaN or infinite.
        notes: What a reader should know, in sentences.
    """

    norms: Mapping[str, NormData]
    states: Mapping[str, NormState]
    sizes: tuple[int, ...]
    accuracy: float | None = None
    train_accuracy: float | None = None
    agreement: float | None = None
    distance: float | None = None
    chance: float | None = None
    why_not: str = ""
    nonfinite: int = 0
    notes: tuple[str, ...] = ()
    _kept: Kept | None = field(default=None, repr=False)

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return sum(self.sizes)

    @property
    def too_few(self) -> str:
        """What is missing for judging one mode against the other; empty if nothing is."""
        large = sum(size >= SAMPLES for size in self.sizes)
        if large >= BATCHES:
            return ""
        count, most = len(self.sizes), max(self.sizes)
        batches = "is 1 batch" if count == 1 else f"are {count} batches"
        found = f"there {batches}, of {most} sample{'' if most == 1 else 's'} at most"
        return f"{BATCHES} batches of {SAMPLES} samples or more (--data, --batches): {found}"

    @property
    def at_chance(self) -> bool:
        """Whether both modes are hardly better than saying the most frequent label always."""
        if self.accuracy is None or self.train_accuracy is None or self.chance is None:
            return False
        limit = self.chance + 0.1 * (1 - self.chance)
        return self.accuracy <= limit and self.train_accuracy <= limit

    @property
    def untrained(self) -> bool:
        """Whether it looks as initialised: there is nothing to be judged."""
        states = [state for state in self.states.values() if not state.frozen]
        fresh = bool(states) and all(s.fresh and not s.moved for s in states)
        return fresh and (self.accuracy is None or self.at_chance)

    def divergence(self, path: str) -> float | None:
        """KL divergence of the data from a norm's running statistics, the median over channels.

        Of two Gaussians, ``0.5·(v_d/v_r + (μ_d − μ_r)²/v_r − 1 − ln(v_d/v_r))`` with ε added to
        both variances. None where the norm or its input is not finite, or has none of them.
        """
        pair = self._pair(path)
        if pair is None:
            return None
        data, state = pair
        with np.errstate(all="ignore"):
            ratio = (data.var + state.eps) / (state.var + state.eps)
            shift = (data.mean - state.mean) ** 2 / (state.var + state.eps)
            return _median(0.5 * (ratio + shift - 1 - np.log(ratio)))

    def log2_ratio(self, path: str) -> float | None:
        """log2(running variance / variance of the data in eval mode), the median over channels.

        None where the norm or its input is not finite, or has none of them.
        """
        pair = self._pair(path)
        if pair is None:
            return None
        data, state = pair
        with np.errstate(all="ignore"):
            return _median(np.log2((state.var + state.eps) / (data.var + state.eps)))

    def _pair(self, path: str) -> tuple[NormData, NormState] | None:
        data, state = self.norms.get(path), self.states.get(path)
        if data is None or state is None or data.count < 2 or state.channels != data.mean.size:
            return None
        return data, state

    @cached_property
    def proof(self) -> Proof | None:
        """What recalibrated statistics are worth on these batches, measured on a copy.

        None where nothing can be recalibrated or compared, and for an untrained model.
        """
        if self._kept is None or self.untrained:
            return None
        from bnify.auditing.recalibrate import proof, recalibrated

        model = self._kept.model
        return proof(model, recalibrated(model, self), self)

    @property
    def kept(self) -> Kept:
        """The model and the batches.

        Raises:
            PlanError: They were not kept.
        """
        if self._kept is None:
            raise PlanError("the batches were not kept", hint="measure them again")
        return self._kept


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the proof needs: batches are read once.

    Attributes:
        live: The model under audit; it is not touched.
        norms: The norms of the copy that was measured.
        own: What reached each norm with all norms in train mode.
        batches: The batches.
        labels: The labels of each, where every one has some.
        said: Predictions with the norms in train mode; empty without classes.
    """

    live: Live
    norms: Norms
    own: Mapping[str, Seen]
    batches: tuple[Batch, ...]
    labels: tuple[Tensor, ...]
    said: tuple[Tensor, ...]

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.live.model

    def probe(self) -> Probe:
        """Puts the norms of the copy that was measured in train mode."""
        return Probe(self.norms, train=True)


def measure(live: Live, batches: Iterable[Any], limit: int) -> Measured:
    """Run a copy of the model on data, in eval mode and with its norms alone in train mode.

    In the second pass each norm takes the statistics of its batch and writes none; dropout stays
    off. Modes, random numbers and tensors of the model stay as they are.

    Args:
        live: The model, with example inputs.
        batches: The data: inputs, or inputs and labels.
        limit: How many batches to take at most; they are read once and kept.

    Raises:
        PlanError: There are no example inputs, a batch cannot be run or holds NaN, or the outputs
            are not finite in either mode.
    """
    if live.call is None:
        raise PlanError("data are run on a model with example inputs", hint="pass inputs=")
    states = {state.path: state for state in live.states()}
    taken = first_batches(batches, limit)
    working = without_synchronisation(copy_model(live.model)).eval()
    constant = frozenset(path for path, state in states.items() if holds_constants(state))
    passes = Passes(Norms(live, working, constant), read(taken, live.call, live.model))
    passes.run()
    return _measured(live, states, passes)


def _measured(live: Live, states: Mapping[str, NormState], passes: Passes) -> Measured:
    constant = passes.norms.constant
    norms = {path: _data(seen, path in constant) for path, seen in passes.eval.found.items()}
    classes = not passes.why_not
    labelled = classes and bool(passes.labels) and len(passes.labels) == len(passes.batches)
    found = Measured(
        norms=norms,
        states=states,
        sizes=tuple(batch.samples for batch in passes.batches),
        accuracy=passes.tally.accuracy.value if labelled else None,
        train_accuracy=passes.train_tally.accuracy.value if labelled else None,
        agreement=passes.tally.agreement.value if classes else None,
        distance=None if classes else passes.distance.value,
        chance=_most_frequent(passes.labels) if labelled else None,
        why_not=passes.why_not,
        nonfinite=passes.nonfinite,
        _kept=Kept(
            live,
            passes.norms,
            passes.train.found,
            passes.batches,
            tuple(passes.labels) if labelled else (),
            tuple(passes.said) if classes else (),
        ),
    )
    found.notes = tuple(_notes(found, partly=bool(passes.labels) and not labelled))
    return found


def _data(seen: Seen, constant: bool) -> NormData:
    return NormData(
        path=seen.path,
        instance=seen.instance,
        count=seen.pooled.count,
        mean=seen.pooled.mean.numpy(),
        var=seen.pooled.var.numpy(),
        per_batch=median_low(seen.sizes.elements()),
        constant=constant,
    )


def _median(values: Vector) -> float | None:
    """The median of the finite ones; None of none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def _most_frequent(labels: Iterable[Tensor]) -> float | None:
    counts: Counter[int] = Counter()
    for one in labels:
        values, numbers = torch.unique(one[one >= 0], return_counts=True)
        counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    total = counts.total()
    return max(counts.values()) / total if total else None


def _notes(measured: Measured, *, partly: bool) -> Iterator[str]:
    """What was run and what came out, and what could not be compared."""
    count = len(measured.sizes)
    batches = "1 batch" if count == 1 else f"{count} batches"
    yield f"{batches} of data, {measured.samples} samples"
    eval_mode, train_mode = measured.accuracy, measured.train_accuracy
    if measured.why_not:
        yield f"eval and train mode were not compared by prediction: {measured.why_not}"
    elif eval_mode is not None and train_mode is not None:
        yield f"accuracy {eval_mode:.3f} in eval mode, {train_mode:.3f} with norms in train mode"
    elif measured.agreement is not None:
        yield (
            f"{'not every batch has' if partly else 'no'} labels: eval mode and norms in train "
            f"mode predict the same in {measured.agreement:.3f} of the cases"
        )
    if measured.untrained:
        yield "the model is untrained: its statistics were not judged by data"
    elif measured.at_chance and measured.chance is not None and not measured.nonfinite:
        yield (
            f"both modes are near chance ({measured.chance:.3f}): not a normalization problem; "
            "see that weights, labels and preprocessing belong together"
        )
    if measured.nonfinite:
        yield f"{measured.nonfinite} outputs are NaN or infinite in eval mode"
    unseen = [path for path in measured.states if path not in measured.norms]
    if unseen:
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        yield f"the data did not reach {unseen[0] or 'the norm'}{more}"
    alone = [n.path for n in measured.norms.values() if n.per_batch < 2 and not n.constant]
    if alone:
        yield f"{', '.join(alone)}: one value a channel in a batch, so kept in eval mode"
