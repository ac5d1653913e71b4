"""The fingerprint of a model: class and tensor names, shapes and dtypes, never values."""

from __future__ import annotations

from torch import Tensor, nn

from bnify.plan import Fingerprint


def fingerprint(model: nn.Module) -> Fingerprint:
    """What a plan remembers of the model it was made for."""
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    tensors += model.named_buffers(remove_duplicate=False)
    return Fingerprint(
        model=type(model).__name__,
        tensors=tuple(
            (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors
        ),
    )
