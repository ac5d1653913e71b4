"""Start-up: what must not be imported before it is needed."""

from __future__ import annotations

import json

import pytest

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "safetensors", "scipy")

PROBE = """
import json, sys
before = set(sys.modules)
try:
    {statement}
except SystemExit as stop:
    code = stop.code
else:
    code = 0
heavy = sorted(set({heavy!r}) & set(sys.modules))
sys.stderr.write(json.dumps([code, heavy]) + "\\n")
"""


def _probe(run_python, statement):
    done = run_python("-c", PROBE.format(statement=statement, heavy=HEAVY))
    assert done.code == 0, done.stderr
    return json.loads(done.stderr.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "statement",
    [
        "import bnify",
        "import bnify; bnify.__version__; dir(bnify)",
        "import bnify.cli",
        "sys.argv = ['bnify', '--help']; import bnify.cli; bnify.cli.main()",
        "sys.argv = ['bnify', '--version']; import bnify.cli; bnify.cli.main()",
        "sys.argv = ['bnify', 'insert', '--help']; import bnify.cli; bnify.cli.main()",
        "sys.argv = ['bnify', 'audit', '--help']; import bnify.cli; bnify.cli.main()",
        "sys.argv = ['bnify', 'explain', '--help']; import bnify.cli; bnify.cli.main()",
        "sys.argv = ['bnify', 'nonsense']; import bnify.cli; bnify.cli.main()",
    ],
)
def test_nothing_heavy_is_imported(run_python, statement):
    code, heavy = _probe(run_python, statement)
    assert heavy == []
    assert code in ((2,) if "nonsense" in statement else (0, None))


def test_the_probe_sees_torch(run_python):
    """The planted fault: the probe must not be blind."""
    _, heavy = _probe(run_python, "import torch")
    assert "torch" in heavy


def test_plans_are_read_without_torch(run_python):
    _, heavy = _probe(run_python, "import bnify.plan, bnify.errors, bnify.verdict")
    assert heavy == []


@pytest.mark.parametrize("statement", ["import bnify; bnify.audit", "import bnify.auditing.rules"])
def test_auditing_needs_numpy_and_nothing_more(run_python, statement):
    _, heavy = _probe(run_python, statement)
    assert heavy == ["numpy"]
