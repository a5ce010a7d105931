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
SIZES = (1, 2, 7, 63, 64, 65)
COUNT = 65
# The rows of this stub take hundreds of solves each.
SUBSTEPPED = {"substepping": 12}

tolerances = pytest.mark.parametrize("tolerance", [1e-6, 1e-8, 1e-10])


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


class Together:
    """Rows that are solved together, for comparison with some of them."""

    def __init__(self, model: Model, rows: Tensors, tolerance: float) -> None:
        self._model, self._rows, self._tolerance = model, rows, tolerance
        self.solution = self.solve(rows)

    def solve(self, rows: Tensors) -> Any:
        return self._model.solve(rows, jacobian=bool(self._model.derivative_pairs))

    def require_the_same_of(self, index: Tensor, found: Any = None) -> None:
        """The same verdicts, iterations, values and derivatives; to the last bit where the tolerance is zero."""
        found, whole = found or self.solve({n: x[index] for n, x in self._rows.items()}), self.solution
        assert found.converged.tolist() == whole.converged[index].tolist()
        assert found.iterations.tolist() == whole.iterations[index].tolist()
        # What rounding does to values, derivatives have more of.
        alike = self._tolerance
        pairs = [(x, whole.outputs[out], alike) for out, x in found.outputs.items()]
        pairs += [(x, whole.blocks[out][by], 100 * alike) for out, row in found.blocks.items() for by, x in row.items()]
        good = found.converged
        for value, of_all, tolerance in pairs:
            expected, value = (x[good].reshape(int(good.sum()), of_all[0].numel()) for x in (of_all[index], value))
            # A row that is next to nothing beside the others is compared with a millionth of these, if they are any.
            least = max(1e-6 * float(of_all[whole.converged].abs().max()), 1e-9)
            scale = expected.abs().amax(1, keepdim=True).clamp(min=least)
            assert bool(((value - expected).abs() <= tolerance * scale).all())


@tolerances
@pytest.mark.parametrize("name", IMPLICIT)
def test_rows_fare_as_alone(name: str, tolerance: float, implementation: str) -> None:
    count = SUBSTEPPED.get(name, COUNT)
    model = loaded(references.case(name), tolerance)
    together = Together(model, uneven(name, count), tolerance_of(name, implementation))
    iterations = together.solution.iterations
    # Without rates, rows at other rates are the same ones.
    assert len(iterations.unique()) > 1 or name == "rate_independent"
    slow = int(iterations.argmax())
    for k in range(0, count, 3):
        together.require_the_same_of(torch.tensor([k]))
        together.require_the_same_of(torch.tensor([k, slow]))
    for size in (n for n in SIZES if n <= count):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(size))[:size]
        together.require_the_same_of(order)
        together.require_the_same_of(torch.cat([order[order != slow], torch.tensor([slow])]))


@tolerances
@pytest.mark.parametrize("name", ["viscoplasticity", "chaboche"])
def test_large_batches_and_borders_of_blocks(
    name: str, tolerance: float, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, rows = references.case(name), uneven(name, 600)
    together = Together(loaded(case, tolerance), rows, tolerance_of(name, implementation))
    for size in (511, 512, 513):
        together.require_the_same_of(torch.randperm(600, generator=torch.Generator().manual_seed(size))[:size])
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_BLOCK_ROWS", "37")
    cut = loaded(case, tolerance)
    together.require_the_same_of(torch.arange(600), cut.solve(rows, jacobian=bool(cut.derivative_pairs)))


@pytest.mark.wide
def test_a_row_whose_first_norms_overflow_fares_the_same_twice() -> None:
    rows = {n: x[:1].clone() for n, x in references.case("chaboche").rows().items()}
    rows["t~2"] = torch.full_like(rows["t~2"], 1e-4)
    twice = {n: torch.cat([x, x]) for n, x in rows.items()}
    together = Together(references.case("chaboche").load(tight=False), twice, torch.inf)
    together.require_the_same_of(torch.tensor([0]))


@tolerances
@pytest.mark.parametrize("name", [name for name in IMPLICIT if name not in SUBSTEPPED])
def test_implementations_agree(name: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for implementation in ("native", "torch"):
        monkeypatch.setenv(VARIABLE, implementation)
        model = loaded(references.case(name), tolerance)
        by = [segment.implementation.startswith("torch") for segment in caller_of(model).program.implicit]
        assert all(by) if implementation == "torch" or name in OTHERS else not any(by)
        found[implementation] = model.solve(uneven(name), jacobian=bool(model.derivative_pairs))
    kernels, tensors = found.values()
    assert torch.equal(kernels.converged, tensors.converged)
    assert torch.equal(kernels.iterations, tensors.iterations)
    good = kernels.converged
    for out, value in kernels.outputs.items():
        scale = float(value[good].abs().max())
        assert float((value[good] - tensors.outputs[out][good]).abs().max()) <= 1e-13 * scale, out
    for out, row in kernels.blocks.items():
        for by_name, block in row.items():
            expected = tensors.blocks[out][by_name][good]
            scale = max(float(expected.abs().max()), 1e-6)
            torch.testing.assert_close(block[good], expected, rtol=0.0, atol=1e-8 * scale)


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
