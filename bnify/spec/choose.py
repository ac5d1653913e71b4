"""Which part of a checkpoint are the weights, and what its names have in front of the model's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnify.errors import WeightsError
from bnify.spec.checkpoint import Checkpoint, find_state_dicts
from bnify.spec.formats import printable
from bnify.spec.usercode import a_type


def state_dicts(
    checkpoint: Checkpoint, key: str | None, path: Path
) -> dict[str, Mapping[str, Any]]:
    """The state dicts in the file, or under a dotted key, by their dotted keys from there.

    Raises:
        WeightsError: There is none.
    """
    tree = checkpoint.content if key is None else _descend(checkpoint.content, key, path)
    found = find_state_dicts(tree)
    if not found:
        where = f" under {key!r}" if key else ""
        raise WeightsError(
            f"{path} holds no weights{where}: {_contents(tree)}", hint=_key_hint(checkpoint, key)
        )
    return found


def choose(
    checkpoint: Checkpoint, key: str | None, wanted: Mapping[str, Any], path: Path
) -> tuple[str, Mapping[str, Any]]:
    """The state dict in the file with its dotted key: by key, or as the only one that fits.

    Raises:
        WeightsError: There is none, or there are several.
    """
    found = state_dicts(checkpoint, key, path)
    # A generator and its discriminator in one file: only one has names that the model knows.
    fitting = {
        at: state for at, state in found.items() if fit(strip_prefix(state, wanted)[1], wanted)
    }
    candidates = fitting or found
    if len(candidates) > 1:
        names = [f"{key}.{name}" if key else name for name in candidates]
        raise WeightsError(
            f"{path} holds several sets of weights: {', '.join(names)}",
            hint=f"choose one, as in --weights-key {names[0]}",
        )
    at, state = next(iter(candidates.items()))
    return ".".join(part for part in (key or "", at) if part), state


def _descend(tree: Any, key: str, path: Path) -> Any:
    """What lies under a dotted key; the parts may themselves have dots."""
    content, rest = tree, key
    while rest:
        node = dict(enumerate(tree)) if isinstance(tree, (list, tuple)) else tree
        entries = {str(k): v for k, v in node.items()} if isinstance(node, Mapping) else {}
        matching = [k for k in entries if rest == k or rest.startswith(f"{k}.")]
        if not matching:
            names = ", ".join(printable(name) for name in list(entries)[:10]) or _contents(tree)
            found = find_state_dicts(content)
            raise WeightsError(
                f"{path} has nothing under {key!r}: there is {names}",
                hint=_keys(found) or "leave --weights-key out",
            )
        part = max(matching, key=len)
        tree, rest = entries[part], rest[len(part) + 1 :]
    return tree


def _keys(places: Mapping[str, Any]) -> str:
    """The keys that there are, as an option."""
    keys = [printable(key) for key in places if key]
    return f"--weights-key {'one of ' * (len(keys) > 1)}{', '.join(keys[:5])}" if keys else ""


def _contents(tree: Any) -> str:
    if isinstance(tree, Mapping):
        entries = [
            f"{printable(str(name))} ({type(value).__name__})"
            for name, value in list(tree.items())[:10]
        ]
        return f"a dict of {', '.join(entries)}" if entries else "an empty dict"
    return a_type(tree)


def _key_hint(checkpoint: Checkpoint, key: str | None) -> str:
    found = list(find_state_dicts(checkpoint.content)) if key else []
    return _keys(dict.fromkeys(found)) or "save model.state_dict()"


def strip_prefix(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Drop a prefix common to all names (``module.``, ``_orig_mod.``) if more names fit then."""
    best_prefix, best, best_fit = "", dict(state), fit(state, wanted)
    prefix, names = "", list(state)
    while names:
        first = names[0].partition(".")[0] + "."
        if not all(name.startswith(first) and len(name) > len(first) for name in names):
            break
        prefix, names = prefix + first, [name[len(first) :] for name in names]
        stripped = dict(zip(names, state.values(), strict=True))
        if (fits := fit(stripped, wanted)) > best_fit:
            best_prefix, best, best_fit = prefix, stripped, fits
    return best_prefix, best


def fit(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    """How many names of the file the model knows."""
    return sum(name in wanted for name in state)
