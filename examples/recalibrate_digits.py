"""A network whose running statistics are stale, and the same one calibrated.

    python examples/recalibrate_digits.py

A small CNN with batch norm is trained on digits with a momentum of 0.001: in a hundred steps its
running statistics hardly leave their start, so it is right in train mode and wrong in eval mode.
The audit says so, and one pass over the data mends it.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnify
from cnn import SmallCNN
from digits import digits


def main() -> None:
    """Train with a momentum that is too small, audit, calibrate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits()
    images, test_images = (x.unflatten(1, (1, 28, 28)) for x in (data.images, data.test_images))
    loader = DataLoader(TensorDataset(images, data.labels), 32, shuffle=True, drop_last=True)

    model = bnify.insert(SmallCNN(), images[:32], momentum=0.001).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(options.epochs):
        for batch, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()

    before = accuracy(model, test_images, data.test_labels)
    report = bnify.audit(model, images[:32])
    print(f"stale:      {before:.1%} on test data in eval mode")
    for finding in report.findings:
        if finding.code == "BN104":
            print(f"            {finding.module}: {finding.message}")
    found = bnify.calibrate(model, loader)
    print(f"calibrated: {accuracy(model, test_images, data.test_labels):.1%}")
    for norm in found.norms:
        print(f"            {norm.name}: {norm.count:,} values a channel")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit in eval mode is the label's; the mode is given back."""
    mode = model.training
    try:
        return (model.eval()(images).argmax(1) == labels).double().mean().item()
    finally:
        model.train(mode)


if __name__ == "__main__":
    main()
