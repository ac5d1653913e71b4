"""Figures as bytes: PNG and SVG files, and SVG for a page; the same figure gives the same bytes.

matplotlib's global settings are neither used nor changed.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from bnify.report.comparison_plots import Plot
from bnify.report.comparison_style import INK, variables
from bnify.report.terminal import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Points. A phone shows it at about 1:1, so that no letter gets too small to read.
_WIDTH: Final = 336
_LINE: Final = 14.0
_LETTERS: Final = 88
_COLUMNS: Final = 3
_POINTS: Final = 72
_SETTINGS: Final[Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "bnify",
}


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def _settings() -> Iterator[None]:
    """Our settings alone, whatever the user's are; and no word on letters that a font lacks."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def _figure(plot: Plot, *, alone: bool) -> Figure:
    """The figure, drawn: from the top title, legend, axes and caption.

    Args:
        plot: What to draw.
        alone: Not in a page: on white, with the title above and the caption below.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    title = textwrap.wrap(plot.title, 46) if alone else []
    caption = textwrap.wrap(plot.caption, _LETTERS) if alone else []
    legend = _LINE * math.ceil(plot.lines / _COLUMNS) + 6 * (plot.lines > 0)
    below = 10.5 * len(caption) + 6 * alone
    height = below + plot.height + legend + _LINE * len(title) + 8 * alone
    figure = Figure(
        figsize=(_WIDTH / _POINTS, height / _POINTS), facecolor="white" if alone else "none"
    )
    axes = figure.subplots()
    axes.set_facecolor("none")
    plot.draw(axes)
    top = (below + plot.height + legend) / height
    figure.text(0.02, top + 3 / height, "\n".join(title), fontsize=11, fontweight="bold")
    figure.text(0.02, below / height, "\n".join(caption), fontsize=7, va="top", linespacing=1.25)
    if plot.lines:
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="upper left",
            bbox_to_anchor=(0.0, top),
            ncols=_COLUMNS,
            frameon=False,
            handlelength=2.6,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
    place = (0, below / height, 1, plot.height / height)
    ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.05, rect=place).execute(figure)
    # The solver's last digits are not the same in every run.
    x, y, width, tall = (round(length, 4) for length in axes.get_position().bounds)
    axes.set_position((x, y, width, tall))
    return figure


def png(plot: Plot) -> bytes:
    """The figure as a picture for a slide or a pull request: on white, with title and caption."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with _settings():
        figure = _figure(plot, alone=True)
        FigureCanvasAgg(figure)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=200, metadata={"Software": None})
    return out.getvalue()


def svg(plot: Plot) -> str:
    """The figure as an SVG file: on white, with title and caption; text stays text."""
    return _svg(plot, alone=True)


def _svg(plot: Plot, *, alone: bool) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with _settings():
        figure = _figure(plot, alone=alone)
        FigureCanvasSVG(figure)
        out = io.StringIO()
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=unsaid)
    return clean(out.getvalue())  # XML has no control characters, and a name may


_REFERENCE: Final = re.compile(r"#([\w-]+)(?=\)|$)")


def inline_svg(plot: Plot) -> str:
    """The figure for an HTML page: transparent, in the page's font and colours.

    Its ids begin with its name, so that figures of a page keep out of each other's way.
    """
    root = ElementTree.fromstring(_svg(plot, alone=False))
    svg_space, link_space = (f"{{http://www.w3.org/{place}}}" for place in _SPACES)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{svg_space}metadata", f"{svg_space}style"):
                parent.remove(child)
    used = {
        name
        for element in root.iter()
        for key, value in element.attrib.items()
        if key != "id"
        for name in _REFERENCE.findall(value)
    }
    ids = {
        old: f"{plot.name}-{place}"
        for place, old in enumerate(e.get("id", "") for e in root.iter() if e.get("id") in used)
    }
    for element in root.iter():
        element.tag = element.tag.removeprefix(svg_space)
        element.tail = None
        known = ids.get(element.attrib.pop("id", ""))
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(key.removeprefix(link_space), _in_page(value, ids))
        if known:
            element.set("id", known)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{plot.name}-title {plot.name}-desc")
    for place, (tag, text) in enumerate((("title", plot.title), ("desc", plot.alt))):
        element = ElementTree.Element(tag, id=f"{plot.name}-{tag}")
        element.text = clean(text)
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


_FONT: Final = re.compile(r"font: [\w ]*?([\d.]+px)[^;]*|font-family: [^;]*; ")
_SPACES: Final = ("2000/svg", "1999/xlink")


def _in_page(value: str, ids: dict[str, str]) -> str:
    """An attribute with the page's colours and font, and with the new ids."""
    value = _REFERENCE.sub(lambda found: f"#{ids.get(found[1], found[1])}", value)
    for colour, variable in variables().items():
        value = value.replace(colour, variable)
    return _FONT.sub(lambda found: f"font-size: {found[1]}" if found[1] else "", value)
