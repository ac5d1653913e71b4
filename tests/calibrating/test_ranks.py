"""Real processes with gloo: shares are merged in the order of ranks, the same bits everywhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from normed import hostile, images, recorded

from bnify.calibrations import calibrate

WORKER = Path(__file__).with_name("ranks.py")
spec = importlib.util.spec_from_file_location("calibrating_ranks", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.fixture(scope="module", params=[1, 2, 3])
def ran(request, tmp_path_factory):
    """What each rank found in each scenario."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(str(WORKER.parents[up]) for up in (1, 2))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    logs = [folder / f"{rank}.txt" for rank in range(world)]
    children = []
    for rank, log in enumerate(logs):
        words = (rank, world, folder / "store", folder)
        with log.open("w") as said:
            child = subprocess.Popen(
                [sys.executable, WORKER, *map(str, words)],
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
        children.append(child)
    try:
        for child, log in zip(children, logs, strict=True):
            assert child.wait(timeout=150) == 0, log.read_text()
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def the_same(ran, name):
    """The states of all ranks are the same bits; the state, and what each rank said."""
    states = [rank[name][1] for rank in ran]
    for state in states[1:]:
        assert list(state) == list(states[0])
        for key, tensor in state.items():
            assert torch.equal(tensor, states[0][key]), key
    return states[0], [rank[name][0] for rank in ran]


def test_uneven_shares_give_the_statistics_of_all_activations(ran):
    world = len(ran)
    got, said = the_same(ran, "uneven")
    alone = hostile()
    order = [batch for share in worker.shares(world) for batch in share]
    with recorded(alone) as values:
        calibrate(alone, order)
    for name, seen in values.items():
        var, mean = torch.var_mean(torch.cat(seen), 0)
        ours = got[f"{name}.running_mean"], got[f"{name}.running_var"]
        assert float(((ours[0] - mean) / (mean.abs() + var.sqrt())).abs().max()) < 1e-12, name
        error = (ours[1] - var).abs() / (var + 1e-16 * mean.square())
        assert float(error.max()) < 1e-12, name
    assert all(one == said[0] for one in said)
    assert (said[0]["ranks"], said[0]["samples"]) == (world, 61)
    assert said[0]["batches"] == len(order)


def test_ranks_without_data_get_the_statistics_too(ran):
    got, said = the_same(ran, "one_has_all")
    alone = hostile()
    calibrate(alone, images().split(20))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(got[name], tensor), name
    assert all(one == said[0] for one in said)
    assert said[0]["samples"] == 61


def test_no_data_at_all(ran):
    got, said = the_same(ran, "nothing")
    assert set(said) == {"PlanError: the data holds no batch"}
    assert untouched(got)


def test_a_rank_that_fails_stops_all_and_nothing_is_changed(ran):
    got, said = the_same(ran, "failing")
    assert untouched(got)
    assert said[-1].startswith("PlanError: the model raised RuntimeError on batch 4 of the data")
    last = len(ran) - 1
    for one in said[:-1]:
        assert one.startswith(f"PlanError: rank {last} failed: PlanError: the model raised")
        assert one.endswith("nothing was changed on any rank")


def untouched(state) -> bool:
    return all(torch.equal(state[name], tensor) for name, tensor in hostile().state_dict().items())


def test_samples_that_a_sampler_repeats_are_told_of(ran):
    world = len(ran)
    _, said = the_same(ran, "padded")
    extra = -61 % world
    assert said[0]["samples"] == 61 + extra
    if extra:
        assert said[0]["notes"][0].startswith(
            f"DistributedSampler repeats {extra} of 61 samples, which count twice"
        )
    else:
        assert said[0]["notes"] == []


def test_ranks_draw_what_as_many_batches_in_one_process_draw(ran):
    got, said = the_same(ran, "drawing")
    alone = hostile()
    calibrate(worker.Noisy(alone), [0 * images(5)] * 4 * len(ran))
    for name in ("bn1.running_mean", "bn1.running_var", "bn5.running_var"):
        assert torch.allclose(got[name], alone.state_dict()[name], rtol=1e-10, atol=1e-12), name
    assert all(one == said[0] for one in said)


def test_a_model_in_distributed_data_parallel_and_an_early_end(ran):
    _, said = the_same(ran, "in_parallel")
    assert all(one == said[0] for one in said)
    assert said[0]["stopped"]
    assert said[0]["batches"] == 8 * len(ran)
    assert all(norm["error"] <= 0.9 for norm in said[0]["norms"])


def test_samples_that_a_sampler_would_repeat_but_nobody_reads_are_not_told_of(ran):
    _, said = the_same(ran, "padded_and_cut")
    assert all(one["notes"] == [] for one in said)


def test_a_sampler_is_told_of_by_every_rank(ran):
    _, said = the_same(ran, "padded")
    assert all(one == said[0] for one in said)


def test_a_rank_that_stops_alone_speaks_for_itself(ran):
    world = len(ran)
    _, said = the_same(ran, "one_stops")
    assert all(one == said[0] for one in said)
    assert said[0]["stopped"]
    note = said[0]["notes"][0]
    if world == 1:
        assert note.startswith("stopped after 8 batches: the standard error")
        assert "at most 0.001" in note
    else:
        assert note.startswith(f"1 of {world} ranks stopped early, {9 * world - 1} batches in all")
        worst = max(norm["error"] for norm in said[0]["norms"])
        assert worst > 0.001
        assert f"is up to about {worst:.2g} of the standard deviation" in note


def test_counters_end_alike_too(ran):
    got, said = the_same(ran, "counted")
    assert int(got["bn1.num_batches_tracked"]) == 1000 + 100 * (len(ran) - 1)
    assert all(one == said[0] for one in said)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("bad_arguments", "UsageError: batches=0: at least one is needed"),
        ("no_module", "CaptureError: the model is a type, no torch.nn.Module"),
        ("expanded", "PlanError: the elements of bn2.running_mean share memory"),
    ],
)
def test_what_is_wrong_on_one_rank_keeps_no_other_waiting(ran, name, own):
    last = len(ran) - 1
    said = [rank[name][0] for rank in ran]
    assert said[-1].startswith(own)
    assert all(one.startswith(f"PlanError: rank {last} failed: {own}") for one in said[:-1])
    assert all(untouched(rank[name][1]) for rank in ran[:-1])


def test_other_weights_on_one_rank_are_refused(ran):
    last = len(ran) - 1
    said = [rank["other_weights"][0] for rank in ran]
    if last:
        want = f"PlanError: rank {last} has other weights than rank 0"
        assert all(one.startswith(want) for one in said)
        assert all(untouched(rank["other_weights"][1]) for rank in ran[:-1])
    else:
        assert said[0]["batches"] == 4


def test_another_model_on_one_rank_is_refused(ran):
    last = len(ran) - 1
    said = [rank["other_model"][0] for rank in ran]
    if last:
        want = f"PlanError: rank {last} has another model than rank 0"
        assert all(one.startswith(want) for one in said)
        assert all(untouched(rank["other_model"][1]) for rank in ran[:-1])
    else:
        assert said[0]["batches"] == 4
