"""What doctor found, for a person and a program."""

from __future__ import annotations

import json

from bnify.doctor import examine
from bnify.report import render


def test_the_real_findings_render_in_every_format():
    found = examine()
    text = render(found, "rich", width=80)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("torch", "onnxruntime", "CPUExecutionProvider", found["python"]):
        assert word in text
    assert "| torch |" in render(found, "md")
    data = json.loads(render(found, "json"))
    assert data["verb"] == "doctor"
    assert data["packages"]["torch"]["ok"] is True


def test_something_missing_is_a_failed_verdict_with_its_cure():
    found = examine()
    found["missing"] = [
        {"name": "onnx", "why": "writing ONNX", "hint": "pip install onnx", "required": True}
    ]
    found["ok"] = False
    found["packages"]["onnx"] |= {"version": None, "ok": False}
    text = render(found, "rich", width=80)
    assert "FAIL  1 missing that bnify needs" in text
    assert "pip install onnx" in text
