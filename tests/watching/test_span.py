"""A watcher changes nothing, leaves nothing behind, and counts steps by itself."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from loops import EVERY, batch, hooks_of, loss_of, network, passes, sgd, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnify.watching import watch
from bnify.watching.watcher import FIRST_STEPS

# -- the same training ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), 1e-3)])
def test_training_is_the_same_to_the_bit(make):
    plain = network()
    watched = copy.deepcopy(plain)
    outputs, randoms = [], []
    for model in (plain, watched):
        torch.manual_seed(3)
        optimizer = make(model)
        watcher = watch(model, every=7, average=copy.deepcopy(model))
        if model is watched:
            watcher.start()
        train(model, optimizer, 100)
        watcher.stop()
        randoms.append(torch.get_rng_state())
        outputs.append(model.eval()(batch()))
    assert watcher.steps == 100
    assert torch.equal(*outputs)
    assert torch.equal(*randoms)
    for one, other in zip(plain.state_dict().items(), watched.state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.name().startswith("profiler::"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Still(torch.optim.Optimizer):
    """An optimizer whose steps run no operator."""

    def step(self, closure=None):
        return None


def test_between_checks_no_tensor_is_looked_at_and_a_check_takes_them_all_at_once():
    model = network()
    optimizer = Still(model.parameters(), {})
    with watch(model, optimizer, every=EVERY):
        for step in range(1, 41):
            model(batch())
            with Operators() as seen:
                optimizer.step()
            if step == FIRST_STEPS or step % EVERY == 0:
                assert seen.names.count("aten::cat") == 1
            else:
                assert seen.names == []


@pytest.mark.gpu
def test_no_wait_for_the_device_between_checks():
    model = network().cuda()
    optimizer = sgd(model)
    inputs, labels = batch().cuda(), torch.zeros(8, dtype=torch.long, device="cuda")
    with watch(model, optimizer, every=EVERY) as watcher:
        for step in range(1, 41):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            looks = step == FIRST_STEPS or step % EVERY == 0
            torch.cuda.set_sync_debug_mode("default" if looks else "error")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
    assert watcher.findings == ()


# -- nothing stays -------------------------------------------------------------------------------


def test_hooks_are_gone_after_the_first_steps_and_all_of_them_after_the_end():
    model = network()
    optimizer = sgd(model)
    before = set(vars(model)), pickle.dumps(model)
    with watch(model) as watcher:
        assert (
            hooks_of(model) == 3 + 3 + 1 + 1 + 1
        )  # before, with kwargs, after, always, optimizers
        train(model, optimizer, FIRST_STEPS)
        assert hooks_of(model) == 1
    assert hooks_of(model) == 0
    steps = watcher.steps
    train(model, optimizer)
    assert watcher.steps == steps
    assert set(vars(model)) == before[0]
    assert len(pickle.dumps(model)) == len(before[1])


def test_an_exception_passes_and_takes_the_hooks_along():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(KeyError, match="mine"), watch(model, optimizer):
        train(model, optimizer)
        raise KeyError("mine")
    assert hooks_of(model) == 0
    assert not optimizer._optimizer_step_post_hooks


def test_copies_and_pickles_made_in_the_first_steps_are_not_watched():
    model = network()
    with watch(model) as watcher:
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (copied, loaded):
            other(batch())
            assert hooks_of(other) == 1  # that of the optimizers
        assert watcher._recorder.passes == 0
    assert hooks_of(copied) == hooks_of(loaded) == 0


def test_it_can_be_started_and_stopped_again():
    model = network()
    optimizer = sgd(model)
    watcher = watch(model, optimizer, every=EVERY)
    train(model, optimizer)
    assert watcher.steps == 0
    watcher.stop()
    assert watcher.start() is watcher.start()
    train(model, optimizer, 5)
    watcher.stop()
    watcher.stop()
    train(model, optimizer, 5)
    with watcher:
        train(model, optimizer, 2)
        assert hooks_of(model) > 0
        passes(model, 1)
        train(model, optimizer, 3)
    assert watcher.steps == 10
    assert {f.code for f in watcher.findings} == {"BN309"}
    assert hooks_of(model) == 0


# -- counting steps ------------------------------------------------------------------------------


def test_steps_of_other_models_do_not_count():
    model, other = network(), network()
    with watch(model) as watcher:
        train(other, sgd(other), 3)
        assert watcher.steps == 0
        train(model, sgd(model), 2)
        assert watcher.steps == 2
    assert watcher.findings == ()


def test_of_two_optimizers_the_one_that_is_given_counts():
    model = network()
    body, head = sgd(model[:5]), sgd(model[5:])
    with watch(model, head) as watcher:
        loss_of(model).backward()
        body.step()
        head.step()
    assert watcher.steps == 1


def test_steps_by_hand(capsys):
    model = network()
    optimizer = sgd(model)
    with watch(model, every=EVERY) as watcher:
        for number in range(EVERY):
            loss_of(model).backward()
            watcher.step()
            assert watcher.steps == number + 1
        train(model, optimizer)
        assert watcher.steps == EVERY, "steps that are seen do not count beside them"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("count", [5, 1200])
def test_a_loop_without_an_optimizer_is_told_once_that_no_step_is_seen(count, capsys):
    model, inputs = nn.Sequential(nn.BatchNorm1d(2)), torch.randn(64, 2)
    with watch(model):
        for _ in range(count):
            model(inputs)
        assert (hooks_of(model) == 1) is (count > 1000)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "watcher.step()" in err


def test_gradients_that_are_accumulated_over_very_many_passes(capsys):
    model, inputs = nn.Sequential(nn.BatchNorm1d(2)), torch.randn(64, 2)
    optimizer = sgd(model)
    with watch(model, optimizer, every=EVERY) as watcher:
        for number in range(600):
            model(inputs).sum().backward()
            if number % 200 == 199:
                optimizer.step()
    assert watcher.steps == 3
    assert capsys.readouterr().err == ""


def test_steps_by_hand_before_the_start_and_after_the_end_are_none():
    model = network()
    watcher = watch(model, every=1)
    watcher.step()
    with watcher:
        watcher.step()
    model[1].running_mean[0] = float("nan")
    watcher.step()
    assert (watcher.steps, watcher.findings) == (1, ())


@pytest.mark.parametrize("what", ["optimizer", "parameters", "head"])
def test_a_new_optimizer_counts_on(what):
    model = network()
    with watch(model, every=EVERY) as watcher:
        train(model, sgd(model), 5)
        if what == "parameters":
            state = {name: t.clone() for name, t in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        elif what == "head":
            model[9] = nn.Linear(8, 4)
        train(model, sgd(model[9] if what == "head" else model), 5)
        assert watcher.steps == 10


def test_the_optimizer_that_was_given_makes_no_step_while_another_does(capsys):
    model = nn.Sequential(nn.Linear(2, 2))
    other, given = sgd(model), sgd(model)
    with watch(model, given):
        for _ in range(1100):
            other.step()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "another optimizer of this model made 1000 steps" in err


def test_wrapped_optimizers_are_seen_through():
    class Accelerated(torch.optim.Optimizer):
        """As Accelerate's: an optimizer by class that was never initialised as one."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = network()
    optimizer = sgd(model)
    with watch(model, Accelerated(optimizer)) as watcher:
        train(model, optimizer, 2)
    assert watcher.steps == 2
