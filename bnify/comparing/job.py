"""What a worker process needs to run trials: sent to it once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from bnify.comparing.data import Data, load_data
from bnify.comparing.question import Question
from bnify.comparing.recipe import Recipe, scale_weights
from bnify.comparing.training import Loss, Setup, default_loss, train
from bnify.comparing.trial import Outcome, Trial
from bnify.devices import resolve
from bnify.errors import SpecError, UsageError
from bnify.spec.kinds import parse_spec
from bnify.spec.objects import import_folder, load_object
from bnify.spec.silence import user_output_to_stderr
from bnify.spec.usercode import a_type

if TYPE_CHECKING:
    from bnify.comparing.arms import ArmPlan

#: Seeds of one comparison differ from those of another one with another ``seed``.
_STRIDE = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A comparison without its schedule; it can be pickled where its parts can.

    Attributes:
        recipe: The model.
        data: The words of ``--data``, or what such a function would return.
        loss: ``"pkg.mod:loss"``, a function of (output, targets), or None for the usual one.
        question: The options.
        image_size: Pixels a side of the images of a folder.
        arms: One recipe a kind of norm.
    """

    recipe: Recipe
    data: Any
    question: Question
    loss: Any = None
    image_size: int | None = None
    arms: tuple[ArmPlan, ...] = ()

    def load(self) -> tuple[Callable[[int], nn.Module], Data]:
        """The model's factory, and the data.

        Raises:
            BnifyError: One of them cannot be had.
        """
        build = self.recipe.factory()
        question = self.question
        data = load_data(
            self.data,
            build(0),
            task=question.task,
            seed=question.seed,
            image_size=self.image_size,
        )
        return build, data

    def setup(self, data: Data) -> Setup:
        """Loss and device with the data.

        Raises:
            BnifyError: The loss or the device cannot be had.
        """
        loss = default_loss(data.task) if self.loss is None else _loss(self.loss)
        device = resolve(self.question.device)
        return Setup(data=data, loss=loss, question=self.question, device=device)

    def prepare(self) -> Callable[[Trial], Outcome]:
        """Load everything; the result runs one trial."""
        build, data = self.load()
        return self.runner(build, self.setup(data))

    def runner(self, build: Callable[[int], nn.Module], setup: Setup) -> Callable[[Trial], Outcome]:
        """What runs one trial with what is loaded."""
        arms = {arm.norm: arm for arm in self.arms}

        def run(trial: Trial) -> Outcome:
            model = build(self.question.seed * _STRIDE + trial.seed)
            scale_weights(model, trial.init_scale)
            return train(arms[trial.norm].build(model), trial, setup)

        return run


def _loss(loss: Any) -> Loss:
    """The user's own loss, from its words or as it is."""
    found = loss
    if isinstance(loss, str):
        if ":" not in loss:
            raise UsageError(f"--loss {loss} names no function", hint="write pkg.mod:loss")
        target = parse_spec(loss)
        with user_output_to_stderr(), import_folder(target):
            found = load_object(target).value
        if isinstance(found, type):
            found = found()  # a loss module's class
    if not callable(found):
        raise SpecError(f"the loss is {a_type(found)}", hint="name a function of (output, targets)")
    result: Loss = found
    return result
