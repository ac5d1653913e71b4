"""Random networks for the laws of folding: every source, absorber and passage, and every trap.

``random_fold_network(seed)`` draws a small DAG with hostile statistics. A program is a list of
steps on numbered values: ``foldparts.OPERATORS`` says what each does, ``foldwriting`` and
``foldmoves`` which are drawn. The same seed gives the same network.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

import laws
from foldmoves import Author
from foldparts import OPERATORS
from foldwriting import BATCH, NormUse
from laws import Step


class RandomFoldNetwork(nn.Module):
    """A random program; :func:`random_fold_network` makes one with inputs.

    Attributes:
        steps: The program: ``values[i + 1] = steps[i](values)``.
        norms: Every batch norm, or look-alike, that runs.
        vocabulary: Number of tokens when the input is integers, else 0.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.layers = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            author = Author(self.eval(), random.Random(seed))
            self.input_shape, self.results = author.write()
        self.vocabulary: int = author.vocabulary
        self.norms: tuple[NormUse, ...] = author.norm_uses()

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(self.run(step, [values[i] for i in step.sources]))
        outputs = [values[i] for i in self.results]
        return outputs[0] if len(outputs) == 1 else {f"out{i}": v for i, v in enumerate(outputs)}

    def run(self, step: Step, sources: list[Tensor]) -> Tensor:
        """Apply one step."""
        if step.op == "layer":
            return self.layers[step.layer](sources[0])
        return OPERATORS[step.op](self, sources, step.option)

    @property
    def signature(self) -> str:
        """What the network computes, without its values; equal for equal programs."""
        return f"{self.input_shape} {self.steps} {self.layers} {self.results}"


def random_fold_network(seed: int, batch: int = BATCH) -> tuple[RandomFoldNetwork, Tensor]:
    """A random network in eval mode, its norms hostile, and inputs; the same for the same seed."""
    net = RandomFoldNetwork(seed).eval()
    laws.hostile_(net, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *net.input_shape)
    if net.vocabulary:
        return net, torch.randint(0, net.vocabulary, shape, generator=generator)
    return net, torch.randn(shape, generator=generator)
