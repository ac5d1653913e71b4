"""Figures of a comparison: there where there is data, honest marks, the same bytes every time."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report.comparisons import normal
from report.odd_comparisons import EVERY, all_sweeps, everything_diverged, hostile, partial

from bnify.atomic import OutputError
from bnify.comparing.run_folder import RunFolder
from bnify.report.comparison_figures import inline_svg, png, svg
from bnify.report.comparison_files import write_report
from bnify.report.comparison_plots import NAMES, Plot, plots
from bnify.report.comparison_scales import plain, round_numbers
from bnify.report.comparison_style import INK, STYLES, palette

matplotlib = pytest.importorskip("matplotlib")


def named(comparison, name: str) -> Plot:
    return next(plot for plot in plots(comparison) if plot.name == name)


def drawn(plot: Plot):
    """The axes of a figure, drawn."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plot.draw(axes)
    return axes


def test_a_figure_is_there_where_there_is_data():
    assert [plot.name for plot in plots(all_sweeps())] == list(NAMES)
    assert [plot.name for plot in plots(everything_diverged())] == ["learning-rates"]
    assert plots(EVERY["nothing"]()) == ()
    swept = {"batch-sizes", "initial-scales"}
    assert {plot.name for plot in plots(normal())} == set(NAMES) - swept
    untimed = replace(normal(), target=None)
    assert "steps-to-target" not in {plot.name for plot in plots(untimed)}


@pytest.mark.parametrize("name", EVERY)
def test_every_figure_is_a_picture_in_words_and_in_svg(name):
    for plot in plots(EVERY[name]()):
        assert plot.alt
        root = ElementTree.fromstring(inline_svg(plot))
        assert root.tag == "svg"
        assert root.get("role") == "img"
        parts = {element.get("id"): element for element in root.iter() if element.get("id")}
        for part in root.get("aria-labelledby", "").split():
            assert parts[part].text
    if name in ("partial", "hostile", "nan"):
        for plot in plots(EVERY[name]()):
            ElementTree.fromstring(svg(plot))
            assert png(plot).startswith(b"\x89PNG")


def test_captions_name_seeds_device_threads_and_versions():
    for plot in plots(all_sweeps()):
        for words in ("cpu, 1 thread", "bnify 0.5.0", "torch 2.9.1"):
            assert words in plot.caption, plot.name
        assert "eeds" in plot.caption, plot.name
        assert ("8 seeds (0–7)" in plot.caption) != (plot.name == "learning-rates")
    assert "device unknown" in named(EVERY["nan"](), "learning-rates").caption


def test_the_same_comparison_gives_the_same_bytes():
    for one, other in zip(plots(all_sweeps()), plots(all_sweeps()), strict=True):
        assert inline_svg(one) == inline_svg(other)


def test_ids_are_unique_over_all_figures_and_every_reference_has_one():
    text = "".join(inline_svg(plot) for plot in plots(all_sweeps()))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:href="|url\()#([\w-]+)', text)
    assert set(referred) <= set(ids)
    assert referred


def test_inline_figures_take_the_colours_and_the_font_of_the_page():
    for plot in plots(all_sweeps()):
        text = inline_svg(plot)
        assert INK not in text
        assert "currentColor" in text
        assert "font:" not in text
        assert "DejaVu" not in text
        assert "http" not in text
        assert "<style" not in text
        assert not re.search(r"fill: #fff(fff)?\b(?!.*text)", text.split("<desc", 1)[0])


def test_a_norm_looks_the_same_in_every_figure():
    for name in ("learning-curves", "training-loss", "gradient-spread", "batch-sizes"):
        by_label = {line.get_label(): line for line in drawn(named(all_sweeps(), name)).lines}
        for norm in ("none", "batch", "batch-noaffine", "group", "layer", "instance", "rms"):
            line = by_label[norm]
            assert line.get_color() == STYLES[norm].light
            assert line.get_marker() == STYLES[norm].marker
    looks = {(style.marker, style.dashes) for style in STYLES.values()}
    assert len(looks) == len(STYLES), "a norm is told without its colour"
    assert len({style.marker for style in STYLES.values()}) == len(STYLES)
    assert "var(--batch)" in inline_svg(named(all_sweeps(), "differences"))
    for dark in (False, True):
        assert palette(dark=dark).count("--") == len(STYLES) + 1


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("norm", STYLES)
def test_colours_stand_out_on_both_grounds(norm):
    assert 1.05 / (luminance(STYLES[norm].light) + 0.05) >= 3
    dark = luminance("#131519") + 0.05
    assert (luminance(STYLES[norm].dark) + 0.05) / dark >= 3.9


def test_a_run_that_never_got_there_has_a_triangle_at_the_horizon():
    comparison = partial()
    axes = drawn(named(comparison, "steps-to-target"))
    triangles = [line for line in axes.lines if line.get_marker() == ">"]
    lost = sum(
        m.censored for m in comparison.measures if (m.name, m.setting) == ("steps", "best-lr")
    )
    assert len(triangles) == lost == 10
    assert {line.get_xdata()[0] for line in triangles} == {comparison.steps}
    assert [text.get_text() for text in axes.texts] == ["never ×4", "never ×6"]
    dots = [line for line in axes.lines if line.get_marker() in {s.marker for s in STYLES.values()}]
    assert len(dots) + lost == 6 * 6, "a mark for every run of six arms and seeds"


