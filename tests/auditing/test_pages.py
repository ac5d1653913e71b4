"""Every rule has a code, a name and a page, and stands in the documentation."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from bnify.auditing.finding import Safety, Severity
from bnify.auditing.pages import SECTIONS, find_rule, page_of
from bnify.auditing.rule import Need, Rule
from bnify.auditing.rules import RULES
from bnify.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "bnify" / "auditing" / "rules").glob("bn*.py"))
TIERS = {"T0", "T0x", "T1", "T2", "T3"}

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)


def test_the_tuple_holds_every_file_once_and_in_order():
    homes = [Path(inspect.getsourcefile(type(rule))) for rule in RULES]
    assert homes == FILES
    assert len({rule.code for rule in RULES}) == len(RULES) == len({rule.name for rule in RULES})


@each_rule
def test_code_name_and_file_belong_together(rule):
    assert re.fullmatch(r"BN[1-4]\d\d", rule.code)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.name)
    file = Path(inspect.getsourcefile(type(rule)))
    assert file.stem == f"{rule.code.lower()}_{rule.name.replace('-', '_')}"
    assert (inspect.getmodule(type(rule)).__doc__ or "").startswith(f"{rule.code}: ")
    classes = [v for v in vars(inspect.getmodule(type(rule))).values() if inspect.isclass(v)]
    own = [c for c in classes if issubclass(c, Rule) and c.__module__ == type(rule).__module__]
    assert own == [type(rule)]


@each_rule
def test_what_a_rule_says_of_itself(rule):
    assert isinstance(rule.severity, Severity)
    assert isinstance(rule.safety, Safety)
    assert rule.tiers
    assert set(rule.tiers) <= TIERS
    assert rule.needs
    assert all(group and group <= set(Need) for group in rule.needs)
    assert rule.cost or rule.severity is Severity.INFO
    for text in (rule.cost, rule.fix):
        assert not text.endswith(".")
        assert "\n" not in text
    assert rule.safety is Safety.ADVICE or rule.fix


@each_rule
def test_the_page_has_its_sections(rule):
    page = page_of(rule)
    assert tuple(page.sections) == SECTIONS
    for text in (page.summary, *page.sections.values()):
        assert len(text) >= 8
        assert text.rstrip("`\"')").endswith((".", ":")) or text.splitlines()[-1].startswith(" ")
        assert text.count("``") % 2 == 0


@each_rule
def test_the_documentation_has_the_rule(rule):
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    anchor = f"#{rule.code.lower()}-{rule.name})"
    assert f"\n## {rule.code} {rule.name}\n" in page
    assert f"| [{rule.code}]({anchor} | `{rule.name}` | {rule.severity}" in page
    assert f"| [{rule.code}](docs/rules.md{anchor} | `{rule.name}` |" in readme
    section = page.split(f"\n## {rule.code} ")[1].split("\n## ")[0]
    for heading in ("At a glance", *SECTIONS):
        assert f"\n### {heading}\n" in section


def test_rules_are_found_by_code_and_name_in_any_case():
    for rule in RULES:
        for word in (rule.code, rule.code.lower(), rule.name, f" {rule.name} "):
            assert find_rule(word) is rule


@pytest.mark.parametrize(
    ("typed", "near"),
    [("BN10", "BN101"), ("nonfinite", "nonfinite-stats"), ("redundant-bais", "BN201")],
)
def test_close_ones_are_named(typed, near):
    with pytest.raises(UsageError, match="no rule") as caught:
        find_rule(typed)
    assert near in caught.value.hint


@pytest.mark.parametrize("typed", ["", "qqqq", "42"])
def test_without_a_close_one_the_table_is_named(typed):
    with pytest.raises(UsageError) as caught:
        find_rule(typed)
    assert caught.value.hint


def test_paragraphs_are_joined_and_lists_and_code_are_not():
    class Odd(Rule):
        """Finds
        nothing.

        What it checks:
            First line
            goes on.

            - one
            - two
              more

                code = 1

            Last.
        """

        def check(self, subject):
            yield from ()

    page = page_of(Odd())
    assert page.summary == "Finds nothing."
    expected = "First line goes on.\n\n- one\n- two more\n\n    code = 1\n\nLast."
    assert page.sections == {"What it checks": expected}
