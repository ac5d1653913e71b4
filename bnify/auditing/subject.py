"""What is audited, as far as it is known: vectors always, a graph or measurements where given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bnify.auditing.state import NormState

if TYPE_CHECKING:
    from bnify.auditing.live import Live
    from bnify.auditing.measured import Measured
    from bnify.auditing.observed import Observed
    from bnify.auditing.onnx_file import OnnxFile


@dataclass(slots=True, kw_only=True)
class Subject:
    """What is audited.

    Attributes:
        target: As the user named it.
        kind: ``"checkpoint"``, ``"onnx"`` or ``"model"``.
        norms: Every norm with fixed statistics, in the order of the file or the model.
        tensors: Shape and dtype of every tensor in a checkpoint, by name; None without one.
        live: The model, its modules and its recording; None for files.
        onnx: The graph of an ONNX file; None for anything else.
        measured: What the model did on data; None without.
        observed: What a training loop showed; None outside of one.
        reference: The norms of the model that this one is an average of, by path.
        reference_moved: Whether parameters differ between the two.
        optimizer: The optimizer.
        loader: The training loader, of which batch size, length and ``drop_last`` are read.
        precision: ``"int8"`` or ``"fp16"`` of the deployment; None if not said.
        assumed: What is not known and was assumed, in sentences.
        digest: Fingerprint.
    """

    target: str = ""
    kind: str = "model"
    norms: tuple[NormState, ...] = ()
    tensors: Mapping[str, tuple[tuple[int, ...], str]] | None = None
    live: Live | None = None
    onnx: OnnxFile | None = None
    measured: Measured | None = None
    observed: Observed | None = None
    reference: Mapping[str, NormState] | None = None
    reference_moved: bool = False
    optimizer: Any = None
    loader: Any = None
    precision: str | None = None
    assumed: list[str] = field(default_factory=list)
    digest: str = ""

    @property
    def trained(self) -> tuple[NormState, ...]:
        """Norms whose running statistics are not as initialised."""
        return tuple(norm for norm in self.norms if not norm.fresh)

    @property
    def parts(self) -> tuple[tuple[NormState, ...], ...]:
        """The norms of each model in the file; one group where there is one model."""
        groups: dict[str, list[NormState]] = {}
        for norm in self.norms:
            groups.setdefault(norm.part, []).append(norm)
        return tuple(tuple(group) for group in groups.values())
