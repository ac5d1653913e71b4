"""Streams as programs and people need them: pipes, colours, encodings, terminals."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bnify.cli.streams import wants_color, wants_progress

DOCTOR = [sys.executable, "-m", "bnify", "doctor"]


@pytest.mark.parametrize(
    ("choice", "terminal", "environment", "wanted"),
    [
        ("auto", True, {}, True),
        ("auto", False, {}, False),
        ("auto", True, {"NO_COLOR": "1"}, False),
        ("auto", True, {"NO_COLOR": ""}, True),
        ("auto", False, {"FORCE_COLOR": "1"}, True),
        ("auto", True, {"TERM": "dumb"}, False),
        ("auto", False, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ("always", False, {"NO_COLOR": "1"}, True),
        ("never", True, {"FORCE_COLOR": "1"}, False),
    ],
)
def test_colour(choice, terminal, environment, wanted):
    assert wants_color(choice, terminal=terminal, environment=environment) is wanted


@pytest.mark.parametrize(
    ("quiet", "environment", "wanted"),
    [
        (False, {}, True),
        (True, {}, False),
        (False, {"CI": "true"}, False),
        (False, {"TERM": "dumb"}, False),
    ],
)
def test_progress(quiet, environment, wanted):
    class Terminal:
        def isatty(self) -> bool:
            return True

    assert wants_progress(quiet=quiet, stream=Terminal(), environment=environment) is wanted
    assert not wants_progress(quiet=False, stream=sys.__stdin__, environment={"CI": "1"})


def test_a_closed_pipe_ends_quietly(child_env):
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        DOCTOR, env=child_env, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert ran.returncode == 0
    assert ran.stderr == ""


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams_are_survived(child_env, closing):
    line = f"{' '.join(DOCTOR)} {closing}"
    ran = subprocess.run(
        ["sh", "-c", line], env=child_env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran
    assert "Traceback" not in ran.stderr + ran.stdout


def test_a_full_stdout_is_an_error(child_env):
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            DOCTOR, env=child_env, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ran.returncode == 3
    assert "cannot write to stdout: no space left" in ran.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
)
def test_any_encoding_works(user, run_cli, environment):
    (user / "n\u00e4m\u4e2d.py").write_text((user / "net.py").read_text())
    ran = run_cli("doctor", cwd=user, env=environment)
    assert ran.code == 0, ran
    assert "PASS" in ran.stdout
    assert ran.stdout.isascii()
    # A character that the output lacks is replaced, in errors too.
    ran = run_cli("insert", "n\u00e4m\u4e2d.py:Nett", "--input", "2,4", cwd=user, env=environment)
    assert ran.code == 3
    assert "has no 'Nett'" in ran.stderr


def test_the_c_locale_works(user, run_cli):
    ran = run_cli("insert", "net.py:Quiet", "--input", "32,4", cwd=user, env={"LC_ALL": "C"})
    assert ran.code == 0, ran
    assert "PASS" in ran.stdout


def test_what_the_user_prints_at_any_time_goes_to_stderr(user, run_cli):
    (user / "loud.py").write_text(
        "import atexit, os, sys, subprocess\n"
        "from torch import nn\n"
        "out = sys.stdout\n"
        "atexit.register(lambda: print('user: at exit'))\n"
        "atexit.register(lambda: os.write(1, b'user: raw at exit\\n'))\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
        "    def forward(self, x):\n"
        "        os.write(1, b'user: raw\\n'); print('user: kept', file=out)\n"
        "        print('user: dunder', file=sys.__stdout__)\n"
        "        return super().forward(x)\n"
    )
    ran = run_cli("insert", "loud.py:Net", "--input", "32,4", "--format", "json", cwd=user)
    assert ran.code == 0, ran.stderr
    assert json.loads(ran.stdout)["verb"] == "insert"
    for words in ("raw", "kept", "dunder", "at exit", "raw at exit"):
        assert f"user: {words}" in ran.stderr


def test_warnings_are_one_line_and_quiet_is_quiet(user, run_cli):
    (user / "warns.py").write_text(
        "import warnings\n"
        "from torch import nn\n"
        "warnings.warn('mind\\nthis', stacklevel=1)\n"
        "warnings.warn('old', DeprecationWarning, stacklevel=1)\n"
        "net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    words = ("insert", "warns.py:net", "--input", "32,4")
    assert run_cli(*words, cwd=user).stderr == "warning: mind this\n"
    assert run_cli(*words, "--quiet", cwd=user).stderr == ""
    assert "warning: old" in run_cli(*words, "-v", cwd=user).stderr


def test_on_a_terminal_there_are_colours_and_progress(user, child_env):
    import pty

    def on_terminal(**env: str) -> str:
        master, slave = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-m", "bnify", "insert", "net.py:Quiet", "--input", "32,4"],
            env={**child_env, "TERM": "xterm", **env}, cwd=user, stdin=slave, stdout=slave,
            stderr=slave,
        )  # fmt: skip
        os.close(slave)
        seen = b""
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # Linux reports the end of a terminal so
                break
            if not chunk:
                break
            seen += chunk
        os.close(master)
        assert child.wait() == 0
        return seen.decode()

    colored = on_terminal()
    assert "\x1b[1;32mPASS" in colored
    assert "loading net.py:Quiet" in colored
    plain = on_terminal(NO_COLOR="1", CI="1")
    assert "PASS" in plain
    assert "\x1b[" not in plain
    assert "loading" not in plain
