"""bnify.watch in Hugging Face's Trainer: a callback of a dozen lines, and a fault that it finds.

    python examples/watch_transformers.py --epochs 2

bnify has no adapter for transformers and does not depend on it: copy the callback into your
project. A small ResNet, made from its configuration (nothing is downloaded), is trained on digits
with a frozen stem whose norm goes on moving. Needs ``transformers`` and ``accelerate``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

import torch

import bnify
from digits import digits

try:
    import accelerate  # noqa: F401 - the Trainer stands on it
    import transformers as hf
except ImportError:
    print("this example needs the Trainer: pip install transformers accelerate")
    sys.exit()


class WatchNorms(hf.TrainerCallback):
    """Watches the norms of the model from the first to the last step of ``train``."""

    def __init__(self, **options: Any) -> None:
        """Options of ``bnify.watch``: ``every=50``, ``average=...``, ``strict=True``."""
        self.options = options
        self.watcher: Any = None

    def on_train_begin(self, *_: Any, model: torch.nn.Module, **_others: Any) -> None:
        """Steps are counted by the optimizer itself, however gradients are accumulated."""
        self.stop()
        self.watcher = bnify.watch(model, **self.options).start()

    def on_train_end(self, *_: Any, **_others: Any) -> None:
        """A last look."""
        self.stop()

    def stop(self, error: BaseException | None = None) -> None:
        """The Trainer has no event for an exception: see ``main``."""
        if self.watcher is not None:
            self.watcher.stop(error)


class Digits(torch.utils.data.Dataset):
    """Digits as the Trainer wants them."""

    def __init__(self) -> None:
        data = digits()
        self.images, self.labels = data.images.unflatten(1, (1, 28, 28)), data.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main() -> None:
    """Train under the callback, and print what it found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--healthy", action="store_true", help="freeze nothing")
    options = parser.parse_args()
    hf.set_seed(0)
    torch.set_num_threads(1)
    model = hf.ResNetForImageClassification(
        hf.ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="basic",
            num_labels=10,
        )
    )
    if not options.healthy:
        model.resnet.embedder.requires_grad_(False)
    watching = WatchNorms(every=20)
    with tempfile.TemporaryDirectory() as folder:
        trainer = hf.Trainer(
            model,
            hf.TrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=64,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Digits(),
            callbacks=[watching],
        )
        try:
            trainer.train()
        except BaseException as error:
            watching.stop(error)
            raise
    watcher = watching.watcher
    print(f"{watcher.steps} steps, {len(watcher.findings)} findings")
    for finding in watcher.findings:
        print(f"  {finding.code} {finding.module}: {finding.message}")


if __name__ == "__main__":
    main()
