"""What user code prints must never reach stdout, whichever way it prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bnify.spec import user_output_to_stderr


def test_every_way_of_printing_goes_to_stderr(capfd):
    with user_output_to_stderr():
        print("from print")
        os.write(1, b"from the descriptor\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    print("the result")
    out, err = capfd.readouterr()
    assert out == "the result\n"
    for line in ("from print", "from the descriptor", "from a child"):
        assert line in err


def test_what_c_code_buffers_lands_on_stderr_too(run_python):
    code = (
        "import ctypes\n"
        "from bnify.spec.silence import user_output_to_stderr\n"
        "with user_output_to_stderr():\n"
        "    ctypes.CDLL(None).printf(b'from printf\\n')\n"
        "print('the result')\n"
    )
    ran = run_python("-c", code)
    assert (ran.code, ran.stdout) == (0, "the result\n")
    assert "from printf" in ran.stderr


def test_stdout_comes_back_after_an_exception(capfd):
    before = sys.stdout
    with pytest.raises(ZeroDivisionError), user_output_to_stderr():
        print(1 / 0)
    assert sys.stdout is before
    os.write(1, b"back\n")
    assert capfd.readouterr().out == "back\n"


def test_it_nests(capfd):
    with user_output_to_stderr():
        with user_output_to_stderr():
            os.write(1, b"inner\n")
        os.write(1, b"outer\n")
    os.write(1, b"result\n")
    out, err = capfd.readouterr()
    assert out == "result\n"
    assert err == "inner\nouter\n"


def test_closed_streams_are_no_obstacle(run_python):
    code = (
        "import os\n"
        "from bnify.spec.silence import user_output_to_stderr\n"
        "os.close(2)\n"
        "with user_output_to_stderr():\n"
        "    os.write(1, b'nowhere')\n"
        "os.write(1, b'result')\n"
        "os.close(1)\n"
        "with user_output_to_stderr():\n"
        "    pass\n"
    )
    assert run_python("-c", code).stdout == "result"
