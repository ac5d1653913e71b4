"""Classes made at run time out of other classes, for class swaps in place.

Swapping an object's class leaves its tensors, their names, its hooks and every optimizer that
holds its parameters as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from bnify.borrow import own_generated_class

Maker: TypeAlias = Callable[[type[nn.Module]], type[nn.Module]]
#: A class that can be imported, or a function that makes one of another recipe.
Recipe: TypeAlias = "type[nn.Module] | tuple[Maker, Recipe]"


class Made:
    """What classes made by :func:`made_class` share: they are pickled by the class they are of.

    Attributes:
        plain: The class it was made of.
        maker: The function that makes this class of the plain one; importable.
    """

    plain: type[nn.Module]
    maker: Maker

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the plain class: the made one has no importable name."""
        kind: Any = type(self)
        return _revive, (_recipe(kind),), self.__getstate__()


_MADE: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def made_class(
    kind: type[Made], plain: type[nn.Module], maker: Maker, *bases: type[nn.Module]
) -> type[nn.Module]:
    """The class ``kind`` on top of ``plain`` (and of more bases); made once for each pair."""
    if (kind, plain) not in _MADE:
        word = kind.__name__.strip("_")
        body = {
            "plain": plain,
            "maker": staticmethod(maker),
            "__module__": plain.__module__,  # torch.fx knows the norms of torch by it
            "__doc__": f"{plain.__name__}, {word}.",
        }
        _MADE[kind, plain] = type(f"{plain.__name__}{word}", (kind, plain, *bases), body)
    return _MADE[kind, plain]


def is_made(module: nn.Module, kind: type[Made]) -> bool:
    """Whether the class of this very module was made with ``kind``, not one it was made of."""
    return kind in class_of(module).__bases__


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of a parametrized one that beneath its ``ParametrizedX`` class."""
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        return kind.__bases__[0]
    return kind


def swap_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, in place.

    For a parametrized module it is slipped beneath its ``ParametrizedX`` class, so that
    parametrizations can be removed, and more of them registered, afterwards.
    """
    if nn.utils.parametrize.is_parametrized(module):
        own_generated_class(module, kind)
    else:
        module.__class__ = kind


def _recipe(kind: type[nn.Module]) -> Recipe:
    if "maker" not in vars(kind):
        return kind
    made: Any = kind
    return made.maker, _recipe(made.plain)


def _cook(recipe: Recipe) -> type[nn.Module]:
    if isinstance(recipe, type):
        return recipe
    maker, plain = recipe
    return maker(_cook(plain))


def _revive(recipe: Recipe) -> nn.Module:
    made = _cook(recipe)
    return made.__new__(made)
