"""The Newton loop on a system written down here: square roots, a row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neml2_aoti_plugin.settings import NewtonSettings
from neml2_aoti_plugin.solve import newton
from neml2_aoti_plugin.solve.groups import Group
from neml2_aoti_plugin.solve.rows import Rows

Groups = list[Tensor]
LAYOUT = (Group("dense"),)
SETTINGS = NewtonSettings(atol=1e-6, rtol=1e-12, miters=60, ls_max_iters=1)
# Far from the root, Newton's method halves the iterate: each row of these needs some updates more than the one before.
SQUARES = torch.tensor([4.0, 9.0, 100.0, 1e4, 1e6, 1e8], dtype=torch.float64)


class SquareRoots:
    """`u^2 = g`; rows of `spoiled` whose residual is below the tolerance are sent away by `step`."""

    residual_apart = direct = True

    def __init__(self, spoiled: float | None = None, step: float = torch.inf) -> None:
        self.spoiled, self.step = spoiled, step

    def evaluate(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> tuple[Groups, Groups]:
        return self.residual(u, g, tail), [2.0 * u[0]]

    def residual(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> Groups:
        return [g[0] - u[0] ** 2]

    def direction(self, u: Groups, g: Groups, tail: Sequence[Tensor], b: Groups, linear: Groups) -> Groups:
        lost = (g[0] == self.spoiled) & (b[0].abs() < SETTINGS.atol)
        return [(b[0] / linear[0]).masked_fill(lost, self.step)]

    def fresh(self) -> SquareRoots:
        return self


class DoubleRoots(SquareRoots):
    """`(u - g)^2 = 0`, where Newton's method halves the distance in each step, and no more."""

    def evaluate(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> tuple[Groups, Groups]:
        return self.residual(u, g, tail), [2.0 * (u[0] - g[0])]

    def residual(self, u: Groups, g: Groups, tail: Sequence[Tensor]) -> Groups:
        return [-((u[0] - g[0]) ** 2)]


def solve(squares: Tensor, spoiled: float | None = None, step: float = torch.inf) -> Rows:
    u, g = torch.ones_like(squares).unsqueeze(-1), squares.unsqueeze(-1)
    return newton.solve_rows(SquareRoots(spoiled, step), [u], [g], [], (LAYOUT, LAYOUT), SETTINGS)


def updates(square: float) -> int:
    """Updates until the test of the residual is met."""
    u, k = 1.0, 0
    while abs(square - u * u) >= max(SETTINGS.atol, SETTINGS.rtol * abs(square - 1.0)):
        u, k = u + (square - u * u) / (2.0 * u), k + 1
    return k


@pytest.mark.parametrize("copies", [1, 40], ids=["all-wait", "some-leave"])
def test_rows_stop_on_their_own_and_take_one_step_more(copies: int) -> None:
    squares = SQUARES.repeat_interleave(copies)[torch.randperm(copies * len(SQUARES))]
    found = solve(squares)
    assert found.all_converged
    torch.testing.assert_close(found.unknowns[0].squeeze(-1), squares.sqrt(), rtol=1e-14, atol=0.0)
    assert found.told.iterations.tolist() == [updates(float(x)) for x in squares]
    assert len(set(found.told.iterations.tolist())) == len(SQUARES)


@pytest.mark.parametrize("copies", [1, 40], ids=["all-wait", "some-leave"])
@pytest.mark.parametrize("spoiled", [4.0, 1e4, 1e8])
def test_last_step_that_leads_nowhere_is_not_taken(spoiled: float, copies: int) -> None:
    squares = SQUARES.repeat_interleave(copies)
    found = solve(squares, spoiled)
    assert found.all_converged
    roots = found.unknowns[0].squeeze(-1)
    assert bool(((roots**2 - squares).abs() < 1e-6 + 1e-12 * squares).all())
    others = squares != spoiled
    torch.testing.assert_close(roots[others], squares[others].sqrt(), rtol=1e-14, atol=0.0)
    assert found.told.iterations.tolist() == [updates(float(x)) for x in squares]


@pytest.mark.parametrize("copies", [1, 40], ids=["all-wait", "some-leave"])
def test_last_step_is_one_step_however_long_the_others_take(copies: int) -> None:
    squares = SQUARES.repeat_interleave(copies)
    roots = solve(squares, spoiled=4.0, step=1e-9).unknowns[0].squeeze(-1)
    alone = solve(squares[:1], spoiled=4.0, step=1e-9).unknowns[0].squeeze(-1)
    assert 1e-10 < float((alone - 2.0).abs()) < 1e-6
    torch.testing.assert_close(roots[:copies], alone.expand(copies), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_last_step_has_its_own_jacobian_where_an_old_one_leads_too_short(rows: int) -> None:
    roots = torch.linspace(0.0, 0.75, rows, dtype=torch.float64).unsqueeze(-1)
    found = newton.solve_rows(
        DoubleRoots(), [torch.ones_like(roots)], [roots], [], (LAYOUT, LAYOUT), replace(SETTINGS, rtol=0.0)
    )
    assert found.all_converged
    halved = found.told.iterations.unsqueeze(-1) + 1
    torch.testing.assert_close(found.unknowns[0] - roots, (1.0 - roots) * 0.5**halved, rtol=1e-6, atol=0.0)


def test_lost_rows_do_not_hold_up_the_others() -> None:
    squares = SQUARES.repeat(50)
    squares[::7] = torch.nan
    squares[3] = -1.0  # has no root
    found = solve(squares)
    good = squares > 0.0
    assert not found.all_converged
    assert found.told.converged.tolist() == good.tolist()
    torch.testing.assert_close(found.unknowns[0][good].squeeze(-1), squares[good].sqrt(), rtol=1e-14, atol=0.0)
