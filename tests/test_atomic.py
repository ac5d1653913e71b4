"""Folders appear whole or not at all, whatever stops the writer."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import pytest

from bnify.atomic import OutputError, check_output, recover, written_folder
from bnify.errors import UsageError

OURS = ("a", "b")

# A writer that kills itself at the n-th call of os.fsync, os.rename or shutil.rmtree.
KILLED = """
import os, pathlib, shutil, signal, sys
from bnify import atomic
target, step = pathlib.Path(sys.argv[1]), int(sys.argv[2])
count = 0
def dying(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.fsync = dying(os.fsync)
pathlib.Path.rename = dying(pathlib.Path.rename)
shutil.rmtree = dying(shutil.rmtree)
with atomic.written_folder(target, force=True, ours=("a", "b")) as folder:
    (folder / "a").write_text("new")
    (folder / "b").write_text("new")
print("done")
"""


def _write(target: Path, text: str, *, force: bool = False) -> None:
    with written_folder(target, force=force, ours=OURS) as folder:
        for name in OURS:
            (folder / name).write_text(text)


def _listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _content(target: Path) -> list[str]:
    return [(target / name).read_text() for name in OURS]


def test_a_written_folder_is_there_and_nothing_else(tmp_path):
    _write(tmp_path / "deep" / "out", "one")
    assert _content(tmp_path / "deep" / "out") == ["one", "one"]
    assert _listing(tmp_path / "deep") == ["out"]


def test_an_existing_output_is_refused_and_replaced_only_by_force(tmp_path):
    _write(tmp_path / "out", "one")
    with pytest.raises(UsageError, match="exists already"):
        _write(tmp_path / "out", "two")
    assert _content(tmp_path / "out") == ["one", "one"]
    _write(tmp_path / "out", "two", force=True)
    assert _content(tmp_path / "out") == ["two", "two"]
    assert _listing(tmp_path) == ["out"]


def test_force_never_deletes_what_bnify_did_not_write(tmp_path):
    _write(tmp_path / "out", "one")
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex'"):
        _write(tmp_path / "out", "two", force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        _write(tmp_path / "file", "two", force=True)


def test_an_error_inside_leaves_the_old_folder_and_nothing_beside_it(tmp_path):
    _write(tmp_path / "out", "one")

    def fail() -> None:
        with written_folder(tmp_path / "out", force=True, ours=OURS) as folder:
            (folder / "a").write_text("two")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _content(tmp_path / "out") == ["one", "one"]
    assert _listing(tmp_path) == ["out"]


def test_a_link_is_written_through(tmp_path):
    _write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    _write(tmp_path / "link", "two", force=True)
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "real") == ["two", "two"]


@pytest.mark.parametrize("step", range(1, 10))
@pytest.mark.parametrize("existed", [False, True])
def test_a_killed_writer_leaves_the_old_or_the_new_folder(tmp_path, run_python, step, existed):
    target = tmp_path / "out"
    if existed:
        _write(target, "old")
    ran = run_python("-c", KILLED, target, str(step))
    finished = "done" in ran.stdout
    assert finished or ran.code == -signal.SIGKILL
    recover(target)
    if target.exists():
        assert _content(target) in (["old", "old"], ["new", "new"])
    else:
        assert not existed
    assert set(_listing(tmp_path)) <= {"out"}, "a leftover survived the next writer"
    _write(target, "next", force=True)
    assert _content(target) == ["next", "next"]


def test_the_work_of_a_living_writer_is_no_leftover(tmp_path):
    with written_folder(tmp_path / "out", force=False, ours=OURS) as folder:
        (folder / "a").write_text("one")
        recover(tmp_path / "out")
        assert (folder / "a").exists()
        (folder / "b").write_text("one")
    assert _content(tmp_path / "out") == ["one", "one"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a folder"):
        check_output(tmp_path / "file" / "out", ours=OURS)
    with pytest.raises(OutputError, match="cannot write"):
        _write(Path("/proc/nothing/here"), "one")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="is a folder, not a file"):
        check_output(tmp_path / "folder", force=True)


# Checks an output in a process without root's rights, where permissions count.
UNPRIVILEGED = """
import os, pathlib, sys
from bnify.atomic import OutputError, check_output
if os.getuid() == 0:
    os.setuid(65534)
try:
    check_output(pathlib.Path(sys.argv[1]), ours=("a", "b"))
except OutputError as error:
    print(error.message)
"""


@pytest.mark.parametrize(
    ("mode", "reason"), [(0o555, "is read-only"), (0o000, "permission denied")]
)
def test_a_folder_without_permission_is_refused_before_any_work(run_python, mode, reason):
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(mode)
        ran = run_python("-c", UNPRIVILEGED, folder / "out")
    finally:
        folder.chmod(0o755)
        folder.rmdir()
    assert reason in ran.stdout
