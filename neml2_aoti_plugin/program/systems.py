"""The nonlinear system of an implicit segment: its residual and its Newton direction, however they were compiled.

`evaluate` gives `b = -r` at the unknowns and what the direction needs besides (the Jacobian, if there is a graph of
it); `direction` solves `A du = b`. All tensors are lists of groups with one flat batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..artifact.schema import DirectStep, FusedStep, ImplicitSegment, KrylovStep
from ..errors import AOTIError, ArtifactError
from ..graphs.graph import Graph
from ..solve.krylovstep import KrylovStep as KrylovDirection
from .packing import layout_of

Groups = list[Tensor]
GraphOf = Callable[[str], Graph]


class System(Protocol):
    """What a Newton solve asks of a segment.

    `residual_apart` tells whether the residual alone costs less than `evaluate`, and `direct` whether besides a
    linearisation serves at other unknowns than those where it was evaluated.
    """

    residual_apart: bool
    direct: bool

    def evaluate(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> tuple[Groups, Groups]:
        """`b = -r` at `u`, and the linearisation there."""
        ...

    def residual(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> Groups:
        """`b = -r` at `u`."""
        ...

    def direction(self, u: Groups, g: Groups, tail: Sequence[Tensor], b: Groups, linear: Groups) -> Groups:
        """The step `du` from `u`; rows whose system is singular come back not finite.

        What is in `linear` may be replaced by what serves another `b` better.
        """
        ...

    def fresh(self) -> System:
        """The system for another solve, with nothing kept of the last one."""
        ...


class _Residual:
    """What all systems share: the residual graph."""

    def __init__(self, segment: ImplicitSegment, graph_of: GraphOf) -> None:
        self._residual_graph = graph_of(segment.residual)
        self._residuals = len(segment.residuals)
        self._unknowns = len(segment.unknowns)

    def residual(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> Groups:
        """See `System.residual`."""
        b = self._residual_graph([*u, *g], tail)
        check_arity(self._residual_graph, b, self._residuals)
        return b


class DirectSystem(_Residual):
    """A Jacobian graph and a graph of the direct solve."""

    residual_apart = direct = True

    def __init__(self, segment: ImplicitSegment, step: DirectStep, graph_of: GraphOf) -> None:
        super().__init__(segment, graph_of)
        self._jacobian, self._solve = graph_of(step.jacobian), graph_of(step.solve)
        self._blocks = self._residuals * self._unknowns

    def evaluate(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> tuple[Groups, Groups]:
        """See `System.evaluate`."""
        outputs = self._jacobian([*u, *g], tail)
        check_arity(self._jacobian, outputs, self._blocks + self._residuals)
        rows = u[0].shape[0]
        # A block that depends on nothing comes back once for all rows.
        a = [x if x.shape[0] == rows else x.expand(rows, *x.shape[1:]) for x in outputs[: self._blocks]]
        return outputs[self._blocks :], a

    def direction(self, u: Groups, g: Groups, tail: Sequence[Tensor], b: Groups, linear: Groups) -> Groups:
        """See `System.direction`."""
        return solve_rows(self._solve, linear, b, u)

    def fresh(self) -> DirectSystem:
        """See `System.fresh`."""
        return self


class DenseSystem(DirectSystem):
    """A Jacobian graph of one dense block, which is factored here: the factors serve another right-hand side."""

    def direction(self, u: Groups, g: Groups, tail: Sequence[Tensor], b: Groups, linear: Groups) -> Groups:
        """See `System.direction`."""
        # A row without pivot comes back not finite from either solve. For one row, a solve is as cheap as half of one.
        if len(linear) == 1 and u[0].shape[0] == 1:
            return [torch.linalg.solve_ex(linear[0], b[0].unsqueeze(-1)).result.squeeze(-1)]
        if len(linear) == 1:
            linear[:] = torch.linalg.lu_factor_ex(linear[0])[:2]
        return [torch.linalg.lu_solve(*linear, b[0].unsqueeze(-1)).squeeze(-1)]


class FusedSystem(_Residual):
    """One graph of the whole step (older releases)."""

    direct = False

    def __init__(self, segment: ImplicitSegment, step: FusedStep, graph_of: GraphOf) -> None:
        super().__init__(segment, graph_of)
        self._step, self._returns_iterate = graph_of(step.file), step.returns_iterate
        self.residual_apart = not self._returns_iterate

    def evaluate(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> tuple[Groups, Groups]:
        """See `System.evaluate`; the step itself stands in for the linearisation where it comes with `b`."""
        if self._returns_iterate:
            return self.residual(u, g, tail), []
        try:
            outputs = self._step([*u, *g], tail)
        except ArtifactError:
            raise
        except AOTIError:
            return self.residual(u, g, tail), []
        check_arity(self._step, outputs, self._unknowns + self._residuals)
        return outputs[self._unknowns :], outputs[: self._unknowns]

    def direction(self, u: Groups, g: Groups, tail: Sequence[Tensor], b: Groups, linear: Groups) -> Groups:
        """See `System.direction`."""
        if linear:
            return linear
        count = self._unknowns

        def step(arguments: Sequence[Tensor]) -> list[Tensor]:
            return self._step(arguments, tail)[:count]

        found = on_sound_rows(step, [*u, *g], u)
        return [x - y for x, y in zip(found, u, strict=True)] if self._returns_iterate else found

    def fresh(self) -> FusedSystem:
        """See `System.fresh`."""
        return self


class KrylovSystem(_Residual):
    """Matrix-vector products and an iterative solve."""

    residual_apart = direct = False

    def __init__(self, segment: ImplicitSegment, step: KrylovStep, graph_of: GraphOf) -> None:
        super().__init__(segment, graph_of)
        self._settings = step.settings
        self._matvec = graph_of(step.matvec)
        self._setup = graph_of(step.precond_setup) if step.precond_setup else None
        self._apply = graph_of(step.precond_apply) if step.precond_apply else None
        self._layouts = layout_of(segment.unknowns), layout_of(segment.residuals)
        self._kept: tuple[Groups, KrylovDirection] | None = None
        self._b: Groups = []

    def evaluate(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> tuple[Groups, Groups]:
        """See `System.evaluate`."""
        return self.residual(u, g, tail), []

    def direction(self, u: Groups, g: Groups, tail: Sequence[Tensor], b: Groups, linear: Groups) -> Groups:
        """See `System.direction`."""
        # The preconditioner belongs to the rows that it was set up for; another choice of rows starts afresh.
        if self._kept is None or self._kept[0] is not g:
            self._kept = (g, self._iteration(g, tail))
        self._b = b
        return self._kept[1](u)[0]

    def _iteration(self, g: Groups, tail: Sequence[Tensor]) -> KrylovDirection:
        matvec, setup, apply = self._matvec, self._setup, self._apply
        # neml2 traces the preconditioner without promoted parameters, although it may read them.
        setup_tail = tail if setup is not None and _takes(setup, len(self._layouts[0]) + len(g) + len(tail)) else ()
        return KrylovDirection(
            lambda u: self._b,
            lambda u, v: matvec([*u, *g], tail, v),
            self._settings,
            *self._layouts,
            precond_setup=(lambda u: setup([*u, *g], setup_tail)) if setup is not None else None,
            precond_apply=(lambda state, r: apply([*state, r])[0]) if apply is not None else None,
        )

    def fresh(self) -> KrylovSystem:
        """See `System.fresh`."""
        clone = object.__new__(KrylovSystem)
        clone.__dict__.update(self.__dict__, _kept=None)
        return clone


def _takes(graph: Graph, count: int) -> bool:
    return graph.signature is not None and len(graph.signature.arguments) == count


def system_of(segment: ImplicitSegment, graph_of: GraphOf, device: torch.device, as_native: bool = False) -> System:
    """The system of a segment; `as_native` solves by the graphs alone, and as neml2's C++ runtime where it iterates."""
    if isinstance(segment.step, DirectStep):
        groups = (*segment.unknowns, *segment.residuals)
        one = len(groups) == 2 and all(group.structure == "dense" for group in groups)
        kind = DenseSystem if one and device.type == "cpu" and not as_native else DirectSystem
        return kind(segment, segment.step, graph_of)
    if isinstance(segment.step, FusedStep):
        return FusedSystem(segment, segment.step, graph_of)
    settings = replace(segment.step.settings, absolute_floor=as_native)
    return KrylovSystem(segment, replace(segment.step, settings=settings), graph_of)


