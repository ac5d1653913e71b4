"""The folder that a comparison is kept in while it runs, so that a killed one can go on.

``run.json`` holds the question, ``loaded.json`` digests of network, data and code, ``pilot.json``,
``schedule.json``, ``selection.json`` and ``cut.json`` what was decided once, ``trials/`` one file a
finished trial. A lock, which the kernel drops with the process, keeps a second process out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from bnify.atomic import OutputError
from bnify.comparing.disk import BESIDE, lock, put, readable_errors, sync
from bnify.comparing.trial import Outcome, Trial
from bnify.comparing.trial_file import PATTERN, file_name, read_outcome
from bnify.errors import BnifyError, UsageError
from bnify.strict_json import dumps

#: Names in a run folder. ``force`` deletes these, and nothing else.
FILES: Final = (
    "run.json",
    "loaded.json",
    "schedule.json",
    "pilot.json",
    "selection.json",
    "cut.json",
    "report.html",
    "report.json",
    "results.csv",
)
#: Folders in a run folder, and what the names of the files in them look like.
FOLDERS: Final[Mapping[str, str]] = {
    "trials": PATTERN,
    "figures": r"[\w.-]+\.(svg|png|csv|json)",
}
_ELSEWHERE: Final = "choose another folder with -o"


class RunFolder:
    """The files of one comparison, locked while it is open.

    Attributes:
        path: The folder, absolute: user code may change the working directory.
        notes: What was found there and not understood, one sentence each.
        elapsed: Seconds that the comparison took before now: the largest ``elapsed`` of its
            outcomes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.elapsed = 0.0
        self._outcomes: dict[Trial, Outcome] = {}

    @classmethod
    @contextmanager
    def opened(
        cls, path: Path, question: Mapping[str, Any], *, resume: bool, force: bool
    ) -> Iterator[Self]:
        """A new run folder, or one to go on with.

        Args:
            path: The folder. Without ``resume`` and ``force`` it must not exist or be empty.
            question: All that shapes the numbers, JSON-ready.
            resume: Go on with the run there, which must be of the same question.
            force: Replace a folder that holds nothing but files of a comparison.

        Yields:
            The folder, with the outcomes that are there.

        Raises:
            UsageError: The folder exists, is none, holds something else or answers another
                question; with ``resume``, there is no run.
            OutputError: Another process has it open, or nothing can be written there.
        """
        if resume and force:
            raise UsageError("resume goes on with a run and force replaces it", hint="choose one")
        place = Path(os.path.realpath(path))
        if resume and not place.is_dir():
            raise UsageError(f"there is no run to resume in {path}", hint=_BEGIN)
        if place.exists() and not place.is_dir():
            raise UsageError(f"{path} is a file, not a folder", hint=_ELSEWHERE)
        with readable_errors(path, _ELSEWHERE):
            place.mkdir(parents=True, exist_ok=True)
            held = lock(place)
        if held is None:
            raise OutputError(
                f"another process is using the run folder {path}",
                hint=f"wait until it ends, or {_ELSEWHERE}",
            )
        try:
            folder = cls(place)
            if resume:
                _check_same(path, question)
            with readable_errors(path, _ELSEWHERE):
                if not resume:
                    _make_room(path, force=force)
                    put(place / "run.json", dumps(question))
                folder._open_trials()
            yield folder
        finally:
            os.close(held)

    def read(self, name: str) -> dict[str, Any] | None:
        """What was decided once under this name, or None if it has not been yet.

        Raises:
            BnifyError: The file is not one of ours.
        """
        return _object(self._decision(name))

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Keep a decision; ``inf`` and ``nan`` become text, as in every JSON of bnify.

        Args:
            name: ``"loaded"``, ``"pilot"``, ``"schedule"``, ``"selection"`` or ``"cut"``.
            data: What was decided.

        Raises:
            BnifyError: Something else was decided before.
            OutputError: The disk is full, read-only or refuses for another reason.
        """
        file = self._decision(name)
        before = _object(file)
        if before is None:
            put(file, dumps(data))
        elif before != json.loads(dumps(data)):
            raise BnifyError(f"{file} is decided already, and differently")

    def outcomes(self) -> dict[Trial, Outcome]:
        """The finished trials, those of this process too."""
        return dict(self._outcomes)

    def keep(self, outcome: Outcome) -> None:
        """Write a finished trial; when this returns it outlives whatever comes.

        Raises:
            OutputError: The disk is full, read-only or refuses for another reason.
        """
        put(self.path / "trials" / file_name(outcome.trial), dumps(outcome.to_dict()))
        self._remember(outcome)

    def _decision(self, name: str) -> Path:
        if f"{name}.json" not in FILES:
            raise ValueError(f"a run folder has no {name}.json")
        return self.path / f"{name}.json"

    def _remember(self, outcome: Outcome) -> None:
        self._outcomes[outcome.trial] = outcome
        self.elapsed = max(self.elapsed, outcome.elapsed)

    def _open_trials(self) -> None:
        trials = self.path / "trials"
        trials.mkdir(exist_ok=True)
        sync(self.path)
        for file in sorted(trials.iterdir()):
            found = read_outcome(file)
            if isinstance(found, Outcome):
                self._remember(found)
            elif file.name.endswith(BESIDE) and _foreign_file(file, FOLDERS["trials"]) is None:
                file.unlink()  # a process was killed while it wrote; the trial is run again
            else:
                self.notes.append(f"trials/{file.name} is ignored: {found}")


_BEGIN: Final = "leave out resume=True (--resume) to begin one"


def _object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file) from error
    if not isinstance(data, dict):
        raise _damaged(file)
    return data


def _damaged(file: Path) -> BnifyError:
    return BnifyError(
        f"{file} cannot be read: it is not what bnify wrote",
        hint="begin again with force=True (--force) or in another folder",
    )


def _check_same(path: Path, question: Mapping[str, Any]) -> None:
    there = _object(path / "run.json")
    if there is None:
        raise UsageError(f"there is no run to resume in {path}", hint=_BEGIN)
    here = json.loads(dumps(question))
    found = _difference(there, here)
    if found is not None:
        key, old, new = found
        what = f"{key} was {old} there and is {new} here"
        if key.endswith("_sha256"):
            what = f"the file of the {key.removesuffix('_sha256')} has changed since"
        raise UsageError(
            f"the run in {path} is of another question: {what}",
            hint=f"ask the same again, or {_ELSEWHERE}",
        )


def _difference(there: Any, here: Any, key: str = "") -> tuple[str, str, str] | None:
    """The first entry in which two JSON values differ: its name, and both values as JSON."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in {**there, **here}:
            below = f"{key}.{name}" if key else name
            if name not in there or name not in here:
                return below, _shown(there, name), _shown(here, name)
            found = _difference(there[name], here[name], below)
            if found is not None:
                return found
        return None
    same = there == here and isinstance(there, bool) == isinstance(here, bool)
    return None if same else (key, json.dumps(there), json.dumps(here))


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"


