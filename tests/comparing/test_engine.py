"""Trials give the same bits wherever they run, and no worker outlives what it works for."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from comparing.tinyjob import (
    DyingJob,
    LargeJob,
    LeavingJob,
    ParentJob,
    RaisingJob,
    SlowJob,
    StubbornJob,
    TinyJob,
    UnevenJob,
    UnloadableJob,
    UnpicklableJob,
    UnpreparedJob,
    alive,
    interrupted_at_work,
    processes_of,
    trials,
    wait_for,
)

from bnify.comparing.engine import open_engine
from bnify.comparing.worker import Failure, attempt
from bnify.errors import BnifyError, SpecError, UsageError, VerificationError

# For scripts: what pytest put on the path, which has tinyjob.
PATHS = os.pathsep.join(str(path) for path in sys.path if path)


def _run(job, wanted, jobs):
    with open_engine("local", job, jobs) as engine:
        return list(engine.run(wanted))


def _by_trial(outcomes):
    return {outcome.trial: outcome for outcome in outcomes}


def test_two_processes_give_the_bits_of_one_in_whatever_order():
    wanted = trials(6)
    here = _run(TinyJob(), wanted, 1)
    assert [outcome.trial for outcome in here] == wanted
    there = _run(UnevenJob(), wanted, 2)
    assert there[0].trial != wanted[0], "the slow first trial must not hold up the others"
    assert _by_trial(there) == _by_trial(here)
    assert _by_trial(_run(TinyJob(), wanted[::-1], 1)) == _by_trial(here)


def test_a_worker_prepares_once_and_is_used_again(tmp_path):
    with open_engine("local", TinyJob(tmp_path), 2) as engine:
        assert engine.name == "2 processes"
        first, second = list(engine.run(trials(4))), list(engine.run(trials(4)))
        assert list(engine.run([])) == []
    assert _by_trial(first) == _by_trial(second)
    assert len(processes_of(tmp_path)) == 2
    assert not alive(processes_of(tmp_path))


def test_in_this_process_one_thread_is_used_and_given_back(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_engine("local", TinyJob(tmp_path), 1) as engine:
            assert engine.name == "this process"
            assert torch.get_num_threads() == 1
            list(engine.run(trials(2)))
            list(engine.run(trials(2)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert processes_of(tmp_path) == [os.getpid()]


@pytest.mark.parametrize("jobs", [1, 2])
def test_nothing_that_user_code_prints_reaches_stdout(jobs, capfd):
    with open_engine("local", TinyJob(), jobs) as engine:
        for _ in engine.run(trials(2)):
            print("the caller prints")
    out, err = capfd.readouterr()
    assert out.splitlines() == ["the caller prints"] * 2
    for words in ("prepare prints", "a child of prepare prints", "a trial prints"):
        assert words in err


def test_an_interruption_ends_at_once_with_all_workers(tmp_path):
    with open_engine("local", SlowJob(tmp_path), 2) as engine:
        with closing(engine.run(trials(4))) as running:
            interrupted_at_work(running, tmp_path)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert not alive(processes_of(tmp_path))


def test_after_a_cut_no_outcome_of_before_turns_up():
    with open_engine("local", UnevenJob(), 2) as engine:
        running = engine.run(trials(3))
        assert next(running).trial.seed != 0  # trial 0 is being run
        running.close()
        again = list(engine.run(trials(2, lr=0.01)))
    assert {outcome.trial for outcome in again} == set(trials(2, lr=0.01))


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_prepare_arrives_as_it_is(jobs):
    with pytest.raises(SpecError) as caught:
        _run(UnpreparedJob(), trials(3), jobs)
    assert type(caught.value) is SpecError
    assert (caught.value.message, caught.value.hint) == ("no network there", "look elsewhere")


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_a_trial_is_not_taken_for_a_lost_worker(jobs):
    with pytest.raises(ConnectionRefusedError, match="the trial's own"):
        _run(RaisingJob(), trials(4), jobs)


def test_an_error_that_cannot_be_sent_arrives_in_words():
    with pytest.raises(BnifyError, match="StubbornError: one, two"):
        _run(StubbornJob(), trials(2), 2)


def test_every_error_of_ours_survives_the_way():
    for error in (UsageError("m", hint="h"), VerificationError("m", hint="h", result=[1])):
        failure = attempt(lambda error=error: (_ for _ in ()).throw(error))
        assert isinstance(failure, Failure)
        arrived = pickle.loads(pickle.dumps(failure)).error()
        assert type(arrived) is type(error)
        assert arrived.to_dict() == error.to_dict()
        assert "in a worker process" in arrived.__notes__[0]


def test_a_killed_worker_is_an_error_with_the_next_step(tmp_path):
    finished = []
    with (
        pytest.raises(BnifyError, match="was killed by SIGKILL during batch-") as caught,
        open_engine("local", DyingJob(tmp_path), 2) as engine,
    ):
        finished.extend(engine.run(trials(8)))
    assert "--resume" in caught.value.hint
    assert "--jobs" in caught.value.hint
    assert not alive(processes_of(tmp_path))


def test_user_code_that_leaves_a_worker_is_an_error():
    with pytest.raises(BnifyError, match="ended while it was loading model and data"):
        _run(LeavingJob(), trials(2), 2)


def test_a_job_that_cannot_be_sent_is_refused_before_any_process_starts():
    with (
        pytest.raises(UsageError, match=r"cannot be sent to worker processes \(cannot pickle"),
        open_engine("local", UnpicklableJob(), 2),
    ):
        pytest.fail("it opened")
    assert len(_run(UnpicklableJob(), trials(1), 1)) == 1


def test_a_job_that_cannot_be_received_is_refused_in_the_same_words():
    with pytest.raises(UsageError, match="cannot be sent to worker processes") as caught:
        _run(UnloadableJob(), trials(2), 2)
    assert "net.py:MyNetwork" in caught.value.hint


def test_a_large_job_arrives():
    assert len(_run(LargeJob(), trials(2), 2)) == 2


def test_user_code_may_start_processes():
    assert len(_run(ParentJob(), trials(2), 2)) == 2


def test_what_is_no_engine_is_refused():
    for engine, jobs in (("slurm", 1), ("local", 0), ("rays", 2)):
        with pytest.raises(UsageError), open_engine(engine, TinyJob(), jobs):
            pytest.fail("it opened")


SCRIPT = """
import sys
from pathlib import Path
from comparing.tinyjob import SlowJob, TinyJob, trials
from bnify.comparing.engine import open_engine
def main():
    job = (SlowJob if sys.argv[1] == "slow" else TinyJob)(Path(sys.argv[2]))
    with open_engine("local", job, int(sys.argv[3])) as engine:
        for outcome in engine.run(trials(4)):
            print(outcome.trial.key, flush=True)
