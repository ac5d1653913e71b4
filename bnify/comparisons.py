"""``bnify.compare``: which normalization helps this model on this data, honestly."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnify.borrow import training_possible
from bnify.comparing.comparison import Comparison
from bnify.comparing.job import Job
from bnify.comparing.phases import Progress
from bnify.comparing.processes import refuse_reimport
from bnify.comparing.question import BATCH_SIZES, INIT_SCALES, NORMS, Question
from bnify.comparing.recipe import Recipe
from bnify.comparing.run_folder import RunFolder
from bnify.comparing.runner import run_job
from bnify.devices import resolve
from bnify.environment import environment, file_sha256
from bnify.errors import UsageError
from bnify.report.comparison_files import write_report
from bnify.spec.kinds import SpecKind, classify, parse_spec


def compare(
    factory: str | nn.Module | Callable[..., nn.Module],
    data: Any,
    norms: Sequence[str] = NORMS,
    seeds: int = 10,
    budget: float = 120.0,
    *,
    arguments: Mapping[str, Any] | None = None,
    loss: Any = None,
    epochs: float = 15.0,
    batch_size: int = 32,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    lrs: Sequence[float] = (),
    tuning_seeds: int = 2,
    sweep: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    init_scales: Sequence[float] = INIT_SCALES,
    target: float | None = None,
    task: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    image_size: int | None = None,
    jobs: int = 1,
    engine: str = "local",
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Comparison:
    """Train the same model with each kind of norm, and say what can be said about it.

    Every norm starts from the same weights and sees the same batches, seed by seed. Its learning
    rate is tuned on validation data with seeds of their own; the figures are from test data.
    Differences are paired by seed, with a 95 % interval and a sign-flip test after Holm.

    Args:
        factory: A class or function that builds the model, a SPEC such as ``"net.py:MyNetwork"``,
            or a network, whose weights every run then starts from.
        data: ``"digits"``, ``"glyphs"``, ``"mnist:DIR"``, ``"fashion-mnist:DIR"``,
            ``"cifar10:DIR"``, ``"folder:DIR"``, ``"pkg.mod:datasets"``, or what such a function
            returns: training, validation and test data, each a dataset or a pair of tensors.
        norms: Kinds to compare, ``"none"`` among them. A model that has norms is ``"as-is"``; the
            others then replace its norms.
        seeds: Of the figures; fewer than 8 cannot distinguish six norms at 5 %, nor fewer than 9
            answer ten claims.
        budget: Seconds, 0 for no limit. What has to be cut for it is said.
        arguments: Of the class or function.
        loss: A function of (output, targets), or ``"pkg.mod:loss"``; cross-entropy or the mean
            squared error when None.
        epochs: Passes through the training data in a run.
        batch_size: Samples a step.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        momentum: Of SGD.
        weight_decay: Not of norms and biases.
        lrs: Learning rates to tune over; seven half-decades for the optimizer when empty.
        tuning_seeds: Runs for each norm and learning rate.
        sweep: ``"lr"``, ``"batch"`` and ``"init"``: also run all seeds at each learning rate, at
            other batch sizes, from scaled initial weights.
        batch_sizes: Of the sweep.
        init_scales: Factors on the initial weights, of the sweep.
        target: Validation accuracy (or loss) that steps and time run to; 95 % of the median arm's
            (110 % of its loss) when None.
        task: ``"classification"`` or ``"regression"``; by the targets when ``"auto"``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"auto"``.
        seed: Of the data's split and, with a run's own seed, of everything else.
        image_size: Pixels a side of the images of a folder; 32 when None.
        jobs: Worker processes with one thread each; 1 runs in this process.
        engine: ``"local"``, or ``"ray"`` or ``"ray://host:port"`` for a Ray cluster.
        output: Folder for the runs and the report; each finished run is in it at once.
        resume: Go on in that folder.
        force: Replace that folder, if it holds nothing but a comparison.
        progress: Called with a :class:`bnify.comparing.phases.Progress` after each run.

    Returns:
        The comparison. Interrupted by Ctrl-C it holds what there is by then, and its ``partial``
        says so; with ``output`` it is written, and ``resume`` goes on.

    Raises:
        UsageError: An option that cannot be right, an output that exists, another question to
            resume than the folder's.
        SpecError: Model, data or loss cannot be had or do not fit each other, or no run trained.
        PlanError: There is no layer to normalize.
    """
    refuse_reimport()
    question = Question(
        norms=tuple(dict.fromkeys(norms)),
        seeds=seeds,
        budget=budget,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        lrs=tuple(lrs),
        tuning_seeds=tuning_seeds,
        sweep=tuple(sweep),
        batch_sizes=tuple(batch_sizes),
        init_scales=tuple(init_scales),
        target=target,
        task=task,
        device=device,
        seed=seed,
    )
    question.check()
    if resolve(device).type != "cpu" and engine != "local":
        raise UsageError(
            f"device={device} with engine={engine}: Ray's workers get CPUs only",
            hint="device='cpu', or engine='local'",
        )
    if jobs < 1:
        raise UsageError(f"jobs={jobs}: at least one process is needed", hint="jobs=2")
    if resume and output is None:
        raise UsageError("there is no folder to resume", hint="name it with output= (-o)")
    recipe = Recipe(source=factory, arguments=dict(arguments or {}))
    job = Job(recipe=recipe, data=data, question=question, loss=loss, image_size=image_size)
    asked = _asked(job)
    with (
        _place(output) as place,
        one_thread(),
        training_possible(),
        RunFolder.opened(place, asked, resume=resume, force=force) as folder,
    ):
        comparison = run_job(
            job,
            folder,
            engine=engine,
            jobs=jobs,
            tell=progress or (lambda _: None),
            model=recipe.name,
            data=asked["data"],
            report=output is not None,
        )
        if output is not None:
            write_report(comparison, place)
    return comparison


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread adds in one order, here as in the workers; restored at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _place(output: str | Path | None) -> Iterator[Path]:
    """The folder of the run: the user's, or one that goes when it is over."""
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="bnify-") as folder:
        yield Path(folder) / "run"


def _asked(job: Job) -> dict[str, Any]:
    """What makes two comparisons the same: they are resumed only then."""
    made = environment(device=job.question.device, seed=job.question.seed)
    return {
        "model": _name(job.recipe.name),
        "model_sha256": _sha256(job.recipe.source),
        "arguments": dict(job.recipe.arguments),
        "data": _name(job.data),
        "data_sha256": _sha256(job.data),
        "loss": None if job.loss is None else _name(job.loss),
        "loss_sha256": _sha256(job.loss),
        "image_size": job.image_size,
        **job.question.to_dict(),
        "versions": made["versions"],
        "platform": made["platform"],
    }


def _name(value: Any) -> str:
    """Words, with a path in one spelling, or the name of a function or class."""
    if isinstance(value, str):
        return ":".join(os.path.normpath(part) if part else "" for part in value.split(":"))
    return getattr(value, "__name__", type(value).__name__)


def _sha256(value: Any) -> str | None:
    """Of the Python file that words name, or that a class or function is defined in."""
    if isinstance(value, str):
        if value.partition(":")[0].endswith(".py") and classify(value) is SpecKind.FILE:
            path = Path(parse_spec(value).place)
            return file_sha256(path) if path.is_file() else None
        return None
    module = sys.modules.get(getattr(value, "__module__", None) or type(value).__module__)
    file = getattr(module, "__file__", None)
    return file_sha256(Path(file)) if file and Path(file).is_file() else None
