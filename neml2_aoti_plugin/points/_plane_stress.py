"""Plane stress: the strains out of the plane at which the stresses out of the plane vanish, and condensed derivatives.

With i for the components in the plane (xx, yy, xy) and o for the others (zz, yz, xz), each point solves
s_o(e_i, e_o) = 0 for e_o by Newton's method, e_o <- e_o - C_oo^-1 s_o. At the solution s_o stays zero, so that e_o
follows what drives the point: de_o = -C_oo^-1 (ds_o/dx) dx, and any output y has the derivative
dy/dx - (dy/de_o) C_oo^-1 (ds_o/dx). See J. C. Simo and T. J. R. Hughes, Computational Inelasticity (1998), and for the
iteration at the level of the point R. de Borst, The zero-normal-stress condition in plane-stress and shell
elastoplasticity, Commun. Appl. Numer. Methods 7 (1991) 29.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..errors import DerivativeNotCompiledError, InputError
from ..model import Model, Outcome, Solution
from ._interface import OUT_OF_PLANE, SYMMETRIC
from ._roles import Base, Pair, compiled_pairs, earlier

Tensors = dict[str, Tensor]

# A point is done when |s_o| is below so much of |C_oo| |e| or |s|; or below GOOD of it where it no longer falls to
# half, because the model's own solve is not more accurate. LEAST is an accuracy of strains where these are zero.
RELATIVE, GOOD, LEAST = 1e-13, 1e-8, 1e-15
# Newton steps of a point, and how often one is halved at which the model does not converge.
LIMIT, CUTS = 30, 6

# Evaluates some of the points for their whole strains, from initial guesses of the same points; in the first call all
# of them, from the guesses that they have.
Evaluate = Callable[[Tensor | None, Tensor, Tensors | None], Solution]


@dataclass(frozen=True)
class PlaneStress:
    """The constraint: which stress has no components out of the plane, and of which strain these are sought."""

    stress: str
    strain: str
    # Base shapes of all variables and parameters.
    bases: Mapping[str, Base]

    @property
    def pair(self) -> Pair:
        """The derivative that the iteration needs."""
        return self.stress, self.strain

    def condensable(self, model: Model, pairs: Sequence[Pair], *, chosen: bool) -> tuple[Pair, ...]:
        """The pairs whose condensed derivatives follow from what was compiled; all of them where the caller chose."""
        there = compiled_pairs(model)
        found = []
        for out, by in pairs:
            missing = [pair for pair in ((out, self.strain), (self.stress, by)) if pair not in there]
            if not missing:
                found.append((out, by))
            elif chosen:
                raise DerivativeNotCompiledError(
                    f"in plane stress d({out})/d({by}) takes d({missing[0][0]})/d({missing[0][1]}) too, which was not "
                    f"compiled into {model.artifact}. Compile it: neml2-compile ... -d "
                    f"{missing[0][0]}:{missing[0][1]}."
                )
        return tuple(found)

    def require_reduced(self, whole: Sequence[str]) -> None:
        """Refuse that the stress or the strain is given whole: what is out of the plane is found."""
        for name in self.pair:
            if name in whole:
                raise InputError(
                    f"whole= names {name!r}, whose components out of the plane are what plane stress finds or sets to "
                    f"zero; Points.trial({name!r}) has them."
                )

    def start(self, strain: Tensor, old: Tensors, last: Tensors | None) -> Tensor:
        """Strains `(n, 6)` to start from: out of the plane those of the last update of the step, or of the state."""
        found, before = strain.clone(), old[earlier(self.strain, 1)][:, OUT_OF_PLANE]
        if last is not None:
            now = last[self.strain][:, OUT_OF_PLANE]
            before = torch.where(now.isfinite(), now, before)
        found[:, OUT_OF_PLANE] = before
        return found

    def needed(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The derivatives that it takes to condense some."""
        outs, bys = dict.fromkeys(out for out, _ in pairs), dict.fromkeys(by for _, by in pairs)
        more = [*((out, self.strain) for out in outs), *((self.stress, by) for by in bys)]
        return list(dict.fromkeys([self.pair, *pairs, *more]))

    def solve(self, evaluate: Evaluate, strain: Tensor, unknowns: Sequence[str]) -> tuple[Solution, Tensor]:
        """Find the strains out of the plane, of all points at once, from those in `strain`, `(n, 6)`.

        The outputs `unknowns` of one evaluation are the initial guesses of the next. Points where the search fails have
        failed in the solution.
        """
        strain = strain.clone()
        found = evaluate(None, strain, None)
        live = torch.arange(len(strain), device=strain.device)
        # Of each live point: its step, the strains where that began, how often it was halved.
        step, base, halved = strain.new_zeros((len(strain), 3)), strain[:, OUT_OF_PLANE], torch.zeros_like(live)
        before = strain.new_full((len(strain),), torch.inf)
        part, hardest = found, found.iterations.clone()
        for _ in range(LIMIT):
            stress, stiffness = part.outputs[self.stress], part.blocks[self.stress][self.strain]
            c, off = stiffness[:, OUT_OF_PLANE][:, :, OUT_OF_PLANE], stress[:, OUT_OF_PLANE].norm(dim=-1)
            stiff = torch.linalg.matrix_norm(c)
            size = torch.maximum(stiff * strain[live].norm(dim=-1), stress.norm(dim=-1))
            small = off <= RELATIVE * size + LEAST * stiff
            ended = part.converged & (small | ((off <= GOOD * size) & (off > 0.5 * before)))
            # Where the first strains already are too much for the model, there is no step to halve.
            ended |= ~part.converged & ((halved == CUTS) | (step == 0).all(-1))
            left = (~ended).nonzero().squeeze(-1)
            if not len(left):
                return replace(found, iterations=hardest), strain
            live, fine = live[left], part.converged[left]
            newton, _ = torch.linalg.solve_ex(c[left], -stress[left][:, OUT_OF_PLANE])
            before = torch.where(fine, off[left], torch.inf)
            start = strain[live][:, OUT_OF_PLANE]
            step = torch.where(fine[:, None], newton, 0.5 * step[left])
            base = torch.where(fine[:, None], start, base[left])
            halved = torch.where(fine, torch.zeros_like(halved[left]), halved[left] + 1)
            strain[live[:, None], torch.tensor(OUT_OF_PLANE, device=strain.device)] = base + step
            known = {name: part.outputs[name][left] for name in unknowns}
            part = evaluate(live, strain[live], known)
            write(found, live, part)
            hardest[live] = torch.maximum(hardest[live], part.iterations)
        stuck = torch.zeros_like(found.converged)
        stuck[live] = True
        return replace(failed(found, stuck & found.converged, Outcome.OUT_OF_ITERATIONS), iterations=hardest), strain

    def condensed(self, found: Solution, pairs: Sequence[Pair]) -> Solution:
        """A solution with the blocks of `needed`, with condensed derivatives; zero by the strains out of the plane.

        Points with a derivative that is not finite have failed.
        """
        stiffness = found.blocks[self.stress][self.strain]
        c = stiffness[:, OUT_OF_PLANE][:, :, OUT_OF_PLANE]
        follows: dict[str, Tensor] = {}
        for by in dict.fromkeys(by for _, by in pairs):
            rows = self._flat(found, self.stress, by)[:, OUT_OF_PLANE]
            follows[by], _ = torch.linalg.solve_ex(c, rows)
        condensed: dict[str, dict[str, Tensor]] = {}
        lost = torch.zeros_like(found.converged)
        for out, by in pairs:
            by_strain = self._flat(found, out, self.strain)[:, :, OUT_OF_PLANE]
            block = self._flat(found, out, by) - by_strain @ follows[by]
            condensed.setdefault(out, {})[by] = block.reshape(found.blocks[out][by].shape)
            lost = lost | ~block.isfinite().flatten(1).all(-1)
        return failed(replace(found, blocks=condensed), lost & found.converged, Outcome.NOT_FINITE)

    def _flat(self, found: Solution, out: str, by: str) -> Tensor:
        """A block as a matrix per point."""
        block = found.blocks[out][by]
        return block.reshape(block.shape[0], -1, prod(self.bases[by]))


