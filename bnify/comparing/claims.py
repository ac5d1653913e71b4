"""The claims that are made for normalization, answered for the case at hand.

Those that a p decides are corrected together by Holm's method, at 5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from bnify.comparing.claim_tests import (
    Evidence,
    affine_reduces_cost,
    all_improve,
    fewer_steps,
    gradient_flow,
    higher_learning_rates,
    init_sensitivity,
    layer_slower_than_group,
    regularises,
    small_batches,
    trains_faster,
)
from bnify.comparing.comparison import Answer, Claim
from bnify.comparing.measures import Runs
from bnify.comparing.statistics import LEVEL, holm, too_few


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimTest:
    """A claim and what answers it."""

    name: str
    claim: str
    evidence: Callable[[Runs], Evidence]


CLAIMS: Final = (
    ClaimTest(
        name="fewer-steps", claim="Batch norm needs fewer training steps", evidence=fewer_steps
    ),
    ClaimTest(
        name="higher-learning-rates",
        claim="Batch norm allows higher learning rates",
        evidence=higher_learning_rates,
    ),
    ClaimTest(
        name="init-sensitivity",
        claim="Batch norm makes training less sensitive to the initial weights",
        evidence=init_sensitivity,
    ),
    ClaimTest(
        name="gradient-flow",
        claim="Batch norm makes gradients flow better through the layers",
        evidence=gradient_flow,
    ),
    ClaimTest(
        name="small-batches",
        claim="Group norm does better than batch norm with small batches",
        evidence=small_batches,
    ),
    ClaimTest(
        name="regularises",
        claim="Batch norm regularises: it overfits less",
        evidence=regularises,
    ),
    ClaimTest(name="all-improve", claim="All norms do better than no norm", evidence=all_improve),
    ClaimTest(
        name="layer-slower-than-group",
        claim="Layer norm converges more slowly than group norm",
        evidence=layer_slower_than_group,
    ),
    ClaimTest(name="trains-faster", claim="Batch norm trains in less time", evidence=trains_faster),
    ClaimTest(
        name="affine-reduces-cost",
        claim="A learned scale and shift reduce the cost",
        evidence=affine_reduces_cost,
    ),
)


def answer_claims(runs: Runs) -> tuple[tuple[Claim, ...], tuple[str, ...]]:
    """The claims in order, and a note where there are too few seeds for so many of them."""
    found = [(test, test.evidence(runs)) for test in CLAIMS]
    tested = [evidence for _, evidence in found if evidence.p is not None]
    adjusted = iter(holm([evidence.p for evidence in tested if evidence.p is not None]))
    claims = tuple(_claim(test, evidence, adjusted) for test, evidence in found)
    most = max((evidence.seeds for evidence in tested), default=0)
    return claims, tuple(too_few(most, len(tested), "claim")) if tested else ()


def _claim(test: ClaimTest, evidence: Evidence, adjusted: Iterator[float]) -> Claim:
    p, answer = None, evidence.answer
    if evidence.p is not None:
        p = next(adjusted)
        sides = {1: Answer.SUPPORTED, -1: Answer.CONTRADICTED, 0: Answer.UNDISTINGUISHED}
        answer = sides[evidence.side] if p < LEVEL else Answer.UNDISTINGUISHED
    return Claim(name=test.name, claim=test.claim, answer=answer, figure=evidence.figure, p=p)
