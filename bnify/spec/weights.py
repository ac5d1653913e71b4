"""Checkpoint → model, strictly: each tensor of the model comes from the file, and none is left.

What may differ is named by the user, and everything that was adapted is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnify.errors import WeightsError
from bnify.spec.checkpoint import read_checkpoint
from bnify.spec.choose import choose, fit, strip_prefix
from bnify.spec.usercode import first_line

STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsReport:
    """What was loaded, and how it was made to fit.

    Attributes:
        sha256: Of the file, hexadecimal.
        key: Where in the file the weights were, ``"ema.state_dict"``; None for the top.
        prefix: What was stripped from every name, ``"module."``; empty if nothing.
        missing: Tensors of the model that the file lacks, as allowed.
        unexpected: Entries of the file that the model lacks, as allowed.
        notes: What was adapted, one sentence each.
    """

    sha256: str
    key: str | None = None
    prefix: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    key: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    trust_globals: Sequence[str] = (),
    unsafe_pickle: bool = False,
    as_found: bool = False,
) -> WeightsReport:
    """Load a checkpoint into the model; on failure the model is as it was.

    Args:
        model: Changed in place.
        path: A .safetensors file, or one that ``torch.save`` wrote.
        key: Dotted key of the weights in a nested checkpoint; searched for if None.
        allow_missing: Globs of names that the file may lack. Running statistics need a glob that
            names them, such as ``"*.running_*"``: their defaults of 0 and 1 look plausible.
        allow_unexpected: Globs of names that only the file has. A tensor of another shape is
            left out if both lists allow its name.
        trust_globals: Full names of classes and functions that a pickle may use.
        unsafe_pickle: Run the pickle, whatever it does.
        as_found: Take running statistics that the file lacks, and values that are not finite, as
            they are: an audit is there to find them.

    Raises:
        WeightsError: The file cannot be read, wants more than weights, does not fit the model,
            or holds weights or running statistics that are not finite.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, trust_globals=trust_globals, unsafe_pickle=unsafe_pickle)
    wanted = model.state_dict(keep_vars=True)
    place, found = choose(checkpoint, key, wanted, path)
    prefix, state = strip_prefix(found, wanted)
    notes = [f"stripped the prefix {prefix!r} from every name"] if prefix else []

    other_shape = _other_shapes(state, wanted)
    skipped = {
        name
        for name in other_shape
        if _allowed(name, allow_missing) and _allowed(name, allow_unexpected)
    }
    state = {name: value for name, value in state.items() if name not in skipped}
    refused = [text for name, text in other_shape.items() if name not in skipped]
    if refused:
        missing, unexpected = _differences(state, wanted)
        raise _misfit(path, model, missing, unexpected, refused, state, wanted)

    before = {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in wanted.items()
        if not is_lazy(value)
    }
    try:
        missing, unexpected = _load(model, state, path)
        tied = _tied(missing, state, wanted)
        counters = [name for name in wanted if _counter(name) and name not in state]
        bad_missing = [
            name
            for name in missing
            if name not in tied
            and not _counter(name)
            and not _allowed(name, allow_missing)
            and not (as_found and _statistic(name))
        ]
        bad_unexpected = [n for n in unexpected if not _allowed(n, allow_unexpected)]
        if bad_missing or bad_unexpected:
            raise _misfit(path, model, bad_missing, bad_unexpected, [], state, wanted)
        if not as_found:
            _refuse_nonfinite(model, set(missing) - set(tied) | skipped, path)
    except WeightsError:
        model.load_state_dict(before, strict=False)
        raise

    notes += [f"{name} is tied to {other}, which the file has" for name, other in tied.items()]
    if counters:
        notes.append(f"the file has no {_COUNTER}, as before torch 0.4: {_listed(counters)}")
    notes += _dtype_notes(state, wanted)
    kept = [name for name in missing if name not in tied and not _counter(name)]
    if as_found:
        kept = [name for name in kept if not _statistic(name)]
    if kept:
        notes.append(
            f"{len(kept)} {_plural(kept, 'tensor')} of the model left at the initial values, "
            f"as allowed: {_listed(kept)}"
        )
    covered = {"allow-missing": missing, "allow-unexpected": [*unexpected, *skipped]}
    for option, globs in (("allow-missing", allow_missing), ("allow-unexpected", allow_unexpected)):
        notes += [
            f"--{option} {glob!r} matches nothing that is {option.removeprefix('allow-')}"
            for glob in globs
            if not any(_allowed(name, (glob,)) for name in covered[option])
        ]
    return WeightsReport(
        sha256=checkpoint.sha256,
        key=place or None,
        prefix=prefix,
        missing=tuple(kept),
        unexpected=tuple(unexpected) + tuple(sorted(skipped)),
        notes=tuple(notes),
    )


# -- does it fit ---------------------------------------------------------------------------------


