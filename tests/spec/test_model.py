"""SPEC → model from Python code: every form, and every way in which the user's code can fail."""

from __future__ import annotations

import copy
import pickle
import sys
import traceback

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bnify.errors import SpecError, UsageError
from bnify.spec import SpecKind, load_model

NET = """
from torch import nn
import torch

print("imported")

class Net(nn.Module):
    def __init__(self, width=4, *, bias=True):
        super().__init__()
        print("built")
        self.fc = nn.Linear(3, width, bias=bias)

    def forward(self, x):
        return self.fc(x)

class Zoo:
    class Small(nn.Module):
        pass

def build(width=2):
    return Net(width)

net = Net(5)
needs = lambda width: Net(width)
nothing = lambda: None
pair = lambda: (Net(), "transform")
weights = {"fc.weight": torch.ones(1)}
class Plain: pass
"""

DEEP = """from torch import nn
def inner():
    return nn.Linear('a', 3)
def Net():
    return inner()
"""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if not name.startswith("torch"):
            sys.modules.pop(name)


@pytest.mark.parametrize(
    ("spec", "arguments", "width"),
    [
        ("net.py:Net", {}, 4),
        ("net.py:Net", {"width": 7, "bias": False}, 7),
        ("net.py:build", {}, 2),
        ("net.py:build", {"width": 6}, 6),
        ("net.py:net", {}, 5),
        ("./net.py:needs", {"width": 3}, 3),
        ("net:Net", {}, 4),
        ("net:net", {}, 5),
    ],
)
def test_each_form(spec, arguments, width):
    source = load_model(spec, arguments=arguments)
    assert source.model.fc.out_features == width
    assert source.spec == spec
    assert source.kind is (SpecKind.FILE if ".py" in spec else SpecKind.MODULE)
    assert source.file is not None
    assert source.file.name == "net.py"
    assert len(source.sha256 or "") == 64
    assert source.call is None


def test_dotted_attributes():
    assert type(load_model("net.py:Zoo.Small").model).__name__ == "Small"


def test_user_output_goes_to_stderr(capfd):
    load_model("net.py:Net")
    out, err = capfd.readouterr()
    assert out == ""
    assert "imported" in err
    assert "built" in err


def test_the_file_is_private_yet_its_models_copy_and_pickle(tmp_path):
    path = list(sys.path)
    model = load_model("net.py:Net").model
    assert sys.path == path
    assert "net" not in sys.modules
    assert type(model).__module__ in sys.modules
    assert not (tmp_path / "__pycache__").exists()
    assert torch.equal(copy.deepcopy(model).fc.weight, model.fc.weight)
    assert torch.equal(pickle.loads(pickle.dumps(model)).fc.weight, model.fc.weight)


def test_an_edited_file_is_read_again_and_the_first_model_lives_on(tmp_path):
    first = load_model("net.py:build")
    (tmp_path / "net.py").write_text(NET.replace("width=2", "width=9"))
    second = load_model("net.py:build")
    assert (first.model.fc.out_features, second.model.fc.out_features) == (2, 9)
    assert first.sha256 != second.sha256
    assert type(pickle.loads(pickle.dumps(first.model))) is type(first.model)


def test_the_network_of_a_module_is_not_shared():
    first, second = load_model("net:net").model, load_model("net:net").model
    assert first is not second
    assert torch.equal(first.fc.weight, second.fc.weight)


def test_the_seed_decides_the_weights_and_torch_goes_on_undisturbed():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = load_model("net.py:Net", seed=1).model.fc.weight
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, load_model("net.py:Net", seed=1).model.fc.weight)
    assert not torch.equal(first, load_model("net.py:Net", seed=2).model.fc.weight)


