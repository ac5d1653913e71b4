"""A comparison as one HTML file: it needs no other file, no script and no network."""

from __future__ import annotations

import html
from collections.abc import Iterator

from bnify.comparing.comparison import Answer, Arm, Comparison, Verdict
from bnify.report.compared import made_with, remarks, results, sweeps
from bnify.report.comparison_css import style_sheet
from bnify.report.comparison_figures import available, inline_svg
from bnify.report.comparison_plots import Plot, plots
from bnify.report.comparison_style import STYLES
from bnify.report.comparison_tables import claims_table
from bnify.report.comparison_words import (
    answer,
    better,
    headline,
    machine,
    seeds_in_words,
    trained,
    without_figures,
)
from bnify.report.document import Block, Facts, Items, Paragraph, Table
from bnify.report.terminal import clean

WITHOUT_MATPLOTLIB = "Figures need matplotlib: pip install 'bnify[compare]'."


def to_html(comparison: Comparison) -> str:
    """The page: the answer first, then claims, results, figures, and how it was measured.

    Without matplotlib a sentence stands where the figures would be. The same comparison gives the
    same text.
    """
    title = f"Which normalization helps {comparison.model}?"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>",
            f"<style>\n{style_sheet()}\n</style>",
            "</head>",
            "<body>",
            "<main>",
            *_head(comparison, title),
            *_section("The answer, norm by norm", _answers(comparison)),
            *_section("Claims", _claims(comparison)),
            *_section("Results", _blocks(results(comparison))),
            *_section("Figures", _figures(comparison)),
            *_section("How it was measured", _design(comparison)),
            *_section("What was cut, and notes", _blocks(remarks(comparison))),
            *_section("Made with", _blocks([Facts("", _environment(comparison))])),
            "</main>",
            "</body>",
            "</html>\n",
        )
    )


def _text(text: str) -> str:
    """Text whose characters mean themselves."""
    return html.escape(clean(text))


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    """A part of the page; none where there is nothing to say."""
    body = list(lines)
    if body:
        yield f"<section>\n<h2>{_text(title)}</h2>"
        yield from body
        yield "</section>"


def _head(comparison: Comparison, title: str) -> Iterator[str]:
    about = f"{comparison.data} · {seeds_in_words(comparison.seeds)} · "
    yield "<header>"
    yield '<p class="kicker">bnify compare</p>'
    yield f"<h1>{_text(title)}</h1>"
    yield f'<p class="lede">{_text(headline(comparison))}</p>'
    if comparison.partial:
        yield f'<p class="warning">{_text(comparison.partial)}</p>'
    yield f'<p class="meta">{_text(about + machine(comparison.environment))}</p>'
    yield "</header>"


def _answers(comparison: Comparison) -> Iterator[str]:
    arms = trained(comparison)
    if arms:
        yield '<ul class="verdicts">'
        for arm in arms:
            word, tone = _word(comparison, arm)
            mark = arm.norm if arm.norm in STYLES else "unknown"
            yield (
                f'<li style="--mark: var(--{mark})"><b>{_text(arm.norm)}</b>'
                f'<span class="word {tone}">{_text(word)}</span>'
                f"<span>{_text(_capital(answer(comparison, arm)))}</span></li>"
            )
        yield "</ul>"
    yield from _blocks([Items("Left out", without_figures(comparison))])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _word(comparison: Comparison, arm: Arm) -> tuple[str, str]:
    """The verdict in a word, and its tone."""
    measure = comparison.measure(arm.norm, "metric")
    if arm.norm == comparison.reference:
        return "reference", "open"
    if measure is None or measure.difference is None:
        return "not compared", "open"
    verdict = measure.difference.verdict
    if verdict is Verdict.UNDISTINGUISHED:
        return verdict.value, "open"
    return verdict.value, "good" if better(comparison, verdict) else "bad"


_TONES = {Answer.SUPPORTED: "good", Answer.CONTRADICTED: "bad"}


def _claims(comparison: Comparison) -> Iterator[str]:
    if comparison.claims:
        tones = {answer.value: _TONES.get(answer, "open") for answer in Answer}
        yield from _table(claims_table(comparison), css="claims", tones=tones)


def _figures(comparison: Comparison) -> Iterator[str]:
    drawn = plots(comparison)
    if drawn and available():
        yield '<div class="figures">'
        for plot in drawn:
            yield from _figure(plot)
        yield "</div>"
    elif drawn:
        yield f"<p>{_text(WITHOUT_MATPLOTLIB)}</p>"
    tables = sweeps(comparison)
    if tables:
        yield "<details>\n<summary>The grids as tables</summary>"
        yield from _blocks([table for _, table in tables])
        yield "</details>"


