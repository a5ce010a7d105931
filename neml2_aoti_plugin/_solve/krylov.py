"""Iterative linear solves of a batch of systems `A x = b`, given only the products `A v`.

Tensors are flat: `(rows, N)`. The rows are independent systems that share the iterations: one that is done waits for
the others, and its solution is that of the iteration at which it was done.

Both methods take the iterates of neml2's C++ runtime, as long as that divides by nothing below the machine
epsilon: it takes such a divisor for zero, whatever the units, so that a residual that is small in its units (a strain)
is solved wrongly or not at all. Here only what is small beside the right-hand side counts as zero.

At the end stand nonlinear systems whose directions come from such solves, with a preconditioner that is kept where it
may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .. import _log as log
from ..errors import AOTIError
from ..settings import KrylovSettings
from .system import Groups, Layout, Linearisation, taken

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearSolution:
    """What an iterative linear solve came to."""

    # `(rows, N)`; the last iterate where the solve did not converge.
    x: Tensor
    iterations: int
    # Rows that have converged, `(rows,)`.
    done: Tensor
    # Iterations that each row took part in, `(rows,)`.
    used: Tensor


def solve_linear(matvec: Operator, b: Tensor, settings: KrylovSettings, minv: Operator | None = None) -> LinearSolution:
    """Solve `A x = b` by the method that the settings name, from `x = 0`.

    A solve that does not converge is no error: the channel `linear` carries a warning.
    """
    solution = (gmres if settings.method == "gmres" else bicgstab)(matvec, b, settings, minv)
    if log.enabled("linear", "warning"):
        left = int((~solution.done).sum())
        if left:
            outcome = f"linear solve NOT converged (iters={solution.iterations}, {left} element(s) at max_its)"
            log.emit("linear", "warning", outcome)
        else:
            log.emit("linear", "info", f"linear solve: iters={solution.iterations}, converged")
    return solution


class _Test:
    """When a row needs no further iteration; made from the norms of the right-hand sides."""

    def __init__(self, b_norm: Tensor, settings: KrylovSettings) -> None:
        limits = torch.finfo(b_norm.dtype)
        self._scale = b_norm.clamp(min=limits.eps if settings.absolute_floor else limits.tiny)
        self._settings, self.together = settings, settings.together

    def passed(self, norm: Tensor) -> Tensor:
        # Asked the other way round, so that a row that has become NaN does not hold up the others.
        failed = norm / self._scale >= self._settings.rel_tol
        return ~(failed & (norm >= self._settings.abs_tol) if self._settings.abs_tol > 0 else failed)

    def report(self, iteration: int, norm: Tensor) -> None:
        if log.enabled("linear", "debug"):
            largest, relative = torch.stack((norm.amax(), (norm / self._scale).amax())).tolist()
            log.emit("linear", "debug", f"  krylov iter={iteration} max|r|={largest:.6e} max|r|/|b|={relative:.6e}")

    def solution(self, x: Tensor, iterations: int, passed: Tensor, used: Tensor) -> LinearSolution:
        return LinearSolution(x, iterations, passed & (x.sum(-1) + self._scale).isfinite(), used)


def gmres(matvec: Operator, b: Tensor, settings: KrylovSettings, minv: Operator | None = None) -> LinearSolution:
    """Restarted GMRES, preconditioned from the left.

    Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., algorithm 9.4; classical Gram-Schmidt, twice; the
    least-squares problem is kept triangular by Givens rotations. The test compares the norm of the preconditioned
    residual with that of the plain right-hand side, as neml2 does; `x = 0` is accepted only if the plain residual,
    which is `b` there, passes too (otherwise a preconditioner of small norm would end the solve before it began).
    """
    apply = minv or (lambda r: r)
    b_norm = _norm(b)
    test = _Test(b_norm, settings)
    x = torch.zeros_like(b)
    r = apply(b)
    beta = _norm(r)
    done = test.passed(torch.maximum(beta, b_norm))
    used, by_row = 0, torch.zeros_like(done, dtype=torch.int64)
    while used < settings.max_its and not done.all():
        if used:
            r = apply(b - matvec(x))
            beta = _norm(r)
            done = done | test.passed(beta)
            if done.all():
                break
        width = min(max(settings.restart, 1), settings.max_its - used)
        dx, done, used, part = _gmres_cycle(lambda v: apply(matvec(v)), r, beta, done, used, width, test)
        x, by_row = x + dx, by_row + part
    return test.solution(x, used, done, by_row)


def _gmres_cycle(
    operator: Operator, r: Tensor, beta: Tensor, done: Tensor, used: int, width: int, test: _Test
) -> tuple[Tensor, Tensor, int, Tensor]:
    """One cycle of GMRES from the preconditioned residual `r`.

    Gives the correction, the rows done, the iterations used so far, and in how many of this cycle each row took part.
    """
    rows, n = r.shape
    eps = torch.finfo(r.dtype).eps
    # Room for a few directions, doubled when full: most solves end long before the restart width.
    basis = r.new_empty(rows, min(width, 7) + 1, n)
    basis[:, 0] = r / beta.clamp(min=torch.finfo(r.dtype).tiny).unsqueeze(-1)
    rotations: list[tuple[Tensor, Tensor]] = []
    columns: list[Tensor] = []
    projected = [beta]
    part = torch.zeros_like(done, dtype=torch.int64)
    for j in range(width):
        part += ~done
        w = operator(basis[:, j])
        span = basis[:, : j + 1]
        h = _product(span, w, test.together)
        w = w - _product(span.mT, h, test.together)
        again = _product(span, w, test.together)
        w = w - _product(span.mT, again, test.together)
        column = list((h + again).unbind(-1))
        below = _norm(w)

        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        length = (column[j] * column[j] + below * below).sqrt().clamp(min=eps)
        c, s = column[j] / length, below / length
        rotations.append((c, s))
        column[j] = c * column[j] + s * below
        columns.append(torch.stack(column, -1))
        projected.append(-s * projected[j])
        projected[j] = c * projected[j]

        used += 1
        error = projected[-1].abs()
        done = done | test.passed(error)
        test.report(used, error)
        if j + 1 == width or done.all():
            break
        if j + 1 == basis.shape[1]:
            basis = torch.cat((basis, torch.empty_like(basis)), 1)
        basis[:, j + 1] = w / below.clamp(min=eps).unsqueeze(-1)

    size = len(columns)
    triangle = torch.stack([torch.nn.functional.pad(column, (0, size - column.shape[-1])) for column in columns], -1)
    triangle.diagonal(dim1=-2, dim2=-1).add_(eps)
    right = torch.stack(projected[:size], -1)
    if not test.together:
        # Directions found after a row was done are none of its own.
        right = torch.where(torch.arange(size, device=r.device) < part.unsqueeze(-1), right, 0.0)
    y = torch.linalg.solve_triangular(triangle, right.unsqueeze(-1), upper=True).squeeze(-1)
    return _product(basis[:, :size].mT, y, test.together), done, used, part


def bicgstab(matvec: Operator, b: Tensor, settings: KrylovSettings, minv: Operator | None = None) -> LinearSolution:
    """BiCGStab, preconditioned from the right, so that its residual is that of the system.

    van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992) 631-644. The iteration works on `b` divided by a power of two,
    which brings its largest entry near 1 and changes no digit, so that inner products can be told from zero.
    """
    apply = minv or (lambda r: r)
    eps = torch.finfo(b.dtype).eps
    least = eps if settings.absolute_floor else eps * eps
    together = settings.together
    exponent = torch.frexp(b.abs().amax(-1)).exponent.unsqueeze(-1)
    if settings.absolute_floor:
        exponent = torch.zeros_like(exponent)
    shadow = r = torch.ldexp(b, -exponent)
    norm = _norm(r, exponent)
    test = _Test(norm, settings)
    done = test.passed(norm)
    x = torch.zeros_like(b)
    v = p = torch.zeros_like(b)
    rho = alpha = omega = torch.ones_like(norm).unsqueeze(-1)
    left = len(b) - int(done.sum())
    used, by_row = 0, torch.zeros_like(done, dtype=torch.int64)
    while used < settings.max_its and left:
        rho_old, rho = rho, _dot(shadow, r, together)
        beta = (rho / _away_from_zero(rho_old, least)) * (alpha / _away_from_zero(omega, least))
        p_new = r + beta * (p - omega * v)
        # A row that is done keeps its direction, so that nothing it computes from it runs away.
        p = p_new if left == len(b) else torch.where(done.unsqueeze(-1), p, p_new)
        towards = apply(p)
        v = matvec(towards)
        alpha = rho / _away_from_zero(_dot(shadow, v, together), least)
        s = r - alpha * v
        sideways = apply(s)
        t = matvec(sideways)
        omega = _dot(t, s, together) / _dot(t, t, together).clamp(min=least)
        x_new = x + alpha * towards + omega * sideways
        r_new = s - omega * t
        if left == len(b):
            x, r = x_new, r_new
        else:
            x = torch.where(done.unsqueeze(-1), x, x_new)
            r = torch.where(done.unsqueeze(-1), r, r_new)
        used, by_row = used + 1, by_row + ~done
        norm = _norm(r, exponent)
        done = done | test.passed(norm)
        test.report(used, norm)
        left = len(b) - int(done.sum())
    return test.solution(torch.ldexp(x, exponent), used, done, by_row)


def _norm(v: Tensor, exponent: Tensor | None = None) -> Tensor:
    """Norm of each row, times a power of two."""
    norm = v.square().sum(-1).sqrt()
    return norm if exponent is None else torch.ldexp(norm, exponent.squeeze(-1))


def _product(matrix: Tensor, vector: Tensor, together: bool) -> Tensor:
    """Each row's matrix `(rows, m, k)` times its vector `(rows, k)`, `(rows, m)`.

    BiCGStab magnifies a difference in the last bit: rows that are together take the sum as neml2's C++ runtime does,
    by a product of matrices, which rounds a row by the number of rows; others in the order of the entries.
    """
    if together:
        return torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)
    terms = matrix * vector.unsqueeze(-2)
    return terms.cumsum(-1)[..., -1] if terms.shape[-1] else terms.sum(-1)


def _dot(a: Tensor, b: Tensor, together: bool) -> Tensor:
    """Product of each row with its partner, `(rows, 1)`."""
    return _product(a.unsqueeze(-2), b, together)


def _away_from_zero(d: Tensor, least: float) -> Tensor:
    """Replace magnitudes below `least` by that, with the sign kept; zero counts as positive."""
    return torch.where(d < 0, d.clamp(max=-least), d.clamp(min=least))


class Products(Protocol):
    """What an iterative solve asks of a system of equations, with all but the unknowns bound."""

    def residual(self, u: Groups) -> Groups:
        """`b = -r` at `u`."""

    def product(self, u: Groups, v: Groups) -> Sequence[Tensor]:
        """The Jacobian at `u` times `v`."""

    def set_up(self, u: Groups) -> Sequence[Tensor] | None:
        """The state of the preconditioner at `u`; None where there is none."""

    def precondition(self, state: Sequence[Tensor], r: Tensor) -> Tensor:
        """`M^-1 r` on flat vectors `(rows, N)`."""

    def take(self, rows: Tensor) -> Products:
        """The same for some rows."""


@dataclass(frozen=True)
class KrylovLinearisation:
    """The products at some unknowns, with a preconditioner; see `system.Linearisation`."""

    # Is told how many iterations a solve took.
    system: KrylovSystem
    u: Groups
    reusable: bool = True

    def solve(self, b: Groups) -> Groups:
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in b))
        widths = [x.shape[-1] for x in self.u]
        products, state = self.system.products, self.system.state

        def groups(flat: Tensor) -> Groups:
            # A compiled graph takes contiguous tensors only; a direction of GMRES is a slice.
            return [part.reshape(*batch, part.shape[-1]).contiguous() for part in flat.split(widths, -1)]

        def flat(groups: Sequence[Tensor]) -> Tensor:
            return torch.cat([x.expand(*batch, -1) for x in groups], -1).reshape(batch.numel(), -1)

        inverse = None if state is None else partial(products.precondition, state)
        solution = solve_linear(
            lambda v: flat(products.product(self.u, groups(v))), flat(b), self.system.settings, inverse
        )
        self.system.used = solution.used
        return groups(solution.x)

    def take(self, rows: Tensor) -> Linearisation:
        return KrylovLinearisation(self.system.take(rows), taken(self.u, rows))


@dataclass
class KrylovSystem:
    """A system that is solved iteratively; made anew for each solve, for it keeps the preconditioner."""

    products: Products
    settings: KrylovSettings
    layouts: tuple[Layout, Layout]
    # Of the preconditioner; None before the first, and for none.
    state: Sequence[Tensor] | None = None
    # Iterations that each row took in the last linear solve; None before the first.
    used: Tensor | None = None
    # The unknowns at which the residual was evaluated last, and `-r` there.
    last: tuple[Groups, Groups] | None = None

    def __post_init__(self) -> None:
        if any(group.structure != "dense" for layout in self.layouts for group in layout):
            raise AOTIError(
                "an iterative linear solver takes dense groups only; a model whose unknowns are solved per site (a "
                "sub-batched model) needs a direct linear solver"
            )

    def residual(self, u: Groups) -> Groups:
        """`b = -r` at `u`, remembered for a linearisation at the same list."""
        b = self.products.residual(u)
        self.last = (u, b)
        return b

    def linearise(self, u: Groups) -> tuple[Groups, Linearisation]:
        b = self.last[1] if self.last is not None and self.last[0] is u else self.products.residual(u)
        self.state = self._preconditioner(u)
        return b, KrylovLinearisation(self, u)

    def _preconditioner(self, u: Groups) -> Sequence[Tensor] | None:
        """The preconditioner that was kept, or a new one, by rows where these do not share it."""
        strategy, state, used = self.settings.cache_strategy, self.state, self.used
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
        fresh = self.products.take(rows).set_up(taken(u, rows))
        assert fresh is not None, "there is a preconditioner"
        return [old.index_copy(0, rows, new) for old, new in zip(state, fresh, strict=True)]

    def take(self, rows: Tensor) -> KrylovSystem:
        """The system of some rows; what was kept goes along."""
        state = None if self.state is None else taken(self.state, rows)
        used = None if self.used is None else self.used.index_select(0, rows)
        return KrylovSystem(self.products.take(rows), self.settings, self.layouts, state, used)
