"""No row fails that plain Newton's method solves."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import references
from neml2_aoti_plugin import Model
from neml2_aoti_plugin.solve.choice import VARIABLE
from references import Case, Tensors

UPDATES = 24


@pytest.fixture(params=["native", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations of the loop's operations."""
    monkeypatch.setenv(VARIABLE, request.param)
    name: str = request.param
    return name


@cache
def drawn(name: str, count: int, seed: int) -> Tensors:
    """Rows of a case, with rates over six decades, driven inputs over three, and states and forces off the trajectory.

    Some of them are beyond what Newton's method solves.
    """
    generator = torch.Generator().manual_seed(seed)

    def decades(width: float) -> torch.Tensor:
        return 10.0 ** (width * (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5))

    few = references.case(name).rows()
    which = torch.randint(len(next(iter(few.values()))), (count,), generator=generator)
    rows = {n: x[which] for n, x in few.items()}
    if {"t", "t~1"} <= set(rows):
        rows["t~1"] = rows["t"] - (rows["t"] - rows["t~1"]) * decades(6.0)
    for n, x in rows.items():
        if n not in ("t", "t~1", "control"):
            size = decades(1.0 if n.endswith("~1") else 3.0).reshape(-1, *(1,) * (x.ndim - 1))
            rows[n] = size * x * (1.0 + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64))
    return rows


def loaded(case: Case, tolerance: float, ls_max_iters: int, *, chord_steps: bool = True) -> Model:
    model = case.load(tight=False)
    model.set_solver_config(
        **{**case.newton, "atol": tolerance, "rtol": tolerance, "ls_max_iters": ls_max_iters, "miters": UPDATES + 1}
    )
    model.set_solver(chord_steps=chord_steps)
    return model


@pytest.mark.parametrize("ls_max_iters", [1, 10])
def test_no_row_fails_by_chord_steps(ls_max_iters: int, implementation: str) -> None:
    """Draws of which some rows failed before they were solved again."""
    case = references.case("viscoplasticity")
    rows = drawn("viscoplasticity", 2000, 10)
    found = loaded(case, 1e-9, ls_max_iters).solve(rows)
    plain = loaded(case, 1e-9, ls_max_iters, chord_steps=False).solve(rows)
    assert not bool((plain.converged & ~found.converged).any())
    again = found.converged & (found.iterations > UPDATES)
    assert bool(again.any())
    for out, value in found.outputs.items():
        assert torch.equal(value[again], plain.outputs[out][again])
    failed = ~found.converged
    assert bool(failed.any()) and torch.equal(found.outcome[failed], plain.outcome[failed])
    assert bool((found.iterations[failed] > plain.iterations[failed]).any())
    k = int(again.nonzero()[0])
    alone = loaded(case, 1e-9, ls_max_iters).solve({n: x[k : k + 1] for n, x in rows.items()})
    assert int(alone.iterations) == int(found.iterations[k])
