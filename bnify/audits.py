"""The straight line of an audit: what the target is, what is known of it, rules, report.

torch is imported for a model and for pickled checkpoints only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnify.auditing.engine import chosen, run_rules
from bnify.auditing.finding import AuditReport
from bnify.auditing.files import subject_of_file
from bnify.auditing.subject import Subject

if TYPE_CHECKING:
    from torch import nn

    from bnify.structure import Inputs


def audit(
    target: nn.Module | str | Path,
    inputs: Inputs | None = None,
    data: Iterable[Any] | None = None,
    optimizer: Any = None,
    loader: Any = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    *,
    extend_select: Sequence[str] = (),
    reference: nn.Module | str | Path | None = None,
    precision: str | None = None,
    batches: int = 8,
    name: str = "",
) -> AuditReport:
    """Look for normalization faults in a model, a checkpoint or an ONNX file.

    Args:
        target: A model, or the path of a .safetensors, .pt or .onnx file or of a folder that
            bnify wrote.
        inputs: Example inputs of a model, so that one forward pass can be recorded.
        data: Batches to run (with labels, where there are some); at most ``batches`` of them.
        optimizer: The model's optimizer.
        loader: The training loader, of which only batch size, length and ``drop_last`` are read.
        select: Codes, prefixes of codes or names of rules to run, instead of the default ones.
        ignore: Rules not to run.
        extend_select: Rules to run as well.
        reference: For an averaged model (EMA, SWA): the model that was averaged.
        precision: ``"int8"`` or ``"fp16"``, where the folded model is to be deployed in it.
        batches: How many batches of ``data`` are run.
        name: What the report calls the target.

    Raises:
        UsageError: A word of ``select`` or ``ignore`` fits no rule.
        WeightsError: A checkpoint cannot be read.
        SpecError: The target is nothing that can be audited.
    """
    rules = chosen(select, ignore, extend_select)
    if isinstance(target, (str, Path)):
        subject = subject_of_file(Path(target), name or str(target))
    else:
        subject = _of_model(target, inputs, name)
    subject.optimizer, subject.loader, subject.precision = optimizer, loader, precision
    return run_rules(subject, rules)


def _of_model(model: nn.Module, inputs: Inputs | None, name: str) -> Subject:
    from bnify.accept import example_call, refuse_wrapped
    from bnify.auditing.live import Live
    from bnify.fingerprint import fingerprint

    refuse_wrapped(model, "audit")
    live = Live.of(model, None if inputs is None else example_call(model, inputs))
    return Subject(
        target=name or type(model).__name__,
        norms=tuple(live.states()),
        live=live,
        digest=fingerprint(model).digest,
    )
