"""``bnify compare``: train with each kind of norm, and say honestly which one helps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from bnify.cli import options as o
from bnify.cli.session import Session
from bnify.errors import UsageError

if TYPE_CHECKING:
    from bnify.comparing.phases import Progress

_INTERRUPTED = 130
#: Not a bnify folder: its weights are fixed, and every run starts anew.
_SPEC = "net.py:MyNetwork, pkg.mod:factory, torchvision:NAME, timm:NAME, or hf:DIR"
_DATA = (
    "digits, glyphs, mnist:DIR, fashion-mnist:DIR, cifar10:DIR, folder:DIR, or pkg.mod:datasets, "
    "a function that returns training, validation and test data"
)


def compare(
    ctx: typer.Context,
    spec: Annotated[str, typer.Argument(metavar="SPEC", help=_SPEC, show_default=False)],
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DATA", help=_DATA + ".", rich_help_panel=o.EXPERIMENT),
    ] = None,
    norms: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Kinds to compare.", rich_help_panel=o.EXPERIMENT),
    ] = "none,batch,batch-noaffine,group,layer,instance,rms",
    seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Runs of each norm; fewer than 8 cannot distinguish six norms.",
            rich_help_panel=o.EXPERIMENT,
        ),
    ] = 10,
    budget: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="What does not fit is cut, and said; 0: no limit.",
            rich_help_panel=o.EXPERIMENT,
        ),
    ] = 120.0,
    sweep: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="AXES",
            help="Also over learning rates, batch sizes, initial scales: lr,batch,init.",
            rich_help_panel=o.EXPERIMENT,
        ),
    ] = None,
    batch_sizes: Annotated[
        str,
        typer.Option(metavar="B,B,...", help="Of that sweep.", rich_help_panel=o.EXPERIMENT),
    ] = "2,8,32,128",
    init_scales: Annotated[
        str,
        typer.Option(metavar="X,X,...", help="Of that sweep.", rich_help_panel=o.EXPERIMENT),
    ] = "0.1,0.3,1,3,10",
    epochs: Annotated[
        float,
        typer.Option(
            metavar="N",
            help="Passes through the training data in a run.",
            rich_help_panel=o.EXPERIMENT,
        ),
    ] = 15.0,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Samples a step.", rich_help_panel=o.EXPERIMENT)
    ] = 32,
    optimizer: Annotated[
        o.Optimizer, typer.Option(help="Trains all of them.", rich_help_panel=o.EXPERIMENT)
    ] = o.Optimizer.SGD,
    momentum: Annotated[
        float, typer.Option(metavar="M", help="Of SGD.", rich_help_panel=o.EXPERIMENT)
    ] = 0.9,
    weight_decay: Annotated[
        float,
        typer.Option(metavar="D", help="Not of norms and biases.", rich_help_panel=o.EXPERIMENT),
    ] = 0.0,
    lrs: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="LR,LR,...",
            help="Learning rates to tune over; seven half-decades by default.",
            rich_help_panel=o.EXPERIMENT,
        ),
    ] = None,
    tuning_seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Runs for each norm and learning rate.",
            rich_help_panel=o.EXPERIMENT,
        ),
    ] = 2,
    target: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            metavar="X",
            help="Validation accuracy (or loss) that steps and time run to; by default 95 % of "
            "the median norm's (110 % of its loss).",
            rich_help_panel=o.EXPERIMENT,
        ),
    ] = None,
    task: Annotated[
        o.Task, typer.Option(help="By the targets.", rich_help_panel=o.EXPERIMENT)
    ] = o.Task.AUTO,
    loss: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="LOSS",
            help="pkg.mod:loss, a function of (output, targets).",
            rich_help_panel=o.EXPERIMENT,
        ),
    ] = None,
    image_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            metavar="N",
            help="Pixels a side of the images of a folder (32).",
            rich_help_panel=o.EXPERIMENT,
        ),
    ] = None,
    arg: o.Arg = None,
    arg_json: o.ArgJson = None,
    seed: o.Seed = 0,
    jobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--jobs",
            "-j",
            metavar="N",
            help="Worker processes of one thread; by default one a core.",
            rich_help_panel=o.RUNNING,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="ENGINE",
            help="local, ray, or ray://host:port for a cluster.",
            rich_help_panel=o.RUNNING,
        ),
    ] = "local",
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="cpu, cuda, cuda:N or auto; cuda never becomes cpu.",
            rich_help_panel=o.RUNNING,
        ),
    ] = "cpu",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder to write: report.html, report.json, results.csv, figures, runs.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on in that folder.", rich_help_panel=o.OUTPUT),
    ] = False,
    force: o.Force = False,
    fmt: o.FormatOption = o.Form.RICH,
    color: o.ColorOption = o.Color.AUTO,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,  # noqa: ARG001 - read before parsing, so that it holds for usage errors
) -> int:
    """Train the model with each kind of norm, and say which one helps, with what certainty.

    Every norm starts from the same weights and sees the same batches; its learning rate is tuned.
    Ctrl-C ends with what there is; with -o nothing finished is lost, and --resume goes on.

    Example: bnify compare net.py:MyNetwork --data digits -o compared/
    """
    session = Session(ctx, fmt=fmt, color=color, quiet=quiet, verbose=verbose)
    if data is None:
        raise UsageError("no data to train on", hint=f"--data with one of {_DATA}")
    if resume and output is None:
        raise UsageError("--resume goes on in the folder of -o, which is missing", hint="-o DIR")
    with session.work():
        from bnify.comparisons import compare as compare_models
        from bnify.spec import parse_arguments

        with session.step("starting"):
            comparison = compare_models(
                spec,
                data,
                _words(norms),
                seeds,
                budget,
                arguments=parse_arguments(arg or (), arg_json),
                loss=loss,
                epochs=epochs,
                batch_size=batch_size,
                optimizer=optimizer.value,
                momentum=momentum,
                weight_decay=weight_decay,
                lrs=_numbers("--lrs", lrs),
                tuning_seeds=tuning_seeds,
                sweep=_words(sweep or ""),
                batch_sizes=_numbers("--batch-sizes", batch_sizes, int),
                init_scales=_numbers("--init-scales", init_scales),
                target=target,
                task=task.value,
                device=device,
                seed=seed,
                image_size=image_size,
                jobs=_jobs(jobs, device),
                engine=engine,
                output=output,
                resume=resume,
                force=force,
                progress=lambda progress: session.doing(_said(progress)),
            )
    session.emit(comparison)
    if output is not None:
        session.note(f"the report is {output / 'report.html'}")
        if comparison.partial:
            session.note(f"go on with --resume -o {output}")
    return _INTERRUPTED if comparison.partial else 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str | None, kind: type = float) -> tuple[Any, ...]:
    try:
        return tuple(kind(word) for word in _words(text or ""))
    except ValueError as error:
        what, example = ("numbers", "0.01,0.1,1") if kind is float else ("whole numbers", "2,8,32")
        raise UsageError(f"{option} {text} are not {what}", hint=f"{option} {example}") from error


def _jobs(jobs: int | None, device: str) -> int:
    """Worker processes: one a core that this process may use, one on a GPU."""
    import os

    if jobs is not None:
        return jobs
    if device != "cpu":
        return 1
    allowed: Any = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _said(progress: Progress) -> str:
    """``"training: 31 of 96 runs, about 40 s left"``."""
    text = progress.doing
    if progress.total:
        text += f": {progress.done} of {progress.total} runs"
    if progress.left is not None:
        text += f", about {max(progress.left, 1):.0f} s left"
    return text
