"""Layers that carry their norm, and the norms that torch has no module for.

A layer gets its norm by a class swap: the same object, the same parameters and names, plus a
child ``norm``. ``forward`` is explicit, so that the common layers can be scripted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify.made import class_of, swap_class
from bnify.synced import LocalSyncBatchNorm as LocalSyncBatchNorm
from bnify.synced import unsync_norms

M = TypeVar("M", bound=nn.Module)


class TokenNorm(nn.Module):
    """Normalize the last axis of (N, ..., C) with a norm that wants (N, C).

    A container around a real norm rather than a subclass: ``SyncBatchNorm`` conversion replaces
    the ``inner`` norm and leaves the container, so tokens never become channels.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: Tensor) -> Tensor:
        """(N, ..., C) → (N, ..., C)."""
        return self.inner(input.flatten(0, -2)).view(input.shape)  # type: ignore[no-any-return]


class ChannelRMSNorm(nn.Module):
    """RMS norm of a convolution's output: one mean square per sample, one scale per channel.

    y = x / sqrt(mean(x², all axes but the first) + eps) · weight[channel]; the statistic of
    ``GroupNorm(1, C)`` without its mean (Zhang & Sennrich, Root Mean Square Layer Normalization,
    2019).
    """

    def __init__(self, num_features: int, eps: float | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *) → (N, C, *)."""
        scale = self.weight.view([-1] + [1] * (input.dim() - 2))
        return F.rms_norm(input, input.shape[1:], None, self.eps) * scale

    def extra_repr(self) -> str:
        """Size and eps, as torch's norms print them."""
        return f"{self.weight.numel()}, eps={self.eps}"


class CallNorms(nn.Module):
    """One norm per call of a layer that runs several times in a forward pass.

    The i-th call since the forward of their scope began uses the i-th norm. The scope is the
    innermost module around the layer that runs once in a forward pass; :func:`restart_calls`, a
    forward pre-hook on it, sets the count back. A call too many is an error: which norm it wants
    cannot be known.
    """

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        for index, norm in enumerate(norms):
            self.add_module(str(index), norm)
        self.call = 0

    def norms(self) -> tuple[nn.Module, ...]:
        """The norms in the order of the calls."""
        return tuple(self.children())

    def forward(self, input: Tensor) -> Tensor:
        """Normalize with the norm of the call at hand."""
        norms = self.norms()
        # In the backward pass a checkpoint repeats its calls, from the first if it spans them all.
        repeated = torch._C._current_graph_task_id() != -1
        if self.call >= len(norms) and not repeated:
            raise RuntimeError(
                f"this layer has norms for {len(norms)} calls and is called once more: insert with "
                "inputs that make as many calls"
            )
        norm = norms[self.call % len(norms)]
        self.call += 1
        return norm(input)  # type: ignore[no-any-return]


def restart_calls(model: nn.Module, _args: Any) -> None:
    """Forward pre-hook of a scope: every :class:`CallNorms` in it starts at its first norm."""
    for module in model.modules():
        if isinstance(module, CallNorms):
            module.call = 0


def without_synchronisation(model: M) -> M:
    """Let a copy of a model run alone, in place; ``SyncBatchNorm`` waits for others, or refuses.

    In train mode it raises on CPU as soon as a process group is up, which is the usual moment for
    an insertion: before the model goes to its GPU.
    """
    for module in model.modules():
        if class_of(module) is nn.SyncBatchNorm:
            swap_class(module, LocalSyncBatchNorm)
    unsync_norms(model)  # subclasses that bnify made
    return model


# -- layers with a norm --------------------------------------------------------------------------


class NormedLayer:
    """What all layers with a norm share; ``norm`` runs on what the plain class would return."""

    if TYPE_CHECKING:  # torch.jit.script would try to read these
        norm: nn.Module
        dropped_bias: Tensor | None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        """Load a checkpoint with a bias into a layer whose bias lives in the running mean."""
        key, own_key = f"{prefix}bias", f"{prefix}dropped_bias"
        dropped = getattr(self, "dropped_bias", None)
        # After a fold the layer has a bias again, which is its own.
        if dropped is not None and getattr(self, "bias", None) is None:
            bias = state_dict.pop(key, None)
            if bias is not None and bias.shape == dropped.shape:
                self._take_bias(state_dict, prefix, bias, dropped)
            elif bias is not None:
                state_dict[own_key] = bias  # torch lists it with the other sizes that do not fit
            elif own_key not in state_dict:  # such as a tied one, saved under its other name
                missing_keys.append(key)
        if dropped is not None:
            state_dict.setdefault(own_key, dropped)
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )

    @torch.no_grad()  # a state dict may hold parameters
    def _take_bias(
        self, state_dict: dict[str, Any], prefix: str, bias: Tensor, dropped: Tensor
    ) -> None:
        for name, buffer in self.norm.named_buffers():
            if name.rpartition(".")[2] != "running_mean":
                continue
            key = f"{prefix}norm.{name}"
            if key in state_dict:
                state_dict[key] = state_dict[key] - bias
            else:
                buffer.copy_(buffer + dropped - bias.to(buffer))
        dropped.copy_(bias)
        state_dict.pop(f"{prefix}dropped_bias", None)


