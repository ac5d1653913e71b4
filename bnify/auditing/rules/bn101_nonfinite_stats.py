"""BN101: running statistics, scale or shift that are not finite, or a negative variance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bnify.auditing.finding import Finding, Safety, Severity
from bnify.auditing.proved import with_proof
from bnify.auditing.rule import Need, Rule, needs
from bnify.auditing.subject import Subject


class NonfiniteStatistics(Rule):
    """Running statistics or scale and shift are NaN or infinite, or a variance is negative.

    What it checks:
        Every running mean, running variance, scale and shift: each must be finite, and no
        variance below 0. ``onnx.checker`` passes such files.

    Why it is bad:
        In eval mode the channel is NaN, and with it every output that it reaches. In train mode
        nothing shows: batch statistics are used there, and the running ones stay NaN for good,
        since NaN times (1 - momentum) is NaN.

    Example:
        One batch overflowed in fp16; ``bn1.running_var`` has been NaN in 3 of 64 channels since.

    How to fix it:
        Recalibrate the statistics on data, or go back to a checkpoint from before. Scale and
        shift that are not finite cannot be repaired: only an older checkpoint helps.

    Fix safety:
        Needs data; the new statistics are proved on a copy first.

    Source:
        Ioffe & Szegedy (2015), section 3.1: eval mode divides by sqrt(running_var + eps).
    """

    code = "BN101"
    name = "nonfinite-stats"
    severity = Severity.ERROR
    tiers = ("T0", "T0x", "T3")
    needs = needs(Need.STATISTICS)
    fix = "recalibrate the statistics on data, or load an older checkpoint"
    safety = Safety.DATA
    cost = "outputs in eval mode are NaN or infinite"

    def check(self, subject: Subject) -> Iterator[Finding]:
        """One finding a norm, with the channels of each fault."""
        for norm in subject.norms:
            vectors = {
                "running_mean": norm.mean,
                "running_var": norm.var,
                "weight": norm.weight,
                "bias": norm.bias,
            }
            bad = {
                name: int((~np.isfinite(vector)).sum())
                for name, vector in vectors.items()
                if vector is not None
            }
            bad = {name: count for name, count in bad.items() if count}
            negative = int((norm.var < 0).sum())
            if not bad and not negative:
                continue
            parts = [f"{name} is not finite in {n}" for name, n in bad.items()]
            parts += [f"running_var is negative in {negative}"] if negative else []
            beyond = {"weight", "bias"} & set(bad)
            found = self.finding(
                norm.path,
                f"{', '.join(parts)} of {norm.channels} channels",
                {"nonfinite": bad, "negative_variance": negative, "channels": norm.channels},
                fix="load a checkpoint from before it diverged" if beyond else None,
                safety=Safety.ADVICE if beyond else None,
            )
            yield found if beyond else with_proof(found, subject)
