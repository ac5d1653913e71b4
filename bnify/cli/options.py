"""The options that verbs share, each with its help; named as the Python arguments are."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional, TypeAlias

import typer


class Form(StrEnum):
    """Values of ``--format``."""

    RICH = "rich"
    JSON = "json"
    MD = "md"


class AuditForm(StrEnum):
    """Values of ``--format`` of ``bnify audit``."""

    RICH = "rich"
    CONCISE = "concise"
    JSON = "json"
    SARIF = "sarif"
    GITHUB = "github"
    MD = "md"


class FailOn(StrEnum):
    """Values of ``--fail-on``; a test holds them to :class:`bnify.auditing.finding.Severity`."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Precision(StrEnum):
    """Values of ``--target``."""

    INT8 = "int8"
    FP16 = "fp16"


class Color(StrEnum):
    """Values of ``--color``."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Norm(StrEnum):
    """Values of ``--norm``; a test holds them to :data:`bnify.norms.KINDS`."""

    BATCH = "batch"
    BATCH_NOAFFINE = "batch-noaffine"
    SYNC = "sync"
    GROUP = "group"
    LAYER = "layer"
    INSTANCE = "instance"
    RMS = "rms"
    AUTO = "auto"


class Position(StrEnum):
    """Values of ``--position``."""

    BEFORE = "before-act"
    AFTER = "after-act"


class Init(StrEnum):
    """Values of ``--init``."""

    RESET = "reset"
    PRESERVE = "preserve"
    STATS = "stats"


class Emit(StrEnum):
    """Values of ``--emit``; a test holds them to :data:`bnify.folding.options.EMITS`."""

    MODULE = "module"
    GRAPH = "graph"


class Optimizer(StrEnum):
    """Values of ``--optimizer``; a test holds them to :mod:`bnify.comparing.question`."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"


class Task(StrEnum):
    """Values of ``--task``."""

    AUTO = "auto"
    CLASSIFICATION = "classification"
    REGRESSION = "regression"


MODEL = "The model"
INPUTS = "Inputs"
NORMS = "Norms"
RULES = "Rules"
FIXES = "Fixes"
FOLDING = "Folding"
EXPERIMENT = "The experiment"
RUNNING = "Running"
OUTPUT = "Output"
CHECKS = "Verification"
GENERAL = "General"

_SPEC = "net.py:MyNetwork, pkg.mod:factory, torchvision:NAME, timm:NAME, hf:DIR, or a bnify folder"

Spec: TypeAlias = Annotated[str, typer.Argument(metavar="SPEC", help=_SPEC, show_default=False)]

Texts: TypeAlias = Optional[list[str]]  # noqa: UP045 - typer reads the annotation at run time

Weights: TypeAlias = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", help="Checkpoint: .safetensors or .pt.", rich_help_panel=MODEL),
]
WeightsKey: TypeAlias = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="KEY", help="Where in the checkpoint they are.", rich_help_panel=MODEL),
]
AllowMissing: TypeAlias = Annotated[
    Texts,
    typer.Option(metavar="GLOB", help="Names the checkpoint may lack.", rich_help_panel=MODEL),
]
AllowUnexpected: TypeAlias = Annotated[
    Texts,
    typer.Option(metavar="GLOB", help="Names the model may lack.", rich_help_panel=MODEL),
]
TrustGlobal: TypeAlias = Annotated[
    Texts,
    typer.Option(
        metavar="NAME", help="A global that the pickle may use; repeat.", rich_help_panel=MODEL
    ),
]
UnsafePickle: TypeAlias = Annotated[
    bool,
    typer.Option("--unsafe-pickle", help="Run whatever the pickle holds.", rich_help_panel=MODEL),
]
Arg: TypeAlias = Annotated[
    Texts,
    typer.Option(
        metavar="NAME=VALUE",
        help="Argument of the class or factory: JSON, else text; repeat.",
        rich_help_panel=MODEL,
    ),
]
ArgJson: TypeAlias = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", help="Arguments as a JSON object.", rich_help_panel=MODEL),
]
Pretrained: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--pretrained", help="Weights of the registry, from the cache.", rich_help_panel=MODEL
    ),
]
AllowDownload: TypeAlias = Annotated[
    bool,
    typer.Option("--allow-download", help="Let the registry download.", rich_help_panel=MODEL),
]
InputItems: TypeAlias = Annotated[
    Texts,
    typer.Option(
        "--input",
        metavar="[NAME=]SIZES",
        help="An input, 2,3,224,224[:dtype][@normal|uniform(0,1)|int(0,9)|ones]; repeat.",
        rich_help_panel=INPUTS,
    ),
]
InputFile: TypeAlias = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", help="Inputs: .npz or .safetensors.", rich_help_panel=INPUTS),
]
Data: TypeAlias = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="LOADER", help="Batches: pkg.mod:loader or file.py:loader.", rich_help_panel=INPUTS
    ),
]
Batches: TypeAlias = Annotated[
    int, typer.Option(metavar="N", help="How many of them at most.", rich_help_panel=INPUTS)
]
Seed: TypeAlias = Annotated[
    int, typer.Option(metavar="N", help="Of all random numbers.", rich_help_panel=INPUTS)
]
Device: TypeAlias = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="DEVICE",
        help="cpu (default), cuda, cuda:N or auto; cuda never becomes cpu.",
        rich_help_panel=CHECKS,
    ),
]
Force: TypeAlias = Annotated[
    bool, typer.Option("--force", help="Replace what bnify wrote there.", rich_help_panel=OUTPUT)
]
PlanFile: TypeAlias = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", help="Carry out this plan.", rich_help_panel=OUTPUT),
]
Output: TypeAlias = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder to write: weights, plan, ONNX file, report.",
        rich_help_panel=OUTPUT,
    ),
]
Onnx: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--onnx/--no-onnx",
        help="Write an ONNX file too.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
KeepFailed: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--keep-failed",
        help="Keep an unverified result, as DIR.failed or DIR.unverified.",
        rich_help_panel=OUTPUT,
    ),
]
DryRun: TypeAlias = Annotated[
    bool,
    typer.Option("--dry-run", help="Only make and print the plan.", rich_help_panel=OUTPUT),
]
Diff: TypeAlias = Annotated[
    bool,
    typer.Option("--diff", help="Show the module tree before and after.", rich_help_panel=OUTPUT),
]
PrintCode: TypeAlias = Annotated[
    bool,
    typer.Option("--print-code", help="Show the rewritten forward.", rich_help_panel=OUTPUT),
]
Verify: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Measure the result, or nothing.",
        show_default=False,
        rich_help_panel=CHECKS,
    ),
]
FormatOption: TypeAlias = Annotated[
    Form, typer.Option("--format", help="How the result is written.", rich_help_panel=GENERAL)
]
ColorOption: TypeAlias = Annotated[
    Color, typer.Option("--color", help="When to colour.", rich_help_panel=GENERAL)
]
Quiet: TypeAlias = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Only errors on stderr.", rich_help_panel=GENERAL),
]
Verbose: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Also what libraries and exporter say.", rich_help_panel=GENERAL
    ),
]
Debug: TypeAlias = Annotated[
    bool, typer.Option("--debug", help="Tracebacks on stderr.", rich_help_panel=GENERAL)
]
