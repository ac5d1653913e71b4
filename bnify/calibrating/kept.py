"""A calibrated model as what is written into a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bnify.auditing.probe import run_once
from bnify.borrow import copy_model
from bnify.calibrating.result import Calibration
from bnify.changes import Change
from bnify.fingerprint import fingerprint
from bnify.plan import Edit, Plan
from bnify.structure import Call, describe, device_of, outputs_of
from bnify.verdict import Check, Verification


@dataclass(slots=True, kw_only=True)
class CalibratedModel:
    """A model with new statistics, its calibration, and whether it computes with them.

    Attributes:
        model: The model.
        calibration: What was found and done.
        plan: The model's fingerprint and inputs, and an edit for each norm that was updated; the
            statistics themselves are in the weights.
        verification: Whether outputs are finite in eval mode.
        source: Where the model came from.
        structure: Nothing: the module tree is as it was.
        files: What was written, by what it is.
        reference: None: an exported file has to compute what the model computes.
    """

    model: nn.Module
    calibration: Calibration
    plan: Plan
    verification: Verification | None
    source: Mapping[str, Any] = field(default_factory=dict)
    structure: tuple[Change, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    reference: None = None

    @classmethod
    def of(
        cls, model: nn.Module, calibration: Calibration, call: Call, source: Mapping[str, Any]
    ) -> CalibratedModel:
        """Check the outputs in eval mode on the example inputs; the model is not touched."""
        skeleton, specs = describe(call, model)
        plan = Plan(
            verb="calibrate",
            edits=tuple(
                Edit(
                    layer=norm.name,
                    kind="recalibrate",
                    layer_type=norm.kind,
                    channels=norm.channels,
                    detail="statistics of the data",
                )
                for norm in calibration.norms
                if norm.updated
            ),
            fingerprint=fingerprint(model),
            call=skeleton,
            inputs=specs,
            notes=calibration.notes,
        )
        return cls(
            model=model,
            calibration=calibration,
            plan=plan,
            verification=_verified(model, call),
            source=source,
        )

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON-ready data, with its verification and files."""
        return {
            **self.calibration.to_dict(),
            "verification": None if self.verification is None else self.verification.to_dict(),
            "files": dict(self.files),
        }


def _verified(model: nn.Module, call: Call) -> Verification:
    """Finite outputs in eval mode: new statistics of 0 or beyond a dtype's range would show."""
    try:
        outputs = outputs_of(run_once(copy_model(model).eval(), call))
    except Exception as error:  # forward() is user code
        detail = f"the model raised {type(error).__name__}: {error}".splitlines()[0]
    else:
        bad = [name for name, tensor in outputs if not bool(torch.isfinite(tensor).all())]
        detail = f"not finite: {', '.join(bad)}" if bad else ""
    check = Check(
        name="outputs are finite in eval mode, on the example inputs",
        passed=not detail,
        detail=detail,
    )
    return Verification(
        passed=not detail, checks=(check,), device=str(device_of(model)), inputs=("example",)
    )