def check_arity(graph: Graph, outputs: Sequence[Tensor], expected: int) -> None:
    """Refuse a graph that returns another number of tensors than the metadata tells."""
    if len(outputs) != expected:
        raise ArtifactError(
            f"{graph.file}: returned {len(outputs)} outputs, expected {expected}. The package belongs to "
            "another model or "
            "to another compile; compile the model again with neml2-compile."
        )


def solve_rows(graph: Graph, a: Groups, b: Groups, like: Groups) -> Groups:
    """Solve `A x = b`; rows where `A` is singular come back not finite.

    Args:
        graph: the compiled solve; under some releases of torch it refuses the whole batch for one singular row.
        a: the blocks of the matrix.
        b: the right-hand side.
        like: tensors of the shapes of `x`.

    Returns:
        `x`.
    """
    if len(a) == 1:
        try:
            return graph([*a, *b])
        except ArtifactError:
            raise
        except AOTIError:
            singular = torch.linalg.solve_ex(a[0], b[0].unsqueeze(-1)).info != 0
            if not singular.any():
                raise
            mended = torch.where(
                singular[:, None, None], torch.eye(a[0].shape[-1], dtype=a[0].dtype, device=a[0].device), a[0]
            )
            found = graph([mended, *b])
            return [x.masked_fill(singular[:, None], torch.nan) for x in found]
    return on_sound_rows(graph, [*a, *b], like)


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
