"""Systems of equations that neml2's eager solvers hand over as callables, which take all rows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .._solve.preconditioned import Products
from .._solve.system import Direction, Groups, Linearisation, System

Residual = Callable[[list[Tensor]], list[Tensor]]
Step = Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]
JacobianProduct = Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]
PreconditionerSetup = Callable[[list[Tensor]], Sequence[Tensor]]
PreconditionerApply = Callable[[Sequence[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class CallableSystem:
    """A system that neml2 gives as callables, which take all rows; see `solve.system.System`.

    Args:
        residual_fn: `b = -r` at given unknowns.
        step_fn: the Newton step and `b` at given unknowns.
    """

    residual_fn: Residual
    step_fn: Step

    def residual(self, u: Groups) -> Groups:
        """See `solve.system.System`."""
        return self.residual_fn(u)

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        """See `solve.system.System`."""
        du, b = self.step_fn(u)
        return b, Direction(du)

    def take(self, rows: Tensor) -> System:
        """See `solve.system.System`."""
        raise NotImplementedError("neml2's callables take all rows")


@dataclass(frozen=True)
class CallableProducts:
    """Products and a preconditioner that neml2 gives as callables; see `solve.preconditioned.Products`."""

    residual_fn: Residual
    matvec_fn: JacobianProduct
    setup_fn: PreconditionerSetup | None
    apply_fn: PreconditionerApply | None

    def residual(self, u: Groups) -> Groups:
        """See `solve.preconditioned.Products`."""
        return self.residual_fn(u)

    def product(self, u: Groups, v: Groups) -> Sequence[Tensor]:
        """See `solve.preconditioned.Products`."""
        return self.matvec_fn(u, v)

    def set_up(self, u: Groups) -> Sequence[Tensor] | None:
        """See `solve.preconditioned.Products`."""
        return self.setup_fn(u) if self.setup_fn is not None and self.apply_fn is not None else None

    def precondition(self, state: Sequence[Tensor], r: Tensor) -> Tensor:
        """See `solve.preconditioned.Products`."""
        assert self.apply_fn is not None
        return self.apply_fn(state, r)

    def take(self, rows: Tensor) -> Products:
        """See `solve.preconditioned.Products`."""
        raise NotImplementedError("neml2's callables take all rows")
