"""What a run folder holds is whole and is what was put there, whatever killed the writer."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from comparing.tinyjob import trials
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnify.comparing.question import NORMS
from bnify.comparing.run_folder import FILES, RunFolder
from bnify.comparing.trial import Outcome, Trial
from bnify.comparing.trial_file import PATTERN, file_name
from bnify.errors import BnifyError, UsageError

QUESTION = {
    "model": "net.py:Net",
    "options": {"seeds": 8, "lrs": [0.1, 1.0], "target": math.inf},
    "versions": {"torch": "2.9"},
}


def _open(path, question=QUESTION, *, resume=False, force=False):
    return RunFolder.opened(path, question, resume=resume, force=force)


def _outcome(seed=0, **more):
    return Outcome(trial=trials(seed + 1)[seed], steps=(0, 5), train=(0.1, math.nan), **more)


def _listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Round trips


floats = st.floats(allow_nan=True, allow_infinity=True)
finite = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: x != 0)
any_trial = st.builds(
    Trial,
    norm=st.sampled_from(NORMS) | st.text(st.characters(codec="utf-8"), max_size=60),
    lr=finite,
    batch_size=st.integers(1, 1 << 20),
    steps=st.integers(0, 1 << 40),
    seed=st.integers(-(1 << 40), 1 << 40),
    init_scale=finite,
)
curves = st.lists(floats, max_size=4).map(tuple)
any_outcome = st.builds(
    Outcome,
    trial=any_trial,
    steps=st.lists(st.integers(0, 1 << 40), max_size=4).map(tuple),
    train=curves,
    train_loss=curves,
    validation=curves,
    validation_loss=curves,
    spread=curves,
    final_validation=floats,
    test=floats,
    test_loss=floats,
    diverged=st.none() | st.integers(0, 1 << 40),
    seconds=floats,
    elapsed=st.floats(0, 1e9),
    error=st.text(st.characters(codec="utf-8")) | st.sampled_from(["inf", "nan", "1"]),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kept=st.lists(any_outcome, max_size=4, unique_by=lambda outcome: outcome.trial))
def test_outcomes_come_back_bit_for_bit(kept, tmp_path):
    with _open(tmp_path / "run", force=True) as folder:
        for outcome in kept:
            folder.keep(outcome)
        assert repr(folder.outcomes()) == repr({o.trial: o for o in kept})  # nan != nan
    with _open(tmp_path / "run", resume=True) as folder:
        found = folder.outcomes()
        assert folder.notes == []
        assert folder.elapsed == max((o.elapsed for o in kept), default=0.0)
    assert {t: repr(o) for t, o in found.items()} == {o.trial: repr(o) for o in kept}


@settings(max_examples=300)
@given(one=any_trial, other=any_trial, nudge=st.sampled_from([0, 1e-9, 1e-7, 1e-5]))
def test_two_trials_never_share_a_file(one, other, nudge):
    near = replace(one, lr=one.lr * (1 + nudge))
    for pair in ((one, other), (one, near), (one, replace(one, init_scale=near.lr))):
        first, second = map(file_name, pair)
        assert (pair[0] == pair[1]) == (first.lower() == second.lower())
    assert re.fullmatch(PATTERN, file_name(one))
    assert len(file_name(one).encode()) < 200


def test_the_usual_trial_has_its_key_for_a_name_and_near_ones_do_not_collide(tmp_path):
    plain = trials(1)[0]
    near = replace(plain, lr=0.1000000001)
    assert plain.key == near.key
    assert file_name(plain) == f"{plain.key}.json"
    with _open(tmp_path / "run") as folder:
        folder.keep(Outcome(trial=plain, test=1.0))
        folder.keep(Outcome(trial=near, test=2.0))
    with _open(tmp_path / "run", resume=True) as folder:
        assert {t.lr: o.test for t, o in folder.outcomes().items()} == {0.1: 1, 0.1000000001: 2}


# Beginning, going on, replacing


def test_a_new_run_wants_an_empty_place(tmp_path):
    for place in (tmp_path / "deep" / "run", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with _open(place) as folder:
            folder.keep(_outcome())
        with pytest.raises(UsageError, match="exists already") as caught, _open(place):
            pytest.fail("it opened")
        assert "--resume" in caught.value.hint
        assert "--force" in caught.value.hint
    (tmp_path / "file").touch()
    for more in ({}, {"force": True}):
        with pytest.raises(UsageError, match="is a file"), _open(tmp_path / "file", **more):
            pytest.fail("it opened")


def test_nothing_to_resume_is_an_error_that_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        with (
            pytest.raises(UsageError, match="no run to resume"),
            _open(tmp_path / name, resume=True),
        ):
            pytest.fail("it opened")
    assert _listing(tmp_path) == ["empty"]
    with pytest.raises(UsageError), _open(tmp_path / "x", resume=True, force=True):
        pytest.fail("it opened")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "net.py:Other"}, 'model was "net.py:Net" there and is "net.py:Other" here'),
        ({"options": {"seeds": 9}}, "options.seeds was 8 there and is 9 here"),
        ({"options": {"lrs": [0.1]}}, "options.lrs was [0.1, 1.0] there and is [0.1] here"),
        ({"options": {"target": 1}}, 'options.target was "inf" there and is 1 here'),
        ({"options": {"new": None}}, "options.new was absent there and is null here"),
        ({"versions": {"torch": "3.0"}}, 'versions.torch was "2.9" there and is "3.0" here'),
        ({"options": {"seeds": True}}, "options.seeds was 8 there and is true here"),
    ],
)
def test_another_question_is_not_gone_on_with(change, words, tmp_path):
    other = {
        key: {**value, **change.get(key, {})} if isinstance(value, dict) else change.get(key, value)
        for key, value in QUESTION.items()
    }
    with _open(tmp_path / "run"):
        pass
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(UsageError) as caught, _open(tmp_path / "run", other, resume=True):
        pytest.fail("it opened")
    assert words in caught.value.message
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_an_entry_that_is_gone_is_a_difference(tmp_path):
    with _open(tmp_path / "run"):
        pass
    fewer = {key: value for key, value in QUESTION.items() if key != "versions"}
    with (
        pytest.raises(UsageError, match=r"versions was \{.*\} there and is absent here"),
        _open(tmp_path / "run", fewer, resume=True),
    ):
        pytest.fail("it opened")


def test_a_file_that_has_changed_is_named_without_its_digests(tmp_path):
    with _open(tmp_path / "run", {**QUESTION, "model_sha256": "0" * 64}):
        pass
    with (
        pytest.raises(UsageError, match="the file of the model has changed since") as caught,
        _open(tmp_path / "run", {**QUESTION, "model_sha256": "1" * 64}, resume=True),
    ):
        pytest.fail("it opened")
    assert "000" not in caught.value.message


def test_force_replaces_all_of_ours(tmp_path):
    run = tmp_path / "run"
    with _open(run) as folder:
        folder.keep(_outcome())
        folder.write("pilot", {"a": 1})
    for name in (*FILES, "figures/curves-lr.svg", "schedule.json.tmp", "trials/x.json.tmp"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    (run / "trials" / "x.json.tmp").rename(run / "trials" / f"{file_name(trials(1)[0])}.tmp")
    with _open(run, force=True) as folder:
        assert folder.outcomes() == {}
        assert folder.read("pilot") is None
    assert _listing(run) == ["run.json", "trials"]
    with _open(tmp_path / "new", force=True):
        pass


@pytest.mark.parametrize(
    "name",
    ["thesis.tex", "trials/notes.txt", "trials/data.json", "figures/thesis.tex", "sub/run.json"],
)
def test_force_never_deletes_what_bnify_did_not_write(name, tmp_path):
    with _open(tmp_path / "run") as folder:
        folder.keep(_outcome())
    (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / name).write_text("years of work")
    before = _listing(tmp_path)
    with pytest.raises(UsageError, match="did not write"), _open(tmp_path / "run", force=True):
        pytest.fail("it opened")
    assert _listing(tmp_path) == before


def test_force_follows_no_link(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a.svg").touch()
    with _open(tmp_path / "run"):
        pass
    for name, target in (("figures", "precious"), ("report.html", "precious/a.svg")):
        (tmp_path / "run" / name).symlink_to(tmp_path / target)
        with pytest.raises(UsageError, match=f"'{name}'"), _open(tmp_path / "run", force=True):
            pytest.fail("it opened")
        (tmp_path / "run" / name).unlink()
    assert (tmp_path / "precious" / "a.svg").exists()


# What is decided once


def test_a_decision_is_kept_and_never_changed(tmp_path):
    decided = {"cuts": ["x"], "budget": math.inf, "lrs": (0.1, 1.0)}
    with _open(tmp_path / "run") as folder:
        assert folder.read("schedule") is None
        folder.write("schedule", decided)
        folder.write("schedule", decided)
        with pytest.raises(BnifyError, match="decided already"):
            folder.write("schedule", {**decided, "cuts": []})
    with _open(tmp_path / "run", resume=True) as folder:
        found = folder.read("schedule")
    assert found == {"cuts": ["x"], "budget": "inf", "lrs": [0.1, 1.0]}


def test_files_that_are_not_ours_are_errors_or_notes_but_never_outcomes(tmp_path):
    run = tmp_path / "run"
    with _open(run) as folder:
        folder.keep(_outcome(0))
        folder.keep(_outcome(1))
    whole = (run / "trials" / file_name(trials(1)[0])).read_text()
    spoiled = {
        "half.json": whole[: len(whole) // 2],
        "empty.json": "",
        "list.json": "[]",
        "binary.json": "\0\udcff",
        "deep.json": "[" * 100_000,
        "copy.json": whole,
        "batch-lr0.1-b8-x1-n12-s5.json": whole,
        "batch-lr0.1-b8-x1-n12-s6.json": whole.replace('"seed": 0', '"seed": 6').replace(
            '"test": 0.0', '"test": null'
        ),
        "batch-lr0.1-b8-x1-n12-s7.json": whole.replace('"seed": 0', '"seed": 7').replace(
            '"test"', '"tset"'
        ),
        "batch-lr0.1-b8-x1-n12-s8.json": whole.replace('"seed": 0', '"seed": 8').replace(
            '"nan"', '"many"'
        ),
    }
    for name, text in spoiled.items():
        (run / "trials" / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    (run / "trials" / "folder.json").mkdir()
    with _open(run, resume=True) as folder:
        assert set(folder.outcomes()) == set(trials(2))
        assert len(folder.notes) == len(spoiled) + 1
        assert any("half.json is ignored: it is not a whole outcome" in n for n in folder.notes)
        assert any("the trial in it belongs into batch-lr0.1" in note for note in folder.notes)
        (run / "pilot.json").write_text('{"half":')
        with pytest.raises(BnifyError, match="cannot be read"):
            folder.read("pilot")
    (run / "run.json").write_text("")
    with pytest.raises(BnifyError, match="cannot be read"), _open(run, resume=True):
        pytest.fail("it opened")


def test_the_time_before_goes_on_counting(tmp_path):
    with _open(tmp_path / "run") as folder:
        assert folder.elapsed == 0
        folder.keep(_outcome(0, elapsed=7.5))
        folder.keep(_outcome(1, elapsed=3.0))
        assert folder.elapsed == 7.5
    with _open(tmp_path / "run", resume=True) as folder:
        assert folder.elapsed == 7.5
