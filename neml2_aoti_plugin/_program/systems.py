"""The nonlinear system of an implicit segment as the solver takes it, however it was compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .._artifact.schema import DirectStep, FusedStep, GroupInfo, ImplicitInfo, KrylovStep
from .._graphs.graph import Graph
from .._solve.krylov import KrylovSystem
from .._solve.system import Direction, Group, Groups, Layout, Linearisation, System, taken
from .._solve.tables import VECTOR
from ..errors import AOTIError, ArtifactError

Of = TypeVar("Of", bound="GraphSystem")


@dataclass(frozen=True)
class GraphSystem:
    """What the systems of all kinds share: the graphs, by name of the package, and all but the unknowns bound."""

    spec: ImplicitInfo
    graphs: Mapping[str, Graph]
    # Givens, one tensor per group, `(rows, ...)`.
    g: Groups
    parameters: Sequence[Tensor]
    # Whether all is done as by neml2's C++ runtime.
    as_native: bool

    def residual(self, u: Groups) -> Groups:
        """`b = -r`; see `system.System`."""
        graph = self.graphs[self.spec.residual]
        b = graph([*u, *self.g], self.parameters)
        check_arity(graph, b, len(self.spec.residuals))
        return b

    def take(self: Of, rows: Tensor) -> Of:
        """The system of some rows."""
        return replace(self, g=taken(self.g, rows))


@dataclass(frozen=True)
class BlockLinearisation:
    """A Jacobian in blocks that a graph solves with; see `system.Linearisation`."""

    graph: Graph
    a: Groups
    u: Groups
    reusable: bool = True

    def solve(self, b: Groups) -> Groups:
        return on_sound_rows(self.graph, [*self.a, *b], self.u)

    def take(self, rows: Tensor) -> Linearisation:
        return BlockLinearisation(self.graph, taken(self.a, rows), taken(self.u, rows))


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


class DirectSystem(GraphSystem):
    """A Jacobian graph and a graph of the direct solve; see `system.System`."""

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        step, rows = self.spec.step, u[0].shape[0]
        assert isinstance(step, DirectStep), "made for such steps alone"
        a, b = jacobian_blocks(self.spec, self.graphs[step.jacobian], [*u, *self.g], self.parameters)
        a = [x if x.shape[0] == rows else x.expand(rows, *x.shape[1:]) for x in a]
        factored = is_factored(self.spec, u[0].device, self.as_native)
        return b, Factors(a[0]) if factored else BlockLinearisation(self.graphs[step.solve], a, u)


class FusedSystem(GraphSystem):
    """One graph of the whole step (older releases); see `system.System`."""

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        step, count = self.spec.step, len(u)
        assert isinstance(step, FusedStep), "made for such steps alone"
        graph = self.graphs[step.file]
        if not step.returns_iterate:
            try:
                outputs = graph([*u, *self.g], self.parameters)
            except ArtifactError:
                raise
            except AOTIError:
                pass
            else:
                check_arity(graph, outputs, count + len(self.spec.residuals))
                return outputs[count:], Direction(outputs[:count])
        found = on_sound_rows(lambda arguments: graph(arguments, self.parameters)[:count], [*u, *self.g], u)
        if step.returns_iterate:
            found = [x - y for x, y in zip(found, u, strict=True)]
        return self.residual(u), Direction(found)


class GraphProducts(GraphSystem):
    """Matrix-vector products and a preconditioner; see `krylov.Products`.

    Iterative solves enlarge what graphs round otherwise in the last rows of a call, those that do not fill a vector of
    the processor. So that a row is independent of the rest of the batch, calls are filled up to whole vectors, except
    where all is done as by neml2's C++ runtime.
    """

    @property
    def step(self) -> KrylovStep:
        """The graphs of the products by their names."""
        found = self.spec.step
        assert isinstance(found, KrylovStep), "made for such steps alone"
        return found

    def _run(
        self, file: str, batched: Sequence[Tensor], parameters: Sequence[Tensor] = (), behind: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        graph, rows = self.graphs[file], batched[0].shape[0]
        more = -rows % VECTOR
        if not rows or not more or self.as_native:
            return graph(batched, parameters, behind)
        filled = [[torch.cat([x, x[:1].expand(more, *x.shape[1:])]) for x in group] for group in (batched, behind)]
        outputs = graph(filled[0], parameters, filled[1])
        return [x[:rows] if x.shape[0] == rows + more else x for x in outputs]

    def residual(self, u: Groups) -> Groups:
        b = self._run(self.spec.residual, [*u, *self.g], self.parameters)
        check_arity(self.graphs[self.spec.residual], b, len(self.spec.residuals))
        return b

    def product(self, u: Groups, v: Groups) -> Sequence[Tensor]:
        return self._run(self.step.matvec, [*u, *self.g], self.parameters, v)

    def set_up(self, u: Groups) -> Sequence[Tensor] | None:
        file = self.step.precond_setup
        if file is None:
            return None
        signature, count = self.graphs[file].signature, len(u) + len(self.g) + len(self.parameters)
        # neml2 traces the preconditioner without promoted parameters, although it may read them.
        takes_them = signature is not None and len(signature.arguments) == count
        return self._run(file, [*u, *self.g], self.parameters if takes_them else ())

    def precondition(self, state: Sequence[Tensor], r: Tensor) -> Tensor:
        assert self.step.precond_apply is not None
        return self._run(self.step.precond_apply, [*state, r])[0]


def system_of(
    spec: ImplicitInfo,
    graphs: Mapping[str, Graph],
    g: Groups,
    parameters: Sequence[Tensor],
    layouts: tuple[Layout, Layout],
    as_native: bool,
) -> System:
    """The system of a segment; for one solve, since an iterative one keeps a preconditioner."""
    bound, step = (spec, graphs, g, parameters, as_native), spec.step
    if isinstance(step, KrylovStep):
        settings = replace(step.settings, absolute_floor=as_native, together=as_native)
        return KrylovSystem(GraphProducts(*bound), settings, layouts)
    return FusedSystem(*bound) if isinstance(step, FusedStep) else DirectSystem(*bound)


def layout_of(groups: Sequence[GroupInfo]) -> Layout:
    """The layout that the solvers work on."""
    return tuple(Group(g.structure, g.sub_batch_shape) for g in groups)


def is_factored(spec: ImplicitInfo, device: torch.device, as_native: bool) -> bool:
    """Whether the Jacobian is one dense block, which is factored here."""
    structures = [group.structure for group in (*spec.unknowns, *spec.residuals)]
    direct = isinstance(spec.step, DirectStep) and structures == ["dense", "dense"]
    return direct and device.type == "cpu" and not as_native


def jacobian_blocks(
    spec: ImplicitInfo, graph: Graph, variables: Groups, parameters: Sequence[Tensor]
) -> tuple[Groups, Groups]:
    """What a graph of the Jacobian gives: its blocks, `(rows or 1, ...)`, and `b = -r`."""
    outputs, count = graph(variables, parameters), len(spec.residuals) * len(spec.unknowns)
    check_arity(graph, outputs, count + len(spec.residuals))
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