def _make_room(path: Path, *, force: bool) -> None:
    """Refuse or empty a folder that holds something, before a new run begins in it."""
    entries = sorted(path.iterdir())
    # A process killed right at its beginning leaves no more than this.
    if all(entry.name == f"run.json{BESIDE}" for entry in entries):
        return
    if not force:
        raise UsageError(
            f"the run folder {path} exists already",
            hint="go on with it by resume=True (--resume), replace it by force=True (--force), "
            f"or {_ELSEWHERE}",
        )
    for entry in entries:
        foreign = _foreign(entry)
        if foreign is not None:
            raise UsageError(
                f"{path} holds {foreign!r}, which bnify did not write, so it is not replaced",
                hint=f"{_ELSEWHERE}, or move that file away",
            )
    # First what makes it a run: killed in between, the folder is none that could be resumed.
    for entry in sorted(entries, key=lambda entry: entry.name != "run.json"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _foreign(entry: Path) -> str | None:
    """The name of what is not ours in an entry of a run folder, or None."""
    if entry.name in FOLDERS and entry.is_dir() and not entry.is_symlink():
        found = (_foreign_file(file, FOLDERS[entry.name]) for file in sorted(entry.iterdir()))
        inside = next((name for name in found if name is not None), None)
        return inside and f"{entry.name}/{inside}"
    return _foreign_file(entry, "|".join(map(re.escape, FILES)))


def _foreign_file(file: Path, names: str) -> str | None:
    """The name of a file unless it matches, as itself or while it was being written."""
    plain = file.is_file() and not file.is_symlink()
    ours = plain and re.fullmatch(names, file.name.removesuffix(BESIDE))
    return None if ours else file.name
