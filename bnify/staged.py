"""Statistics of norms that rest on each other: the shallow ones first, then what they reach.

With ``init="stats"`` a norm changes the function, so the input of a deeper one is what it is only
when every norm before it has its statistics and runs in eval mode. One pass over the data measures
all sites whose earlier sites are done: as many passes as sites lie behind one another at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import fx, nn

from bnify import ops
from bnify.borrow import copy_model
from bnify.capture import Captured
from bnify.errors import PlanError
from bnify.layers import CallNorms, norm_of
from bnify.plan import Edit, Plan
from bnify.pooled import Point, Pooled
from bnify.rewrite import Statistics, initial_norms, rewrite_tree
from bnify.rewrite.initial import start

#: Runs a model over the data once and pools its points: by path, for each call.
Pooling: TypeAlias = Callable[[nn.Module, Sequence[Point]], Mapping[str, tuple[Pooled, ...]]]


@dataclass(frozen=True, slots=True)
class Site:
    """One norm of an edit: that of one call."""

    edit: Edit
    call: int

    @property
    def path(self) -> str:
        """Module path of its norm in the rewritten tree."""
        path = f"{self.edit.carrier}.norm".lstrip(".")
        return f"{path}.{self.call}" if self.edit.calls > 1 else path

    @property
    def point(self) -> Point:
        """Where the input of its norm comes out, while a module that does nothing stands there."""
        return Point(self.path, self.edit.axis, self.edit.channels)


def stages(captured: Captured, plan: Plan) -> list[list[Site]]:
    """The measured sites of a plan in the order in which they can be measured.

    A site is one deeper than the deepest that its value depends on, directly or through memory
    that is written in place. Where a value leaves for Python nobody knows what depends on it: then
    each site has a stage of its own, in the order of execution.
    """
    sites = _sites(captured, plan)
    if captured.escapes:
        return [[site] for site in sites.values()]
    depth: dict[fx.Node, int] = {}
    written: dict[int | None, int] = {}
    order: dict[int, list[Site]] = {}
    for node in captured.graph.nodes:
        memory = node.meta.get("alias")
        reached = [
            max(depth[source], written.get(source.meta.get("alias"), 0))
            for source in ops.sources(node)
        ]
        depth[node] = max(reached, default=0)
        for target in node.meta.get("writes", ()):
            group = target.meta.get("alias")
            written[group] = max(written.get(group, 0), depth[node])
        if node in sites:
            here = max(depth[node], written.get(memory, 0))
            order.setdefault(here, []).append(sites[node])
            depth[node] = here + 1
    return [order[here] for here in sorted(order)]


def _sites(captured: Captured, plan: Plan) -> dict[fx.Node, Site]:
    """The sites to measure by the node of the value they normalize, in order of execution."""
    edits = {edit.carrier: edit for edit in plan.edits if edit.init != "reset"}
    found: dict[fx.Node, Site] = {}
    for call in captured.calls:
        if call.path in edits:
            found[call.outputs[0]] = Site(edits[call.path], call.number)
    return {node: found[node] for node in captured.graph.nodes if node in found}


def measure_staged(
    model: nn.Module,
    plan: Plan,
    order: Sequence[Sequence[Site]],
    pool: Pooling,
    say: Callable[[str], None],
) -> Statistics:
    """Statistics of every site in the network as it will be, stage by stage.

    Args:
        model: The original model; a copy of it runs.
        plan: The plan.
        order: Its :func:`stages`.
        pool: Runs a model over the data and pools its points.
        say: Called with a few words before each pass.

    Returns:
        For each carrier the statistics of its calls.

    Raises:
        PlanError: The data yields no batch, the model raised on one, or a layer never ran on it.
    """
    # The bias is dropped when all is measured: the statistics are of values that have it.
    kept = replace(plan, edits=tuple(replace(e, drop_bias=False) for e in plan.edits))
    working = copy_model(model)
    norms = initial_norms(working, kept)
    measured: dict[str, list[Pooled]] = {}
    waiting = {}
    for edit in kept.edits:
        measures = edit.init != "reset"
        waiting[edit.carrier] = _blank(edit) if measures else norms[edit.carrier]
        if measures:
            measured[edit.carrier] = [Pooled.empty(edit.channels)] * edit.calls
    rewrite_tree(working, kept, waiting)
    for number, sites in enumerate(order, 1):
        say(f"measuring statistics, pass {number} of {len(order)}")
        pooled = pool(working, [site.point for site in sites])
        for site in sites:
            (found,) = pooled[site.path]
            if not found.count:
                raise never_ran(site.edit.layer)
            measured[site.edit.carrier][site.call] = found
            norm = norms[site.edit.carrier]
            one = norm.norms()[site.call] if isinstance(norm, CallNorms) else norm
            start(one, found, site.edit)
            parent, _, name = site.path.rpartition(".")
            working.get_submodule(parent).add_module(name, one.eval())
    return {carrier: tuple(statistics) for carrier, statistics in measured.items()}


def never_ran(layer: str) -> PlanError:
    """The error for a layer that the data does not reach."""
    return PlanError(
        f"{layer or 'the model itself'} never ran on this data: it has no statistics",
        hint="pass data that reaches it, or leave it out with exclude",
    )


def _blank(edit: Edit) -> nn.Module:
    """A norm that does nothing yet."""
    blanks = [nn.Identity() for _ in range(edit.calls)]
    return blanks[0] if edit.calls == 1 else CallNorms(blanks)


def with_open_inputs(model: nn.Module, sites: Iterable[Site]) -> dict[str, Point]:
    """Let the input of each site's norm be measured, in place; the function stays.

    Returns:
        The point of each site by the path of its norm before.
    """
    found: dict[str, Point] = {}
    for site in sites:
        parent, _, name = site.path.rpartition(".")
        holder = model.get_submodule(parent)
        holder.add_module(name, nn.Sequential(nn.Identity(), holder.get_submodule(name)))
        found[site.path] = replace(site.point, path=f"{site.path}.0")
    return found


def norm_at(model: nn.Module, site: Site) -> nn.Module:
    """The norm of a site in a rewritten tree."""
    norm = norm_of(model.get_submodule(site.edit.carrier))
    return norm.norms()[site.call] if isinstance(norm, CallNorms) else norm
