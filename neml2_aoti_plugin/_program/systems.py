"""The nonlinear system of an implicit segment as the solver takes it, however it was compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .._artifact.schema import DirectStep, FusedStep, GroupInfo, ImplicitInfo, KrylovStep
from .._graphs.graph import Graph
from .._solve.krylov import KrylovSystem
from .._solve.system import Direction, Group, Groups, Layout, Linearisation, System
from .._solve.tables import VECTOR
from ..errors import AOTIError, ArtifactError
from ..settings import KrylovSettings

GraphOf = Callable[[str], Graph]
Of = TypeVar("Of", bound="Bound")


@dataclass(frozen=True)
class Bound:
    """The residual graph with all but the unknowns bound; what the systems of all kinds share."""

    graphs: SystemGraphs
    # Givens, one tensor per group, `(rows, ...)`.
    g: Groups
    parameters: Sequence[Tensor]

    def residual(self, u: Groups) -> Groups:
        b = self.graphs.residual([*u, *self.g], self.parameters)
        check_arity(self.graphs.residual, b, self.graphs.residual_groups)
        return b

    def take(self: Of, rows: Tensor) -> Of:
        return type(self)(self.graphs, [x.index_select(0, rows) for x in self.g], self.parameters)


@dataclass(frozen=True)
class Blocks:
    """A Jacobian in blocks that a graph solves with; see `system.Linearisation`."""

    graph: Graph
    a: Groups
    u: Groups
    reusable: bool = True

    def solve(self, b: Groups) -> Groups:
        return on_sound_rows(self.graph, [*self.a, *b], self.u)

    def take(self, rows: Tensor) -> Linearisation:
        a, u = ([x.index_select(0, rows) for x in groups] for groups in (self.a, self.u))
        return Blocks(self.graph, a, u)


class Factors:
    """A dense Jacobian, factored when it is first solved with; see `system.Linearisation`."""

    reusable = True

    def __init__(self, a: Tensor, pivots: Tensor | None = None) -> None:
        self._a, self._pivots = a, pivots

    def solve(self, b: Groups) -> Groups:
        """See `system.Linearisation`; a row without a pivot comes back not finite."""
        if self._pivots is None:
            self._a, self._pivots = torch.linalg.lu_factor_ex(self._a)[:2]
        return [torch.linalg.lu_solve(self._a, self._pivots, b[0].unsqueeze(-1)).squeeze(-1)]

    def take(self, rows: Tensor) -> Linearisation:
        pivots = None if self._pivots is None else self._pivots.index_select(0, rows)
        return Factors(self._a.index_select(0, rows), pivots)


class DirectSystem(Bound):
    """A Jacobian graph and a graph of the direct solve; see `system.System`."""

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        graphs, rows = self.graphs, u[0].shape[0]
        assert graphs.jacobian is not None and graphs.solve is not None
        a, b = graphs.linearised(graphs.jacobian, u, self.g, self.parameters)
        a = [x if x.shape[0] == rows else x.expand(rows, *x.shape[1:]) for x in a]
        return b, Factors(a[0]) if graphs.factored else Blocks(graphs.solve, a, u)


class FusedSystem(Bound):
    """One graph of the whole step (older releases); see `system.System`."""

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        graphs, count = self.graphs, len(u)
        assert graphs.step is not None
        step = graphs.step
        if not graphs.returns_iterate:
            try:
                outputs = step([*u, *self.g], self.parameters)
            except ArtifactError:
                raise
            except AOTIError:
                pass
            else:
                check_arity(step, outputs, count + graphs.residual_groups)
                return outputs[count:], Direction(outputs[:count])
        found = on_sound_rows(lambda arguments: step(arguments, self.parameters)[:count], [*u, *self.g], u)
        if graphs.returns_iterate:
            found = [x - y for x, y in zip(found, u, strict=True)]
        return self.residual(u), Direction(found)


class GraphProducts(Bound):
    """Matrix-vector products and a preconditioner; see `krylov.Products`.

    Iterative solves enlarge what graphs round otherwise in the last rows of a call, those that do not fill a vector of
    the processor. So that a row is independent of the rest of the batch, calls are filled up to whole vectors, except
    where all is done as by neml2's C++ runtime.
    """

    def _run(
        self, graph: Graph, batched: Sequence[Tensor], parameters: Sequence[Tensor] = (), behind: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        rows = batched[0].shape[0]
        more = -rows % VECTOR
        if not rows or not more or self.graphs.as_native:
            return graph(batched, parameters, behind)
        filled = [[torch.cat([x, x[:1].expand(more, *x.shape[1:])]) for x in group] for group in (batched, behind)]
        outputs = graph(filled[0], parameters, filled[1])
        return [x[:rows] if x.shape[0] == rows + more else x for x in outputs]

    def residual(self, u: Groups) -> Groups:
        b = self._run(self.graphs.residual, [*u, *self.g], self.parameters)
        check_arity(self.graphs.residual, b, self.graphs.residual_groups)
        return b

    def product(self, u: Groups, v: Groups) -> Sequence[Tensor]:
        assert self.graphs.matvec is not None
        return self._run(self.graphs.matvec, [*u, *self.g], self.parameters, v)

    def set_up(self, u: Groups) -> Sequence[Tensor] | None:
        graph = self.graphs.precond_setup
        if graph is None or self.graphs.precond_apply is None:
            return None
        count = len(u) + len(self.g) + len(self.parameters)
        # neml2 traces the preconditioner without promoted parameters, although it may read them.
        takes_them = graph.signature is not None and len(graph.signature.arguments) == count
        return self._run(graph, [*u, *self.g], self.parameters if takes_them else ())

    def precondition(self, state: Sequence[Tensor], r: Tensor) -> Tensor:
        assert self.graphs.precond_apply is not None
        return self._run(self.graphs.precond_apply, [*state, r])[0]


def layout_of(groups: Sequence[GroupInfo]) -> Layout:
    """The layout that the solvers work on."""
    return tuple(Group(g.structure, g.sub_batch_shape) for g in groups)


class SystemGraphs:
    """The graphs of an implicit segment's system."""

    jacobian: Graph | None = None
    solve: Graph | None = None
    step: Graph | None = None
    matvec: Graph | None = None
    precond_setup: Graph | None = None
    precond_apply: Graph | None = None
    returns_iterate = False
    krylov: KrylovSettings | None = None

    def __init__(self, segment: ImplicitInfo, graph_of: GraphOf, device: torch.device, as_native: bool) -> None:
        self.as_native = as_native
        self.residual = graph_of(segment.residual)
        self.residual_groups, self.unknown_groups = len(segment.residuals), len(segment.unknowns)
        self.layouts = layout_of(segment.unknowns), layout_of(segment.residuals)
        groups = (*segment.unknowns, *segment.residuals)
        one_dense_block = len(groups) == 2 and all(group.structure == "dense" for group in groups)
        self.factored = False
        step = segment.step
        if isinstance(step, DirectStep):
            self.jacobian, self.solve = graph_of(step.jacobian), graph_of(step.solve)
            self.factored = one_dense_block and device.type == "cpu" and not as_native
        elif isinstance(step, FusedStep):
            self.step, self.returns_iterate = graph_of(step.file), step.returns_iterate
        else:
            assert isinstance(step, KrylovStep)
            self.matvec = graph_of(step.matvec)
            self.precond_setup = graph_of(step.precond_setup) if step.precond_setup else None
            self.precond_apply = graph_of(step.precond_apply) if step.precond_apply else None
            self.krylov = replace(step.settings, absolute_floor=as_native, together=as_native)

    def system(self, g: Groups, parameters: Sequence[Tensor]) -> System:
        """The system with givens and parameters bound; for one solve, since an iterative one keeps a preconditioner."""
        if self.krylov is not None:
            return KrylovSystem(GraphProducts(self, g, parameters), self.krylov, self.layouts)
        return (FusedSystem if self.step is not None else DirectSystem)(self, g, parameters)

    def linearised(self, graph: Graph, u: Groups, g: Groups, parameters: Sequence[Tensor]) -> tuple[Groups, Groups]:
        """What a graph of the Jacobian gives: its blocks, `(rows or 1, ...)`, and `b = -r`."""
        outputs, count = graph([*u, *g], parameters), self.residual_groups * self.unknown_groups
        check_arity(graph, outputs, count + self.residual_groups)
        return outputs[:count], outputs[count:]


def check_arity(graph: Graph, outputs: Sequence[Tensor], expected: int, role: str = "") -> None:
    """Refuse a graph that returns another number of tensors than the metadata tells."""
    if len(outputs) != expected:
        raise ArtifactError(
            f"{graph.file}: {role}returned {len(outputs)} outputs, expected {expected}. The package belongs to another "
            "model or to another compile; compile the model again with neml2-compile."
        )


def on_sound_rows(run: Callable[[Sequence[Tensor]], Groups], arguments: Sequence[Tensor], like: Groups) -> Groups:
    """Run a graph that refuses a batch for one row; the rows that it refuses on their own come back NaN."""
    rows = arguments[0].shape[0]
    try:
        return run(arguments)
    except ArtifactError:
        raise
    except AOTIError:
        if rows <= 1:
            return [torch.full_like(x, torch.nan) for x in like]
    half = rows // 2
    first = on_sound_rows(run, [x[:half] for x in arguments], [x[:half] for x in like])
    second = on_sound_rows(run, [x[half:] for x in arguments], [x[half:] for x in like])
    return [torch.cat(pair) for pair in zip(first, second, strict=True)]
