"""From the command line to an exit code: parse, run the verb, and turn every error into words."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import typer

import bnify
from bnify.cli import audit, calibrate, compare, doctor, explain, export, fold, insert, verify
from bnify.cli.grouped import GroupedCommand
from bnify.cli.options import Form
from bnify.cli.streams import Streams, wants_color
from bnify.errors import BnifyError, UsageError

#: In the order of ``--help``. Each is one Python function of the same name.
VERBS: Final[tuple[Callable[..., Any], ...]] = (
    insert.insert,
    fold.fold,
    audit.audit,
    calibrate.calibrate,
    compare.compare,
    export.export,
    verify.verify,
    explain.explain,
    doctor.doctor,
)
SHORT: Final = {
    "insert": "Put norms into a model, where they belong.",
    "fold": "Fold trained norms into weights.",
    "audit": "Find what is wrong with norms.",
    "calibrate": "Measure running statistics anew.",
    "compare": "Train with each kind of norm, and say which helps.",
    "export": "Write a model as a verified ONNX file.",
    "verify": "Judge one model or file by another.",
    "explain": "Explain a rule of the audit.",
    "doctor": "Show what is installed and what is missing.",
}
INTERRUPTED: Final = 130
OUR_BUG: Final = 70


class InternalError(BnifyError):
    """A bug of bnify's own: the one error that is never the user's."""

    exit_code = OUR_BUG


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None, *, restore: bool = False) -> int:
    """Run a command line.

    Args:
        arguments: The words after the program's name; those of the process when None.
        restore: Give stdout back at the end, for callers that live on.

    Returns:
        The exit code: 0 done and verified, 1 checked and failed, 2 the command line cannot be
        right, 3 found while doing it, 70 a bug of bnify, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    streams = Streams()
    code = OUR_BUG
    try:
        code = _run(words, streams)
    except BnifyError as error:  # writing the result failed
        streams.say(f"error: {error.message}")
        code = error.exit_code
    finally:
        try:
            streams.close(restore=restore)
        except BnifyError as error:
            streams.say(f"error: {error.message}")
            code = error.exit_code
    return code


def _run(words: list[str], streams: Streams) -> int:
    try:
        command = typer.main.get_command(application(words))
        code = command.main(words, prog_name="bnify", standalone_mode=False, obj=streams)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        streams.say("interrupted")
        return INTERRUPTED
    except SystemExit as error:  # shell completion ends that way
        return error.code if isinstance(error.code, int) else 0
    except Exception as error:  # the outermost boundary: every error ends as words and a code
        return _report(error, words, streams)


def application(words: Sequence[str]) -> typer.Typer:
    """The Typer application.

    Options of the group (help, version, shell completion) stand before any verb. Leaving
    them out behind one spares ``bnify VERB --help`` the import of pydantic, half of its time.
    """
    names = {verb.__name__ for verb in VERBS}
    before_verb = not (words and words[0] in names) or "_BNIFY_COMPLETE" in os.environ
    app = typer.Typer(
        name="bnify",
        help="Put normalization into PyTorch models, and prove each step with numbers.",
        add_completion=before_verb,
        add_help_option=before_verb,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="exit codes: 0 done and verified, 1 checked and failed, 2 wrong command line, "
        "3 found while doing it, 70 a bug of bnify, 130 interrupted",
    )
    if before_verb:
        app.callback()(_top)
    for verb in VERBS:
        app.command(cls=GroupedCommand, short_help=SHORT[verb.__name__])(verb)
    return app


def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version and exit.",
            is_eager=True,
            callback=lambda value: _show_version(value),
        ),
    ] = False,
) -> None:
    pass


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bnify {bnify.__version__}")
        raise typer.Exit


# "dynamic_batch=False (--static-batch)": hints name both; here the option is what can be typed.
_OF_PYTHON: Final = re.compile(r"\b\w+=\w+ \((--[\w-]+)\)")


