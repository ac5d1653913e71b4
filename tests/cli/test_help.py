"""What the command says of itself, and what it costs to say it."""

from __future__ import annotations

import re

import pytest

import bnify
from bnify.auditing.finding import Severity
from bnify.cli import options
from bnify.cli.run import VERBS
from bnify.folding.options import EMITS
from bnify.insertion.options import INITS, POSITIONS
from bnify.norms import KINDS
from bnify.report.audited import AuditFormat

COLD = """
import sys
sys.argv = ["bnify", *{words!r}]
from bnify.cli import main
try:
    main()
except SystemExit as end:
    code = end.code
names = ("torch", "numpy", "onnx", "onnxruntime", "safetensors")
heavy = [name for name in names if name in sys.modules]
print("imported:", heavy, "code:", code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["insert", "--help"], ["audit", "-h"], ["explain", "-h"]]
)
def test_help_and_version_import_nothing_heavy(run_python, words):
    ran = run_python("-c", COLD.format(words=words))
    assert "imported: [] code: 0" in ran.stderr
    assert ran.stdout


def test_version(cli):
    assert cli("--version") == (0, f"bnify {bnify.__version__}\n", "")


def test_help_lists_the_verbs_that_work_and_no_other(cli):
    text = cli("--help").stdout
    commands = text.partition("Commands:")[2]
    assert re.findall(r"^  ([a-z]+) {2,}\S", commands, re.MULTILINE) == [v.__name__ for v in VERBS]
    assert "..." not in commands, "a description was cut off"
    assert "--install-completion" in text


@pytest.mark.parametrize("verb", [verb.__name__ for verb in VERBS])
def test_every_option_has_help_and_stands_under_a_heading(cli, verb):
    ran = cli(verb, "--help")
    assert ran.code == 0
    assert ran.stderr == ""
    assert "General:" in ran.stdout
    assert f"  Example: bnify {verb}" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80
    entries = re.split(
        r"^  (?=-)", ran.stdout.partition("Arguments:")[2] or ran.stdout, flags=re.MULTILINE
    )[1:]
    assert entries
    for entry in entries:
        option = entry.splitlines()[0]
        assert re.search(r" {2,}\S|\n {10,}\S", entry), f"{option} has no help"


def test_insert_has_the_options_of_the_python_function(cli):
    import inspect

    from bnify.api import insert

    text = cli("insert", "--help").stdout
    python_only = {"model", "inputs", "optimizer", "inplace", "progress"}
    for name in set(inspect.signature(insert).parameters) - python_only:
        assert f"--{name.replace('_', '-')} " in text, name
    assert "--no-verify " in text
    assert "--onnx / --no-onnx" in text


def test_fold_has_the_options_of_the_python_function(cli):
    import inspect

    from bnify.api import fold

    text = cli("fold", "--help").stdout
    for name in set(inspect.signature(fold).parameters) - {
        "model",
        "inputs",
        "inplace",
        "progress",
    }:
        assert f"--{name.replace('_', '-')} " in text, name
    headings = [line[:-1] for line in text.splitlines() if line and line[0] != " "][1:]
    insert = cli("insert", "--help").stdout
    assert (
        headings
        == [
            h.replace("Norms", "Folding")
            for h in (line[:-1] for line in insert.splitlines() if line and line[0] != " ")
        ][1:]
    )


def test_export_has_the_options_of_the_python_function(cli):
    import inspect

    from bnify.api import export

    text = cli("export", "--help").stdout
    for name in set(inspect.signature(export).parameters) - {"model", "inputs", "path", "options"}:
        assert f"--{name.replace('_', '-')} " in text, name
    assert "--static-batch" in text
    assert "--no-dynamic-batch" in text


def test_audit_has_the_options_of_the_python_function(cli):
    import inspect

    from bnify.audits import audit

    text = cli("audit", "--help").stdout
    python_only = {"target", "inputs", "optimizer", "loader", "name", "checkpoint"}
    renamed = {"precision": "target"}
    for name in set(inspect.signature(audit).parameters) - python_only:
        assert f"--{renamed.get(name, name).replace('_', '-')} " in text, name
    assert "--unsafe-fixes" in text


def test_choices_are_those_of_the_library():
    assert tuple(options.Norm) == KINDS
    assert tuple(options.Position) == POSITIONS
    assert tuple(options.Init) == INITS
    assert tuple(options.Emit) == EMITS
    assert tuple(options.FailOn) == tuple(Severity)
    assert tuple(options.AuditForm) == tuple(AuditFormat)


def test_python_dash_m_works(run_cli):
    assert run_cli("--version").stdout == f"bnify {bnify.__version__}\n"


def test_completion_can_be_shown(run_cli):
    ran = run_cli(
        env={"_BNIFY_COMPLETE": "complete_bash", "COMP_WORDS": "bnify ins", "COMP_CWORD": "1"}
    )
    assert ran.stdout.strip() == "insert"
