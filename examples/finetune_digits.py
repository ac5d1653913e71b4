"""Fine-tune a trained network without norms: what putting norms in costs and gains.

    python examples/finetune_digits.py --epochs 4

A plain CNN is trained on handwritten digits (accuracy on 360 test images). Then the same weights
go on in four ways: without norms, and with norms that start from scratch (``reset``), as the old
function (``preserve``) or with the data's statistics (``stats``); each at a small and at a large
learning rate. The columns are accuracy as inserted (eval, then with batch statistics), after the
first epoch and at the end, and what a step takes. Look for two things: ``preserve`` loses nothing
at the start, and ``reset`` and ``stats`` bear the learning rate at which the old scale diverges.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnify
from digits import Split, digits


class PlainCNN(nn.Module):
    """Six convolutions and no norm: (N, 784) to (N, 10) logits."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [1, width, width, 2 * width, 2 * width, 2 * width, 2 * width]
        pairs = itertools.pairwise(sizes)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of ten classes."""
        x = F.avg_pool2d(x.unflatten(1, (1, 28, 28)), 2)
        for index, conv in enumerate(self.convs):
            x = F.relu(conv(x))
            if index in (1, 3):
                x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def main() -> None:
    """Train a plain network, then fine-tune it in four ways and print a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="*", default=[0.002, 0.1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits()
    loader = DataLoader(TensorDataset(data.images, data.labels), 32, shuffle=True, drop_last=True)

    plain = PlainCNN()
    optimizer = torch.optim.Adam(plain.parameters(), lr=2e-3)
    for _ in range(8):
        train_epoch(plain, optimizer, loader)
    print(f"trained without norms: {accuracy(plain, data):.1%}\n")

    for rate in options.rates:
        print(f"SGD, learning rate {rate:g}, momentum 0.9, {options.epochs} epochs")
        print(f"  {'':9} {'eval':>7} {'train':>7} {'epoch 1':>8} {'end':>7} {'ms/step':>8}")
        for init in (None, "reset", "preserve", "stats"):
            torch.manual_seed(1)
            model = copy.deepcopy(plain)
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
            if init is not None:
                bnify.insert(
                    model,
                    data.images[:32],
                    init=init,
                    data=loader,
                    optimizer=optimizer,
                    inplace=True,
                    verify=False,
                )
            inserted, noisy = accuracy(model, data), accuracy(model, data, train=True)
            curve, started = [], time.perf_counter()
            for _ in range(options.epochs):
                train_epoch(model, optimizer, loader)
                curve.append(accuracy(model, data))
            steps = options.epochs * len(loader)
            cost = 1000 * (time.perf_counter() - started) / steps
            print(
                f"  {init or 'no norms':9} {inserted:7.1%} {noisy:7.1%} {curve[0]:8.1%} "
                f"{curve[-1]:7.1%} {cost:8.1f}"
            )
        print()


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> None:
    """One pass over the training images."""
    model.train()
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split, *, train: bool = False) -> float:
    """Share of test images that are told right; ``train``: with the statistics of batches of 32."""
    working = copy.deepcopy(model).train(train)
    logits = torch.cat([working(batch) for batch in data.test_images.split(32)])
    return (logits.argmax(1) == data.test_labels).double().mean().item()


if __name__ == "__main__":
    main()
