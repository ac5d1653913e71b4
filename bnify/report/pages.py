"""The pages of rules: one for ``bnify explain CODE``, the table of all, and docs/rules.md."""

from __future__ import annotations

from collections.abc import Sequence

from bnify.auditing.pages import Page
from bnify.auditing.rule import Need, Rule
from bnify.report.document import Block, Column, Document, Items, Prose, Table
from bnify.report.markdown import to_markdown
from bnify.report.terminal import to_terminal


def page_document(page: Page) -> Document:
    """One rule in full."""
    rule = page.rule
    glance = tuple(f"{name}: {value}" for name, value in facts_of(rule))
    blocks: list[Block] = [Prose("", page.summary), Items("At a glance", glance)]
    blocks += [Prose(heading, text) for heading, text in page.sections.items()]
    return Document(f"{rule.code} {rule.name}", tuple(blocks))


def facts_of(rule: Rule) -> tuple[tuple[str, str], ...]:
    """Severity, tiers, whether it runs by default, what it needs, and its fix."""
    needed = "; or ".join(
        " and ".join(need.value for need in Need if need in group) for group in rule.needs
    )
    pairs = (
        ("severity", rule.severity.value),
        ("tiers", ", ".join(rule.tiers)),
        ("runs", "by default" if rule.default else f"only with --extend-select {rule.code}"),
        ("needs", needed),
        ("costs", rule.cost),
        ("fix", f"{rule.fix} ({rule.safety.how})" if rule.fix else ""),
    )
    return tuple((name, value) for name, value in pairs if value)


def rules_document(rules: Sequence[Rule]) -> Document:
    """All rules, one a line."""
    columns = (
        Column("Code", short=True),
        Column("Name", short=True),
        Column("Severity", short=True),
        Column("Tiers"),
        Column("Default", short=True),
        Column("Fix", short=True),
    )
    rows = tuple(
        (
            rule.code,
            rule.name,
            rule.severity.value,
            " ".join(rule.tiers),
            "on" if rule.default else "off",
            rule.safety.value,
        )
        for rule in rules
    )
    return Document("bnify explain --all", (Table(f"{len(rows)} rules", columns, rows),))


def page_text(page: Page, *, markdown: bool = False) -> str:
    """A page as text of its own, as SARIF holds it."""
    document = page_document(page)
    if markdown:
        return to_markdown(document)
    return to_terminal(document, width=88, color=False, encoding="utf-8")
