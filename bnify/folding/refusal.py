"""How a step says no: with a reason, and with what stood in the way."""

from __future__ import annotations

from bnify.reason import Reason


class Refused(Exception):  # noqa: N818 - it is no error, it ends in a Skip
    """An affine cannot go this way.

    Args:
        reason: Why, for machines.
        detail: What stood in the way, for people.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class NeedsBias(Refused):
    """The scale could go there, but the layer can take no shift."""
