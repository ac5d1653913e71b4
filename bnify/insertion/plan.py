"""PLAN: from a recording to edits and skips, a reason for every layer left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import distributed, fx

from bnify import ops
from bnify.capture import Captured
from bnify.errors import PlanError
from bnify.fingerprint import fingerprint
from bnify.graph import Facts
from bnify.insertion.options import InsertOptions, Selection
from bnify.insertion.rules import RULES, Context, is_frozen
from bnify.insertion.sites import LAYERS, Candidate, activation_call, candidates, effective_rows
from bnify.insertion.walk import activation_after, residual_add_after
from bnify.layers import carries_norm
from bnify.norms import BATCH_KINDS, group_count, resolve
from bnify.plan import Edit, Plan, Skip
from bnify.reason import Reason
from bnify.structure import describe

ASSUMED_BATCH = 32
FEW_VALUES = 16
BIAS_READ = "its bias stays: something else reads it too"


def plan_insert(
    captured: Captured,
    options: InsertOptions,
    *,
    train: Captured | None = None,
    example_batch: int | None = None,
) -> Plan:
    """Decide for every Linear and Conv whether a norm follows it.

    Args:
        captured: The recording in eval mode.
        options: What the user asked for, checked.
        train: The recording in train mode, which shows layers that run there only.
        example_batch: Batch size the user passed; the recording's own when None.

    Raises:
        PlanError: A glob of the options matches nothing, or ``groups`` does not divide a layer.
    """
    facts = Facts(captured.graph)
    layers = candidates(captured, facts, train)
    selection = Selection(options, [(c.names, c.module) for c in layers])
    example = example_batch if example_batch is not None else (captured.call.batch or 1)
    batch_size = training_batch(options.batch_size, example)
    world = _world_size()
    edits: list[Edit] = []
    skips: list[Skip] = []
    chosen: list[tuple[Candidate, Edit]] = []
    for layer in layers:
        norm = resolve(options.norm, linear=layer.linear, batch_size=batch_size, world_size=world)
        if norm == "sync" and _backend() == "gloo":
            norm = "batch"
        context = Context(captured, facts, options, batch_size, norm)
        skip = _refusal(layer, context, selection)
        if skip is not None:
            skips.append(skip)
            continue
        chosen.append((layer, _edit(layer, context)))
    zeroed = _closing_residuals(facts, [c for c, _ in chosen]) if options.zero_gamma else set()
    for layer, edit in chosen:
        edits.append(_zero(edit) if layer.layer in zeroed else edit)
    call, inputs = describe(captured.call, captured.model)
    return Plan(
        verb="insert",
        edits=tuple(edits),
        skips=tuple(skips),
        fingerprint=fingerprint(captured.model),
        call=call,
        inputs=inputs,
        options=options.to_dict(),
        notes=tuple(_notes(captured, options, edits, chosen, example, batch_size)),
    )


def reconciled(plan: Plan, captured: Captured) -> Plan:
    """A plan in which every layer of the model is an edit or a skip, after editing by hand too."""
    edited = {edit.layer for edit in plan.edits}
    skips = [skip for skip in plan.skips if skip.layer not in edited]
    known = edited | {skip.layer for skip in skips}
    for path, module in captured.model.named_modules():
        if isinstance(module, LAYERS) and path not in known and not carries_norm(module):
            skips.append(
                Skip(
                    layer=path,
                    reason=Reason.EXCLUDED,
                    detail="not in the plan that was carried out",
                    layer_type=type(module).__name__,
                )
            )
    return replace(plan, skips=tuple(skips))


def training_batch(asked: int | None, example: int | None) -> int:
    """Samples per device in training: as asked, else the example's, else the assumed 32."""
    return asked or (example if example is not None and example > 1 else ASSUMED_BATCH)


def _refusal(layer: Candidate, context: Context, selection: Selection) -> Skip | None:
    """The first reason that holds, or None."""
    detail = selection.excluded(layer.names, layer.module)
    if detail is not None:
        return Skip(
            layer=layer.layer,
            reason=Reason.EXCLUDED,
            detail=detail,
            layer_type=layer.type_name,
        )
    included = selection.included(layer.names, layer.module)
    for reason, rule, policy in RULES:
        if policy and included:
            continue
        detail = rule(layer, context)
        if detail is not None:
            return Skip(layer=layer.layer, reason=reason, detail=detail, layer_type=layer.type_name)
    return None