"""


def _script(tmp_path, child_env, *arguments, guard, stdout=subprocess.PIPE):
    call = 'if __name__ == "__main__":\n    main()\n' if guard else "main()\n"
    (tmp_path / "script.py").write_text(SCRIPT + call)
    return subprocess.Popen(
        [sys.executable, tmp_path / "script.py", *map(str, arguments)],
        env={**child_env, "PYTHONPATH": PATHS},
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
        encoding="utf-8",
    )


def test_ctrl_c_ends_promptly_and_takes_the_workers_along(tmp_path, child_env):
    script = _script(tmp_path, child_env, "slow", tmp_path, 2, guard=True)
    wait_for(lambda: len(list(tmp_path.glob("began-*"))) == 2)
    began = time.monotonic()
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, err = script.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert err.count("KeyboardInterrupt") == 1, err
    assert script.returncode == -signal.SIGINT
    assert not alive(processes_of(tmp_path))


def test_ctrl_c_that_reaches_workers_is_left_to_the_parent(tmp_path, child_env):
    script = _script(tmp_path, child_env, "tiny", tmp_path, 2, guard=True)
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children")
    while script.poll() is None:  # from their first moment to their last
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                os.kill(child, signal.SIGINT)
        time.sleep(0.01)
    out, err = script.communicate(timeout=20)
    assert (script.returncode, err.count("KeyboardInterrupt")) == (0, 0), err
    assert len([line for line in out.splitlines() if line.startswith("batch-")]) == 4


def test_workers_die_with_a_parent_that_is_killed(tmp_path, child_env):
    # stderr and stdout go nowhere that would end the workers by a broken pipe.
    script = _script(
        tmp_path, child_env, "slow", tmp_path, 2, guard=True, stdout=subprocess.DEVNULL
    )
    wait_for(lambda: len(list(tmp_path.glob("began-*"))) == 2)
    workers = processes_of(tmp_path)
    assert len(alive(workers)) == 2
    script.kill()
    script.communicate(timeout=20)
    wait_for(lambda: not alive(workers), 5)


def test_a_script_without_the_guard_gets_one_clear_error(tmp_path, child_env):
    script = _script(tmp_path, child_env, "tiny", tmp_path, 2, guard=False)
    out, err = script.communicate(timeout=60)
    assert script.returncode == 1
    assert out == ""
    assert err.count("Traceback") == 1, err
    assert "UsageError: worker processes import this script" in err
    assert not processes_of(tmp_path), "a worker began the work of the script again"
    one = _script(tmp_path, child_env, "tiny", tmp_path, 1, guard=False)
    out, err = one.communicate(timeout=60)
    assert one.returncode == 0, err
    assert len(out.splitlines()) == 4


def test_a_script_that_fails_in_its_workers_gets_a_clear_error(tmp_path, child_env):
    guard = 'if __name__ != "__main__":\n    raise SystemExit(9)\n'
    script_text = guard + SCRIPT + "main()\n"
    (tmp_path / "broken.py").write_text(script_text)
    done = subprocess.run(
        [sys.executable, tmp_path / "broken.py", "tiny", tmp_path, "2"],
        env={**child_env, "PYTHONPATH": PATHS},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert "BnifyError: a worker process ended while it was starting (exit code 9)" in done.stderr
