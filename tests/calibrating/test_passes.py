"""Passes over the same data are over the same batches."""

from __future__ import annotations

import pytest
import torch
from normed import hostile, images
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from bnify.calibrating.scoring import accuracies, accuracy
from bnify.calibrations import calibrate

DATASET = TensorDataset(images(), torch.arange(61) % 5)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS = {
    "loader": lambda: DataLoader(DATASET, 7, shuffle=True, generator=generator()),
    "sampler": lambda: DataLoader(
        DATASET, 7, sampler=RandomSampler(DATASET, generator=generator())
    ),
    "batch sampler": lambda: DataLoader(
        DATASET, batch_sampler=BatchSampler(RandomSampler(DATASET, generator=generator()), 7, False)
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_generator_of_its_own_gives_the_same_order_again(kind):
    loader, untouched = LOADERS[kind](), LOADERS[kind]()
    models = hostile(), hostile()
    for model in models:
        calibrate(model, loader, batches=3)
    first = models[0].state_dict()
    assert all(torch.equal(t, first[n]) for n, t in models[1].state_dict().items())
    assert accuracy(models[0], loader, 3) == accuracy(models[0], loader, 3)
    for (ours, _), (want, _) in zip(loader, untouched, strict=True):
        assert torch.equal(ours, want)


class Augmented(Dataset):
    """Noise from a generator that nobody else knows: images are never the same twice."""

    def __init__(self) -> None:
        self.random = generator()

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(4, generator=self.random), index % 4


def test_models_are_judged_on_the_same_images():
    loader = DataLoader(Augmented(), batch_size=20)
    model = nn.Sequential(nn.Linear(4, 4))
    found = accuracies((model, model, model), loader)
    assert found is not None
    assert len(set(found)) == 1
    assert accuracies((model,), loader) != accuracies((model,), loader)  # as it could have been
