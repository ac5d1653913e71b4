"""Ray runs the same trials to the same bits, and leaves nothing running."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from comparing.tinyjob import (
    DyingJob,
    SlowJob,
    TinyJob,
    UnpicklableJob,
    UnpreparedJob,
    alive,
    interrupted_at_work,
    processes_of,
    trials,
    wait_for,
)

from bnify.comparing.engine import open_engine
from bnify.errors import BnifyError, SpecError, UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
PATHS = os.pathsep.join(str(path) for path in sys.path if path)


@pytest.fixture(scope="module")
def ray():
    """A Ray that is there already, as on a cluster."""
    ray = pytest.importorskip("ray")
    before = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:
        pytest.skip(f"Ray does not start here: {error}")
    yield ray
    ray.shutdown()
    os.environ.pop("RAY_USAGE_STATS_ENABLED")
    if before is not None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = before


def test_ray_gives_the_bits_of_this_process(ray, tmp_path, capfd):
    with open_engine("local", TinyJob(), 1) as engine:
        here = {outcome.trial: outcome for outcome in engine.run(trials(5))}
    capfd.readouterr()
    with open_engine("ray", TinyJob(tmp_path), 1) as engine:
        assert engine.name == "ray: 2 CPUs"
        there = {outcome.trial: outcome for outcome in engine.run(trials(5))}
        again = {outcome.trial: outcome for outcome in engine.run(trials(5))}
    assert there == again == here
    assert capfd.readouterr().out == ""
    workers = processes_of(tmp_path)
    assert len(workers) == 2
    wait_for(lambda: not alive(workers), 20)
    assert ray.is_initialized(), "what was there before must go on"


def test_an_interruption_ends_the_workers(ray, tmp_path):
    with open_engine("ray", SlowJob(tmp_path), 2) as engine:
        interrupted_at_work(engine.run(trials(4)), tmp_path)
        workers = processes_of(tmp_path)
        assert len(workers) == 2
        wait_for(lambda: not alive(workers), 20)
    assert ray.is_initialized()


def test_an_error_of_prepare_arrives_as_it_is(ray):
    with (
        pytest.raises(SpecError, match="no network there") as caught,
        open_engine("ray", UnpreparedJob(), 2) as engine,
    ):
        list(engine.run(trials(3)))
    assert caught.value.hint == "look elsewhere"


def test_a_killed_worker_is_an_error_with_the_next_step(ray):
    with (
        pytest.raises(BnifyError, match="Ray lost a trial") as caught,
        open_engine("ray", DyingJob(), 2) as engine,
    ):
        list(engine.run(trials(6)))
    assert "--resume" in caught.value.hint


def test_a_job_that_cannot_be_sent_is_refused(ray):
    with pytest.raises(UsageError, match="cannot be sent"), open_engine("ray", UnpicklableJob(), 2):
        pytest.fail("it opened")


STARTING = """
import os
from comparing.tinyjob import TinyJob, trials
from bnify.comparing.engine import open_engine
class Mine(TinyJob):  # of __main__: a worker cannot import it
    pass
if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    with open_engine("ray", Mine(), 1) as engine:
        assert engine.name == "ray: 1 CPU", engine.name
        print(len(list(engine.run(trials(2)))))
    import ray
    assert not ray.is_initialized()
"""


def test_ray_is_started_quietly_and_stopped(tmp_path, child_env):
    pytest.importorskip("ray")
    (tmp_path / "script.py").write_text(STARTING)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", tmp_path / "script.py"],
        env={**child_env, "PYTHONPATH": PATHS},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert "usage stat" not in done.stderr.lower()


def test_a_missing_ray_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(BnifyError, match="not installed") as caught,
        open_engine("ray", TinyJob(), 2),
    ):
        pytest.fail("it opened")
    assert "pip install 'bnify[ray]'" in caught.value.hint
    assert caught.value.exit_code == 3


def test_a_cluster_that_is_not_there_is_an_error_in_words(tmp_path, child_env):
    pytest.importorskip("ray")
    script = """
from comparing.tinyjob import TinyJob
from bnify.comparing.engine import open_engine
from bnify.errors import BnifyError
try:
    with open_engine("ray://127.0.0.1:1", TinyJob(), 1):
        print("opened")
except BnifyError as error:
    print(error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**child_env, "PYTHONPATH": PATHS, "RAY_CLIENT_CONNECT_TIMEOUT": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=200,
    )
    assert done.stdout.startswith("cannot reach Ray at ray://127.0.0.1:1: "), done
    assert len(done.stdout.splitlines()) == 1
