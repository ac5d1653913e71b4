"""A fix by data is offered with what it is worth: measured on a copy, in the finding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from bnify.auditing.finding import Finding, Safety
from bnify.auditing.subject import Subject

_WORDS: Final = {
    "accuracy": "accuracy",
    "agreement": "agreement with norms in train mode",
    "distance": "distance from the outputs with norms in train mode",
}


def with_proof(finding: Finding, subject: Subject) -> Finding:
    """The finding with the proof of recalibration, where the audit had data.

    ``fix`` then has accuracy (or what stands for it) before and after, ``values["proof"]`` the
    numbers. Without a gain the fix is none, and says so. The proof is computed once an audit.
    """
    proof = None if subject.measured is None else subject.measured.proof
    if proof is None:
        return finding
    return replace(
        finding,
        fix=proof.sentence,
        values={**finding.values, "proof": proof.to_dict()},
        safety=Safety.DATA if proof.helps else Safety.ADVICE,
    )


def proof_text(proof: Mapping[str, Any]) -> str:
    """``"recalibrate: accuracy 0.400 -> 0.983 on a copy"``."""
    numbers = f"{_WORDS[proof['measure']]} {proof['before']:.3f} -> {proof['after']:.3f} on a copy"
    lead = "recalibrate" if proof["helps"] else "recalibration does not help here"
    return f"{lead}: {numbers}"