_NO_NUMBER: Final = re.compile(r"invalid value for '(--[\w-]+)'.*?valid (number|integer)")


def _report(error: Exception, words: Sequence[str], streams: Streams) -> int:
    """Words for an error, on the stream and in the form that was asked for."""
    known = _as_ours(error, words)
    known.hint = _OF_PYTHON.sub(r"\1", known.hint)
    if "--debug" in words:
        streams.say("".join(traceback.format_exception(error)))
    from bnify.report import render_error

    form = _asked_form(words)
    verb = _asked_verb(words)
    result = getattr(known, "result", None)
    if form is Form.JSON:
        streams.emit(render_error(known, verb, form))
        return known.exit_code
    if getattr(result, "verification", None) is not None or getattr(known, "export", None):
        streams.emit(_render_failed(known, form, words, streams))
    colored = wants_color(
        _value_of("--color", words) or "auto",
        terminal=_is_terminal(streams.error),
        environment=os.environ,
    )
    encoding = getattr(streams.error, "encoding", None) or "utf-8"
    streams.say(render_error(known, verb, Form.RICH, color=colored, encoding=encoding))
    return known.exit_code


def _render_failed(error: Any, form: Form, words: Sequence[str], streams: Streams) -> str:
    """The report on a result that was measured and found wrong."""
    from bnify.report import render

    colored = wants_color(
        _value_of("--color", words) or "auto",
        terminal=streams.is_terminal(),
        environment=os.environ,
    )
    return render(
        error.result,
        form,
        width=streams.width(),
        color=colored,
        encoding=streams.encoding,
        target=" ".join(word for word in words[1:2] if not word.startswith("-")),
        export=getattr(error, "export", None),
    )


def _as_ours(error: Exception, words: Sequence[str]) -> BnifyError:
    """Any error as one of ours."""
    if isinstance(error, BnifyError):
        return error
    explain = getattr(error, "format_message", None)  # click's and typer's own errors
    if explain is not None and hasattr(error, "exit_code"):
        return _usage_error(error, explain(), words)
    if isinstance(error, MemoryError):
        return BnifyError("out of memory", hint="use smaller inputs: --input with a smaller batch")
    what = " ".join(str(error).split())
    return InternalError(
        f"bug in bnify: {type(error).__name__}: {what}",
        hint="please report this; the same command with --debug shows where",
    )


def _usage_error(error: Exception, message: str, words: Sequence[str]) -> UsageError:
    """An error of the command-line parser in our words: what was typed, and where help is."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "bnify"
    text = " ".join(message.replace("Value error, ", "").split()).rstrip(".")
    lowered = text[:1].lower() + text[1:]
    if lowered == "missing command":
        verbs = ", ".join(verb.__name__ for verb in VERBS)
        return UsageError("no verb was given", hint=f"one of {verbs}; see bnify --help")
    number = _NO_NUMBER.match(lowered)
    if number is not None:
        option, kind = number.groups()
        what = "a number" if kind == "number" else "a whole number"
        value = _value_of(option, words)
        typed = f" {value}" if value is not None else ""
        return UsageError(f"{option}{typed} is not {what}", hint=f"{what}; see {path} --help")
    return UsageError(lowered, hint=f"{path} --help")


def _asked_form(words: Sequence[str]) -> Form:
    """What --format says, even on a command line that cannot be parsed."""
    try:
        return Form(_value_of("--format", words) or "rich")
    except ValueError:
        return Form.RICH


def _asked_verb(words: Sequence[str]) -> str | None:
    first = next((word for word in words if not word.startswith("-")), None)
    return first if first in {verb.__name__ for verb in VERBS} else None


def _value_of(option: str, words: Sequence[str]) -> str | None:
    """The last value that an option was given."""
    value = None
    for index, word in enumerate(words):
        if word == option and index + 1 < len(words):
            value = words[index + 1]
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except ValueError:  # closed
        return False
