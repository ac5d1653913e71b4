"""A plan is plain data: edits, skips with their reasons, and the model they were made for.

Nothing here imports torch. Names are module paths and tensor names, never fx nodes, so a plan
prints, diffs, survives JSON and can be edited by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Self, TypeVar

from bnify.errors import PlanError
from bnify.reason import Reason

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change of the model.

    Attributes:
        layer: Module path of the Linear or Conv (of the norm, in a fold).
        kind: ``"insert-after"``.
        norm: Kind of norm, resolved (never ``"auto"``).
        channels: Length of the channel axis.
        axis: Channel axis of the normalized value.
        into: The layers that absorb a folded norm; empty in an insertion.
        detail: What a reader should know about this edit.
        at: Module path of the activation that carries the norm with ``after-act``; else empty.
        layer_type: Class name of the layer.
        dims: Number of dimensions of the normalized value.
        calls: Number of norms, one per call of the layer (``per_call``), else 1.
        scope: With several calls, path of the innermost module around them that runs once.
        groups: Number of groups of a group norm.
        eps: None for the norm's own default.
        momentum: None for the norm's own default.
        drop_bias: The layer's bias is folded into the running mean.
        zero_gamma: The scale starts at 0.
        init: How it starts: ``"reset"``, ``"preserve"`` or ``"stats"``.
    """

    layer: str
    kind: str = "insert-after"
    norm: str = "batch"
    channels: int = 0
    axis: int = 1
    into: tuple[str, ...] = ()
    detail: str = ""
    at: str = ""
    layer_type: str = ""
    dims: int = 2
    calls: int = 1
    scope: str = ""
    groups: int | None = None
    eps: float | None = None
    momentum: float | None = None
    drop_bias: bool = False
    zero_gamma: bool = False
    init: str = "reset"

    @property
    def carrier(self) -> str:
        """Module path that carries the norm."""
        return self.at or self.layer

    @property
    def tokens(self) -> bool:
        """Whether the channel axis is the last of more than two (a Linear on tokens)."""
        return self.dims > 2 and self.axis == self.dims - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """A layer that was looked at and left alone."""

    layer: str
    reason: Reason
    detail: str = ""
    layer_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One tensor of the example inputs, enough to draw another like it.

    ``low`` and ``high`` are the smallest and largest value seen in an integer tensor. ``value``
    is the one value that all elements of a mask (bool or constant integer tensor) have.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: int | None = None
    high: int | None = None
    value: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The model a plan was made for: its class and tensor names, shapes and dtypes, no values."""

    model: str
    tensors: tuple[tuple[str, tuple[int, ...], str], ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over class and tensors, hexadecimal."""
        text = json.dumps([self.model, self.tensors], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def difference(self, other: Self) -> str | None:
        """The first difference between this (planned for) and ``other`` (found), or None."""
        if self.model != other.model:
            return f"the plan is for a {self.model}, this is a {other.model}"
        found = {name: (shape, dtype) for name, shape, dtype in other.tensors}
        for name, shape, dtype in self.tensors:
            if name not in found:
                return f"the plan knows a tensor {name!r} {list(shape)} that this model lacks"
            if found[name] != (shape, dtype):
                has_shape, has_dtype = found[name]
                return (
                    f"{name} is {list(shape)} {dtype} in the plan, "
                    f"{list(has_shape)} {has_dtype} in this model"
                )
        known = {name for name, _, _ in self.tensors}
        for name, shape, _ in other.tensors:
            if name not in known:
                return f"this model has a tensor {name!r} {list(shape)} that the plan does not know"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be done to a model, and for every other layer why nothing is.

    Attributes:
        verb: ``"insert"``.
        edits: What changes, in execution order.
        skips: What stays, with reasons, in execution order.
        fingerprint: The model this plan is for.
        call: Structure of the example inputs: ``{"args": [...], "kwargs": {...}}`` in which
            ``{"$": i}`` stands for ``inputs[i]``.
        inputs: The tensors of the example inputs.
        options: The options the plan was made with, as given.
        notes: Warnings and remarks of the planner.
    """

    verb: str = "insert"
    edits: tuple[Edit, ...] = ()
    skips: tuple[Skip, ...] = ()
    fingerprint: Fingerprint
    call: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[InputSpec, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data; :meth:`from_dict` reads it back."""
        return {
            "schema": SCHEMA,
            "verb": self.verb,
            "edits": [_as_dict(edit) for edit in self.edits],
            "skips": [_as_dict(skip) for skip in self.skips],
            "fingerprint": {
                "model": self.fingerprint.model,
                "digest": self.fingerprint.digest,
                "tensors": {n: [list(s), d] for n, s, d in self.fingerprint.tensors},
            },
            "call": dict(self.call),
            "inputs": [_as_dict(spec) for spec in self.inputs],
            "options": dict(self.options),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The plan as indented JSON, made to be read and edited by hand."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read what :meth:`to_dict` wrote.

        Raises:
            PlanError: A key is missing, unknown or of the wrong type; the message names it.
        """
        if not isinstance(data, dict) or not isinstance(data.get("fingerprint"), dict):
            raise PlanError("this is no plan: no object with a 'fingerprint'", hint=_PLAN_HINT)
        if data.get("schema") != SCHEMA:
            raise PlanError(
                f"the plan has schema {data.get('schema')!r}, this bnify reads {SCHEMA}",
                hint="make the plan again with this version",
            )
        made_for = data["fingerprint"]
        try:
            fingerprint = Fingerprint(
                model=made_for["model"],
                tensors=tuple((n, tuple(s), d) for n, (s, d) in made_for["tensors"].items()),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f"the plan's fingerprint cannot be read: {error!r}", hint=_PLAN_HINT
            ) from None
        if made_for.get("digest", fingerprint.digest) != fingerprint.digest:
            raise PlanError(
                "the plan's fingerprint does not match its own digest: it was edited",
                hint="edit 'edits' and 'skips' only, and leave 'fingerprint' as it was written",
            )
        return cls(
            verb=data.get("verb", "insert"),
            edits=tuple(_read(Edit, item, "edits", i) for i, item in _entries(data, "edits")),
            skips=tuple(_read(Skip, item, "skips", i) for i, item in _entries(data, "skips")),
            fingerprint=fingerprint,
            call=data.get("call", {}),
            inputs=tuple(
                _read(InputSpec, item, "inputs", i) for i, item in _entries(data, "inputs")
            ),
            options=data.get("options", {}),
            notes=tuple(data.get("notes", ())),
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote, or what a person made of it.

        Raises:
            PlanError: The text is not JSON, or not a plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is not JSON: {error}", hint=_PLAN_HINT) from None
        return cls.from_dict(data)

    def with_notes(self, *notes: str) -> Self:
        """The same plan with more notes."""
        return replace(self, notes=(*self.notes, *notes))


_PLAN_HINT = "write one with: bnify insert SPEC --dry-run --format json > plan.json"

_Record = TypeVar("_Record", Edit, Skip, InputSpec)


def _as_dict(record: Edit | Skip | InputSpec) -> dict[str, Any]:
    """The fields that carry information: required ones, and those that differ from the default."""
    data = {}
    for f in fields(record):
        value = getattr(record, f.name)
        if f.name in _ALWAYS or f.default is MISSING or value != f.default:
            data[f.name] = list(value) if isinstance(value, tuple) else value
    return data


_ALWAYS = frozenset({"layer", "kind", "norm", "channels", "axis", "into", "detail", "reason"})


def _entries(data: Mapping[str, Any], key: str) -> list[tuple[int, Any]]:
    """The numbered entries of one list of the plan."""
    entries = data.get(key)
    if not isinstance(entries, list):
        raise PlanError(f"the plan lacks a list {key!r}", hint=_PLAN_HINT)
    return list(enumerate(entries))


def _read(kind: type[_Record], item: Any, where: str, index: int) -> _Record:
    """One record of a plan, or an error that names the entry and the key."""
    place = f"{where}[{index}]"
    if not isinstance(item, dict):
        raise PlanError(f"{place} of the plan is no object: {item!r}", hint=_PLAN_HINT)
    known = {f.name: f for f in fields(kind)}
    for name in item:
        if name not in known:
            raise PlanError(f"{place} of the plan has an unknown key {name!r}", hint=_PLAN_HINT)
    for name, f in known.items():
        if name not in item and f.default is MISSING:
            raise PlanError(f"{place} of the plan lacks {name!r}", hint=_PLAN_HINT)
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in item.items()}
    if kind is Skip:
        try:
            values["reason"] = Reason(values["reason"])
        except ValueError:
            raise PlanError(
                f"{place} of the plan has an unknown reason {values['reason']!r}",
                hint="one of: " + ", ".join(Reason),
            ) from None
    for name, value in values.items():
        wanted = _TYPES.get(name)
        if wanted and not isinstance(value, wanted):
            raise PlanError(
                f"{place}.{name} of the plan is {value!r}, not {wanted[0].__name__}",
                hint=_PLAN_HINT,
            )
    return kind(**values)


_TYPES: Mapping[str, tuple[type, ...]] = {
    "layer": (str,),
    "kind": (str,),
    "norm": (str,),
    "channels": (int,),
    "axis": (int,),
    "dims": (int,),
    "calls": (int,),
    "at": (str,),
    "scope": (str,),
    "name": (str,),
    "shape": (tuple,),
    "drop_bias": (bool,),
    "zero_gamma": (bool,),
    "init": (str,),
    "detail": (str,),
    "layer_type": (str,),
    "into": (tuple,),
    "dtype": (str,),
    "groups": (int, type(None)),
    "eps": (float, int, type(None)),
    "momentum": (float, int, type(None)),
}