def test_cells_with_diverged_runs_are_hatched_and_say_how_many():
    comparison = all_sweeps()
    axes = drawn(named(comparison, "learning-rates"))
    cells = [cell for cell in comparison.grid if cell.axis == "lr"]
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert len(axes.patches) == len(cells)
    assert len(hatched) == sum(cell.diverged > 0 for cell in cells)
    texts = [text.get_text() for text in axes.texts]
    for count in (1, 2):
        said = sum(text.endswith(f"{count}/2") for text in texts)
        assert said == sum(cell.diverged == count for cell in cells)
    healthy = replace(comparison, grid=tuple(replace(c, diverged=0) for c in comparison.grid))
    assert not any(p.get_hatch() for p in drawn(named(healthy, "learning-rates")).patches)


def test_differences_are_drawn_where_they_are():
    comparison = normal()
    axes = drawn(named(comparison, "differences"))
    ends = {tuple(line.get_xdata()) for line in axes.lines}
    for measure in comparison.measures:
        if measure.name == "metric" and measure.setting == "best-lr" and measure.difference:
            assert (measure.difference.low, measure.difference.high) in ends
            assert (measure.difference.mean,) in ends
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["batch", "batch-noaffine", "group", "layer", "instance", "rms"]


def test_matplotlib_stays_as_it_was():
    matplotlib.rcParams["font.size"] = 31.0
    try:
        before = dict(matplotlib.rcParams)
        usual = png(named(normal(), "differences"))
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcdefaults()
    assert png(named(normal(), "differences")) == usual, "the user's settings made a difference"


def test_drawing_needs_no_pyplot(run_python):
    done = run_python(
        "-c",
        "import sys; sys.path.insert(0, 'tests')\n"
        "from report.comparisons import normal\n"
        "from bnify.report.comparison_plots import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from bnify.report.comparison_figures import png\n"
        "png(plots(normal())[0])\n"
        "assert 'matplotlib.pyplot' not in sys.modules",
    )
    assert done.code == 0, done.stderr


def test_long_names_and_formulas_are_only_text():
    axes = drawn(named(hostile(), "differences"))
    assert [label.get_text() for label in axes.get_yticklabels()] == ['<script>alert("…']
    assert "$a_b$" in ElementTree.fromstring(inline_svg(named(hostile(), "differences")))[1].text


@pytest.mark.parametrize(("low", "high"), [(1, 500), (0.003, 3), (7, 700), (1, 1e6), (60, 110)])
def test_ticks_are_round_few_and_inside(low, high):
    ticks = round_numbers(low, high)
    assert 1 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert all(len(plain(tick)) <= 6 for tick in ticks)


def test_plain_numbers():
    values = (0.0, 0.003, 20, 1000, 20000, 3e6, 1e9)
    assert [plain(v) for v in values] == ["0", "0.003", "20", "1000", "20 k", "3 M", "1 G"]


def test_the_files_of_a_report(tmp_path):
    written = write_report(all_sweeps(), tmp_path)
    assert written == {
        "report": "report.html",
        "data": "report.json",
        "values": "results.csv",
        "figures": "figures",
    }
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    figures = {f"figures/{name}.{kind}" for name in NAMES for kind in ("png", "svg")}
    assert there == {"report.html", "report.json", "results.csv", *figures}
    assert (tmp_path / "figures" / "differences.svg").read_text(encoding="utf-8").count("<text")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    write_report(all_sweeps(), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_what_a_killed_report_leaves_is_no_foreign_file(tmp_path, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # SIGKILL leaves no time for it
        with pytest.raises(KeyboardInterrupt):
            write_report(all_sweeps(), run)
    assert list(run.iterdir()), "it was in the middle of writing"
    with RunFolder.opened(run, {}, resume=False, force=True):
        assert [path.name for path in sorted(run.iterdir())] == ["run.json", "trials"]


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*report\.html"):
        write_report(all_sweeps(), tmp_path)


def test_figures_of_an_earlier_report_do_not_stay(tmp_path):
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "a.json").write_text("{}")
    write_report(all_sweeps(), tmp_path)
    written = write_report(EVERY["nothing"](), tmp_path)
    assert "figures" not in written
    assert not list((tmp_path / "figures").iterdir())
    assert (tmp_path / "trials" / "a.json").read_text() == "{}"


def test_without_matplotlib_the_report_is_written_all_the_same(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = write_report(all_sweeps(), tmp_path)
    assert written == {"report": "report.html", "data": "report.json", "values": "results.csv"}
    assert not (tmp_path / "figures").exists()
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Figures need matplotlib: pip install &#x27;bnify[compare]&#x27;" in text
    assert "<svg" not in text
    assert "0.874" in text, "the sweeps are there as tables"
