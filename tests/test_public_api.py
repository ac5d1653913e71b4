"""The public names are a contract: none disappears, none loses its words."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import bnify
from bnify import errors
from bnify.plan import Plan, Reason

VERBS = {
    "insert": (
        "model inputs norm position init data include exclude only batch_size eps momentum groups "
        "drop_bias zero_gamma per_call skip_frozen optimizer plan inplace verify"
    ),
    "apply": "model plan inputs verify",
    "calibrate": "model data batches",
    "compare": "factory data norms seeds budget",
    "audit": "target inputs data optimizer loader select ignore",
    "export": "model inputs path dynamic_batch opset optimize",
    "verify": "reference candidate inputs device k",
    "load": "dir model",
}
DEFAULTS = {
    "norm": "batch",
    "position": "before-act",
    "init": "reset",
    "data": None,
    "include": (),
    "exclude": (),
    "only": (),
    "batch_size": None,
    "eps": None,
    "momentum": None,
    "groups": None,
    "drop_bias": False,
    "zero_gamma": False,
    "per_call": False,
    "skip_frozen": False,
    "optimizer": None,
    "plan": None,
    "inplace": False,
    "verify": True,
    "dynamic_batch": True,
    "opset": None,
    "optimize": True,
    "device": "cpu",
    "k": 10.0,
    "budget": 120.0,
}
SOURCES = sorted(Path(bnify.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_take_the_promised_arguments(verb):
    parameters = inspect.signature(getattr(bnify, verb)).parameters
    for name in VERBS[verb].split():
        assert name in parameters, f"{verb} lost {name}"
        if name in DEFAULTS and parameters[name].default is not inspect.Parameter.empty:
            assert parameters[name].default == DEFAULTS[name], f"{verb}({name}=)"


def test_every_public_name_resolves_and_is_documented():
    for name in bnify.__all__:
        value = getattr(bnify, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (value.__doc__ or "").strip(), name
    assert set(bnify.__all__) <= set(dir(bnify))
    with pytest.raises(AttributeError, match="no attribute 'insret'"):
        _ = bnify.insret


def test_no_subpackage_hides_a_public_name(run_python):
    """Importing bnify.x sets the attribute x of bnify: a verb of that name would be gone."""
    modules = {module.name for module in pkgutil.iter_modules(bnify.__path__)}
    assert not modules & set(bnify.__all__)
    code = (
        "import importlib, pkgutil, types, bnify\n"
        "for m in pkgutil.walk_packages(bnify.__path__, 'bnify.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)\n"
        "lost = [n for n in bnify.__all__ if isinstance(getattr(bnify, n), types.ModuleType)]\n"
        "raise SystemExit(str(lost) if lost else 0)"
    )
    done = run_python("-c", code)
    assert done.code == 0, done.stderr


def test_plan_and_reasons():
    assert {"edits", "skips", "fingerprint"} <= set(Plan.__dataclass_fields__)
    assert hasattr(Plan, "to_json")
    assert hasattr(Plan, "from_json")
    promised = (
        "excluded never-called inside-fused-module attention-projection weight-standardised "
        "tied-weights called-more-than-once output-head already-normed gate one-value-per-channel "
        "pre-norm token-layer functional-activation"
    ).split()
    order = [reason.value for reason in Reason]
    assert [value for value in order if value in promised] == promised
    for reason in Reason:
        assert reason.sentence
        assert not reason.sentence.endswith(".")


def test_errors_form_one_tree():
    names = (
        "SpecError WeightsError CaptureError PlanError VerificationError ExportError DeviceError"
    )
    for name in names.split():
        error = getattr(errors, name)("what", hint="next")
        assert isinstance(error, errors.BnifyError)
        assert error.hint == "next"
        assert error.to_dict() == {"kind": name, "message": "what", "hint": "next"}
        assert error.exit_code == (1 if name == "VerificationError" else 3)
        assert getattr(bnify, name) is getattr(errors, name)
    assert errors.UsageError("x").exit_code == 2


def test_every_module_imports():
    for module in pkgutil.walk_packages(bnify.__path__, "bnify."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_house_rules(path):
    """What neither ruff nor mypy checks: no catch-all files, length, bare Exception."""
    source = path.read_text()
    assert path.stem not in {"utils", "helpers", "misc", "common"}
    assert len(source.splitlines()) <= 420, f"{path.name} is too long: split it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = getattr(node.exc.func, "id", "")
            builtin = {"Exception", "AssertionError", "SystemExit"}
            assert name not in builtin, f"{path.name}:{node.lineno} raises {name}"
