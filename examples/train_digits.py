"""bnify inside a training script: the model is a class of your own, and stays one.

    python examples/train_digits.py --epochs 5 --out out/digits

An old checkpoint of the plain network is loaded, norms are inserted so that the outputs stay what
they were, the optimizer that exists already learns of the new parameters, training goes on, and
the result is saved, loaded again and exported.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnify
from digits import digits


class DigitNet(nn.Module):
    """A small convolutional network with a training step of its own."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(18 * width, 64)
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (N, 18·width) of rows (N, 784)."""
        x = x.unflatten(1, (1, 28, 28))
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.avg_pool2d(x, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ten classes."""
        return self.head(F.relu(self.fc(self.features(x))))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The loss of one batch, as training frameworks call it."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)


def main() -> None:
    """Train, insert, go on training, save, load, export."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits()
    loader = DataLoader(TensorDataset(data.images, data.labels), 32, shuffle=True, drop_last=True)
    batch = data.images[:32]

    # 1. A plain network, trained a little, and its checkpoint: the past that has to fit.
    model = DigitNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    fit(model, optimizer, loader, epochs=2)
    old_checkpoint = model.state_dict()
    old_checkpoint = {name: value.clone() for name, value in old_checkpoint.items()}
    before = outputs(model, batch)
    print(f"plain:    {accuracy(model, data.test_images, data.test_labels):.1%}")

    # 2. Norms go in; in eval the function stays what it was, and the optimizer learns of them.
    result = bnify.insert(
        model, batch, init="preserve", data=loader, optimizer=optimizer, inplace=True
    )
    assert result.model is model
    assert isinstance(model, DigitNet)
    assert hasattr(model, "training_step")
    drift = (outputs(model, batch) - before).abs().max().item()
    print(f"inserted: {', '.join(edit.layer for edit in result.plan.edits)}; moved by {drift:.1e}")
    for skip in result.plan.skips:
        print(f"          {skip.layer} left alone: {skip.reason}")

    # 3. Old checkpoints fit: only the new norms' entries are missing.
    missing, unexpected = model.load_state_dict(old_checkpoint, strict=False)
    assert not unexpected
    assert all(".norm." in name for name in missing)

    # 4. Training goes on with the same loop and the same optimizer.
    fit(model, optimizer, loader, options.epochs)
    print(
        f"with norms, {options.epochs} more epochs: "
        f"{accuracy(model, data.test_images, data.test_labels):.1%}"
    )

    # 5. Four files, no pickle; a fresh instance takes the plan and the weights.
    if options.out.exists():
        shutil.rmtree(options.out)
    result.save(options.out)
    loaded = bnify.load(options.out, model=DigitNet())
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))

    # 6. ONNX, run at two other batch sizes and compared with the model by error budget.
    exported = bnify.export(model.eval(), batch, options.out / "final.onnx")
    assert exported.verification is not None
    assert exported.verification.passed
    print(
        f"exported: {exported.path}, opset {exported.opset}, "
        f"norms {exported.norms_before} -> {exported.norms_after}"
    )


def fit(model: DigitNet, optimizer: torch.optim.Optimizer, loader: DataLoader, epochs: int) -> None:
    """The usual loop."""
    model.train()
    for _ in range(epochs):
        for batch in loader:
            loss = model.training_step(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def outputs(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits in eval mode; the mode is given back."""
    mode = model.training
    try:
        return model.eval()(batch)
    finally:
        model.train(mode)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's."""
    return (outputs(model, images).argmax(1) == labels).double().mean().item()


if __name__ == "__main__":
    main()