class LinearNorm(NormedLayer, nn.Linear):
    """``nn.Linear`` followed by its norm."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, ..., in) → (N, ..., out), normalized."""
        return self.norm(F.linear(input, self.weight, self.bias))  # type: ignore[no-any-return]


class Conv1dNorm(NormedLayer, nn.Conv1d):
    """``nn.Conv1d`` followed by its norm."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, L) → (N, K, L'), normalized."""
        return self.norm(self._conv_forward(input, self.weight, self.bias))  # type: ignore[no-any-return]


class Conv2dNorm(NormedLayer, nn.Conv2d):
    """``nn.Conv2d`` followed by its norm."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → (N, K, H', W'), normalized."""
        return self.norm(self._conv_forward(input, self.weight, self.bias))  # type: ignore[no-any-return]


class Conv3dNorm(NormedLayer, nn.Conv3d):
    """``nn.Conv3d`` followed by its norm."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, K, D', H', W'), normalized."""
        return self.norm(self._conv_forward(input, self.weight, self.bias))  # type: ignore[no-any-return]


class ConvTranspose1dNorm(NormedLayer, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` followed by its norm."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, L) → (N, K, L'), normalized."""
        stride, padding, dilation, groups = self.stride, self.padding, self.dilation, self.groups
        size = self.kernel_size
        extra = self._output_padding(input, output_size, stride, padding, size, 1, dilation)  # type: ignore[arg-type]
        bias = self.bias
        y = F.conv_transpose1d(input, self.weight, bias, stride, padding, extra, groups, dilation)  # type: ignore[arg-type]
        return self.norm(y)  # type: ignore[no-any-return]


class ConvTranspose2dNorm(NormedLayer, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` followed by its norm."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, H, W) → (N, K, H', W'), normalized."""
        stride, padding, dilation, groups = self.stride, self.padding, self.dilation, self.groups
        size = self.kernel_size
        extra = self._output_padding(input, output_size, stride, padding, size, 2, dilation)  # type: ignore[arg-type]
        bias = self.bias
        y = F.conv_transpose2d(input, self.weight, bias, stride, padding, extra, groups, dilation)  # type: ignore[arg-type]
        return self.norm(y)  # type: ignore[no-any-return]


class ConvTranspose3dNorm(NormedLayer, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` followed by its norm."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, D, H, W) → (N, K, D', H', W'), normalized."""
        stride, padding, dilation, groups = self.stride, self.padding, self.dilation, self.groups
        size = self.kernel_size
        extra = self._output_padding(input, output_size, stride, padding, size, 3, dilation)  # type: ignore[arg-type]
        bias = self.bias
        y = F.conv_transpose3d(input, self.weight, bias, stride, padding, extra, groups, dilation)  # type: ignore[arg-type]
        return self.norm(y)  # type: ignore[no-any-return]


_NORMED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LinearNorm,
    nn.Conv1d: Conv1dNorm,
    nn.Conv2d: Conv2dNorm,
    nn.Conv3d: Conv3dNorm,
    nn.ConvTranspose1d: ConvTranspose1dNorm,
    nn.ConvTranspose2d: ConvTranspose2dNorm,
    nn.ConvTranspose3d: ConvTranspose3dNorm,
}


class OnDemand(NormedLayer):
    """Any other class followed by a norm; the classes are made by :func:`normed_class`."""

    plain: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the plain class returns, normalized."""
        return self.norm(super().forward(*args, **kwargs))  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the plain class: the made one has no importable name."""
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _revive, (self.plain,), state


def _revive(plain: type[nn.Module]) -> nn.Module:
    made = normed_class(plain)
    return made.__new__(made)


def normed_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class that runs ``plain`` and then the child ``norm``; made once per plain class."""
    if plain not in _NORMED:
        body = {"plain": plain, "__module__": __name__, "__doc__": f"{plain.__name__}, normalized."}
        _NORMED[plain] = type(f"{plain.__name__}Norm", (OnDemand, plain), body)
    return _NORMED[plain]


def plain_class(normed: type[nn.Module]) -> type[nn.Module]:
    """The class that :func:`normed_class` was made of."""
    return next(plain for plain, made in _NORMED.items() if made is normed)


def attach(layer: nn.Module, norm: nn.Module) -> None:
    """Give a layer its norm, in place: class swap plus child ``norm``.

    For a parametrized layer the new class is slipped beneath its ``ParametrizedX`` class, so that
    ``remove_parametrizations`` leaves the layer with its norm.
    """
    layer.norm = norm
    swap_class(layer, normed_class(class_of(layer)))


def detach(layer: nn.Module) -> nn.Module:
    """Undo :func:`attach`, in place; returns the norm."""
    norm = norm_of(layer)
    del layer.norm
    swap_class(layer, plain_class(class_of(layer)))
    return norm


def norm_of(layer: nn.Module) -> nn.Module:
    """The norm of a layer that carries one."""
    return layer.get_submodule("norm")


def carries_norm(layer: nn.Module) -> bool:
    """Whether bnify put a norm on this layer."""
    return isinstance(layer, NormedLayer)