def write(whole: Solution, rows: Tensor, part: Solution) -> None:
    """Write the solution of some points into that of all, in place; its tensors are nobody else's."""
    for name, value in part.outputs.items():
        whole.outputs[name][rows] = value
    for out, row in part.blocks.items():
        for by, block in row.items():
            whole.blocks[out][by][rows] = block
    whole.converged[rows] = part.converged
    whole.iterations[rows] = part.iterations
    whole.outcome[rows] = part.outcome


def failed(found: Solution, rows: Tensor, outcome: Outcome) -> Solution:
    """A solution in which further points, by a mask, have failed."""

    def without(value: Tensor) -> Tensor:
        return value.masked_fill(rows.reshape(rows.shape + (1,) * (value.ndim - 1)), torch.nan)

    return replace(
        found,
        outputs={name: without(value) for name, value in found.outputs.items()},
        blocks={out: {by: without(x) for by, x in row.items()} for out, row in found.blocks.items()},
        converged=found.converged & ~rows,
        outcome=found.outcome.masked_fill(rows, int(outcome)),
    )


def plane_stress_of(
    where: str, bases: Mapping[str, Base], pairs: Sequence[Pair], driven: Sequence[str], chosen: Pair | None
) -> PlaneStress:
    """Find which stress vanishes and which strain is sought; `chosen` are both, where the caller names them."""
    fitting = [(out, by) for out, by in pairs if by in driven and bases[out] == SYMMETRIC and bases[by] == SYMMETRIC]
    if chosen is not None:
        if tuple(chosen) not in fitting:
            raise InputError(
                f"{where}: stress_strain= names {chosen!r}, which is no compiled derivative of a symmetric tensor by a "
                f"driven one; there are: {fitting or 'none'}. Compile it: neml2-compile ... -d OUT:IN."
            )
        return PlaneStress(*chosen, bases)
    if not fitting:
        raise InputError(
            f"{where}: plane stress needs the derivative of the stress by the strain, which was not compiled. Compile "
            "it: neml2-compile ... -d stress:strain."
        )
    if len(fitting) > 1 and ("stress", "strain") not in fitting:
        raise InputError(
            f"{where}: it is not clear which stress vanishes out of the plane, and by which strain. Say it: "
            f"Points(..., stress_strain=({fitting[0][0]!r}, {fitting[0][1]!r})), or another one of {fitting}."
        )
    return PlaneStress(*(("stress", "strain") if len(fitting) > 1 else fitting[0]), bases)
