"""One training run: the loop, what is looked at on the way, and how a diverged run is scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnify.borrow import copy_model, evaluating, seeded
from bnify.comparing.gradients import gradient_spread
from bnify.comparing.question import Question
from bnify.comparing.trial import Outcome, Trial
from bnify.errors import BnifyError, SpecError
from bnify.optim import param_groups
from bnify.spec.usercode import a_type, user_code
from bnify.structure import outputs_of

if TYPE_CHECKING:
    from bnify.comparing.data import Data, Part

#: Samples of validation and of training data that a look on the way is taken at,
VALIDATION_SAMPLE: Final = 256
TRAINING_SAMPLE: Final = 128
#: and of training data at the end, for the gap to the whole of the validation data.
FINAL_SAMPLE: Final = 1024
_EVALUATION_BATCH: Final = 256
#: Looks come at steps that grow by this factor, so that steps to a target have one relative error,
_GROWTH: Final = 1.25
#: and at least every this share of the run.
_LONGEST_GAP: Final = 1 / 12

Loss = Callable[[Any, Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all trials of one process share.

    Attributes:
        data: The three parts.
        loss: Of the model's output and the targets, a mean over samples.
        question: Optimizer and device.
        device: Where to train.
    """

    data: Data
    loss: Loss
    question: Question
    device: torch.device

    @property
    def classifies(self) -> bool:
        """Whether the metric is the accuracy; else it is the loss."""
        return self.data.task == "classification"

    @cached_property
    def frequent(self) -> Tensor:
        """The most frequent class of the training data, a scalar."""
        everything = torch.arange(len(self.data.train))
        targets = torch.cat([self.data.train.batch(i)[1] for i in _chunks(everything)])
        return targets.mode().values


def looks(steps: int) -> tuple[int, ...]:
    """The steps after which a run is looked at, 0 and the last one included.

    >>> looks(10)
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    """
    found, longest = [0], max(1, int(steps * _LONGEST_GAP))
    while found[-1] < steps:
        following = max(found[-1] + 1, int(found[-1] * _GROWTH))
        found.append(min(steps, following, found[-1] + longest))
    return tuple(found)


def default_loss(task: str) -> Loss:
    """Cross-entropy of logits (N, K), or the mean squared error."""
    return _cross_entropy if task == "classification" else _squared_error


