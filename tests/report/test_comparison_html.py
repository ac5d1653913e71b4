"""A comparison's page: whole, closed, escaped, and fit to be read by a person in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.comparisons import normal
from report.odd_comparisons import EVERY, all_sweeps, hostile, partial

from bnify.report.comparison_html import to_html
from bnify.report.comparison_plots import plots

VOID = frozenset({"meta", "br", "hr", "link", "img", "input"})
#: Anything by which a page could reach outside itself, or run.
OUTSIDE = re.compile(
    r"http|//|url\((?!#)|@import|<script|\ssrc\s*=|\son\w+\s*=|<link|<base|<iframe"
)


class Page(HTMLParser):
    """The tags and the text of a page; unbalanced tags fail."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: to_html(make()) for name, make in EVERY.items()}


@pytest.mark.parametrize("name", EVERY)
def test_pages_are_whole_and_have_their_figures(pages, name):
    page = Page(pages[name])
    assert len(page.of("h1")) == 1
    assert len(page.of("title")) >= 1
    expected = {plot.name for plot in plots(EVERY[name]())}
    assert {attrs.get("id") for attrs in page.of("figure")} == expected
    assert len(page.of("svg")) == len(page.of("figcaption")) == len(expected)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", EVERY)
def test_pages_reach_nothing_outside_themselves_and_run_nothing(pages, name):
    found = OUTSIDE.search(pages[name])
    assert found is None, pages[name][found.start() - 60 : found.end() + 60]


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="x.png">',
        "@import 'x'",
        "<script>",
        'href="http:a"',
        "url(a)",
        "<a onclick=a>",
        "//a",
    ],
)
def test_the_check_for_the_outside_finds_it(planted):
    assert OUTSIDE.search(planted)


def test_names_mean_themselves(pages):
    bad = '<script>alert("x")</script> | $a_b$ &'
    page = Page(pages["hostile"])
    assert page.text.count(bad) > 10
    assert "\x1b" not in pages["hostile"]
    assert "\u202e" not in pages["hostile"]
    assert not page.of("script")


def test_the_same_comparison_gives_the_same_bytes(pages):
    assert to_html(all_sweeps()) == pages["all sweeps"]


def test_the_answer_comes_first_then_claims_results_figures_and_how(pages):
    heads = re.findall(r"<h2>(.*?)</h2>", pages["partial"])
    assert heads == [
        "The answer, norm by norm",
        "Claims",
        "Results",
        "Figures",
        "How it was measured",
        "What was cut, and notes",
        "Made with",
    ]
    text = Page(pages["partial"]).text
    for words in (
        "Interrupted after 71 of 96 runs",
        "instance: a layer has 1 value a channel",
        "It never reached 0.897 within 500 steps",
        "4 of 6 never got there",
        "No sweep over batch sizes.",
        "Holm",
        "sign-flip",
        "torch 2.9.1",
        "linux x86_64",
    ):
        assert words in text


