"""What a command line asks of ``bnify audit``: which rules, what counts, what is to be repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from bnify.cli.config import AuditConfig
from bnify.cli.keeping import Keeping
from bnify.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be found, and what of it counts; flags over the file.

    Attributes:
        rules: Keyword arguments of :func:`bnify.audit` that choose the rules.
        precision: ``"int8"`` or ``"fp16"`` of the deployment.
        reference: The model that this one is an average of.
        eval_mode: Put the model in eval mode first.
        ignores: Glob of module paths → rules to ignore there.
        fail_on: The least severity that makes the exit code 1.
        baseline: File of known findings.
        write_baseline: Write it instead of reading it.
        statistics: Count by rule.
    """

    rules: dict[str, tuple[str, ...]]
    precision: str | None = None
    reference: str | None = None
    eval_mode: bool = False
    ignores: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fail_on: str = "error"
    baseline: Path | None = None
    write_baseline: bool = False
    statistics: bool = False

    @classmethod
    def of(
        cls,
        config: AuditConfig,
        *,
        select: Sequence[str] | None,
        ignore: Sequence[str] | None,
        extend_select: Sequence[str] | None,
        fail_on: str | None,
        baseline: Path | None,
        write_baseline: bool,
        precision: str | None,
        reference: str | None,
        eval_mode: bool,
        statistics: bool,
    ) -> Self:
        """From the options and ``[tool.bnify.audit]``.

        Raises:
            UsageError: ``--write-baseline`` without a file.
        """
        known = baseline or (Path(config.baseline) if config.baseline else None)
        if write_baseline and known is None:
            raise UsageError("--write-baseline says not where to", hint="add --baseline FILE")
        return cls(
            rules={
                "select": _words(select) or config.select or (),
                "ignore": _words(ignore) or config.ignore or (),
                "extend_select": _words(extend_select) or config.extend_select or (),
            },
            precision=None if precision is None else str(precision),
            reference=reference,
            eval_mode=eval_mode,
            ignores=dict(config.per_module_ignores),
            fail_on=str(fail_on or config.fail_on or "error"),
            baseline=known,
            write_baseline=write_baseline,
            statistics=statistics,
        )


def _words(texts: Sequence[str] | None) -> tuple[str, ...]:
    """``["BN1,BN203", "BN301"]`` as three words."""
    return tuple(word.strip() for text in texts or () for word in text.split(",") if word.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairing:
    """What ``--fix`` is to do.

    Attributes:
        fix: Whether it was asked for.
        unsafe: Also what changes the function.
        diff: Show the module tree before and after.
        keeping: Where the repaired model goes.
        opset: Of the ONNX file; torch's own when None.
        k: Factor of the ONNX file's error budget; bnify's own when None.
    """

    fix: bool = False
    unsafe: bool = False
    diff: bool = False
    keeping: Keeping = field(default_factory=Keeping)
    opset: int | None = None
    k: float | None = None

    @classmethod
    def checked(
        cls,
        *,
        fix: bool,
        unsafe: bool,
        diff: bool,
        output: Path | None,
        force: bool,
        onnx: bool,
        opset: int | None = None,
        k: float | None = None,
    ) -> Self:
        """From the options.

        Raises:
            UsageError: They contradict each other, or the place may not be written.
        """
        needing = {"--unsafe-fixes": unsafe, "--diff": diff, "-o": output is not None}
        for name, given in needing.items():
            if given and not fix:
                raise UsageError(f"{name} says what --fix is to do, which is missing", hint="--fix")
        if fix and output is None and not diff:
            raise UsageError(
                "--fix repairs a copy, which nothing keeps or shows",
                hint="add -o DIR to write it, or --diff to see it",
            )
        keeping = Keeping.checked(
            output, force=force, onnx=onnx, keep_failed=False, verify=True, dry_run=False
        )
        return cls(fix=fix, unsafe=unsafe, diff=diff, keeping=keeping, opset=opset, k=k)
