from __future__ import annotations

import os
import sys
import warnings

import pytest

from bnify.quiet import Captured, captured_streams


def test_python_descriptors_and_warnings_are_all_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_streams() as said:
        print("from python")
        print("to stderr", file=sys.stderr)
        os.write(1, b"from C\n")
        os.write(2, b"errors from C\n")
        warnings.warn("mind the gap", UserWarning, stacklevel=1)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    for text in ("from python", "to stderr", "from C", "errors from C", "UserWarning: mind the"):
        assert text in said.text


def test_the_streams_come_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        with captured_streams() as said:
            texts.append(said)
            os.write(1, b"before\n")
            raise ValueError("inside")

    texts: list[Captured] = []
    with pytest.raises(ValueError, match="inside"):
        fails()
    os.write(1, b"after\n")
    assert texts[0].text == "before\n"
    assert capfd.readouterr().out == "after\n"


def test_closed_streams_are_no_obstacle(run_python) -> None:
    code = (
        "import os\n"
        "os.close(1)\n"
        "from bnify.quiet import captured_streams\n"
        "with captured_streams() as said:\n"
        "    os.write(2, b'seen')\n"
        "os.write(2, said.text.encode())\n"
    )
    ran = run_python("-c", code)
    assert (ran.code, ran.stderr) == (0, "seen")
