"""How a norm looks in every figure: fixed by its name, so that figures agree with each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

#: Text and axes, and the lines of a grid. A page replaces both, see :func:`variables`.
INK: Final = "#23272e"
RULE: Final = "#d6dae0"


@dataclass(frozen=True, slots=True, kw_only=True)
class NormStyle:
    """Colour, marker and line of a norm; the marker and the line tell it without the colour.

    Attributes:
        light: Colour on a white ground, contrast 3:1 or more.
        dark: Colour on a black ground.
        marker: In matplotlib's letters.
        dashes: Lengths of ink and gap, in line widths; empty for a solid line.
    """

    light: str
    dark: str
    marker: str
    dashes: tuple[float, ...] = ()


#: Chosen so that colours differ in lightness too: at least 30 apart in CIELAB for normal sight,
#: protanopia and deuteranopia by the matrices of Machado et al. (2009), 22 for tritanopia.
STYLES: Final[Mapping[str, NormStyle]] = {
    "none": NormStyle(light=INK, dark="#e6e8eb", marker="o"),
    "as-is": NormStyle(light="#5d6b6d", dark="#95afa8", marker="h", dashes=(6, 1.5)),
    "batch": NormStyle(light="#002e95", dark="#3f76ff", marker="s"),
    "batch-noaffine": NormStyle(light="#1e7fff", dark="#20c3ff", marker="D", dashes=(4, 1.5)),
    "sync": NormStyle(light="#4534d8", dark="#8373da", marker="p", dashes=(2, 1)),
    "group": NormStyle(light="#da7c06", dark="#f1b35b", marker="^", dashes=(5, 1.5, 1, 1.5)),
    "layer": NormStyle(light="#00a769", dark="#108850", marker="v", dashes=(1.2, 1.2)),
    "instance": NormStyle(light="#b85d9d", dark="#d8309f", marker="P", dashes=(7, 2)),
    "rms": NormStyle(light="#4d3100", dark="#fce100", marker="X", dashes=(3, 1, 1, 1, 1, 1)),
}
_UNKNOWN: Final = NormStyle(light="#777777", dark="#999999", marker="*", dashes=(1, 2))


def style_of(norm: str) -> NormStyle:
    """The norm's style; a grey star for a name that is none of ours."""
    return STYLES.get(norm, _UNKNOWN)


def variables() -> dict[str, str]:
    """Colours of a figure → what stands for them in a page, which knows its ground."""
    named = {style.light: f"var(--{norm})" for norm, style in STYLES.items()}
    return {**named, _UNKNOWN.light: "var(--unknown)", RULE: "var(--rule)", INK: "currentColor"}


def palette(*, dark: bool) -> str:
    """CSS declarations of the norms' colours for one ground."""
    named = {**STYLES, "unknown": _UNKNOWN}
    colours = {norm: style.dark if dark else style.light for norm, style in named.items()}
    return " ".join(f"--{norm}: {colour};" for norm, colour in colours.items())
