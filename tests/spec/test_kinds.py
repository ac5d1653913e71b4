"""A SPEC is told by its text and by what lies on disk; two readings are an error."""

from __future__ import annotations

import math

import pytest

from bnify.errors import SpecError, UsageError
from bnify.spec import SpecKind, classify, parse_arguments


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("class Net: pass\ndef build(): pass\n_x = 1\n")


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("net.py:Net", SpecKind.FILE),
        ("sub/dir/net.py:a.b", SpecKind.FILE),
        ("C:/nets/net.py:Net", SpecKind.FILE),
        ("missing.py:Net", SpecKind.FILE),
        ("pkg.mod:factory", SpecKind.MODULE),
        ("torchvision:resnet50", SpecKind.REGISTRY),
        ("timm:hf_hub:someone/something", SpecKind.REGISTRY),
        ("hf:some/dir", SpecKind.REGISTRY),
        ("model.onnx", SpecKind.ONNX),
        ("MODEL.ONNX", SpecKind.ONNX),
        ("a.safetensors", SpecKind.CHECKPOINT),
        ("a.pt", SpecKind.CHECKPOINT),
        ("a.pth", SpecKind.CHECKPOINT),
        ("a.bin", SpecKind.CHECKPOINT),
        ("a.ckpt", SpecKind.CHECKPOINT),
    ],
)
def test_each_form(spec, kind):
    assert classify(spec) is kind


def test_a_folder_that_bnify_wrote(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bnify.json").write_text("{}")
    assert classify("out") is SpecKind.FOLDER
    assert classify(str(tmp_path / "out")) is SpecKind.FOLDER


@pytest.mark.parametrize(
    ("spec", "fragment", "hint"),
    [
        ("", "empty", "net.py:MyNetwork"),
        ("nothing", "no colon", "net.py:MyNetwork"),
        ("nothing.py", "no colon", "net.py:MyNetwork"),
        ("x" * 5000, "no colon", ""),
        ("null\0byte", "no colon", ""),
        ("net.py", "it defines Net, build", "net.py:NAME"),
        ("net.py:", "attribute", ""),
        (":Net", "no place", ""),
        ("net.py:Net()", "'Net()'", "--arg"),
        ("net.py:a..b", "'a..b'", ""),
        ("./net:Net", "no module name", "did you mean ./net.py:Net?"),
        ("timm:", "names no model", "timm:NAME"),
        ("notes.txt:Net", "not a Python file", ""),
    ],
)
def test_what_cannot_be_right(spec, fragment, hint, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError) as caught:
        classify(spec)
    assert fragment in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [("folder", None, "net.py:MyNetwork"), ("hub", "config.json", "hf:hub")],
)
def test_a_folder_of_someone_else(tmp_path, name, content, hint):
    (tmp_path / name).mkdir()
    if content:
        (tmp_path / name / content).write_text("{}")
    with pytest.raises(SpecError, match=r"without bnify\.json") as caught:
        classify(name)
    assert hint in caught.value.hint


def test_an_unknown_suffix(tmp_path):
    (tmp_path / "a.h5").write_text("")
    with pytest.raises(SpecError, match=r"unknown suffix '\.h5'"):
        classify("a.h5")


def test_a_path_with_a_colon_is_ambiguous(tmp_path):
    (tmp_path / "timm:resnet50").mkdir()
    with pytest.raises(UsageError, match="two ways"):
        classify("timm:resnet50")


def test_a_module_that_is_here_and_installed_is_ambiguous(tmp_path):
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UsageError, match=r"two ways: json\.py here, and .*json") as caught:
        classify("json:factory")
    assert "./json.py:factory" in caught.value.hint
    assert classify("./json.py:factory") is SpecKind.FILE
    assert classify("net:Net") is SpecKind.MODULE


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("n=10", 10),
        ("n=1e-5", 1e-5),
        ("n=[1,2]", [1, 2]),
        ('n={"a":null}', {"a": None}),
        ("n=true", True),
        ("n=text", "text"),
        ('n="10"', "10"),
        ("n=", ""),
        ("n=a=b", "a=b"),
        ("n=1,2", "1,2"),
        ('n="True"', "True"),
    ],
)
def test_a_value_is_json_or_else_a_string(item, value):
    assert parse_arguments([item]) == {"n": value}


@pytest.mark.parametrize(
    ("items", "fragment"),
    [
        (["n"], "--arg n is not NAME=VALUE"),
        (["=1"], "--arg =1 is not NAME=VALUE"),
        (["a.b=1"], "not NAME=VALUE"),
        (["n=1", "n=2"], "--arg n=2: n is given twice"),
        (["bias=False"], "Python spelling"),
    ],
)
def test_malformed_arguments(items, fragment):
    with pytest.raises(UsageError) as caught:
        parse_arguments(items)
    assert fragment in caught.value.message
    assert caught.value.hint


def test_arguments_from_a_file_yield_to_the_command_line(tmp_path):
    file = tmp_path / "args.json"
    file.write_text('{"a": 1, "b": 2}')
    assert parse_arguments(["b=3"], file) == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "error", "fragment"),
    [
        (None, SpecError, "cannot be read"),
        ("{", UsageError, "is no JSON"),
        ("[1]", UsageError, "holds a JSON list"),
    ],
)
def test_a_bad_argument_file(tmp_path, text, error, fragment):
    file = tmp_path / "args.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error, match=fragment):
        parse_arguments([], file)


def test_infinity_is_a_number():
    assert math.isinf(parse_arguments(["n=Infinity"])["n"])
