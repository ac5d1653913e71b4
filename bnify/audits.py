"""The straight line of an audit: what the target is, what is known of it, rules, report.

torch is imported for a model and for pickled checkpoints only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnify.auditing.checkpoint import checkpoint_tensors
from bnify.auditing.engine import chosen, run_rules
from bnify.auditing.files import is_saved_folder, subject_of_file
from bnify.auditing.finding import AuditReport
from bnify.auditing.reference import refer, refer_within
from bnify.auditing.subject import Subject
from bnify.errors import PlanError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from bnify.result import Result
    from bnify.structure import Call, Inputs


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
    checkpoint: str | Path | None = None,
    weights_key: str | None = None,
) -> AuditReport:
    """Look for normalization faults in a model, a checkpoint or an ONNX file.

    Args:
        target: A model, or the path of a .safetensors, .pt or .onnx file or of a folder that
            bnify wrote.
        inputs: Example inputs of a model, so that one forward pass can be recorded; without them
            those of the first batch of ``data``.
        data: Batches to run (with labels, where there are some); at most ``batches`` of them.
        optimizer: The model's optimizer.
        loader: The training loader, of which only batch size, length and ``drop_last`` are read.
        select: Codes, prefixes of codes or names of rules to run, instead of the default ones.
        ignore: Rules not to run.
        extend_select: Rules to run as well.
        reference: For an averaged model (EMA, SWA): the model that was averaged, or a path. A
            file that holds both, one under a key such as ``ema``, needs none.
        precision: ``"int8"`` or ``"fp16"``, where the folded model is to be deployed in it.
        batches: How many batches of ``data`` are run.
        name: What the report calls the target.
        checkpoint: The file whose weights a model has, so that what it lacks is seen.
        weights_key: Where in a checkpoint the weights are.

    Raises:
        UsageError: A word of ``select`` or ``ignore`` fits no rule, or there are data for a file.
        WeightsError: A checkpoint cannot be read.
        SpecError: The target is nothing that can be audited.
        PlanError: A batch of the data cannot be run, or the outputs are not finite in either mode.
    """
    rules = chosen(select, ignore, extend_select)
    if precision not in (None, "int8", "fp16"):
        raise UsageError(f"precision={precision!r} is unknown", hint="int8 or fp16")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise UsageError(
            f"the optimizer is a {type(optimizer).__name__} without param_groups",
            hint="pass a torch.optim.Optimizer",
        )
    taken = None if data is None else _first_batches(target, data, batches)
    subject = _subject(target, inputs, name, weights_key, taken)
    if checkpoint is not None:
        subject.tensors = checkpoint_tensors(Path(checkpoint), key=weights_key)
    if reference is not None:
        refer(subject, _subject(reference))
    else:
        refer_within(subject)
    subject.optimizer, subject.loader, subject.precision = optimizer, loader, precision
    if taken is not None:
        _measure(subject, taken)
    report = run_rules(subject, rules)
    if subject.live is None:
        return report
    from bnify.repairs import repair

    def fixer(wanted: AuditReport, unsafe: bool) -> Result:
        return repair(subject, wanted, unsafe)

    return replace(report, _fixer=fixer)


def _subject(
    target: nn.Module | str | Path,
    inputs: Inputs | None = None,
    name: str = "",
    key: str | None = None,
    batches: list[Any] | None = None,
) -> Subject:
    """What is known of a model, of a file, or of a folder that bnify wrote."""
    if not isinstance(target, (str, Path)):
        return _of_model(target, inputs, name, batches)
    path = Path(target)
    if is_saved_folder(path):
        return _of_folder(path, inputs, name or str(target))
    return subject_of_file(path, name or str(target), key=key)


def _of_folder(folder: Path, inputs: Inputs | None, name: str) -> Subject:
    """The saved model; without inputs it runs on what its plan remembers of them."""
    from bnify.api import load
    from bnify.saved.folder import read
    from bnify.structure import draw

    model = load(folder)
    if inputs is not None:
        return _of_model(model, inputs, name)
    plan = read(folder).plan
    return _of_model(model, draw(plan.call, plan.inputs), name)


def _of_model(
    model: nn.Module,
    inputs: Inputs | Call | None,
    name: str,
    batches: list[Any] | None = None,
) -> Subject:
    from bnify.accept import example_call, refuse_other_than_modules, refuse_wrapped
    from bnify.auditing.live import Live
    from bnify.fingerprint import fingerprint
    from bnify.structure import Call

    refuse_other_than_modules(model)
    refuse_wrapped(model, "audit")
    if inputs is None and batches is not None:
        inputs = _example(batches[0], model)
    call = inputs if inputs is None or isinstance(inputs, Call) else example_call(model, inputs)
    live = Live.of(model, call)
    return Subject(
        target=name or type(model).__name__,
        norms=tuple(live.states()),
        live=live,
        digest="" if live.lazy else fingerprint(model).digest,
    )


# -- data ----------------------------------------------------------------------------------------


def _first_batches(target: nn.Module | str | Path, data: Iterable[Any], limit: int) -> list[Any]:
    """The batches to run, read once.

    Raises:
        UsageError: They are for a file without code.
        PlanError: There are none.
    """
    if isinstance(target, (str, Path)) and not is_saved_folder(Path(target)):
        raise UsageError(
            f"data are run on a model, and {target} is a file without one",
            hint="audit the model: bnify audit SPEC --weights FILE --data LOADER",
        )
    from bnify.auditing.batches import first_batches

    return first_batches(data, limit)


def _example(batch: Any, model: nn.Module) -> Call:
    from bnify.structure import first_call

    call = first_call(batch, model)
    if call is None:
        raise PlanError(
            f"the first batch of the data is a {type(batch).__name__} that forward() cannot take",
            hint="pass inputs= beside data=",
        )
    return call


def _measure(subject: Subject, batches: list[Any]) -> None:
    """Run the data, unless the model cannot run yet."""
    from bnify.auditing.measured import measure

    live = subject.live
    if live is None:
        return
    if live.lazy:
        subject.assumed.append("the data were not run: the model is lazy, run it once first")
        return
    if any(parameter.is_meta for parameter in live.model.parameters()):
        subject.assumed.append("the data were not run: the model is on the meta device")
        return
    subject.measured = measure(live, batches, len(batches))
