"""The files of a comparison's report."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bnify.comparing.comparison import Comparison
from bnify.comparing.disk import put
from bnify.report.comparison_csv import to_csv
from bnify.report.comparison_figures import available, png, svg
from bnify.report.comparison_html import to_html
from bnify.report.comparison_plots import NAMES, plots
from bnify.strict_json import dumps

FIGURES: Final = "figures"


def write_report(comparison: Comparison, folder: Path) -> dict[str, str]:
    """Write the report into a folder; what an earlier one left there is replaced.

    Args:
        comparison: What to report.
        folder: It may hold other files, which stay.

    Returns:
        Name → what was written, relative to the folder: ``report.html``, ``report.json``,
        ``results.csv`` and, where there are figures and matplotlib, the folder ``figures`` with a
        PNG and an SVG of each.

    Raises:
        OutputError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "report": ("report.html", to_html(comparison)),
        "data": ("report.json", dumps(comparison.to_dict())),
        "values": ("results.csv", to_csv(comparison)),
    }
    for name, text in texts.values():
        put(folder / name, text)
    written = {key: name for key, (name, _) in texts.items()}
    if _write_figures(comparison, folder / FIGURES):
        written["figures"] = FIGURES
    return written


def _write_figures(comparison: Comparison, folder: Path) -> bool:
    """Draw the figures; those of an earlier report that have no data now are removed."""
    drawn = plots(comparison) if available() else ()
    names = {plot.name for plot in drawn}
    for stale in (name for name in NAMES if name not in names):
        for suffix in ("png", "svg"):
            (folder / f"{stale}.{suffix}").unlink(missing_ok=True)
    if drawn:
        folder.mkdir(exist_ok=True)
    for plot in drawn:
        put(folder / f"{plot.name}.png", png(plot))
        put(folder / f"{plot.name}.svg", svg(plot))
    return bool(drawn)