def test_siblings_are_importable_while_loading_and_never_mixed_up(tmp_path):
    code = "from layers import WIDTH\nfrom torch import nn\n"
    code += "def build():\n    import late\n    return nn.Linear(1, WIDTH + late.MORE)\n"
    for name, width in (("a", 1), ("b", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "net.py").write_text(code)
        (folder / "layers.py").write_text(f"WIDTH = {width}\n")
        (folder / "late.py").write_text(f"MORE = {width * 10}\n")
    widths = [load_model(f"{name}/net.py:build").model.out_features for name in "aba"]
    assert widths == [11, 22, 11]


def test_scripting_finds_the_source():
    assert torch.jit.script(load_model("net.py:Net").model)(torch.ones(1, 3)).shape == (1, 4)


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "arguments", "fragments", "hint"),
    [
        ("missing.py:Net", {}, ["missing.py", "No such file"], "check the path"),
        ("nett.py:Net", {}, ["No such file"], "did you mean net.py?"),
        ("far/away/net.py:Net", {}, ["No such file"], "there is no folder far/away"),
        (
            "net.py:Nett",
            {},
            ["net.py has no 'Nett'", "Net (nn.Module)", "build (function)", "net (Net instance)"],
            "did you mean net.py:Net?",
        ),
        ("net.py:Zoo.Smal", {}, ["net.py:Zoo has no 'Smal'"], "did you mean net.py:Zoo.Small?"),
        ("net.py:Net", {"widht": 1}, ["'widht'", "Net(width=4, *, bias=True)"], "--arg"),
        ("net.py:needs", {}, ["missing a required argument: 'width'"], "--arg"),
        ("net.py:net", {"width": 1}, ["already built"], "leave --arg out"),
        ("net.py:nothing", {}, ["gives None, not an nn.Module"], ""),
        ("net.py:pair", {}, ["a tuple (Net, str)"], "the network alone"),
        ("net.py:weights", {}, ["gives a dict"], "--weights"),
        ("net.py:Plain", {}, ["gives a Plain"], ""),
        ("net.py:torch", {}, ["gives a module"], "net.py:torch.NAME"),
        ("no_such_pkg.mod:Net", {}, ["there is no module 'no_such_pkg'"], "registries"),
        ("net.mod:Net", {}, ["there is no module 'net.mod'"], ""),
    ],
)
def test_what_names_no_model(spec, arguments, fragments, hint):
    with pytest.raises(SpecError) as caught:
        load_model(spec, arguments=arguments)
    for fragment in fragments:
        assert fragment in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("code", "fragments"),
    [
        ("x = (\n", ["syntax error at bad.py:1", "never closed"]),
        ("\n\nraise ValueError('boom\\nand more')\n", ["ValueError: boom", "bad.py:3 in <module>"]),
        ("import sys\nsys.exit(4)\n", ["SystemExit(4)", "bad.py:2"]),
        ("import no_such_dependency\n", ["No module named 'no_such_dependency'", "bad.py:1"]),
        ("from .layers import x\n", ["relative import"]),
        ("x = 1\0\n", ["null bytes"]),
        ("x = '\xff'\n".encode("latin-1"), ["syntax error"]),
        (
            DEEP,
            ["TypeError", "bad.py:3 in inner, called from bad.py:5 in Net"],
        ),
        ("def Net():\n    return Net()\n", ["RecursionError"]),
    ],
)
def test_user_code_that_fails(tmp_path, code, fragments):
    (tmp_path / "bad.py").write_bytes(code if isinstance(code, bytes) else code.encode())
    before = set(sys.modules)
    with pytest.raises(SpecError) as caught:
        load_model("bad.py:Net")
    for fragment in fragments:
        assert fragment in caught.value.message
    assert "\n" not in caught.value.message
    for foreign in ("importlib", "site-packages", "usercode", "objects.py"):
        assert foreign not in caught.value.message
    assert caught.value.__cause__ is not None  # --debug shows all of it
    left = {name for name in set(sys.modules) - before if name.startswith("_bnify_spec_bad")}
    assert len(left) <= 1


def test_debug_has_the_whole_traceback(tmp_path):
    (tmp_path / "bad.py").write_text("def Net():\n    raise KeyError('deep')\n")
    with pytest.raises(SpecError) as caught:
        load_model("bad.py:Net")
    assert "KeyError: 'deep'" in "".join(traceback.format_exception(caught.value))


def test_an_interrupt_is_not_swallowed(tmp_path):
    (tmp_path / "bad.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_model("bad.py:Net")


def test_what_has_no_code_says_what_it_is(tmp_path):
    save_file({"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}, tmp_path / "w.safetensors")
    (tmp_path / "m.onnx").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bnify.json").write_text("{}")
    for spec, fragment, hint in (
        ("w.safetensors", "2 tensors, 8 values: fc.", "--weights"),
        ("m.onnx", "ONNX file", "net.py:MyNetwork"),
        ("out", "folder that bnify wrote", "bnify.load"),
        ("gone.pt", "there is no file gone.pt", "check the path"),
        ("gone.onnx", "there is no file gone.onnx", "check the path"),
    ):
        with pytest.raises(SpecError) as caught:
            load_model(spec)
        assert fragment in caught.value.message
        assert hint in caught.value.hint


def test_pretrained_is_for_registries():
    with pytest.raises(UsageError, match="no pretrained weights"):
        load_model("net.py:Net", pretrained=True)


def test_the_articles_network():
    from conftest import ROOT

    model = load_model(f"{ROOT / 'examples' / 'mlp.py'}:MyNetwork").model
    assert isinstance(model, nn.Module)
