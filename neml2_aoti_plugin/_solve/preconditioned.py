"""Systems whose direction comes from an iterative linear solve, with a preconditioner that is kept where it may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import AOTIError
from ..settings import KrylovSettings
from .groups import Layout
from .krylov import solve_linear
from .system import Groups, Linearisation, System


class Products(Protocol):
    """What an iterative solve asks of a system of equations, with all but the unknowns bound."""

    def residual(self, u: Groups) -> Groups:
        """`b = -r` at `u`."""
        ...

    def product(self, u: Groups, v: Groups) -> Sequence[Tensor]:
        """The Jacobian at `u` times `v`."""
        ...

    def set_up(self, u: Groups) -> Sequence[Tensor] | None:
        """The state of the preconditioner at `u`; None where there is none."""
        ...

    def precondition(self, state: Sequence[Tensor], r: Tensor) -> Tensor:
        """`M^-1 r` on flat vectors `(rows, N)`."""
        ...

    def take(self, rows: Tensor) -> Products:
        """The same for some rows."""
        ...


@dataclass(frozen=True)
class KrylovLinearisation:
    """The products at some unknowns, with a preconditioner; see `system.Linearisation`."""

    # That it belongs to, which is told how many iterations a solve took.
    system: KrylovSystem
    u: Groups
    # Of the preconditioner; None for none.
    state: Sequence[Tensor] | None
    reusable: bool = True

    def solve(self, b: Groups) -> Groups:
        """See `system.Linearisation`."""
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in b))
        widths = [x.shape[-1] for x in self.u]
        products, state = self.system.products, self.state

        def groups(flat: Tensor) -> Groups:
            # A compiled graph takes contiguous tensors only; a direction of GMRES is a slice.
            return [part.reshape(*batch, part.shape[-1]).contiguous() for part in flat.split(widths, -1)]

        def matvec(v: Tensor) -> Tensor:
            return _flat(products.product(self.u, groups(v)), batch)

        inverse: Callable[[Tensor], Tensor] | None = None
        if state is not None:
            inverse = lambda r: products.precondition(state, r)  # noqa: E731
        solution = solve_linear(matvec, _flat(b, batch), self.system.settings, inverse)
        self.system.used = solution.used
        return groups(solution.x)

    def take(self, rows: Tensor) -> Linearisation:
        """See `system.Linearisation`."""
        u = [x.index_select(0, rows) for x in self.u]
        return KrylovLinearisation(self.system.some(rows), u, _some(self.state, rows))


class KrylovSystem:
    """A system that is solved iteratively; made anew for each solve, for it keeps the preconditioner."""

    def __init__(self, products: Products, settings: KrylovSettings, layouts: tuple[Layout, Layout]) -> None:
        if any(group.structure != "dense" for layout in layouts for group in layout):
            raise AOTIError(
                "an iterative linear solver takes dense groups only; a model whose unknowns are solved per site (a "
                "sub-batched model) needs a direct linear solver"
            )
        self.products, self.settings = products, settings
        self._layouts = layouts
        self._state: Sequence[Tensor] | None = None
        # Iterations that each row took in the last linear solve; None before the first.
        self.used: Tensor | None = None
        self._last: tuple[Groups, Groups] | None = None

    def residual(self, u: Groups) -> Groups:
        """`b = -r` at `u`, remembered for a linearisation at the same list."""
        b = self.products.residual(u)
        self._last = (u, b)
        return b

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        """See `system.System`."""
        b = self._last[1] if self._last is not None and self._last[0] is u else self.products.residual(u)
        self._state = self._preconditioner(u)
        return b, KrylovLinearisation(self, u, self._state)

    def _preconditioner(self, u: Groups) -> Sequence[Tensor] | None:
        """The preconditioner that was kept, or a new one, by rows where these do not share it."""
        strategy, state, used = self.settings.cache_strategy, self._state, self.used
        if state is None or strategy == "none":
            return self.products.set_up(u)
        if strategy == "chord" or used is None:
            return state
        stale = used > self.settings.cache_max_its
        if bool(stale.all()) or (self.settings.together and bool(stale.any())):
            return self.products.set_up(u)
        rows = stale.nonzero().squeeze(-1)
        if not len(rows):
            return state
        fresh = self.products.take(rows).set_up([x.index_select(0, rows) for x in u])
        assert fresh is not None, "there is a preconditioner"
        return [old.index_copy(0, rows, new) for old, new in zip(state, fresh, strict=True)]

    def take(self, rows: Tensor) -> System:
        """See `system.System`."""
        return self.some(rows)

    def some(self, rows: Tensor) -> KrylovSystem:
        """The system of some rows; what was kept goes along."""
        some = KrylovSystem(self.products.take(rows), self.settings, self._layouts)
        some._state = _some(self._state, rows)
        some.used = None if self.used is None else self.used.index_select(0, rows)
        return some


def _some(state: Sequence[Tensor] | None, rows: Tensor) -> Sequence[Tensor] | None:
    """The state of a preconditioner for some rows."""
    return None if state is None else [x.index_select(0, rows) for x in state]


def _flat(groups: Sequence[Tensor], batch: Any) -> Tensor:
    """Join groups `(*batch, n_k)` into one `(rows, N)`."""
    if len(groups) == 1:
        return groups[0].expand(*batch, -1).reshape(batch.numel(), -1)
    return torch.cat([x.expand(*batch, -1) for x in groups], -1).reshape(batch.numel(), -1)