def _figure(plot: Plot) -> Iterator[str]:
    yield f'<figure id="{plot.name}">'
    yield f"<h3>{_text(plot.title)}</h3>"
    yield inline_svg(plot)
    yield f"<figcaption>{_text(plot.caption)}</figcaption>\n</figure>"


def _design(comparison: Comparison) -> Iterator[str]:
    """How the figures came about, so that a reader can judge them."""
    metric, reference = comparison.metric, comparison.reference
    good = "highest" if comparison.higher_is_better else "lowest"
    pairs = {
        "Arms": f"{reference} is the model that all others are compared with. Each kind of norm is "
        "put into the same model; nothing else of it changes.",
        "Pairs": "For one seed, all arms have the same initial weights and the same order of "
        "batches. Differences are taken within a seed, so what a seed does to all arms alike "
        "cancels. The split of the data is one for all seeds: intervals and p are about other "
        "seeds on these data, not about other data.",
        "Training": f"{comparison.steps} steps of {comparison.batch_size} samples, "
        f"{comparison.optimizer}.",
        "Learning rates": f"Each arm has its own: the one with the {good} mean {metric} on "
        "validation data, chosen with seeds of their own. As that is a choice, the results come "
        f"from test data. A second table holds all arms at the rate that is best for {reference}, "
        "which flatters norms that stand high rates.",
        "Certainty": "Intervals are 95 % t-intervals of the mean paired difference. p is from a "
        "two-sided sign-flip permutation test over the seeds, after Holm's correction over the "
        "norms of one measure in one setting, and over the claims among themselves; not over all "
        "of these together, and not for the choice of learning rates. The verdict is “higher” or "
        "“lower” where it is below 0.05. “Not distinguished” does not mean equal.",
        "Steps to the target": "A run that never gets there is kept as “later than the last step, "
        f"{comparison.steps}”, not dropped; medians take it so. The time to the target is these "
        "steps times the median time of a step, which is measured in turns with the reference; "
        "times less than 5 % apart count as equal.",
        "Diverged": f"A run whose loss is no longer finite is scored with the {metric} of the best "
        "constant answer, and counted; it has no gap.",
        "Gradient spread": "Of each layer's weights the norm of the gradient over the norm of the "
        "weights; the largest of these over the smallest, so 1 is even.",
    }
    yield from _blocks([Facts("", tuple(pairs.items()))])


def _environment(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    environment = comparison.environment or {}
    versions = environment.get("versions") or {}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    more = [("versions", named)]
    more += [(name, str(environment.get(name) or "")) for name in ("platform", "engine")]
    return (*made_with(comparison), *(pair for pair in more if pair[1]))


def _blocks(blocks: list[Block]) -> Iterator[str]:
    """Blocks of a document; an empty one is left out."""
    for block in blocks:
        match block:
            case Paragraph(text):
                yield f"<p>{_text(text)}</p>"
            case Items(title, items) if items:
                yield from _heading(title)
                yield f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"
            case Facts(title, pairs):
                yield from _heading(title)
                told = (f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs)
                yield f"<dl>{''.join(told)}</dl>"
            case Table():
                yield from _heading(block.title)
                yield from _table(block)
            case _:
                pass  # no other block is in a comparison's report


def _heading(title: str) -> Iterator[str]:
    if title:
        yield f"<h3>{_text(title)}</h3>"


def _table(table: Table, css: str = "", tones: dict[str, str] | None = None) -> Iterator[str]:
    """A table in a box of its own that scrolls; the first column names the rows."""
    label = f'tabindex="0" role="region" aria-label="{_text(table.title)}"'
    yield (
        f'<div class="scroll" {label}>\n<table class="{css}">'
        if css
        else (f'<div class="scroll" {label}>\n<table>')
    )
    numeric = [' class="n"' if column.numeric else "" for column in table.columns]
    heads = (
        f'<th scope="col"{n}>{_text(c.name)}</th>'
        for c, n in zip(table.columns, numeric, strict=True)
    )
    yield f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>"
    for first, *rest in table.rows:
        cells = [f'<th scope="row">{_text(first)}</th>']
        for cell, mark in zip(rest, numeric[1:], strict=True):
            tone = (tones or {}).get(cell)
            css_word = f' class="word {tone}"' if tone else mark
            cells.append(f"<td{css_word}>{_text(cell)}</td>")
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody>\n</table>\n</div>"
