"""The page of a rule, read from its docstring: for ``bnify explain``, docs/rules.md and SARIF."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

from bnify.auditing.rule import Need, Rule
from bnify.auditing.rules import RULES
from bnify.errors import UsageError

#: The sections of every page, in their order.
SECTIONS: Final = (
    "What it checks",
    "Why it is bad",
    "Example",
    "How to fix it",
    "Fix safety",
    "Source",
)
_HEADING: Final = re.compile(r"(\w[\w ]*):")
_BULLET: Final = re.compile(r"\s*(?:[-*]|\d+\.) ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What there is to read about a rule.

    Attributes:
        rule: The rule.
        summary: What it finds, in a sentence or two.
        sections: The texts by heading; paragraphs are lines of their own, separated by a blank
            line, and indented lines (code) keep their indentation.
    """

    rule: Rule
    summary: str
    sections: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The page as JSON-ready data."""
        rule = self.rule
        return {
            "code": rule.code,
            "name": rule.name,
            "severity": rule.severity.value,
            "tiers": list(rule.tiers),
            "default": rule.default,
            "needs": [[need.value for need in Need if need in group] for group in rule.needs],
            "fix": rule.fix,
            "safety": rule.safety.value,
            "cost": rule.cost,
            "summary": self.summary,
            "sections": dict(self.sections),
        }


def page_of(rule: Rule) -> Page:
    """The page of a rule."""
    summary: list[str] = []
    sections: dict[str, list[str]] = {}
    lines = summary
    for line in inspect.cleandoc(type(rule).__doc__ or "").splitlines():
        heading = _HEADING.fullmatch(line)
        if heading is not None:
            lines = sections[heading[1]] = []
        else:
            lines.append(line)
    texts = {name: _joined(inspect.cleandoc("\n".join(body))) for name, body in sections.items()}
    return Page(rule=rule, summary=_joined("\n".join(summary)), sections=texts)


def _joined(text: str) -> str:
    """The text with a line a paragraph; lists and indented code keep their lines."""
    paragraphs: list[str] = []
    fresh = True
    for line in text.strip("\n").splitlines():
        if not line.strip():
            fresh = True
            paragraphs += [""] if paragraphs and paragraphs[-1] else []
        elif fresh or line.startswith("    ") or _BULLET.match(line):
            paragraphs.append(line.rstrip())
            fresh = line.startswith("    ")
        else:
            paragraphs[-1] += f" {line.strip()}"
    return "\n".join(paragraphs).strip("\n")


def find_rule(word: str) -> Rule:
    """The rule of this code or name.

    Raises:
        UsageError: There is none; the closest ones are named.
    """
    asked = word.strip().lower()
    for rule in RULES:
        if asked in (rule.code.lower(), rule.name):
            return rule
    raise UsageError(f"there is no rule {word!r}", hint=_closest(asked))


def _closest(asked: str) -> str:
    known = {key: rule for rule in RULES for key in (rule.code.lower(), rule.name)}
    starting = [rule for key, rule in known.items() if asked and key.startswith(asked)]
    near = [known[key] for key in get_close_matches(asked, known, n=3, cutoff=0.5)]
    rules = list(dict.fromkeys((*starting, *near)))[:5]
    listed = ", ".join(f"{rule.code} {rule.name}" for rule in rules)
    return f"close to it: {listed}" if listed else "bnify explain --all lists codes and names"
