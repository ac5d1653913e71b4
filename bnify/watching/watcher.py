"""``bnify.watch``: the rules of tier T3, in a training loop, at the price of a look now and then.

The first steps are seen through forward hooks on the norms; after them the hooks are gone, and
running statistics, scale and shift are read every so many steps, in one transfer. In between no
tensor is looked at: steps are counted in the optimizer's own hook, updates of statistics by the
version of a buffer, which is a number on the host.

Not seen: norms that are no modules (``F.batch_norm``); calls within compiled code (their updates
are, but for those that CUDA graphs replay); after the first steps shapes of inputs, and passes
under ``no_grad`` that are fewer than six or so in a row. Without steps nothing is looked at: a
gradient scaler that skips all of them has to be noticed by the loop, which may call ``check()``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnify.accept import refuse_other_than_modules, unwrapped
from bnify.auditing.engine import chosen, run_rules
from bnify.auditing.finding import Finding, Severity
from bnify.auditing.live import Live
from bnify.auditing.observed import Observed
from bnify.auditing.rule import Rule
from bnify.auditing.subject import Subject
from bnify.errors import UsageError, VerificationError
from bnify.watching.average import Average
from bnify.watching.calls import CallRecorder, is_compiled
from bnify.watching.gradients import Gradients
from bnify.watching.kept import Kept
from bnify.watching.lines import announce, line_of, write
from bnify.watching.steps import Owned, on_steps, plain_optimizer
from bnify.watching.transfer import states_of
from bnify.watching.updates import UpdateCounter

#: Optimizer steps after which the forward hooks are taken away.
FIRST_STEPS: Final = 3
#: Forward passes, or steps of other optimizers, without a single step after which it says so.
_PATIENCE: Final = 1000
#: Rules that forward hooks are needed for.
_OF_CALLS: Final = ("BN205", "BN206", "BN302", "BN303")


def watch(
    model: nn.Module,
    optimizer: Any = None,
    *,
    every: int = 50,
    average: nn.Module | None = None,
    on_finding: Callable[[Finding], Any] | logging.Logger | None = None,
    strict: bool = False,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Watcher:
    """Watch the norms of a model while it is trained, and say what goes wrong once.

        with bnify.watch(model, optimizer=optimizer):
            train(model, optimizer)

    The loop stays as it is: steps are counted by a hook on the optimizer. Where there is no block
    (callbacks of a trainer), ``watcher = bnify.watch(model)``, then ``watcher.start()`` and
    ``watcher.stop()``. Training is the same to the bit with and without; afterwards model and
    optimizer have no hooks of the watcher's.

    Args:
        model: The model in training; wrapped by DDP or torch.compile, or not.
        optimizer: Whose steps are counted; without it those of every optimizer of torch's that
            holds a parameter of the model.
        every: Tensors are looked at after the first three steps and then every so many. Steps that
            a gradient scaler skips are none.
        average: A model that averages this one (EMA, SWA), or a module that holds such a model.
        on_finding: Called with each new finding, on every rank; or a logger, which gets a line.
            By default lines go to stderr, on rank 0 only.
        strict: Raise at the first finding that is an error, out of ``optimizer.step()``.
        select: Rules to run instead of all of tier T3.
        ignore: Rules not to run.

    Raises:
        CaptureError: The model or the average is no module.
        UsageError: ``every`` is no whole number from 1 on, the optimizer is none of torch's, or a
            word fits no rule of tier T3.
    """
    refuse_other_than_modules(model)
    if average is not None:
        refuse_other_than_modules(average, "average")
    if type(every) is not int or every < 1:
        raise UsageError(f"every={every!r} is no number of steps", hint="every=50")
    rules = tuple(rule for rule in chosen(select, ignore) if "T3" in rule.tiers)
    if not rules:
        raise UsageError(
            "none of these rules runs in a training loop",
            hint="bnify explain --all lists the tiers of each: T3 is the training loop",
        )
    return Watcher(
        model,
        plain_optimizer(optimizer),
        every=every,
        average=None if average is None else Average(average, unwrapped(model, AveragedModel)),
        on_finding=on_finding,
        strict=strict,
        rules=rules,
    )


class Watcher:
    """What :func:`watch` returns: a context manager, or an object to start and stop.

    Attributes:
        findings: What was found, each module once a rule; ``values["step"]`` has the step.
        steps: Optimizer steps so far.
        unchecked: What is not checked: code → what would enable it; known from the first look on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        every: int,
        average: Average | None,
        on_finding: Callable[[Finding], Any] | logging.Logger | None,
        strict: bool,
        rules: Sequence[Rule],
    ) -> None:
        self.findings: tuple[Finding, ...] = ()
        self.steps = 0
        self.unchecked: Mapping[str, str] = {}
        self._model = unwrapped(model, AveragedModel)
        self._compiled = is_compiled(model)
        self._optimizer = optimizer
        self._every = every
        self._average = average
        self._on_finding = on_finding
        self._strict = strict
        self._rules = rules
        self._said: set[tuple[str, str]] = set()
        self._kept = Kept()
        self._recorder = CallRecorder(())
        self._counter = UpdateCounter()
        self._gradients = Gradients(every)
        self._owned = Owned(self._model)
        self._steps_hook: Any = None
        self._first = FIRST_STEPS
        self._by_hand = False
        self._steps_of_others = 0

    # -- begin and end -----------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin, and keep the statistics as they are now. Does nothing where it has begun."""
        if self._steps_hook is not None:
            return self
        self._counter, self._gradients = UpdateCounter(), Gradients(self._every)
        subject, _ = self._look()
        self._recorder = CallRecorder(subject.live.norms if subject.live else ())
        if not self._compiled:
            self._recorder.hook(self._model, self._passed)
        self._first = self.steps + FIRST_STEPS
        self._steps_hook = on_steps(self._owned.holds, self._stepped)
        return self

    def stop(self, error: BaseException | None = None) -> None:
        """Look a last time; model and optimizer have no hooks of the watcher's from now on.

        Args:
            error: What ended the training, if something did; a block knows it by itself.
        """
        if self._steps_hook is None:
            return
        self._steps_hook.remove()
        self._steps_hook = None
        self._recorder.remove()
        if error is not None:
            # What was raised is what the user must see, whatever state the device is in.
            with contextlib.suppress(Exception):
                self._recorder.raised(error)
                self.check()
            return
        self._recorder.settle()
        self._counter.ended(self.steps)
        self.check()
        if not self.steps and self._recorder.passes < _PATIENCE and self._recorder.calls:
            self._lost("no optimizer step was seen")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop(error)

    # -- steps -------------------------------------------------------------------------------------

    def step(self) -> None:
        """Count a step by hand, where no optimizer of torch's makes it; others count no more.

        Before the start and after the end it does nothing.
        """
        if self._steps_hook is not None:
            self._by_hand = True
            self._count()

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if self._by_hand:
            return
        self._gradients.stepped(optimizer, self.steps)
        if self._optimizer in (None, optimizer):
            self._steps_of_others = 0
            self._count()
            return
        self._steps_of_others += 1
        if self._steps_of_others == _PATIENCE:
            self._lost(
                f"another optimizer of this model made {_PATIENCE} steps, the one given made none"
            )

    def _count(self) -> None:
        self.steps += 1
        self._counter.stepped(self.steps)
        if self._recorder.hooked:
            self._recorder.settle()
            if self.steps >= self._first:
                self._recorder.remove()
        if self.steps == self._first or self.steps % self._every == 0:
            self.check()

    def _passed(self, passes: int) -> None:
        """The model is called in train mode, with hooks."""
        if passes == _PATIENCE and self.steps == self._first - FIRST_STEPS:
            self._recorder.remove()
            self._lost(f"no optimizer step in {passes} forward passes")

    def _lost(self, why: str) -> None:
        advice = "pass the optimizer of the loop, or call watcher.step() after each step"
        write(f"bnify watch: {why}; {advice}", self._on_finding, Severity.WARNING)

    # -- looking -----------------------------------------------------------------------------------

    def check(self) -> tuple[Finding, ...]:
        """Look at the tensors now.

        Returns:
            What is new, which has been said.

        Raises:
            VerificationError: One is an error, and ``strict`` is on.
        """
        subject, averaged = self._look()
        report = run_rules(subject, self._rules)
        found, unchecked = list(report.findings), dict(report.unchecked)
        if averaged is not None and averaged.reference:
            of_pairs = run_rules(averaged, [rule for rule in self._rules if rule.code == "BN307"])
            found += of_pairs.findings
            unchecked.pop("BN307", None)
        elif "BN307" in unchecked:
            unchecked["BN307"] = (
                "the averaged model (bnify.watch(model, average=...))"
                if averaged is None
                else "an average whose norms have the paths of the model's"
            )
        self._compiled = self._compiled or is_compiled(self._model)
        late = self.steps >= self._first and not self._recorder.calls
        if self._compiled or (late and self._counter.any):
            calls = "a model that is not compiled: in compiled code no call is seen"
            unchecked |= {r.code: calls for r in self._rules if r.code in _OF_CALLS}
        self.unchecked = unchecked
        return self._report(found)

    def restore(self) -> tuple[str, ...]:
        """Put back the last finite running statistics of norms that have others now.

        They are of the start or of the last look, at most ``every`` steps ago. Scale and shift
        stay as they are.

        Returns:
            Paths of the norms. If they break once more, that is a new finding.
        """
        subject, _ = self._look()
        norms = subject.live.norms if subject.live else ()
        restored = tuple(self._kept.restore(norms, subject.norms))
        self._said -= {("BN101", path) for path in restored}
        return restored

    def _look(self) -> tuple[Subject, Subject | None]:
        """The model now, and the average beside it."""
        live, average = Live(self._model), self._average
        lives = [live] if average is None else [live, average.live]
        beside = {} if average is None else average.followed()
        states, values = states_of(lives, beside.values())
        self._kept.keep(states[0], self.steps)
        self._counter.look(live.norms, {state.path: state.batches for state in states[0]})
        seen = Observed(
            calls=self._recorder.calls,
            bursts=self._counter.bursts,
            # Steps by hand may come after zero_grad(): then nothing is known of gradients.
            trained=frozenset() if self._by_hand else self._gradients.trained(self.steps),
            ungraded={} if self._by_hand else self._gradients.left_out(self.steps),
        )
        self._gradients.look(live.norms)
        self._owned.refresh()
        subject = Subject(norms=states[0], live=live, observed=seen)
        if average is None:
            return subject, None
        followed = dict(zip(beside, values, strict=True))
        return subject, average.subject(states[1], states[0], followed)

    def _report(self, found: Sequence[Finding]) -> tuple[Finding, ...]:
        # Statistics that are finite again may break once more.
        broken = {finding.module for finding in found if finding.code == "BN101"}
        self._said = {key for key in self._said if key[0] != "BN101" or key[1] in broken}
        new: dict[tuple[str, str], Finding] = {}
        for finding in found:
            key = finding.code, finding.module
            if key not in self._said and key not in new:
                dated = replace(finding, values={**finding.values, "step": self.steps})
                new[key] = self._kept.offer(dated)
        self._said |= set(new)
        findings = tuple(new.values())
        self.findings += findings
        announce(findings, self.steps, self._on_finding)
        for finding in findings:
            if self._strict and finding.severity is Severity.ERROR:
                raise VerificationError(line_of([finding], self.steps), hint=finding.fix)
        return findings
