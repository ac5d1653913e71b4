"""``[tool.bnify]`` in pyproject.toml of the current folder: defaults below the flags.

It may set numbers and the device. Switches that lower the guard against foreign code or
downloads are the user's word on the command line, never a file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bnify.errors import UsageError

_SECURITY = frozenset(
    {"trust_global", "trust_globals", "unsafe_pickle", "allow_download", "pretrained"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the file may set; None where it does not.

    Attributes:
        k: Factor of the error budget.
        rtol: Relative tolerance where no budget can be measured.
        atol: Absolute tolerance where no budget can be measured.
        opset: ONNX opset.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
    """

    k: float | None = None
    rtol: float | None = None
    atol: float | None = None
    opset: int | None = None
    device: str | None = None


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
    table = data.get("tool", {}).get("bnify", {})
    if not isinstance(table, Mapping):
        raise UsageError("pyproject.toml: tool.bnify is no table", hint="write [tool.bnify]")
    return Config(
        **{key: _value(name, value) for name, value in table.items() if (key := _key(name))}
    )


def _key(name: str) -> str:
    key = name.replace("-", "_")
    if key in _SECURITY:
        raise UsageError(
            f"pyproject.toml: {name} cannot be set in a file", hint=f"say --{name} each time"
        )
    known = [field.name for field in fields(Config)]
    if key not in known:
        raise UsageError(
            f"pyproject.toml: tool.bnify has no {name!r}", hint="it has " + ", ".join(known)
        )
    return key


def _value(name: str, value: Any) -> Any:
    """The value, if it is of the right type."""
    wanted: tuple[type, ...] = {"device": (str,), "opset": (int,)}.get(name, (int, float))
    if not isinstance(value, wanted) or isinstance(value, bool):
        kind = "a text" if name == "device" else "an integer" if name == "opset" else "a number"
        raise UsageError(f"pyproject.toml: tool.bnify.{name} = {value!r} is not {kind}")
    if isinstance(value, (int, float)) and not value >= 0:
        raise UsageError(f"pyproject.toml: tool.bnify.{name} = {value!r} is below 0")
    return value