def test_tables_name_their_rows_and_columns(pages):
    page = Page(pages["all sweeps"])
    heads = page.of("th")
    assert {attrs.get("scope") for attrs in heads} == {"row", "col"}
    rows = sum(attrs["scope"] == "row" for attrs in heads)
    assert rows == len(page.of("tr")) - len(page.of("thead"))
    assert page.of("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.of("meta"))
    assert all(svg["role"] == "img" for svg in page.of("svg"))


def test_text_of_the_page_is_14_pixels_or_more(pages):
    style = pages["normal"].split("<style>")[1].split("</style>")[0]
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:clamp\()?([\d.]+)px", style)]
    assert min(sizes) >= 14
    assert "prefers-color-scheme: dark" in style


def test_a_verdict_is_a_word_and_not_only_a_colour(pages):
    words = re.findall(r'<span class="word (\w+)">(.*?)</span>', pages["normal"])
    assert words == [
        ("open", "reference"),
        *[("good", "higher")] * 4,
        ("bad", "lower"),
        ("open", "not distinguished"),
    ]
    losses = re.findall(r'<span class="word (\w+)">(.*?)</span>', pages["regression"])
    assert losses[1] == ("good", "lower")


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture
def look(tmp_path):
    """Run Chromium on a page with no way to the network: ``look(page, "--dump-dom")``."""

    def run(page: Path, *options: str, dark: bool = False) -> str:
        done = subprocess.run(
            [
                str(CHROMIUM),
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--allow-file-access-from-files",
                "--proxy-server=127.0.0.1:9",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                *options,
                page.as_uri(),
            ],
            capture_output=True,
            timeout=120,
            check=True,
            encoding="utf-8",
        )
        return done.stdout

    return run


@browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_page(look, tmp_path, width, dark):
    image = pytest.importorskip("PIL.Image")
    page = tmp_path / "report.html"
    page.write_text(to_html(normal()), encoding="utf-8")
    shot = tmp_path / "shot.png"
    look(page, f"--window-size={width},3000", f"--screenshot={shot}", dark=dark)
    grey = image.open(shot).convert("L")
    ground = grey.getpixel((2, 2))
    assert ground < 40 if dark else ground > 240
    counts = grey.histogram()
    assert grey.width == width
    assert counts[ground] < 0.98 * grey.width * grey.height, "nothing is on the page"
    ink = sum(counts[160:]) if dark else sum(counts[:100])
    assert ink > 0.01 * grey.width * grey.height, "no text stands out from the ground"


@pytest.fixture
def widths(look, tmp_path):
    """Widest of a page and of its figures in a frame of 360 px, and how many texts these have.

    A frame, because a browser's own window does not get so narrow.
    """

    def measure(text: str) -> tuple[float, float, int]:
        (tmp_path / "report.html").write_text(text, encoding="utf-8")
        frame = tmp_path / "frame.html"
        frame.write_text(
            '<iframe id="f" src="report.html" style="width:360px;height:900px;border:0"></iframe>'
            "<p id=w></p><script>onload = () => { const d = f.contentDocument;"
            "w.textContent = [d.documentElement.scrollWidth,"
            "Math.max(...[...d.querySelectorAll('svg')].map(s => s.getBoundingClientRect().right)),"
            "d.querySelectorAll('svg text').length].join(' ') }</script>",
            encoding="utf-8",
        )
        found = re.search(r'<p id="w">([\d.]+) ([\d.]+) (\d+)</p>', look(frame, "--dump-dom"))
        assert found is not None
        return float(found[1]), float(found[2]), int(found[3])

    return measure


@browser
@pytest.mark.parametrize("make", [all_sweeps, partial, hostile])
def test_a_page_is_never_wider_than_the_phone(widths, make):
    page, figures, texts = widths(to_html(make()))
    assert page <= 360
    assert figures <= 360, "a figure sticks out"
    assert texts > 50, "the figures have their text"


@browser
def test_claims_use_the_width_of_a_phone(look, tmp_path):
    (tmp_path / "report.html").write_text(to_html(normal()), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<iframe id="f" src="report.html" style="width:400px;height:900px;border:0"></iframe>'
        "<p id=w></p><script>onload = () => { w.textContent = Math.min(..."
        "[...f.contentDocument.querySelectorAll('.claims td:last-child')]"
        ".map(cell => cell.getBoundingClientRect().width)) }</script>",
        encoding="utf-8",
    )
    found = re.search(r'<p id="w">([\d.]+)</p>', look(frame, "--dump-dom"))
    assert found is not None
    assert float(found[1]) > 340, "half of the screen stays empty"


@browser
def test_a_page_that_is_too_wide_is_found(widths):
    planted = to_html(normal()).replace("<header>", '<header style="width: 500px">')
    assert widths(planted)[0] > 360


@pytest.fixture
def overlaps(look, tmp_path):
    """Texts of one figure whose boxes, in the browser's own font, lie over each other."""

    def measure(text: str, width: int) -> str:
        script = (
            "<p id=w></p><script>onload = () => { const out = [];"
            "for (const s of document.querySelectorAll('figure svg')) {"
            "const b = [...s.querySelectorAll('text')]"
            ".map(t => [t.textContent, t.getBoundingClientRect()]);"
            "for (let i = 0; i < b.length; i++) for (let j = 0; j < i; j++) {"
            "const [p, q] = [b[i][1], b[j][1]];"
            "const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);"
            "const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);"
            "if (x > 1 && y > 4) out.push(b[i][0] + ' over ' + b[j][0]) } }"
            "w.textContent = 'overlaps: ' + out.join('; ') }</script></body>"
        )
        page = tmp_path / "report.html"
        page.write_text(text.replace("</body>", script), encoding="utf-8")
        dom = look(page, "--dump-dom", f"--window-size={width},900")
        found = re.search(r'<p id="w">overlaps: (.*?)</p>', dom)
        assert found is not None
        return found[1]

    return measure


@browser
@pytest.mark.parametrize("width", [500, 1280])
def test_labels_of_a_figure_do_not_overlap(overlaps, width):
    assert overlaps(to_html(all_sweeps()), width) == ""


@browser
def test_labels_that_overlap_are_found(overlaps):
    planted = '<text x="50" y="50">one</text><text x="55" y="52">two</text></svg>'
    assert "two over one" in overlaps(to_html(normal()).replace("</svg>", planted, 1), 1280)
