"""Models by name: no weights, no network, and inputs that fit."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import urllib.request

import pytest
import torch

from bnify.errors import SpecError
from bnify.spec import SpecKind, load_model
from bnify.spec.offline import offline


def runs(spec, **options):
    source = load_model(spec, **options)
    assert source.kind is SpecKind.REGISTRY
    with torch.no_grad():
        source.call(source.model.eval())
    return source


@pytest.mark.parametrize(
    ("spec", "arguments", "shape"),
    [
        ("torchvision:squeezenet1_1", {"num_classes": 3}, (2, 3, 224, 224)),
        ("torchvision:lraspp_mobilenet_v3_large", {}, (2, 3, 224, 224)),
        ("timm:test_vit", {"num_classes": 3}, (2, 3, 160, 160)),
        ("timm:test_resnet.r160_in1k", {"in_chans": 1}, (2, 1, 160, 160)),
        ("timm:test_vit", {"img_size": 96}, (2, 3, 96, 96)),
    ],
)
def test_a_model_comes_with_inputs_that_fit(spec, arguments, shape):
    source = runs(spec, arguments=arguments)
    assert tuple(source.call.args[0].shape) == shape
    if "num_classes" in arguments:
        assert source.call(source.model.eval()).shape[-1] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("inception_v3", (2, 3, 299, 299)),
        ("fcn_resnet50", (2, 3, 224, 224)),
        ("r3d_18", (2, 3, 16, 112, 112)),
        ("raft_small", (2, 3, 128, 128)),
    ],
)
def test_families_of_torchvision(name, shape):
    assert tuple(runs(f"torchvision:{name}").call.args[0].shape) == shape


def test_a_model_without_known_inputs_says_so():
    source = load_model("torchvision:ssdlite320_mobilenet_v3_large")
    assert source.call is None
    assert "--input" in source.notes[0]


def test_the_seed_decides_the_weights():
    models = [load_model("timm:test_vit", seed=seed).model for seed in (1, 1, 2)]
    first, same, other = (model.head.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("spec", "arguments", "fragment", "hint"),
    [
        ("torchvision:resnet51", {}, "torchvision has no model 'resnet51'", "torchvision:resnet50"),
        ("timm:resnet5O", {}, "timm has no model 'resnet5O'", "timm:resnet50"),
        ("torchvision:squeezenet1_1", {"classes": 3}, "SqueezeNet(version: str", "--arg"),
        ("timm:test_vit", {"clases": 3}, "num_classes", "--arg"),
        ("hf:/no/such/folder", {}, "there is no folder", "check"),
    ],
)
def test_what_a_registry_refuses(spec, arguments, fragment, hint):
    with pytest.raises(SpecError) as caught:
        load_model(spec, arguments=arguments)
    assert fragment in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_1", "timm:test_vit"])
def test_pretrained_weights_that_are_not_here_are_not_fetched(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SpecError, match="downloads are off") as caught:
        load_model(spec, pretrained=True)
    assert caught.value.hint == "add --allow-download"


def test_offline_refuses_look_ups_and_gives_everything_back(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    look_up = socket.getaddrinfo
    with offline() as hosts:
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        with pytest.raises(OSError, match="allow-download"):
            urllib.request.urlopen("http://weights.invalid/a.pth", timeout=1)
    assert hosts == ["weights.invalid"]
    assert socket.getaddrinfo is look_up
    assert "HF_HUB_OFFLINE" not in os.environ


def stand_in(tmp_path, code):
    """A package torchvision that shadows the installed one."""
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    return (
        "import sys\n"
        f"sys.path.insert(0, {str(package.parent)!r})\n"
        "from bnify.errors import SpecError\n"
        "from bnify.spec import load_model\n"
        "try:\n    load_model('torchvision:resnet18')\n"
        "except SpecError as error:\n    print(error.message); print(error.hint)\n"
    )


def test_a_registry_in_pieces_tells_the_first_line(tmp_path, run_python):
    code = "raise RuntimeError('operator torchvision::nms does not exist\\nmuch more')"
    ran = run_python("-c", stand_in(tmp_path, code))
    assert "cannot be imported: RuntimeError: operator torchvision::nms does not" in ran.stdout
    assert "much more" not in ran.stdout
    assert "belong together" in ran.stdout


def test_a_registry_that_is_not_installed_tells_the_pip_line(tmp_path, run_python):
    code = "raise ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')"
    ran = run_python("-c", stand_in(tmp_path, code))
    assert ran.stdout == "torchvision is not installed\npip install torchvision\n"


@pytest.fixture
def hf_folder(tmp_path):
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is not None, reason="transformers is installed"
)
def test_hugging_face_without_transformers(hf_folder):
    with pytest.raises(SpecError, match="transformers is not installed") as caught:
        load_model(f"hf:{hf_folder}")
    assert caught.value.hint == "pip install transformers"


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_a_hugging_face_folder(hf_folder):
    source = runs(f"hf:{hf_folder}", arguments={"hidden_size": 12})
    assert source.model.config.hidden_size == 12
    assert source.call.kwargs["input_ids"].max() < 50
    with pytest.raises(SpecError, match="downloads are off"):
        load_model("hf:someone/no-such-model")
    with pytest.raises(SpecError, match="raised OSError"):  # a folder without weights
        load_model(f"hf:{hf_folder}", pretrained=True)
    with pytest.raises(SpecError, match="has no hiden"):
        load_model(f"hf:{hf_folder}", arguments={"hiden": 1})


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(SpecError, match=r"no config\.json"):
        load_model(f"hf:{tmp_path}")
