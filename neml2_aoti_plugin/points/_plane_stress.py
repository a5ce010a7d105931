"""Plane stress: the strains out of the plane at which the stresses out of the plane vanish, and condensed derivatives.

With i for the components in the plane (xx, yy, xy) and o for the others (zz, yz, xz), each point solves
s_o(e_i, e_o) = 0 for e_o by Newton's method, e_o <- e_o - C_oo^-1 s_o. At the solution s_o stays zero, so that e_o
follows what drives the point: de_o = -C_oo^-1 (ds_o/dx) dx, and any output y has the derivative
dy/dx - (dy/de_o) C_oo^-1 (ds_o/dx). See J. C. Simo and T. J. R. Hughes, Computational Inelasticity (1998), and for the
iteration at the level of the point R. de Borst, The zero-normal-stress condition in plane-stress and shell
elastoplasticity, Commun. Appl. Numer. Methods 7 (1991) 29.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..errors import InputError
from ..model import Model, Outcome, Solution
from ._interface import SYMMETRIC
from ._roles import Pair, Tensors, earlier

# Components out of the plane.
OUT_OF_PLANE = [2, 3, 4]
# A point is done when |s_o| is below so much of |C_oo| |e| or |s|; or below GOOD of it where it no longer falls to
# half, because the model's own solve is not more accurate. LEAST is an accuracy of strains where these are zero.
RELATIVE, GOOD, LEAST = 1e-13, 1e-8, 1e-15
# Newton steps of a point, and how often one is halved at which the model does not converge.
LIMIT, CUTS = 30, 6

# Evaluates some of the points, or all, for their whole strains, near values of the unknowns at the same points.
Evaluate = Callable[[Tensor | None, Tensor, Tensors], Solution]


@dataclass(frozen=True)
class PlaneStress:
    """The constraint: which stress has no components out of the plane, and of which strain these are sought."""

    stress: str
    strain: str

    def takes(self, pair: Pair) -> list[Pair]:
        """The derivatives of which a condensed one is made."""
        out, by = pair
        return [pair, (out, self.strain), (self.stress, by)]

    def needed(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The derivatives that it takes to find the strains, and to condense some."""
        both = (self.stress, self.strain)
        return list(dict.fromkeys((both, *(one for pair in pairs for one in self.takes(pair)))))

    def start(self, strain: Tensor, old: Tensors, last: Tensors) -> Tensor:
        """Strains `(n, 6)` to start from: out of the plane those of the last update of the step, or of the state."""
        found, before = strain.clone(), old[earlier(self.strain, 1)][:, OUT_OF_PLANE]
        if last:
            now = last[self.strain][:, OUT_OF_PLANE]
            before = torch.where(now.isfinite(), now, before)
        found[:, OUT_OF_PLANE] = before
        return found

    def solve(self, evaluate: Evaluate, strain: Tensor, near: Tensors) -> tuple[Solution, Tensor]:
        """Find the strains out of the plane, from those in `strain`, `(n, 6)`; where that fails, points have failed."""
        # Each evaluation starts near the outputs of the one before.
        found = part = evaluate(None, strain, near)
        live = torch.arange(len(strain), device=strain.device)
        # Of each live point: its step, the strains where that began, how often it was halved.
        step, base, halved = strain.new_zeros((len(strain), 3)), strain[:, OUT_OF_PLANE], torch.zeros_like(live)
        before = strain.new_full((len(strain),), torch.inf)
        hardest = found.iterations.clone()
        for _ in range(LIMIT):
            stress, stiffness = part.outputs[self.stress], _out_of_plane(part.blocks[self.stress][self.strain])
            off, stiff = stress[:, OUT_OF_PLANE].norm(dim=-1), torch.linalg.matrix_norm(stiffness)
            size = torch.maximum(stiff * strain[live].norm(dim=-1), stress.norm(dim=-1))
            small = off <= RELATIVE * size + LEAST * stiff
            ended = part.converged & (small | ((off <= GOOD * size) & (off > 0.5 * before)))
            # Where the first strains already are too much for the model, there is no step to halve.
            ended |= ~part.converged & ((halved == CUTS) | (step == 0).all(-1))
            left = (~ended).nonzero().squeeze(-1)
            if not len(left):
                return replace(found, iterations=hardest), strain
            live, fine = live[left], part.converged[left]
            newton, _ = torch.linalg.solve_ex(stiffness[left], -stress[left][:, OUT_OF_PLANE])
            before = torch.where(fine, off[left], torch.inf)
            step = torch.where(fine[:, None], newton, 0.5 * step[left])
            base = torch.where(fine[:, None], strain[live][:, OUT_OF_PLANE], base[left])
            halved = torch.where(fine, 0, halved[left] + 1)
            strain[live[:, None], torch.tensor(OUT_OF_PLANE, device=strain.device)] = base + step
            part = evaluate(live, strain[live], {name: value[left] for name, value in part.outputs.items()})
            write(found, live, part)
            hardest[live] = torch.maximum(hardest[live], part.iterations)
        stuck = torch.zeros_like(found.converged)
        stuck[live] = True
        return replace(failed(found, stuck & found.converged, Outcome.OUT_OF_ITERATIONS), iterations=hardest), strain

    def condensed(self, found: Solution, pairs: Sequence[Pair]) -> Solution:
        """A solution with condensed derivatives; points where one of them is not finite have failed."""
        n, follows = len(found.converged), Tensors()
        stiffness = _out_of_plane(found.blocks[self.stress][self.strain])
        for by in dict.fromkeys(by for _, by in pairs):
            rows = found.blocks[self.stress][by][:, OUT_OF_PLANE]
            follows[by], _ = torch.linalg.solve_ex(stiffness, rows.reshape(n, 3, prod(rows.shape[2:])))
        condensed: dict[str, Tensors] = {}
        lost = torch.zeros_like(found.converged)
        for out, by in pairs:
            block, by_strain = found.blocks[out][by], found.blocks[out][self.strain]
            by_strain = by_strain.reshape(n, prod(by_strain.shape[1:-1]), 6)[:, :, OUT_OF_PLANE]
            block = block - (by_strain @ follows[by]).reshape(block.shape)
            condensed.setdefault(out, {})[by] = block
            lost |= ~block.isfinite().reshape(n, -1 if n else 0).all(-1)
        return failed(replace(found, blocks=condensed), lost & found.converged, Outcome.NOT_FINITE)


