"""The whole story on the article's network: insert, train with and without, export, verify.

    make demo        (or: python examples/demo.py)

The network is mlp.py:MyNetwork, the data scikit-learn's handwritten digits, resized from 8×8 to
28×28, and the loop the article's: SGD with a learning rate of 0.01 and cross entropy.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import bnify
from bnify import report
from digits import Split, digits
from mlp import MyNetwork

# What the demo must find: norms after the hidden layers, none after the output head.
EDITS = ["fc1", "fc2"]
SKIPS = [("fc3", "output-head")]


def main() -> int:
    """Run the demo; 0 if the plan is the expected one and everything that was measured passed."""
    parser = argparse.ArgumentParser(description="insert, train, export, verify")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    options = parser.parse_args()
    started = time.perf_counter()
    console = Console()
    torch.set_num_threads(1)  # batches of 32 gain nothing from more
    data = digits(options.seed)

    heading(console, "1  Insert", "bnify.insert(MyNetwork(), torch.randn(32, 784))")
    torch.manual_seed(options.seed)
    plain = MyNetwork()
    result = bnify.insert(plain, torch.randn(32, 784))
    show(report.render(result, "rich"))
    edits = [edit.layer for edit in result.plan.edits]
    skips = [(skip.layer, str(skip.reason)) for skip in result.plan.skips]
    if (edits, skips) != (EDITS, SKIPS):
        console.print(f"expected norms on {EDITS} and {SKIPS} left alone, not {edits} and {skips}")
        return 1

    heading(
        console, "2  Train both", "SGD, lr 0.01, cross entropy, batch 32, same start, same order"
    )
    normed = result.model
    histories = [train(model, data, options.epochs, options.seed) for model in (plain, normed)]
    console.print(training_table(histories), "")

    heading(console, "3  Export and verify", "bnify.export(model.eval(), batch, 'model.onnx')")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "model.onnx"
    batch = data.test_images[:32]
    exported = bnify.export(normed.eval(), batch, file)
    show(report.render(exported, "rich"))

    heading(console, "4  Verify the file", f"bnify.verify(model, {file.name!r}, batch)")
    verification = bnify.verify(normed, file, batch)
    show(report.render(verification, "rich"))
    for name, history in zip(("without norms", "with norms"), histories, strict=True):
        console.print(f"{name:>13}: {history[-1][1]:.1%} of the test digits right")
    console.print(f"files: {file}")
    console.print(f"{time.perf_counter() - started:.0f} seconds in all, without imports")
    verdicts = (result.verification, exported.verification, verification)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def train(
    model: nn.Module, data: Split, epochs: int, seed: int
) -> list[tuple[float, float, float]]:
    """The article's loop; per epoch the mean training loss, the test accuracy and the seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(epochs):
        started, total, seen = time.perf_counter(), 0.0, 0
        model.train()
        for rows in torch.randperm(len(data.images), generator=order).split(32):
            loss = F.cross_entropy(model(data.images[rows]), data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, seen = total + loss.item() * len(rows), seen + len(rows)
        model.eval()
        with torch.no_grad():
            right = (model(data.test_images).argmax(1) == data.test_labels).double().mean().item()
        history.append((total / seen, right, time.perf_counter() - started))
    return history


def training_table(histories: list[list[tuple[float, float, float]]]) -> Table:
    """Loss and accuracy by epoch, without norms beside with norms."""
    table = Table()
    table.add_column("epoch", justify="right")
    for name in ("without", "with norms"):
        for column in ("loss", "accuracy", "seconds"):
            table.add_column(f"{name}\n{column}", justify="right")
    for epoch, rows in enumerate(zip(*histories, strict=True), start=1):
        cells = [f(v) for row in rows for f, v in zip(FORMATS, row, strict=True)]
        table.add_row(str(epoch), *cells)
    return table


FORMATS = ("{:.3f}".format, "{:.1%}".format, "{:.2f}".format)


def heading(console: Console, title: str, line: str) -> None:
    """A rule with the step's title, and the line of code it runs."""
    console.rule(f"[bold]{title}", align="left")
    console.print(f"[dim]>>> {line}\n", highlight=False)


def show(text: str) -> None:
    """What bnify's reports render, as it is."""
    sys.stdout.write(text.rstrip("\n") + "\n\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
