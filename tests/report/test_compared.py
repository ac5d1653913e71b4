"""A comparison as text: what it says at a glance, at any width, with any numbers; and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.comparisons import NORMS, normal, two_seeds_missing
from report.odd_comparisons import EVERY, all_sweeps, broken, hostile, partial, regression

from bnify.comparing.comparison import Verdict
from bnify.report import render
from bnify.report.comparison_csv import HEADER, to_csv
from bnify.report.comparison_tables import fit_table, metric_table
from bnify.report.comparison_words import (
    chance,
    duration,
    headline,
    interval,
    listed,
    number,
    places,
    seeds_in_words,
    signed,
    times,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def golden(request):
    """Compare with a golden file, or write it: pytest --overwrite-golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--overwrite-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text

    return check


def test_golden(golden):
    files = {"report": "out/report.html", "values": "out/results.csv"}
    golden("compare_80.txt", render(all_sweeps(), "rich", width=80, files=files))
    golden("compare_partial_80.txt", render(partial(), "rich", width=80))
    golden("compare.md", render(regression(), "md"))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(name, width):
    text = render(EVERY[name](), "rich", width=width)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("name", ["normal", "partial", "all sweeps", "regression"])
def test_tables_stay_tables_in_80_columns(name):
    for line in render(EVERY[name](), "rich", width=80).splitlines():
        assert not line.startswith("  Norm: "), "a table was too wide and became paragraphs"


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("fmt", ["rich", "md", "json"])
def test_every_format_takes_every_comparison(name, fmt):
    text = render(EVERY[name](), fmt)
    assert not {"\x1b", "\x07", "\u202e"} & set(text) or fmt == "json"
    text.encode()


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"hostile"}))
def test_our_own_words_are_in_western_encodings(name):
    assert render(EVERY[name](), "rich", encoding="latin-1").encode("latin-1")


def test_json_is_strict_and_complete():
    def no_constants(text: str) -> float:
        raise AssertionError(f"{text} is no JSON")

    made = {"device": "cuda:0"}
    text = render(broken(math.inf), "json", files={"report": "r.html"}, environment=made)
    data = json.loads(text, parse_constant=no_constants)
    assert (data["schema"], data["verb"]) == (1, "compare")
    assert data["files"] == {"report": "r.html"}
    assert data["environment"] == made
    assert data["measures"][0]["center"] == "inf"
    usual = json.loads(render(normal(), "json"))
    assert usual["environment"]["threads"] == 1
    assert len(usual["measures"]) == len(normal().measures)


def test_the_headline_follows_the_verdicts():
    made = normal()
    assert headline(made).startswith("Each at its own best learning rate, batch, batch-noaffine")
    assert "instance reaches a lower test accuracy than none" in headline(made)
    equal = replace(
        made,
        measures=tuple(
            replace(m, difference=replace(m.difference, verdict=Verdict.UNDISTINGUISHED))
            if m.difference
            else m
            for m in made.measures
        ),
    )
    assert "no norm's test accuracy is distinguished from that of none" in headline(equal)
    assert "cannot reach" not in headline(equal), "eight seeds can"
    assert "6 seeds over 5 norms cannot reach p < 0.05: 8 seeds can." in headline(partial())
    assert "batch, batch-noaffine" in headline(regression())
    assert "reach a lower test loss than none" in headline(regression())
    assert "nothing to compare" in headline(EVERY["everything diverged"]())
    alone = replace(made, measures=tuple(m for m in made.measures if m.norm == "none"))
    assert headline(alone) == "No norm could be compared with none."


def test_the_headline_says_why_there_is_nothing_to_compare():
    made, lost = normal(), EVERY["everything diverged"]()
    stopped = headline(replace(lost, partial="interrupted after 3 training runs"))
    assert stopped.startswith("Stopped before learning rates were chosen"), "it may yet train"
    only = replace(made, arms=made.arms[:1])
    assert headline(only).startswith("Of none alone there are figures")
    dead = replace(made.arms[0], left_out="every run diverged", best_lr=None)
    without = replace(made, arms=(dead, *made.arms[1:3]))
    assert headline(without).startswith("There are no figures of none to compare with; those of b")
    title = metric_table(without, "equal-lr").title
    assert "best for none" not in title
    assert "best for none" in metric_table(made, "equal-lr").title


def test_a_note_that_several_arms_share_is_said_once():
    made = normal()
    arms = tuple(replace(arm, notes=("it stays at inference",)) for arm in made.arms[1:3])
    text = render(replace(made, arms=(made.arms[0], *arms)), "md")
    assert "batch, batch-noaffine: it stays at inference" in text
    assert text.count("it stays at inference") == 1


def test_overfitting_of_a_loss_is_validation_minus_training():
    assert "(training minus validation accuracy)" in fit_table(normal()).title
    assert "(validation minus training loss)" in fit_table(regression()).title


def test_a_target_that_takes_no_step_takes_no_time():
    measure = next(m for m in normal().measures if m.name == "time")
    assert duration(replace(measure, center=0.0)).startswith("0")


