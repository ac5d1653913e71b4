"""Laws of what a watcher reads: updates between steps, and many tensors in one transfer."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnify.auditing.live import NormModule
from bnify.auditing.observed import Burst
from bnify.watching.transfer import transferred
from bnify.watching.updates import UpdateCounter


def counted(
    updates: list[int], writes: int = 1, *, anew: int | None = None, after: int | None = None
) -> UpdateCounter:
    """A counter after steps with so many updates before each; statistics made anew before one.

    With ``after`` the loop is over, so many updates later.
    """
    norm = nn.BatchNorm2d(2)
    held, counter = norm.num_batches_tracked, UpdateCounter()
    norms = [NormModule("bn", norm, tracked=True, frozen=False)]
    held.fill_(10)
    counter.look(norms, {"bn": 10})
    for step, number in enumerate(updates, 1):
        if step == anew:
            held.zero_()
        for _ in range(number):
            held.add_(1)
            for _ in range(writes - 1):
                held.copy_(held.clone())
        counter.stepped(step)
    if after is not None:
        for _ in range(after):
            held.add_(1)
        counter.ended(len(updates))
    counter.look(norms, {"bn": int(held)})
    return counter


steps = st.integers(5, 12)
batches = st.integers(1, 6)


@settings(deadline=None)
@given(before=steps, after=steps, usual=batches, more=st.integers(0, 30), writes=st.integers(1, 2))
def test_a_burst_is_more_than_twice_the_others_and_four(before, after, usual, more, writes):
    updates = [usual] * before + [usual + more] + [usual] * after
    found = counted(updates, writes).bursts
    middle, beside = writes * (usual + more), writes * usual
    expected = {"bn": Burst(before + 1, middle, beside)} if middle > 2 * beside + 4 else {}
    assert found == expected


@settings(deadline=None)
@given(accumulate=st.integers(1, 12), epoch=st.integers(1, 40), epochs=st.integers(1, 6))
def test_batches_that_are_left_over_for_the_next_step_are_no_burst(accumulate, epoch, epochs):
    updates, waiting = [], 0
    for _ in range(epochs):
        for number in range(1, epoch + 1):
            waiting += 1
            if number % accumulate == 0:
                updates.append(waiting)
                waiting = 0
    least = epochs > 1 and epoch >= accumulate
    assert not least or max(updates) < 2 * accumulate
    assert counted(updates).bursts == {}


@settings(deadline=None)
@given(one=batches, other=st.integers(1, 40), before=steps, after=steps)
def test_another_count_from_some_step_on_is_no_burst(one, other, before, after):
    assert counted([one] * before + [other] * after).bursts == {}


@settings(deadline=None)
@given(steps, st.integers(0, 9))
def test_statistics_that_are_made_anew_are_no_burst(before, more):
    updates = [1] * before + [10 + more] + [1, 1]
    assert set(counted(updates).bursts) == {"bn"}
    short = counted([1] * 30 + [10 + more] + [1, 1], anew=31)
    assert short.bursts == {}


@settings(deadline=None)
@given(st.lists(st.integers(2, 12), min_size=5, max_size=40), st.data())
def test_zeros_between_the_steps_change_nothing(updates, data):
    spread: list[int] = []
    for number in updates:
        spread += [number] + [0] * data.draw(st.integers(0, 3))
    assert {p: b.writes for p, b in counted(spread).bursts.items()} == {
        p: b.writes for p, b in counted(updates).bursts.items()
    }


@settings(deadline=None)
@given(steps, st.integers(7, 30))
def test_what_comes_after_the_last_step_is_judged_at_the_end(before, last):
    assert counted([1] * before + [last]).bursts == {}
    assert counted([1] * before, after=last).bursts == {"bn": Burst(before + 1, last, 1)}
    assert counted([1] * before, after=6).bursts == {}


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(6, 30))
def test_of_counts_that_are_never_alike_none_stands_out(random, largest):
    counts = list(range(1, largest, 2)) * 3
    random.shuffle(counts)
    assert counted(counts).bursts == {}


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3))),
    st.booleans(),
)
def test_tensors_of_any_dtype_and_shape_arrive_as_they_are(kinds, transposed):
    tensors = [(torch.randn(shape) * 100).to(dtype) for dtype, shape in kinds]
    tensors += [torch.tensor([float("nan"), -float("inf")])]
    if transposed:
        tensors = [t.mT if t.dim() > 1 else t for t in tensors]
    found = transferred(tensors)
    for tensor in tensors:
        expected = tensor.double().reshape(-1)
        assert torch.equal(torch.from_numpy(found[id(tensor)]).isnan(), expected.isnan())
        assert torch.equal(torch.from_numpy(found[id(tensor)]).nan_to_num(), expected.nan_to_num())


def test_what_was_transferred_is_a_copy():
    tensor = torch.ones(3)
    found = transferred([tensor])[id(tensor)]
    tensor.zero_()
    assert found.tolist() == [1, 1, 1]
