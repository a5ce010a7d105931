"""The Newton step by an iterative linear solve: flat vectors made of groups, and a preconditioner that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import AOTIError
from ..settings import KrylovSettings
from .groups import Layout
from .krylov import solve_linear
from .linesearch import Residual

JacobianProduct = Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]
PreconditionerSetup = Callable[[list[Tensor]], Sequence[Tensor]]
PreconditionerApply = Callable[[Sequence[Tensor], Tensor], Tensor]


class KrylovStep:
    """The Newton step of one nonlinear solve; made anew for each solve, for it keeps the preconditioner.

    Calling it with the unknowns gives the step `du` and `b = -r` there. A Newton loop that takes its residuals from
    `residual` of the same object spares the step from evaluating them again.

    Args:
        residual: `b = -r` at given unknowns, one tensor per residual group.
        matvec: `(u, v) -> A(u) v`, by groups.
        settings: the linear solve and how long a preconditioner is kept.
        unknown_layout: the unknown groups; dense only.
        residual_layout: the residual groups; dense only.
        precond_setup: the state of the preconditioner at given unknowns; none for no preconditioner.
        precond_apply: `(state, r) -> M^-1 r` on flat vectors `(rows, N)`.

    Raises:
        AOTIError: a group is not dense.
    """

    def __init__(
        self,
        residual: Residual,
        matvec: JacobianProduct,
        settings: KrylovSettings,
        unknown_layout: Layout,
        residual_layout: Layout,
        precond_setup: PreconditionerSetup | None = None,
        precond_apply: PreconditionerApply | None = None,
    ) -> None:
        if any(group.structure != "dense" for group in (*unknown_layout, *residual_layout)):
            raise AOTIError(
                "an iterative linear solver takes dense groups only; a model whose unknowns are solved per site "
                "(a sub-batched model) needs a direct linear solver"
            )
        self._residual = residual
        self._matvec = matvec
        self._settings = settings
        self._setup = precond_setup
        self._apply = precond_apply
        self._state: Sequence[Tensor] | None = None
        self._iterations = 0
        self._last: tuple[list[Tensor], list[Tensor]] | None = None

    def residual(self, u: list[Tensor]) -> list[Tensor]:
        """`b = -r` at `u`, remembered for a step from the same list."""
        b = self._residual(u)
        self._last = (u, b)
        return b

    def __call__(self, u: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The step `du` and `b = -r` at `u`."""
        b = self._last[1] if self._last is not None and self._last[0] is u else self._residual(u)
        return self.direction(u, b), b

    def direction(self, u: list[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
        """The step `du` at `u`, where `b = -r` is known.

        Args:
            u: unknowns; the batch shape may be less than that of `b`.
            b: one tensor `(*batch, n)` per residual group.

        Returns:
            One tensor `(*batch, n)` per unknown group.
        """
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in b))
        widths = [x.shape[-1] for x in u]

        def groups(flat: Tensor) -> list[Tensor]:
            # A compiled graph takes contiguous tensors only; a direction of GMRES is a slice.
            return [part.reshape(*batch, part.shape[-1]).contiguous() for part in flat.split(widths, -1)]

        def matvec(v: Tensor) -> Tensor:
            return _flat(self._matvec(u, groups(v)), batch)

        solution = solve_linear(matvec, _flat(b, batch), self._settings, self._preconditioner(u))
        self._iterations = solution.iterations
        return groups(solution.x)

    def _preconditioner(self, u: list[Tensor]) -> Callable[[Tensor], Tensor] | None:
        setup, apply = self._setup, self._apply
        if setup is None or apply is None:
            return None
        kept = self._settings.cache_strategy == "chord" or (
            self._settings.cache_strategy == "max_its" and self._iterations <= self._settings.cache_max_its
        )
        if self._state is None or not kept:
            self._state = setup(u)
        state = self._state
        return lambda r: apply(state, r)


def _flat(groups: Sequence[Tensor], batch: torch.Size) -> Tensor:
    """Join groups `(*batch, n_k)` into one `(rows, N)`."""
    if len(groups) == 1:
        return groups[0].expand(*batch, -1).reshape(batch.numel(), -1)
    return torch.cat([x.expand(*batch, -1) for x in groups], -1).reshape(batch.numel(), -1)
