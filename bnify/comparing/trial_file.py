"""The file of a finished trial: its name, and what it holds."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Final

from bnify.comparing.trial import Outcome, Trial

#: What every :func:`file_name` looks like.
PATTERN: Final = r"[a-z-]+-lr\S+-b\d+-x\S+-n\d+-s-?\d+(-[0-9a-f]{16})?\.json"


def file_name(trial: Trial) -> str:
    """The file of a trial: its key, and a digest where the key does not tell all of it.

    The key rounds numbers to six digits; two trials never share a file.
    """
    lr, scale = float(trial.lr), float(trial.init_scale)
    plain = re.fullmatch("[a-z]+(-[a-z]+)*", trial.norm) is not None
    if plain and float(f"{lr:g}") == lr and float(f"{scale:g}") == scale:
        return f"{trial.key}.json"
    exact = repr((trial.norm, lr, trial.batch_size, scale, trial.steps, trial.seed))
    digest = hashlib.sha256(exact.encode()).hexdigest()[:16]
    norm = re.sub("[^a-z]+", "-", trial.norm)[:40] or "-"
    return f"{norm}{trial.key.removeprefix(trial.norm)}-{digest}.json"


def read_outcome(file: Path) -> Outcome | str:
    """The outcome that a file holds, or why it holds none."""
    try:
        outcome = Outcome.from_dict(json.loads(file.read_text(encoding="utf-8")))
        named = file_name(outcome.trial)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "it is not a whole outcome of a trial"
    if named != file.name:
        return f"the trial in it belongs into {named}"
    numbers = (
        *(outcome.final_validation, outcome.test, outcome.test_loss),
        *(outcome.seconds, outcome.elapsed),
    )
    if not all(isinstance(number, float) for number in numbers):
        return "it is not a whole outcome of a trial"
    return outcome