def _cross_entropy(output: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(first_tensor(output), targets)


def _squared_error(output: Any, targets: Tensor) -> Tensor:
    return F.mse_loss(first_tensor(output), targets)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of what a model returns: logits, or a regression's values."""
    return outputs_of(output)[0][1]


def train(model: nn.Module, trial: Trial, setup: Setup) -> Outcome:
    """Run a trial on its model; a loss that is not finite ends it early.

    Args:
        model: With its norms and initial weights, on any device; it is trained in place.
        trial: What to run.
        setup: Data, loss and optimizer.
    """
    where = f"{trial.norm} at learning rate {trial.lr:g}"
    try:
        with seeded(trial.seed), deterministic(setup.device), user_code(where):
            return _Run(model, trial, setup).result()
    except BnifyError as error:  # the arm fails; the comparison goes on
        return Outcome(trial=trial, error=error.message)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA: kernels that add in a fixed order where there are some; restored at the end."""
    if device.type == "cpu":
        yield  # one thread adds in one order
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warned)
        torch.backends.cudnn.benchmark = before[1]


class _Run:
    """The state of one training run."""

    def __init__(self, model: nn.Module, trial: Trial, setup: Setup) -> None:
        self.model = model.to(setup.device).train()
        self.trial, self.setup = trial, setup
        self.optimizer = make_optimizer(model, trial.lr, setup.question)
        self.validation = sample(setup.data.validation, VALIDATION_SAMPLE)
        self.training = sample(setup.data.train, TRAINING_SAMPLE)
        self.training_at_end = sample(setup.data.train, FINAL_SAMPLE)
        self.untrained = None if setup.classifies else copy_model(model)
        self.seconds = 0.0

    def result(self) -> Outcome:
        """Train, look, and score."""
        trial = self.trial
        batches = batch_order(len(self.setup.data.train), trial.batch_size, trial.seed)
        done, scores, spreads, diverged = [0], [self._look()], [math.nan], None
        for stop in looks(trial.steps)[1:]:
            diverged, spread = self._train(done[-1], stop, batches)
            if stop == 1:
                spreads[0] = spread  # of the gradient at the initial weights
            if diverged is not None:
                break
            done.append(stop)
            spreads.append(spread)
            scores.append(self._look(last=stop == trial.steps))
        (train, train_loss), (validation, validation_loss) = (
            tuple(zip(*(score[part] for score in scores), strict=True)) for part in (0, 1)
        )
        final = self._score(self.setup.data.validation, diverged)
        test = self._score(self.setup.data.test, diverged)
        if diverged is None and not (math.isfinite(final[1]) and math.isfinite(test[1])):
            diverged = trial.steps  # in eval mode: running statistics that overflowed
        return Outcome(
            trial=trial,
            steps=tuple(done),
            train=train,
            train_loss=train_loss,
            validation=validation,
            validation_loss=validation_loss,
            spread=tuple(spreads),
            final_validation=final[0],
            test=test[0],
            test_loss=test[1],
            diverged=diverged,
            seconds=self.seconds,
        )

    def _train(self, start: int, stop: int, batches: Iterator[Tensor]) -> tuple[int | None, float]:
        """Steps ``start + 1`` to ``stop``: where it diverged, and the last gradient's spread."""
        spread = math.nan
        began = time.perf_counter()
        for step in range(start + 1, stop + 1):
            if not backward(self.model, self.optimizer, next(batches), self.setup):
                return step, spread
            if step == stop:
                spread = gradient_spread(self.model)
            self.optimizer.step()
        self.seconds += time.perf_counter() - began
        return None, spread

    def _look(self, *, last: bool = False) -> tuple[tuple[float, float], tuple[float, float]]:
        """Metric and loss on the samples of training and validation data."""
        data, training = self.setup.data, self.training_at_end if last else self.training
        return (
            self._finite(data.train, training, None),
            self._finite(data.validation, self.validation, None),
        )

    def _score(self, part: Part, diverged: int | None) -> tuple[float, float]:
        """Metric and loss on a whole part."""
        return self._finite(part, torch.arange(len(part)), diverged)

    def _finite(self, part: Part, indices: Tensor, diverged: int | None) -> tuple[float, float]:
        """Metric and loss; of a run that diverged the metric that it is worth, and that is finite.

        Raises:
            SpecError: Not even the untrained model has a finite loss.
        """
        loss = math.inf
        if diverged is None:
            metric, loss = _scored(self.model, part, indices, self.setup)
            if math.isfinite(loss):
                return metric, loss
        if self.untrained is None:
            return frequent_score(part, indices, self.setup), loss
        metric, finite = _scored(self.untrained, part, indices, self.setup)
        if not math.isfinite(finite):
            raise SpecError("the loss of the untrained model is not finite")
        return metric, loss


def backward(
    model: nn.Module, optimizer: torch.optim.Optimizer, indices: Tensor, setup: Setup
) -> bool:
    """Gradients of one batch; False where its loss is not finite, and there are none."""
    call, targets = setup.data.train.batch(indices)
    output = call.to(device=setup.device)(model)
    loss = one_loss(output, targets.to(setup.device), setup)
    if not math.isfinite(loss.item()):
        return False  # the caller ends the run
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return True


def one_loss(output: Any, targets: Tensor, setup: Setup) -> Tensor:
    """The loss of a batch.

    Raises:
        SpecError: The user's function gives no tensor of one number.
    """
    loss = setup.loss(output, targets)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    size = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else a_type(loss)
    raise SpecError(f"the loss is {size}, not a tensor of one number", hint="return its mean")


def batch_order(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after the other, shuffled anew each epoch, incomplete ones left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(samples, generator=generator)
        for start in range(0, samples - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def sample(part: Part, most: int) -> Tensor:
    """Indices of at most so many samples, at random and always the same."""
    if len(part) <= most:
        return torch.arange(len(part))
    return torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:most]


def make_optimizer(model: nn.Module, lr: float, question: Question) -> torch.optim.Optimizer:
    """The optimizer of the question; weight decay leaves norms and biases alone."""
    decay = question.weight_decay
    groups: Any = param_groups(model, decay) if decay else model.parameters()
    match question.optimizer:
        case "adam":
            return torch.optim.Adam(groups, lr=lr)
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, weight_decay=decay)
        case _:
            return torch.optim.SGD(groups, lr=lr, momentum=question.momentum)


@torch.no_grad()
def _scored(model: nn.Module, part: Part, indices: Tensor, setup: Setup) -> tuple[float, float]:
    """Metric and loss in eval mode, NaN and infinity as they come."""
    correct, total = 0, 0.0
    with evaluating(model):
        for chunk in _chunks(indices):
            call, targets = part.batch(chunk)
            output, targets = call.to(device=setup.device)(model), targets.to(setup.device)
            total += one_loss(output, targets, setup).item() * len(chunk)
            if setup.classifies:
                correct += int((first_tensor(output).argmax(1) == targets).sum())
    loss = total / len(indices)
    return (correct / len(indices) if setup.classifies else loss), loss


def frequent_score(part: Part, indices: Tensor, setup: Setup) -> float:
    """Accuracy of the training data's most frequent class: the best answer that sees no input."""
    asked = torch.cat([part.batch(chunk)[1] for chunk in _chunks(indices)])
    return float((asked == setup.frequent).double().mean())


def _chunks(indices: Tensor) -> tuple[Tensor, ...]:
    return indices.split(_EVALUATION_BATCH)  # type: ignore[no-untyped-call, no-any-return]
