"""A row is independent of the rest of the batch: alone, in pairs, in batches of all sizes, in any order, across blocks.

Solved by machine code it has the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import references
from neml2_aoti_plugin import Model
from neml2_aoti_plugin._solve.machine_code import CHOICE as VARIABLE
from references import Case, Tensors, caller_of
from stubs.catalogue import CATALOGUE, EXPLICIT

IMPLICIT = [name for name, stub in CATALOGUE.items() if stub.model not in EXPLICIT and "float32" not in stub.flags]
# What the documents promise of tensors' loops, relative to the largest entry of the output's row.
ALIKE = 1e-12
# A compiled preconditioner multiplies matrices, whose rounding depends on the number of rows of the call.
PRECONDITIONED = {"krylov_precond": 1e-11}
# Models that machine code does not take: several groups, or iterative solves.
OTHERS = ("krylov", "krylov_precond", "bicgstab", "cross_group")
TOLERANCES = (1e-6, 1e-8, 1e-10)
SIZES = (1, 2, 7, 63, 64, 65)
COUNT = 65
# The rows of this stub take hundreds of solves each.
SUBSTEPPED = {"substepping": 12}


@cache
def uneven(name: str, count: int = COUNT) -> Tensors:
    """Rows of a case at rates over four decades, the slowest of them among the first."""
    case = references.case(name)
    generator = torch.Generator().manual_seed(7)
    few = case.rows()
    which = torch.randint(len(next(iter(few.values()))), (count,), generator=generator)
    rows = {n: x[which].clone() for n, x in few.items()}
    if {"t", "t~1"} <= set(rows):
        factor = 10.0 ** (4.0 * torch.rand(count, generator=generator, dtype=torch.float64) - 2.0)
        rows["t~1"] = rows["t"] - (rows["t"] - rows["t~1"]) * factor
    first = rows[case.driven]
    first *= 1.0 + 1e-3 * torch.randn(first.shape, generator=generator, dtype=torch.float64)
    return rows


def loaded(case: Case, tolerance: float) -> Model:
    model = case.load(tight=False)
    model.set_solver_config(**{**case.newton, "atol": tolerance, "rtol": tolerance})
    return model


def tolerance_of(name: str, implementation: str) -> float:
    """How much a row may differ; nothing where machine code solves."""
    return 0.0 if implementation == "native" and name not in OTHERS else PRECONDITIONED.get(name, ALIKE)


def part(rows: Tensors, index: Tensor) -> Tensors:
    return {n: x[index] for n, x in rows.items()}


def assert_alike(found: Any, index: Tensor, together: Any, tolerance: float) -> None:
    """The same verdicts and iterations, and the same values row by row; to the last bit where the tolerance is zero."""
    assert found.converged.tolist() == together.converged[index].tolist()
    assert found.iterations.tolist() == together.iterations[index].tolist()
    for out, value in found.outputs.items():
        good = found.converged
        whole = together.outputs[out]
        if not tolerance:
            assert torch.equal(value[good], whole[index][good]), out
            continue
        expected = whole[index][good].reshape(int(good.sum()), whole[0].numel())
        # A row that is next to nothing beside the others is compared with a millionth of these.
        least = 1e-6 * float(whole[together.converged].abs().max())
        scale = expected.abs().amax(1, keepdim=True).clamp(min=least)
        assert bool(((value[good].reshape(expected.shape) - expected).abs() <= tolerance * scale).all()), out


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("name", IMPLICIT)
def test_rows_fare_as_alone(name: str, tolerance: float, implementation: str) -> None:
    count = SUBSTEPPED.get(name, COUNT)
    case, rows = references.case(name), uneven(name, count)
    model, alike = loaded(case, tolerance), tolerance_of(name, implementation)
    together = model.solve(rows)
    # Without rates, rows at other rates are the same ones.
    assert len(together.iterations.unique()) > 1 or name == "rate_independent"
    slow = int(together.iterations.argmax())
    for k in range(0, count, 3):
        assert_alike(model.solve(part(rows, torch.tensor([k]))), torch.tensor([k]), together, alike)
        pair = torch.tensor([k, slow])
        assert_alike(model.solve(part(rows, pair)), pair, together, alike)
    for size in (n for n in SIZES if n <= count):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(size))[:size]
        assert_alike(model.solve(part(rows, order)), order, together, alike)
        slow_last = torch.cat([order[order != slow], torch.tensor([slow])])
        assert_alike(model.solve(part(rows, slow_last)), slow_last, together, alike)


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("name", ["viscoplasticity", "chaboche"])
def test_large_batches_and_borders_of_blocks(
    name: str, tolerance: float, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, rows = references.case(name), uneven(name, 600)
    model, alike = loaded(case, tolerance), tolerance_of(name, implementation)
    together = model.solve(rows)
    for size in (511, 512, 513):
        order = torch.randperm(600, generator=torch.Generator().manual_seed(size))[:size]
        assert_alike(model.solve(part(rows, order)), order, together, alike)
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_BLOCK_ROWS", "37")
    assert_alike(loaded(case, tolerance).solve(rows), torch.arange(600), together, alike)


@pytest.mark.wide
def test_a_row_whose_first_norms_overflow_fares_the_same_twice() -> None:
    case = references.case("chaboche")
    rows = {n: x[:1].clone() for n, x in case.rows().items()}
    rows["t~2"] = torch.full_like(rows["t~2"], 1e-4)
    model = case.load(tight=False)
    alone = model.solve(rows)
    twice = model.solve({n: torch.cat([x, x]) for n, x in rows.items()})
    assert twice.converged.tolist() == alone.converged.tolist() * 2
    assert twice.iterations.tolist() == alone.iterations.tolist() * 2


@pytest.mark.parametrize("name", [name for name in IMPLICIT if "-d" in CATALOGUE[name].flags])
def test_derivatives_are_those_of_a_row_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "native")
    rows = uneven(name, SUBSTEPPED.get(name, COUNT))
    model, alike = loaded(references.case(name), 1e-10), tolerance_of(name, "native")
    rows = part(rows, model.solve(rows).converged)
    together = model.jacobian(rows)[1]
    count = len(rows[references.case(name).driven])
    for index in (*torch.arange(count).split(1)[::9], torch.randperm(count)[:17]):
        for out, blocks in model.jacobian(part(rows, index))[1].items():
            for given, block in blocks.items():
                whole = together[out][given].reshape(count, -1)
                scale = whole[index].abs().amax(1, keepdim=True).clamp(min=1e-6 * float(whole.abs().max()))
                difference = (block.reshape(len(index), -1) - whole[index]).abs()
                assert bool((difference <= alike * scale).all()), (out, given)


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("name", [name for name in IMPLICIT if name not in SUBSTEPPED])
def test_implementations_agree(name: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case, rows = references.case(name), uneven(name)
    found = {}
    for implementation in ("native", "torch"):
        monkeypatch.setenv(VARIABLE, implementation)
        model = loaded(case, tolerance)
        by = [segment.implementation.startswith("torch") for segment in caller_of(model).program.implicit]
        assert all(by) if implementation == "torch" or name in OTHERS else not any(by)
        found[implementation] = model.solve(rows)
    kernels, tensors = found.values()
    assert torch.equal(kernels.converged, tensors.converged)
    assert torch.equal(kernels.iterations, tensors.iterations)
    for out, value in kernels.outputs.items():
        good = kernels.converged
        scale = float(value[good].abs().max())
        assert float((value[good] - tensors.outputs[out][good]).abs().max()) <= 1e-13 * scale, out


def test_rows_at_loose_tolerances_are_right_and_not_only_alike(implementation: str) -> None:
    """Against a tight solve: a row that had just met this limit, without its last step, would be off by up to 4e-9."""
    case, rows = references.case("viscoplasticity"), uneven("viscoplasticity", 300)
    exact = case.load().solve(rows)
    found = loaded(case, 1e-8).solve(rows)
    assert bool(found.converged.all()) and bool(exact.converged.all())
    for out, value in found.outputs.items():
        right = exact.outputs[out].reshape(300, -1)
        scale = right.abs().amax(1, keepdim=True)
        assert bool(((value.reshape(300, -1) - right).abs() < 1e-10 * scale).all()), out
