"""A comparison's values as CSV: a row a norm, setting, measure and seed."""

from __future__ import annotations

import csv
import io
from typing import Final

from bnify.comparing.comparison import Comparison

HEADER: Final = ("norm", "setting", "measure", "seed", "lr", "value", "censored")


def to_csv(comparison: Comparison) -> str:
    """The values behind every mean and median, to the last bit.

    ``value`` is empty and ``censored`` 1 where it is beyond what was measured: the run never got
    to the target, or a layer had no gradient.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for one in comparison.measures:
        for seed, value in zip(one.seeds, one.values, strict=True):
            told = "" if value is None else repr(float(value))
            row = (one.norm, one.setting, one.name, seed, one.lr, told, int(value is None))
            writer.writerow(row)
    return out.getvalue()
