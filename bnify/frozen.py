"""Modules that stay in eval mode whatever ``train()`` is called on the model around them."""

from __future__ import annotations

from typing import Any

from torch import nn


class _KeptInEval:
    """What classes made by :func:`keep_in_eval` add to the plain one: a ``train()`` of nothing."""

    plain: type[nn.Module]

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode, children included."""
        del mode
        return super().train(False)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the plain class: the made one has no importable name."""
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _revive, (self.plain,), state


_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def _class_for(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _MADE:
        body = {
            "plain": plain,
            "__module__": __name__,
            "__doc__": f"{plain.__name__}, in eval mode.",
        }
        _MADE[plain] = type(f"{plain.__name__}KeptInEval", (_KeptInEval, plain), body)
    return _MADE[plain]


def _revive(plain: type[nn.Module]) -> nn.Module:
    made = _class_for(plain)
    return made.__new__(made)


def keep_in_eval(module: nn.Module) -> None:
    """Let a module stay in eval mode from now on, in place, by a class swap.

    The object, its tensors and their names stay; ``isinstance`` with the plain class holds.
    """
    if not isinstance(module, _KeptInEval):
        module.__class__ = _class_for(type(module))
    module.eval()


def give_back_train(module: nn.Module) -> None:
    """Undo :func:`keep_in_eval`, in place: the plain class again, in eval mode for now."""
    if isinstance(module, _KeptInEval):
        module.__class__ = module.plain  # type: ignore[assignment]