def _edit(layer: Candidate, context: Context) -> Edit:
    """The edit that puts a norm behind a layer."""
    options = context.options
    value, at, detail = layer.value, layer.layer, []
    if options.after_act:
        activation = activation_after(context.facts, value)
        call = activation and activation_call(context.captured, context.facts, activation)
        if activation is not None and call:
            value, at = activation, call.path
            detail.append(f"behind {at}")
        else:
            detail.append("no activation follows")
    shape = value.meta["shape"]
    axis = len(shape) - 1 if layer.linear else 1
    channels, kind = shape[axis], context.norm
    groups = None
    spatial = not layer.linear
    if kind == "group":
        groups = options.groups or group_count(channels, linear=not spatial)
        if channels % groups:
            raise PlanError(
                f"{groups} groups do not divide the {channels} channels of {layer.layer}",
                hint="leave groups out, or exclude the layer",
            )
        if groups == 1 and not spatial and options.groups is None:
            kind, groups = "layer", None
            detail.append("too few channels for groups")
    if kind in BATCH_KINDS:
        rows = effective_rows(layer, shape[0], context.batch_size)
        if rows < FEW_VALUES:
            detail.append(f"only {rows} values a channel at batch size {context.batch_size}")
    if is_frozen(layer):
        detail.append("the layer is frozen")
    # A bias that is computed (a parametrization) is no parameter of the layer, and stays.
    has_bias = layer.module is not None and layer.module._parameters.get("bias") is not None
    drop_bias = options.drop_bias and has_bias and kind in BATCH_KINDS
    if drop_bias and layer.bias_read:
        drop_bias = False
        detail.append(BIAS_READ)
    return Edit(
        layer=layer.layer,
        norm=kind,
        channels=channels,
        axis=axis,
        detail="; ".join(detail),
        at=at if at != layer.layer else "",
        layer_type=layer.type_name,
        dims=len(shape),
        calls=len(layer.calls),
        scope=_scope(context.captured, layer) if len(layer.calls) > 1 else "",
        groups=groups,
        eps=options.eps,
        momentum=options.momentum if kind in BATCH_KINDS else None,
        drop_bias=drop_bias,
        init=options.init,
    )


def _scope(captured: Captured, layer: Candidate) -> str:
    """The innermost module around a layer that the forward pass calls once."""
    counts = Counter(call.path for call in captured.calls)
    path = layer.layer
    while path:
        path = path.rpartition(".")[0]
        if counts[path] == 1:
            return path
    return ""


# -- zero_gamma ----------------------------------------------------------------------------------


def _closing_residuals(facts: Facts, layers: Sequence[Candidate]) -> set[str]:
    """Layers that close a residual branch: of the two operands of an add, the deeper one.

    Depth counts weighted operators, so that the projection on a shortcut is not zeroed with the
    branch it bypasses.
    """
    depth: dict[fx.Node, int] = {}
    for node in facts.nodes:
        above = max((depth[s] for s in ops.sources(node)), default=0)
        depth[node] = above + (node in facts.weighted)
    closing: dict[fx.Node, tuple[int, str]] = {}
    for layer in layers:
        for call in layer.calls:
            add = residual_add_after(facts, call.outputs[0])
            if add is None:
                continue
            mine = depth[call.outputs[0]]
            if mine < max(depth[s] for s in ops.sources(add)):
                continue  # the other operand is deeper: this one is the shortcut
            if add not in closing or closing[add][0] < mine:
                closing[add] = (mine, layer.layer)
    return {layer for _, layer in closing.values()}


def _zero(edit: Edit) -> Edit:
    detail = "; ".join(filter(None, [edit.detail, "closes a residual branch: scale starts at 0"]))
    return replace(edit, zero_gamma=True, detail=detail)


# -- notes ---------------------------------------------------------------------------------------


def _notes(
    captured: Captured,
    options: InsertOptions,
    edits: Sequence[Edit],
    chosen: Iterable[tuple[Candidate, Edit]],
    example: int,
    batch_size: int,
) -> Iterable[str]:
    kinds = {edit.norm for edit in edits}
    if not edits:
        yield "nothing to insert: every layer has a reason to be left alone"
    if edits and options.batch_size is None and example == 1:
        yield f"batch size {batch_size} assumed, since the example has 1: batch_size changes it"
    if options.norm == "auto" and kinds & BATCH_KINDS and batch_size < 16:
        yield f"auto chose batch norm at batch size {batch_size}: its statistics will be noisy"
    few = [e.layer for e in edits if "values a channel" in e.detail]
    if few:
        yield (
            f"fewer than {FEW_VALUES} values a channel at batch size {batch_size} for "
            f"{_count(few, 'batch norm')}: group or layer norm would be steadier"
        )
    if kinds - BATCH_KINDS:
        others = ", ".join(sorted(kinds - BATCH_KINDS))
        several = "norms stay" if len(kinds - BATCH_KINDS) > 1 else "norm stays"
        yield f"{others} {several} at inference: only batch norm folds away"
    for edit in edits:
        if edit.calls > 1:
            where = edit.scope or "the model"
            yield (
                f"{edit.layer} has a norm for each of its {edit.calls} calls in one forward of "
                f"{where}; more calls are an error"
            )
    if options.zero_gamma and edits and not any(edit.zero_gamma for edit in edits):
        yield "zero_gamma changed nothing: no edited layer closes a residual branch"
    read = [edit.layer for edit in edits if BIAS_READ in edit.detail]
    if read:
        layers = _count(read, "layer")
        yield f"drop_bias leaves the bias of {layers}, first {read[0]}: something else reads it too"
    if "sync" in kinds and not _backend():
        yield "sync works as plain batch norm until a process group is up"
    if options.norm in ("sync", "auto") and "batch" in kinds and _backend() == "gloo":
        yield "batch norm in place of sync: SyncBatchNorm does not run on the gloo backend"
    frozen = [c.layer for c, _ in chosen if is_frozen(c)]
    if frozen:
        layers = _count(frozen, "frozen layer")
        yield f"a trainable norm for {layers}; skip_frozen leaves them alone"
    yield from captured.notes


def _count(things: Sequence[str], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _world_size() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _backend() -> str:
    """The backend that would synchronise; empty without a process group."""
    ready = distributed.is_available() and distributed.is_initialized()
    return str(distributed.get_backend()) if ready else ""
