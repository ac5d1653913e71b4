"""BN201: a bias that the batch norm behind it takes away again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject

if TYPE_CHECKING:
    from bnify.auditing.live import NormUse


class RedundantBias(Rule):
    """A layer has a bias, and everything that reads the layer is a batch norm.

    What it checks:
        Every convolution and linear layer with a bias: whether each of its results goes into a
        batch norm (or a tracked instance norm) and nowhere else, channel for channel. A norm over
        another axis, or one that two layers share, does not count.

    Why it is bad:
        The norm subtracts the mean of each channel, and the bias with it: it trains towards
        nothing, takes memory in the optimizer, and moves the running mean when it changes.

    Example:
        ``nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)``: 64 numbers that do nothing. torchvision's
        vgg16_bn has 13 such layers.

    How to fix it:
        Build the layer with ``bias=False``. In a trained model subtract the bias from the running
        mean: the function stays the same.

    Fix safety:
        Safe: eval mode computes the same; train mode does too, up to rounding.

    Source:
        Ioffe & Szegedy (2015), section 3.2: "the bias b can be ignored".
    """

    code = "BN201"
    name = "redundant-bias"
    severity = Severity.INFO
    tiers = ("T1",)
    needs = needs(Need.FORWARD)
    fix = "build the layer with bias=False; trained: running_mean -= bias"
    safety = Safety.SAFE
    cost = "parameters that train towards nothing"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a layer, at the layer."""
        if subject.live is None:
            return
        for layer, channels, norms in redundant(subject):
            yield self.finding(
                layer,
                f"the bias of {channels} channels is taken away by {', '.join(norms)}",
                {"channels": channels, "norms": list(norms)},
                safety=Safety.ADVICE if means_behind(subject, layer, norms) is None else None,
            )


def means_behind(subject: Subject, path: str, norms: tuple[str, ...]) -> list[str] | None:
    """Names of the running means behind a bias; None where the layer cannot go without it."""
    from torch import nn

    live = subject.live
    layer = None if live is None else live.modules.get(path)
    if live is None or not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        return None
    if nn.utils.parametrize.is_parametrized(layer):
        return None
    constants = {} if live.captured is None else live.captured.constants
    means: list[str] = []
    for use in live.uses:
        if use.layer not in norms or not use.tracked:
            continue
        node = use.source.tensors["mean"]
        if node.op != "get_attr" or str(node.target) in constants:
            return None
        means.append(str(node.target))
    return means


def redundant(subject: Subject) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Layers whose bias does nothing: path, number of channels, the norms behind."""
    from bnify.auditing.flow import norms_behind

    live = subject.live
    if live is None or live.draft is None:
        return
    calls: Counter[str] = Counter()
    for use in live.uses:
        calls.update({use.layer, _mean(use)})
    behind: dict[str, list[str] | None] = {}
    channels: dict[str, int] = {}
    for node in live.draft.graph.nodes:
        layer = live.draft.layer(node) if node.op == "call_function" else None
        if layer is None or layer.bias is None or layer.bias.op != "get_attr":
            continue
        name = str(layer.bias.target)
        if behind.get(name, []) is None:
            continue
        norms = norms_behind(live, layer)
        if norms is None or any(max(calls[n.layer], calls[_mean(n)]) > 1 for n in norms):
            behind[name] = None
            continue
        behind.setdefault(name, [])
        behind[name] = [*(behind[name] or []), *(norm.layer for norm in norms)]
        channels[name] = layer.node.meta["shape"][layer.axis]
    for name, norms_of in behind.items():
        if norms_of and not _read_elsewhere(subject, name):
            path = name.rpartition(".")[0]
            yield path, channels[name], tuple(dict.fromkeys(norms_of))


def _mean(use: NormUse) -> str:
    """The tensor of its running mean, which several norms may share; else the norm's name."""
    return f"tensor {use.source.tensors['mean'].target}" if use.tracked else use.layer


def _read_elsewhere(subject: Subject, name: str) -> bool:
    """Whether anything but layers with this bias reads it (a tied or a computed one)."""
    live = subject.live
    if live is None or live.draft is None or live.captured is None:
        return True
    if name in live.captured.aliases or any(name in a for a in live.captured.aliases.values()):
        return True
    for node in live.draft.graph.nodes:
        if node.op == "get_attr" and str(node.target) == name:
            for reader in node.users:
                layer = live.draft.layer(reader)
                if layer is None or layer.bias is not node:
                    return True
    return False
