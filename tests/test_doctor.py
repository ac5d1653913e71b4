from __future__ import annotations

import json

import torch

import bnify
from bnify.doctor import examine


def test_it_names_versions_providers_and_what_is_missing() -> None:
    found = examine()
    assert found["bnify"] == bnify.__version__
    assert found["packages"]["torch"]["version"] == torch.__version__
    assert "CPUExecutionProvider" in found["providers"]
    assert found["cuda"]["torch"] is torch.cuda.is_available()
    assert found["ok"] is True
    if not torch.cuda.is_available():
        cuda = next(item for item in found["missing"] if item["name"] == "CUDA")
        assert cuda["required"] is False
        assert torch.__version__ in cuda["why"]
    json.dumps(found)


def test_it_imports_nothing_heavy_before_it_is_called(run_python) -> None:
    code = "import sys, bnify.doctor; print(sorted({'torch', 'onnx', 'numpy'} & set(sys.modules)))"
    assert run_python("-c", code).stdout.strip() == "[]"


def test_what_is_absent_or_too_old_comes_with_the_line_to_run(run_python, tmp_path) -> None:
    code = (
        "import json\n"
        "from importlib import metadata\n"
        "import bnify.doctor as doctor\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name.startswith('onnxruntime'):\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return '2.8.1+cu126' if name == 'torch' else real(name)\n"
        "metadata.version = version\n"
        "metadata.requires = lambda name: ['torch>=2.9', 'onnxruntime>=1.20']\n"
        "print(json.dumps(doctor.examine()))\n"
    )
    ran = run_python("-c", code, cwd=tmp_path)
    found = json.loads(ran.stdout)
    missing = {item["name"]: item for item in found["missing"]}
    assert found["ok"] is False
    assert found["providers"] == []
    assert missing["torch"]["why"] == "2.8.1+cu126 is too old, >=2.9 is needed for everything"
    assert missing["onnxruntime"]["hint"] == "pip install 'onnxruntime>=1.20'"
    assert missing["onnxruntime"]["required"] is True
