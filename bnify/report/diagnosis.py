"""What ``bnify doctor`` found, for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnify.report.document import Block, Document, Facts, Items, Mark, Verdict


def doctor_document(found: Mapping[str, Any]) -> Document:
    """Plain data as a report: values by name, lists as items, ``missing`` last with its cure."""
    pairs = [
        (_words(key), _value(value))
        for key, value in found.items()
        if not isinstance(value, (Mapping, list, tuple)) or not value
        if key not in {"missing", "schema", "verb"}
    ]
    blocks: list[Block] = [Facts("Found", tuple(pairs))] if pairs else []
    for key, value in found.items():
        if key == "missing" or not value:
            continue
        if isinstance(value, Mapping):
            named = tuple((_words(str(k)), _value(v)) for k, v in value.items())
            blocks.append(Facts(_words(key).capitalize(), named))
        elif isinstance(value, (list, tuple)):
            blocks.append(Items(_words(key).capitalize(), tuple(_value(v) for v in value)))
    missing = found.get("missing") or ()
    if missing:
        items = missing.items() if isinstance(missing, Mapping) else missing
        blocks.append(Items("Missing", tuple(_missing(item) for item in items)))
        blocks.append(Verdict(Mark.UNDECIDED, f"{len(missing)} missing, see above"))
    else:
        blocks.append(Verdict(Mark.PASS, "nothing is missing"))
    return Document("bnify doctor", tuple(blocks))


def _missing(item: Any) -> str:
    """One missing thing: a sentence, a pair, or an object with ``name``/``why`` and ``hint``."""
    if isinstance(item, Mapping):
        return ": ".join(_value(value) for value in item.values() if value)
    if isinstance(item, (tuple, list)):
        return ": ".join(_value(value) for value in item if value)
    return _value(item)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(inner) for inner in value)
    return str(value)
