"""bnify.watch in Lightning: a callback of a dozen lines, and a fault that it finds.

    python examples/watch_lightning.py --epochs 2

bnify has no adapter for Lightning and does not depend on it: copy the callback into your project.
The network is trained on digits with a momentum copied from TensorFlow. Needs ``lightning``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnify
from digits import digits

try:
    import lightning as L
except ImportError:
    print("this example needs Lightning: pip install lightning")
    sys.exit()


class WatchNorms(L.Callback):
    """Watches the norms of the module from the first to the last step of ``fit``."""

    def __init__(self, **options: Any) -> None:
        """Options of ``bnify.watch``: ``every=50``, ``average=...``, ``strict=True``."""
        self.options = options

    def on_train_start(self, _trainer: L.Trainer, module: L.LightningModule) -> None:
        """Steps are counted by the optimizer itself, whatever ``accumulate_grad_batches`` is."""
        logger = logging.getLogger("lightning.pytorch")
        self.watcher = bnify.watch(module, on_finding=logger, **self.options).start()

    def on_train_end(self, *_: Any) -> None:
        """A last look."""
        self.watcher.stop()

    def on_exception(self, _trainer: L.Trainer, _module: Any, exception: BaseException) -> None:
        """A last look; a batch of one sample is recognised by what it raised."""
        if hasattr(self, "watcher"):
            self.watcher.stop(exception)


class DigitModule(L.LightningModule):
    """A convolutional network; its second norm has TensorFlow's momentum."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 3, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, bias=False),
            nn.BatchNorm2d(32, momentum=momentum),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ten classes of rows (N, 784)."""
        return self.net(x)

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def main() -> None:
    """Train under the callback, and print what it found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--momentum", type=float, default=0.99, help="0.1 is healthy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    L.seed_everything(0)
    data = digits()
    loader = DataLoader(TensorDataset(data.images, data.labels), batch_size=64, shuffle=True)
    watching = WatchNorms(every=20)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        callbacks=[watching],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(DigitModule(options.momentum), loader)
    watcher = watching.watcher
    print(f"{watcher.steps} steps, {len(watcher.findings)} findings")
    for finding in watcher.findings:
        print(f"  {finding.code} {finding.module}: {finding.message}")


if __name__ == "__main__":
    main()
