"""SPEC → model: a class, a factory or a network in Python code, or a registry's model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bnify.borrow import copy_model, seeded
from bnify.errors import SpecError, UsageError
from bnify.spec.checkpoint import describe_checkpoint
from bnify.spec.kinds import SpecKind, Target, parse_spec
from bnify.spec.objects import import_folder, load_object
from bnify.spec.registry import load_registered
from bnify.spec.silence import user_output_to_stderr
from bnify.spec.usercode import a_type, call_factory
from bnify.structure import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model and where it came from.

    Attributes:
        model: The model, in the mode its factory left it in.
        spec: The SPEC as typed.
        kind: Its form.
        file: The Python file it came from, absolute; None for registries.
        sha256: Of that file, hexadecimal.
        call: Inputs that the model's registry brings; None where there are none.
        notes: What the user should know, one sentence each.
    """

    model: nn.Module
    spec: str
    kind: SpecKind
    file: Path | None = None
    sha256: str | None = None
    call: Call | None = None
    notes: tuple[str, ...] = ()


def load_model(
    spec: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    allow_download: bool = False,
    seed: int = 0,
) -> ModelSource:
    """Build the model that a SPEC names.

    What the user's code prints goes to stderr; torch's random numbers start at ``seed`` and are
    put back. Without ``pretrained`` no weights are loaded, without ``allow_download`` nothing is
    fetched from the network for a registry's model.

    Args:
        spec: ``"net.py:MyNetwork"``, ``"pkg.mod:factory"``, ``"timm:resnet50"``.
        arguments: Keyword arguments of the class, factory or registry entry.
        pretrained: Load the weights that a registry has for the model.
        allow_download: Let a registry download.
        seed: Of the model's random initialisation.

    Raises:
        UsageError: The SPEC cannot be right.
        SpecError: It names no model, or building the model failed.
    """
    target = parse_spec(spec)
    arguments = dict(arguments or {})
    match target.kind:
        case SpecKind.FOLDER | SpecKind.ONNX | SpecKind.CHECKPOINT:
            raise _no_code(target)
        case SpecKind.REGISTRY:
            with user_output_to_stderr(), seeded(seed):
                entry = load_registered(
                    target, arguments, pretrained=pretrained, allow_download=allow_download
                )
            model = _module_of(entry.model, target)
            return ModelSource(
                model=model, spec=spec, kind=target.kind, call=entry.call, notes=entry.notes
            )
        case SpecKind.FILE | SpecKind.MODULE:
            if pretrained:
                raise UsageError(
                    f"{spec} is no registry's model: it has no pretrained weights",
                    hint="pass --weights FILE",
                )
            with user_output_to_stderr(), seeded(seed), import_folder(target):
                loaded = load_object(target)
                model = _build(loaded.value, arguments, target)
            return ModelSource(
                model=model, spec=spec, kind=target.kind, file=loaded.file, sha256=loaded.sha256
            )


def model_factory(
    spec: str, arguments: Mapping[str, Any] | None = None
) -> Callable[[int], nn.Module]:
    """What builds the model of a SPEC anew from a seed; its code is loaded once.

    A SPEC that names a network, not a class or a factory, gives copies of it whatever the seed.

    Raises:
        UsageError: The SPEC cannot be right.
        SpecError: It names no code, or loading it failed.
    """
    target = parse_spec(spec)
    given = dict(arguments or {})
    if target.kind not in (SpecKind.FILE, SpecKind.MODULE):
        load_model(spec, arguments=given)  # refuse now what cannot be built
        return lambda seed: load_model(spec, arguments=given, seed=seed).model
    with user_output_to_stderr(), seeded(0), import_folder(target):
        value = load_object(target).value

    def build(seed: int) -> nn.Module:
        with user_output_to_stderr(), seeded(seed), import_folder(target):
            made = _build(value, given, target)
            return copy_model(made) if made is value else made

    return build


def _build(value: Any, arguments: Mapping[str, Any], target: Target) -> nn.Module:
    """The network that a class, a factory or a network itself stands for."""
    if isinstance(value, nn.Module):
        if arguments:
            raise SpecError(
                f"{target.spec} is {a_type(value)} already built: it takes no arguments",
                hint="leave --arg out, or name the class or a factory",
            )
        # A module stays imported: its network must not change under who else holds it.
        return copy_model(value) if target.kind is SpecKind.MODULE else value
    if callable(value):
        return _module_of(call_factory(value, arguments, target.spec), target)
    return _module_of(value, target)


def _module_of(value: Any, target: Target) -> nn.Module:
    if isinstance(value, nn.Module):
        return value
    inner = value if isinstance(value, (tuple, list)) else ()
    if any(isinstance(item, nn.Module) for item in inner):
        hint = "write a factory that returns the network alone"
    elif isinstance(value, Mapping):
        hint = "weights go to --weights; the SPEC names the class or a factory"
    elif inspect.isclass(value) or inspect.ismodule(value):
        hint = f"write {target.spec}.NAME"
    else:
        hint = "name a class, a factory or a network"
    raise SpecError(f"{target.spec} gives {_description(value)}, not an nn.Module", hint=hint)


def _description(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(type(item).__name__ for item in value[:4])
        more = ", …" if len(value) > 4 else ""
        return f"{a_type(value)} ({inside}{more})"
    return f"the {value.__name__} class" if inspect.isclass(value) else a_type(value)


def _no_code(target: Target) -> SpecError:
    """Refusal of a SPEC that is no code: says what it is instead."""
    path = Path(target.place)
    if not path.exists():
        return SpecError(f"there is no file {path}", hint="check the path")
    match target.kind:
        case SpecKind.FOLDER:
            return SpecError(
                f"{path} is a folder that bnify wrote, not a model's code",
                hint=f'bnify.load("{path}") rebuilds its model',
            )
        case SpecKind.ONNX:
            return SpecError(
                f"{path} is an ONNX file: it can be verified, not changed or exported",
                hint="name the model's code, as in net.py:MyNetwork",
            )
        case _:
            return SpecError(
                f"{path} is a checkpoint, weights without code: {describe_checkpoint(path)}",
                hint=f"name the model's code and pass --weights {path}",
            )