def _out_of_plane(stiffness: Tensor) -> Tensor:
    """The part `(n, 3, 3)` of derivatives `(n, 6, 6)`."""
    return stiffness[:, OUT_OF_PLANE][:, :, OUT_OF_PLANE]


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


def plane_stress_of(model: Model, driven: Sequence[str], chosen: Pair | None, whole: Sequence[str]) -> PlaneStress:
    """Find which stress vanishes and which strain is sought; `chosen` are both, where the caller names them."""
    where = str(model.artifact)
    fitting = [
        (out, by)
        for out, by in model.derivative_pairs
        if by in driven and model.outputs[out].base_shape == model.inputs[by].base_shape == SYMMETRIC
    ]
    if chosen is not None and tuple(chosen) not in fitting:
        raise InputError(
            f"{where}: stress_strain= names {chosen!r}, which is no compiled derivative of a symmetric tensor by a "
            f"driven one; there are: {fitting or 'none'}. Compile it: neml2-compile ... -d OUT:IN."
        )
    if not fitting:
        raise InputError(
            f"{where}: plane stress needs the derivative of the stress by the strain, which was not compiled. Compile "
            "it: neml2-compile ... -d stress:strain."
        )
    usual = ("stress", "strain")
    if chosen is None and len(fitting) > 1 and usual not in fitting:
        raise InputError(
            f"{where}: it is not clear which stress vanishes out of the plane, and by which strain. Say it: "
            f"Points(..., stress_strain=({fitting[0][0]!r}, {fitting[0][1]!r})), or another one of {fitting}."
        )
    stress, strain = chosen or (fitting[0] if len(fitting) == 1 else usual)
    for name in (stress, strain):
        if name in whole:
            raise InputError(
                f"whole= names {name!r}, whose components out of the plane are what plane stress finds or sets to "
                f"zero; Points.trial({name!r}) has them."
            )
    return PlaneStress(stress, strain)
