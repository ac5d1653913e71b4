"""An ONNX file as a subject of an audit: its norms, with eps and the statistics they read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from bnify.auditing.onnx_constants import Constants
from bnify.auditing.onnx_folds import OnnxFold, find_folds
from bnify.auditing.onnx_graph import Graph, Op, graph_of
from bnify.auditing.onnx_names import Names, place_of
from bnify.auditing.onnx_norm import OnnxNorm, short
from bnify.auditing.onnx_norms import find_norms
from bnify.auditing.onnx_reading import damaged, every_tensor, read_model
from bnify.auditing.subject import Subject

_OTHERS: Final = frozenset(
    {"InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization"}
    | {"SimplifiedLayerNormalization", "com.microsoft::SkipLayerNormalization"}
    | {"com.microsoft::SkipSimplifiedLayerNormalization", "com.microsoft::GroupNorm"}
)


@dataclass(eq=False)  # no slots: folds are looked for once, when they are asked for
class OnnxFile:
    """An ONNX file under audit.

    Attributes:
        path: The file.
        graph: Its operators, those of branches, loops and functions included.
        constants: Evaluates what is the same at every call.
        names: Gives names that no norm has.
        norms: Every norm with statistics over the batch, in the order of execution: batch norms,
            frozen and hand-written ones; those of weights (weight standardisation) are none.
        others: How many layer, group, rms and instance norms there are.
    """

    path: Path
    graph: Graph
    constants: Constants
    names: Names = field(default_factory=Names)
    norms: tuple[OnnxNorm, ...] = ()
    others: int = 0

    @cached_property
    def folds(self) -> tuple[OnnxFold, ...]:
        """The norms that the layer in front of them could take."""
        return find_folds(self.norms, self.constants)

    @cached_property
    def live_dropout(self) -> tuple[tuple[str, float], ...]:
        """Name and ratio of each Dropout that is switched on."""
        found = []
        for op in self.graph.ops:
            ratio = _live_ratio(op, self.constants) if op.kind == "Dropout" else 0.0
            if ratio > 0:
                found.append((self.names.unique(place_of(op, ())), ratio))
        return tuple(found)


def _live_ratio(op: Op, constants: Constants) -> float:
    """The share of values that a Dropout drops; 0 where it passes them on, or may do so."""
    if op.version >= 12:  # training_mode and ratio are inputs
        on = constants.scalar(op.input(2))
        given = op.input(1)
        ratio = 0.5 if given is None else constants.scalar(given)
        return short(ratio) if on and ratio is not None else 0.0
    if op.version < 7 and not op.number("is_test", 0):
        return short(op.number("ratio", 0.5))
    return 0.0  # opsets 7 to 11 know inference only


def onnx_subject(path: Path, name: str) -> Subject:
    """What an ONNX file says of its norms.

    Args:
        path: The file; weights beside it are read from its folder alone.
        name: What the report calls it.

    Raises:
        WeightsError: It is no ONNX file, is damaged, or its weights are not beside it.
    """
    model = read_model(path)
    try:
        file = _file(path, model)
        digest = _digest(model)
    except (UnicodeDecodeError, RecursionError) as error:
        # Names are decoded when they are read, graphs nest as deep as protobuf lets them.
        raise damaged(path, f"{type(error).__name__} in it") from error
    return Subject(
        target=name,
        kind="onnx",
        norms=tuple(norm.state for norm in file.norms if norm.state is not None),
        onnx=file,
        assumed=list(_notes(file)),
        digest=digest,
    )


def _file(path: Path, model: Any) -> OnnxFile:
    graph = graph_of(path, model)
    file = OnnxFile(path, graph, Constants(graph.tensors))
    file.norms = tuple(find_norms(graph, file.constants, file.names))
    file.others = sum(op.kind in _OTHERS for op in graph.ops)
    return file


def _notes(file: OnnxFile) -> list[str]:
    notes = []
    if file.norms:
        notes.append("an ONNX file keeps no num_batches_tracked: nothing is said about it")
    unknown = [norm.path for norm in file.norms if norm.state is None]
    if unknown:
        named = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        notes.append(f"the file stores no statistics of {named}: they were not checked")
    return notes


def _digest(model: Any) -> str:
    """SHA-256 over the operators, and over names, shapes and types of stored tensors."""
    tensors = sorted((t.name, list(t.dims), t.data_type) for t in every_tensor(model))
    operators = [node.op_type for node in model.graph.node]
    text = json.dumps([operators, tensors], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