def _load(model: nn.Module, state: dict[str, Any], path: Path) -> tuple[list[str], list[str]]:
    """Copy what fits; the model's own loading hooks (renamed layers) have their say."""
    try:
        result = model.load_state_dict(state, strict=False)
    except Exception as error:  # load hooks are user code, and torch raises RuntimeError
        raise WeightsError(
            f"{path} could not be loaded into {type(model).__name__}: {first_line(error)}"
        ) from error
    if result is None:  # an override that forgets to return it
        wanted = model.state_dict(keep_vars=True)
        return [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    return list(result.missing_keys), list(result.unexpected_keys)


def _differences(
    state: Mapping[str, Any], wanted: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    tied = _tied([name for name in wanted if name not in state], state, wanted)
    missing = [n for n in wanted if n not in state and n not in tied and not _counter(n)]
    return missing, [name for name in state if name not in wanted]


def _other_shapes(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """Names in both whose tensors cannot be copied, each with a text that shows the two."""
    found = {}
    for name, value in state.items():
        target = wanted.get(name)
        if not isinstance(value, Tensor) or not isinstance(target, Tensor) or is_lazy(target):
            continue
        if value.shape != target.shape:
            shapes = f"{list(value.shape)} in the file, {list(target.shape)} in the model"
            found[name] = f"{name} ({shapes})"
        elif value.is_complex() and not target.is_complex():
            found[name] = f"{name} (complex in the file, real in the model)"
    return found


def _tied(
    missing: Sequence[str], state: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, str]:
    """Missing names that share their tensor with one that the file has (safetensors drops one)."""
    owners = {id(value): name for name, value in wanted.items() if name in state}
    return {name: owners[id(wanted[name])] for name in missing if id(wanted.get(name)) in owners}


def _counter(name: str) -> bool:
    return name.rpartition(".")[2] == _COUNTER


def _statistic(name: str) -> bool:
    return name.rpartition(".")[2] in STATISTICS


def _allowed(name: str, globs: Sequence[str]) -> bool:
    """Whether a glob covers the name; ``"*"`` alone does not name a running statistic."""
    return any(
        fnmatchcase(name, glob) and ("running" in glob or not _statistic(name)) for glob in globs
    )


def _refuse_nonfinite(model: nn.Module, exempt: set[str], path: Path) -> None:
    """NaN and infinity in parameters and running statistics; other buffers may be -inf masks."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: b for name, b in model.named_buffers() if _statistic(name)}
    bad = []
    for name, tensor in (parameters | buffers).items():
        if name in exempt or is_lazy(tensor):
            continue
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # float8 has no isfinite of its own.
        values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        count = int((~torch.isfinite(values)).sum())
        if count:
            bad.append(f"{name} ({count} of {tensor.numel()})")
    if bad:
        raise WeightsError(
            f"{path}: {len(bad)} {_plural(bad, 'tensor')} with values that are not finite: "
            f"{_listed(bad)}",
            hint="the training that wrote it diverged, or a value overflows the model's dtype: "
            "take an earlier checkpoint",
        )


def _dtype_notes(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    changes: dict[tuple[str, str], list[str]] = {}
    for name, value in state.items():
        target = wanted.get(name)
        if isinstance(value, Tensor) and isinstance(target, Tensor) and value.dtype != target.dtype:
            pair = (str(value.dtype), str(target.dtype))
            changes.setdefault(pair, []).append(name)
    return [
        f"{len(names)} {_plural(names, 'tensor')} copied from {old.removeprefix('torch.')} to "
        f"{new.removeprefix('torch.')}: {_listed(names)}"
        for (old, new), names in changes.items()
    ]


# -- words ---------------------------------------------------------------------------------------


def _misfit(
    path: Path,
    model: nn.Module,
    missing: Sequence[str],
    unexpected: Sequence[str],
    shapes: Sequence[str],
    state: Mapping[str, Any],
    wanted: Mapping[str, Any],
) -> WeightsError:
    what = f"{path} does not fit {type(model).__name__}"
    if state and wanted and not fit(state, wanted) and not shapes:
        return WeightsError(
            f"{what}: no name in common; the file has {_listed(list(state), 3)}, "
            f"the model has {_listed(list(wanted), 3)}",
            hint="check the SPEC and its --arg, and --weights-key",
        )
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_listed(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_listed(unexpected)})")
    if shapes:
        parts.append(f"{len(shapes)} of another shape ({_listed(shapes)})")
    statistics = [name for name in missing if _statistic(name)]
    if statistics and len(statistics) == len(missing) and not unexpected and not shapes:
        hint = (
            "a norm without its running statistics computes plausible nonsense; find a checkpoint "
            "that has them, or name them: --allow-missing '*.running_*'"
        )
    elif shapes:
        hint = "check the SPEC's --arg; --allow-missing and --allow-unexpected together skip a name"
    else:
        hint = "--allow-missing GLOB and --allow-unexpected GLOB name what may differ"
    return WeightsError(f"{what}: {', '.join(parts)}", hint=hint)


def _listed(names: Sequence[str], shown: int = _SHOWN) -> str:
    more = f", … {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _plural(items: Sequence[Any], word: str) -> str:
    return word if len(items) == 1 else f"{word}s"
