"""The straight line of a comparison: load, plan the arms, time them, run the phases, analyse.

What depends on the clock (step times, the schedule, a cut) is decided once and kept in the run
folder: a resumed run repeats none of it, so that it ends in the same figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import nn

from bnify.accept import accept, example_call
from bnify.comparing.analysis import analyse
from bnify.comparing.arms import ArmPlan, plan_arms
from bnify.comparing.budget import ANALYSIS, REPORT, Costs, wanted
from bnify.comparing.clock import Clock
from bnify.comparing.comparison import Arm, Comparison
from bnify.comparing.data import Data
from bnify.comparing.engine import open_engine
from bnify.comparing.job import Job
from bnify.comparing.loaded import digests, refuse_other
from bnify.comparing.phases import Phases, Progress, Tell
from bnify.comparing.pilot import Pilot, measure_steps
from bnify.comparing.question import Question
from bnify.comparing.run_folder import RunFolder
from bnify.comparing.schedule import Schedule
from bnify.environment import environment
from bnify.errors import SpecError

#: Share of the budget that timing steps may take, and seconds at most.
_PILOT_SHARE: Final = 0.05
_PILOT_SECONDS: Final = 6.0


def run_job(
    job: Job,
    folder: RunFolder,
    *,
    engine: str,
    jobs: int,
    tell: Tell,
    model: str,
    data: str,
    report: bool = True,
) -> Comparison:
    """Run a comparison, or what is left of it.

    Args:
        job: Model, data, loss and question; its arms are planned here.
        folder: Where finished trials and decisions are kept.
        engine: ``"local"``, ``"ray"`` or ``"ray://host:port"``.
        jobs: Processes.
        tell: Called with the progress.
        model: The model in words.
        data: The data in words.
        report: Whether a report is going to be written, which takes some of the budget.

    Returns:
        The comparison; with :attr:`Comparison.partial` where it was interrupted.

    Raises:
        BnifyError: The model or the data cannot be compared with, or a process was killed.
    """
    question, clock = job.question, Clock(folder.elapsed, job.question.budget)
    tell(Progress(doing=f"loading {model} and {data}"))
    build, loaded = job.load()
    setup, loading = job.setup(loaded), clock.now() - folder.elapsed
    _check_batch(question, loaded)
    tell(Progress(doing="inserting and verifying each norm"))
    reference, arms = _planned(build(0), loaded, question)
    found = folder.read("pilot")
    code = (job.recipe.source, job.data, job.loss)
    here = digests(build(0), loaded, setup.loss, code)
    refuse_other(folder.path, folder.read("loaded"), here, began=found is not None)
    folder.write("loaded", here)
    job = replace(job, arms=arms)
    usable = [arm for arm in arms if not arm.left_out]
    if found is None:
        tell(Progress(doing="timing a training step with each norm"))
        pilot = measure_steps(
            build,
            usable,
            setup,
            reference=reference,
            sizes=question.batch_sizes if "batch" in question.sweep else (),
            seconds=min(_PILOT_SECONDS, question.budget * _PILOT_SHARE or _PILOT_SECONDS),
            loading=loading,
        )
        folder.write("pilot", pilot.to_dict())
    else:
        pilot = Pilot.from_dict(found)
    norms = [arm.norm for arm in usable if arm.norm not in pilot.failed]
    if reference not in norms:
        raise _unusable(reference, arms, pilot, model)
    if len(norms) < 2:
        raise _alone(norms, arms, pilot)
    full, notes = wanted(question, loaded)
    phases = Phases(
        question=question,
        folder=folder,
        clock=clock,
        tell=tell,
        outcomes=dict(folder.outcomes()),
        norms=norms,
        costs=Costs.of(pilot, question, loaded),
        reference=reference,
        higher=setup.classifies,
        full=full,
        report=REPORT if report else ANALYSIS,
    )
    tell(Progress(doing="starting"))
    partial, name = "", engine
    try:
        with open_engine(engine, job, jobs) as opened:
            name = opened.name
            phases.run(opened)
    except KeyboardInterrupt:
        partial = f"interrupted after {len(phases.outcomes)} training runs"
    return analyse(
        question,
        phases.schedule,
        phases.selection,
        tuple(_arm(arm, pilot, phases.schedule) for arm in arms),
        phases.outcomes,
        data=loaded.words,
        model=model,
        task=loaded.task,
        metric="accuracy" if setup.classifies else "loss",
        higher=setup.classifies,
        reference=reference,
        optimizer=_optimizer(question),
        notes=(*_notes(job, loaded), *notes, *folder.notes),
        partial=partial,
        seconds=clock.now(),
        environment={
            **environment(device=str(setup.device), seed=question.seed),
            "threads": 1,
            "engine": name,
        },
    )


def _check_batch(question: Question, data: Data) -> None:
    if question.batch_size > len(data.train):
        raise SpecError(
            f"a batch of {question.batch_size} is more than the {len(data.train)} training "
            f"samples of {data.name}",
            hint=f"--batch-size {max(2, len(data.train) // 4)}",
        )


def _planned(model: nn.Module, data: Data, question: Question) -> tuple[str, tuple[ArmPlan, ...]]:
    """The reference and the arms, on the first batch of the training data."""
    accept(model, verb="compare")
    call = example_call(model, data.train.batch(torch.arange(question.batch_size))[0])
    return plan_arms(model, call, question.norms, batch_size=question.batch_size)


def _unusable(reference: str, arms: Sequence[ArmPlan], pilot: Pilot, model: str) -> SpecError:
    """Without the reference there is nothing to compare with."""
    left_out = next(arm.left_out for arm in arms if arm.norm == reference)
    return SpecError(
        pilot.failed.get(reference) or f"{model} cannot be trained as it is: {left_out}",
        hint="mend the model, the data or the loss",
    )


def _alone(norms: Sequence[str], arms: Sequence[ArmPlan], pilot: Pilot) -> SpecError:
    """One arm is no comparison."""
    reasons = [
        f"{arm.norm}: {arm.left_out or pilot.failed[arm.norm]}"
        for arm in arms
        if arm.norm not in norms
    ]
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return SpecError(f"there is nothing to compare {norms[0]} with{why}", hint="add other --norms")


def _arm(arm: ArmPlan, pilot: Pilot, schedule: Schedule) -> Arm:
    """An arm's figures before anything was run."""
    dropped = "left out for the budget" if arm.norm in schedule.dropped else ""
    return Arm(
        norm=arm.norm,
        norms=arm.norms,
        parameters=arm.parameters,
        step_ms=pilot.step_ms.get(arm.norm),
        step_ratio=pilot.ratio.get(arm.norm),
        left_out=arm.left_out or pilot.failed.get(arm.norm, "") or dropped,
        same_as=arm.same_as,
        notes=() if dropped else arm.notes,
    )


def _optimizer(question: Question) -> str:
    """The optimizer in words."""
    words = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[question.optimizer]
    if question.optimizer == "sgd" and question.momentum:
        words += f" with momentum {question.momentum:g}"
    if question.weight_decay:
        words += f", weight decay {question.weight_decay:g} (not of norms and biases)"
    return f"{words}, constant learning rate"


def _notes(job: Job, data: Data) -> tuple[str, ...]:
    """What a reader should know of model and data."""
    if not job.recipe.fixed():
        return data.notes
    same = (
        "every seed starts from the same weights, those of the network as given: seeds differ in "
        "the order of the batches only"
    )
    return (*data.notes, same)
