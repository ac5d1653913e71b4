"""Running statistics taken anew from data, and what that is worth.

All norms run with the statistics of their batches, as in training; what reaches each of them is
pooled exactly over all batches, in float64, and written as its running mean and variance. One
pass does for any depth: statistics of a deeper norm do not rest on wrong ones before it. (Wu &
Johnson, "Rethinking 'Batch' in BatchNorm", 2021, call this precise batch norm.)

Its limits: a deeper norm sees inputs that were normalized batch by batch, which in eval mode are
normalized with the pooled statistics; with small batches the two differ, and the proof says by how
much. The proof uses the batches that the statistics come from, so it says that the statistics were
the fault, not how well the model generalises. Look-alikes that hold constants keep them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnify.auditing.measured import Kept, Measured
from bnify.auditing.owners import Norms, tensor_or_none
from bnify.auditing.passes import run_probed
from bnify.auditing.probe import Probe, Seen
from bnify.auditing.proved import proof_text
from bnify.auditing.scores import Distance, Tally, predictions
from bnify.auditing.state import NormState
from bnify.borrow import copy_model
from bnify.layers import without_synchronisation

#: Less than half a point more is no gain.
_GAIN = 0.005
#: Nor is a distance that is more than this share of what it was.
_CLOSER = 0.9
#: A running average counts as converged with this weight left on its start; as BN104 has it.
_LEFT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What recalibration is worth on the batches of an audit.

    Attributes:
        measure: ``"accuracy"`` in eval mode, where every batch has labels; else ``"agreement"`` of
            eval mode with the norms in train mode; else, where outputs are no scores of classes,
            the relative ``"distance"`` between the two, which is better if it is less.
        before: Of the model as it is.
        after: Of a recalibrated copy.
        batches: How many batches.
        samples: How many samples in them.
        norms: How many norms were recalibrated.
    """

    measure: str
    before: float
    after: float
    batches: int
    samples: int
    norms: int

    @property
    def helps(self) -> bool:
        """Whether there is a gain: half a point, or a distance less by a tenth."""
        if self.measure == "distance":
            return self.after < self.before * _CLOSER
        return self.after > self.before + _GAIN

    @property
    def sentence(self) -> str:
        """``"recalibrate: accuracy 0.400 -> 0.983 on a copy"``."""
        return proof_text(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The proof as JSON-ready data."""
        return {
            "measure": self.measure,
            "before": self.before,
            "after": self.after,
            "helps": self.helps,
            "batches": self.batches,
            "samples": self.samples,
            "norms": self.norms,
        }


def recalibrated(model: nn.Module, measured: Measured) -> nn.Module:
    """A copy of the model with the statistics of the data; everything else is as it was.

    ``num_batches_tracked`` is raised to the number of batches that a running average with the
    norm's momentum needs to be converged: the pooled statistics are.

    Args:
        model: The model that was measured, or a repaired copy with the same norms.
        measured: What was measured on data.

    Raises:
        PlanError: The model cannot run a batch.
    """
    kept = measured.kept
    pooled, names = kept.own, kept.norms.names
    if model is not kept.model:  # its activations may be others
        pooled = _pooled(model, kept)
    copied = copy_model(model)
    for path in recalibratable(measured):
        _write(copied, names[path], pooled[path])
        _count(copied, names[path][0], measured.states.get(path), len(kept.batches))
    return copied


def recalibratable(measured: Measured) -> tuple[str, ...]:
    """Paths of the norms that get statistics of the data."""
    kept = measured.kept
    return tuple(
        path
        for path, seen in kept.own.items()
        if path in kept.norms.names
        and path not in kept.norms.constant
        and seen.pooled.count > 1
        and bool(seen.pooled.mean.isfinite().all() and seen.pooled.var.isfinite().all())
    )


def _pooled(model: nn.Module, kept: Kept) -> Mapping[str, Seen]:
    working = without_synchronisation(copy_model(model)).eval()
    norms = Norms(kept.live, working, kept.norms.constant)
    probe = Probe(norms, train=True)
    for batch in kept.batches:
        run_probed(working, probe, batch)
    return probe.found


def _write(model: nn.Module, names: tuple[str, str], seen: Seen) -> None:
    for name, vector in zip(names, (seen.pooled.mean, seen.pooled.var), strict=True):
        tensor = tensor_or_none(model, name)
        if tensor is not None and tensor.numel() == vector.numel():
            with torch.no_grad():
                tensor.copy_(as_stored(vector, tensor))


def as_stored(vector: Tensor, like: Tensor) -> Tensor:
    """A statistic in the dtype and shape of a buffer; beyond its range it would be infinite."""
    limit = torch.finfo(like.dtype).max
    return vector.clamp(-limit, limit).reshape(like.shape).to(like)


def converged_after(momentum: float | None, batches: int) -> int:
    """How many batches a running average with this momentum needs to be converged.

    Args:
        momentum: None for a cumulative average.
        batches: The least number.
    """
    if momentum is None or not 0 < momentum < 1:
        return batches
    return max(batches, math.ceil(math.log(_LEFT) / math.log(1 - momentum)))


def _count(model: nn.Module, name: str, state: NormState | None, batches: int) -> None:
    owner = model.get_submodule(name.rpartition(".")[0])
    counter = owner._buffers.get("num_batches_tracked")
    if counter is None or counter.numel() != 1:
        return
    enough = converged_after(state.momentum if state is not None else None, batches)
    with torch.no_grad():
        counter.fill_(max(int(counter), enough))


def proof(model: nn.Module, better: nn.Module, measured: Measured) -> Proof | None:
    """What a recalibrated copy does on the same batches as the model.

    Args:
        model: The model before.
        better: The recalibrated copy; neither is touched.
        measured: What was measured on data.

    Returns:
        None where there is nothing to recalibrate or to compare.

    Raises:
        PlanError: A model cannot run a batch.
    """
    norms = recalibratable(measured)
    if not norms:
        return None
    before: float | None
    if measured.accuracy is not None:
        measure, before = "accuracy", measured.accuracy
    elif measured.agreement is not None:
        measure, before = "agreement", measured.agreement
    elif measured.distance is not None:
        measure, before = "distance", measured.distance
    else:
        return None
    if model is not measured.kept.model:
        before = _worth(model, measured, measure)
    after = _worth(better, measured, measure)
    if before is None or after is None:
        return None
    return Proof(
        measure=measure,
        before=before,
        after=after,
        batches=len(measured.sizes),
        samples=measured.samples,
        norms=len(norms),
    )


def _worth(model: nn.Module, measured: Measured, measure: str) -> float | None:
    """Accuracy, agreement or distance of a model in eval mode on the batches that were kept."""
    kept = measured.kept
    working = without_synchronisation(copy_model(model)).eval()
    tally, distance = Tally(), Distance()
    for index, batch in enumerate(kept.batches):
        got = run_probed(working, None, batch)
        if got is None:
            return None
        if measure == "distance":
            want: Tensor | None = run_probed(kept.norms.working, kept.probe(), batch)
            if want is not None:
                distance.add(got, want)
        else:
            labels = kept.labels[index] if kept.labels else None
            tally.add(predictions(got), labels, kept.said[index])
    if measure == "distance":
        return distance.value
    return tally.accuracy.value if measure == "accuracy" else tally.agreement.value
