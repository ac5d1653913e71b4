"""``[tool.bnify]`` in pyproject.toml of the current folder: defaults below the flags.

It may set numbers, the device, and which rules an audit has. Switches that lower the guard against
foreign code or downloads are the user's word on the command line, never a file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bnify.errors import UsageError

_SECURITY = frozenset(
    {"trust_global", "trust_globals", "unsafe_pickle", "allow_download", "pretrained"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """What ``[tool.bnify.audit]`` may set; None where it does not.

    Attributes:
        select: Codes, prefixes or names of the rules to run.
        ignore: Rules not to run.
        extend_select: Rules to run as well.
        fail_on: ``error``, ``warning`` or ``info``.
        baseline: File of known findings, relative to the folder.
        per_module_ignores: Glob of module paths → rules to ignore there.
    """

    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    extend_select: tuple[str, ...] | None = None
    fail_on: str | None = None
    baseline: str | None = None
    per_module_ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the file may set; None where it does not.

    Attributes:
        k: Factor of the error budget.
        rtol: Relative tolerance where no budget can be measured.
        atol: Absolute tolerance where no budget can be measured.
        opset: ONNX opset.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        audit: The table ``[tool.bnify.audit]``.
    """

    k: float | None = None
    rtol: float | None = None
    atol: float | None = None
    opset: int | None = None
    device: str | None = None
    audit: AuditConfig = field(default_factory=AuditConfig)


def read_config(folder: Path) -> Config:
    """The configuration in the folder's pyproject.toml; an empty one where there is none.

    Raises:
        UsageError: The file cannot be read, or sets something it cannot.
    """
    import tomllib

    path = folder / "pyproject.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Config()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path.name} cannot be read: {error}", hint="repair the file") from error
    values: dict[str, Any] = {}
    for name, value in _table(data.get("tool", {}).get("bnify", {}), "tool.bnify").items():
        key = _key(name, Config, "tool.bnify")
        values[key] = _audit(value) if key == "audit" else _value(key, name, value)
    return Config(**values)


def _table(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"pyproject.toml: {name} is no table", hint=f"write [{name}]")
    return value


def _key(name: str, table: type[Config | AuditConfig], where: str) -> str:
    key = name.replace("-", "_")
    if key in _SECURITY:
        raise UsageError(
            f"pyproject.toml: {name} cannot be set in a file", hint=f"say --{name} each time"
        )
    known = [field.name.replace("_", "-") for field in fields(table)]
    if key.replace("_", "-") not in known:
        raise UsageError(
            f"pyproject.toml: {where} has no {name!r}", hint="it has " + ", ".join(known)
        )
    return key


def _value(key: str, name: str, value: Any) -> Any:
    """The value, if it is of the right type."""
    wanted: tuple[type, ...] = {"device": (str,), "opset": (int,)}.get(key, (int, float))
    if not isinstance(value, wanted) or isinstance(value, bool):
        kind = "a text" if key == "device" else "an integer" if key == "opset" else "a number"
        raise UsageError(f"pyproject.toml: tool.bnify.{name} = {value!r} is not {kind}")
    if isinstance(value, (int, float)) and not value >= 0:
        raise UsageError(f"pyproject.toml: tool.bnify.{name} = {value!r} is below 0")
    return value


def _audit(table: Any) -> AuditConfig:
    values: dict[str, Any] = {}
    where = "tool.bnify.audit"
    for name, value in _table(table, where).items():
        key = _key(name, AuditConfig, where)
        if key == "per_module_ignores":
            ignores = _table(value, f"{where}.{name}")
            values[key] = {g: _words(c, f"{where}.{name}.{g!r}") for g, c in ignores.items()}
        elif key in ("fail_on", "baseline"):
            if not isinstance(value, str):
                raise UsageError(f"pyproject.toml: {where}.{name} = {value!r} is not a text")
            values[key] = value
        else:
            values[key] = _words(value, f"{where}.{name}")
    if values.get("fail_on") not in (None, "error", "warning", "info"):
        raise UsageError(
            f"pyproject.toml: {where}.fail-on = {values['fail_on']!r} is no severity",
            hint="error, warning or info",
        )
    return AuditConfig(**values)


def _words(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise UsageError(
            f"pyproject.toml: {name} = {value!r} is not a list of texts", hint='["BN2", "BN301"]'
        )
    return tuple(value)