def test_better_is_a_matter_of_the_metric():
    text = " ".join(render(regression(), "md").split())
    assert "lower is better" in text
    assert "| batch | 0.0069 ± 0.0010 |" in text.replace("\\", "")


def test_what_never_reached_the_target_is_not_dropped():
    text = render(partial(), "rich", width=80)
    rows = [line.split() for line in text.splitlines()]
    none = next(row for row in rows if row[:1] == ["none"] and ">" in row)
    assert none[2:4] == [">", "500"]
    assert none[4:7] == ["4", "of", "6"]
    rms = next(row for row in rows if row[:1] == ["rms"] and "never" in row)
    assert rms[3:6] == ["6", "of", "6"]


def test_what_diverged_was_cut_or_left_out_is_told():
    text = " ".join(render(partial(), "rich", width=200).split())
    assert "Diverged here: none 2 of 6" in text
    assert "instance: a layer has 1 value a channel" in text
    assert "6 seeds of the 8 that were asked for." in text
    assert "Interrupted after 71 of 96 runs" in text
    assert "0.3 ≥" in text
    assert "best learning rate of group (0.3) is the highest that was tried" in text


def test_an_interval_without_0_that_holm_does_not_accept_is_explained():
    assert "The interval of rms leaves out 0" in render(normal(), "rich", width=200)


def test_missing_seeds_show_in_the_heading_and_are_missing_in_the_csv():
    made = two_seeds_missing("rms")
    assert "mean ± sd over 6–8 seeds" in render(made, "rich", width=200)
    rows = [row for row in csv.DictReader(io.StringIO(to_csv(made))) if row["norm"] == "rms"]
    named = {row["seed"] for row in rows if row["measure"] == "metric"}
    assert named == {str(seed) for seed in range(2, 8)}


def test_names_mean_themselves_in_markdown():
    row = next(line for line in render(hostile(), "md").splitlines() if line.startswith("| \\<"))
    assert row.startswith('| \\<script\\>alert("x")\\</script\\> \\| $a\\_b$ &')


def test_the_csv_gives_back_every_value_bit_for_bit():
    made = partial()
    rows = list(csv.DictReader(io.StringIO(to_csv(made))))
    assert tuple(rows[0]) == HEADER
    assert len(rows) == sum(len(one.values) for one in made.measures)
    read = iter(rows)
    for one in made.measures:
        for seed, value in zip(one.seeds, one.values, strict=True):
            row = next(read)
            assert (row["norm"], row["setting"], row["measure"]) == (
                one.norm,
                one.setting,
                one.name,
            )
            assert (int(row["seed"]), float(row["lr"])) == (seed, one.lr)
            assert row["censored"] == str(int(value is None))
            assert value is None if not row["value"] else float(row["value"]) == value


@pytest.mark.parametrize("name", EVERY)
def test_the_csv_of_every_comparison_has_its_columns(name):
    rows = list(csv.reader(io.StringIO(to_csv(EVERY[name]()))))
    assert {len(row) for row in rows} == {len(HEADER)}


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 9))
def test_signed_numbers_have_a_sign_and_are_short(value, decimals):
    text = signed(value, decimals)
    assert math.isnan(value) or text[0] in "+−"
    assert len(text) <= 20
    assert "-" not in text.replace("e-", "")


@given(st.lists(st.integers(0, 40), unique=True, max_size=9))
def test_seeds_in_words_count_and_name_them(seeds):
    text = seeds_in_words(tuple(seeds))
    if seeds:
        assert text.startswith(f"{len(seeds)} seed")
        assert str(seeds[0]) in text
        assert str(seeds[-1]) in text


def test_words():
    assert seeds_in_words((0, 1, 2)) == "3 seeds (0–2)"
    assert seeds_in_words((3, 5)) == "2 seeds (3, 5)"
    assert seeds_in_words((7,)) == "1 seed (7)"
    assert [chance(p) for p in (0.0004, 0.0312, math.nan)] == ["p < 0.001", "p = 0.031", "p = nan"]
    assert [times(v) for v in (0.0123, 0.2, 1.5, 12.34, 700.2)] == [
        "0.0123×", "0.20×", "1.50×", "12.3×", "700×",
    ]  # fmt: skip
    assert [number(v, 3) for v in (None, -0.5, math.inf, 1e9)] == ["–", "−0.500", "inf", "1e+09"]
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    found = normal().measure("rms", "metric")
    assert found is not None
    assert found.difference is not None
    assert interval(found.difference, 3) == "+0.007 [+0.001, +0.012]"


def test_a_loss_has_three_digits_whatever_its_size():
    assert places(normal()) == 3
    assert places(regression()) == 4
    large = replace(
        regression(),
        measures=tuple(
            replace(m, center=m.center and 1e4 * m.center) for m in regression().measures
        ),
    )
    assert places(large) == 0
    assert len(NORMS) == 7


@pytest.mark.parametrize("width", range(50, 100, 3))
def test_no_word_of_a_claim_is_lost_at_any_width(width):
    made = normal()
    text = render(made, "rich", width=width)
    assert max(map(len, text.splitlines())) <= width
    for claim in made.claims:
        for word in f"{claim.claim} {claim.figure}".split():
            assert word in text, word
