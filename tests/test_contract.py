"""Every model of the catalogue times every operation, against eager neml2 and finite differences.

Where an operation has nothing compiled to work on, it must say so and name the flag of neml2-compile.
"""

from __future__ import annotations

from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor

import references
from neml2_aoti_plugin import DerivativeNotCompiledError
from neml2_aoti_plugin.model._operations import OPERATIONS, Operation
from references import Case, Tensors, difference, finite_differences, size
from stubs import catalogue
from stubs.catalogue import CATALOGUE

# Relative to the largest entry of a tensor, for solves with tightened tolerances.
AGAINST_EAGER = 1e-8
AGAINST_DIFFERENCES = 1e-7
SAME_GRAPHS = 1e-12
SINGLE = 1e-6

RANKS = {0: "one row", 1: "one axis", 2: "two axes"}
SUBSTEPPED = ["substepping"]
EXPLICIT = [name for name, stub in CATALOGUE.items() if stub.model in catalogue.EXPLICIT]
DOUBLE = [name for name, stub in CATALOGUE.items() if "float32" not in stub.flags]
DERIVED = [name for name, stub in CATALOGUE.items() if "-d" in stub.flags]
PROMOTED = [name for name, stub in CATALOGUE.items() if "-p" in stub.flags]

ranks = pytest.mark.parametrize("rank", RANKS, ids=RANKS.get)
models = pytest.mark.parametrize("case", CATALOGUE, indirect=True)
# The last span of a cut step starts from a state that the caller does not have.
implicit_models = pytest.mark.parametrize(
    "case", [n for n in CATALOGUE if n not in EXPLICIT + SUBSTEPPED], indirect=True
)
derived = pytest.mark.parametrize("case", DERIVED, indirect=True)
with_parameters = pytest.mark.parametrize("case", PROMOTED, indirect=True)

INPUTS, PARAMETERS = OPERATIONS["jacobian"], OPERATIONS["param_jacobian"]
# The operations that give blocks, with the models that have some; neml2 cuts steps in compiled models only, and
# differences need double precision.
BLOCKS = [(INPUTS, name) for name in DERIVED] + [(PARAMETERS, name) for name in PROMOTED]
EAGER_BLOCKS = [(o, name) for o, name in BLOCKS if name not in SUBSTEPPED or o is PARAMETERS]
DIFFERENCES = [(o, name) for o, name in BLOCKS if name in DOUBLE or o is PARAMETERS]


def of_blocks(pairs: list[tuple[Operation, str]]) -> pytest.MarkDecorator:
    marks = [pytest.param(o, name, id=f"{o.name}-{name}") for o, name in pairs]
    return pytest.mark.parametrize(("operation", "case"), marks, indirect=["case"])


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return references.case(request.param)


@pytest.fixture
def eager_tolerance(case: Case) -> float:
    return AGAINST_EAGER if case.dtype == torch.float64 else SINGLE


@pytest.fixture
def own_tolerance(case: Case) -> float:
    return SAME_GRAPHS if case.dtype == torch.float64 else SINGLE


def of_rank(case: Case, rank: int) -> Tensors:
    """The case's states with that many batch axes."""
    if rank == 2:
        return case.states
    rows = case.rows()
    return rows if rank == 1 else {name: x[-1] for name, x in rows.items()}


def flattened(value: Tensor, batch_rank: int) -> Tensor:
    return value.reshape(prod(value.shape[:batch_rank]), *value.shape[batch_rank:])


def sensitivity(out: Tensor, argument: Tensor, share: float) -> float:
    """A derivative that changes the output by this share of its size when the argument changes by its own."""
    return share * size(out) / size(argument)


def directions(case: Case, rows: Tensors, seed: int = 5) -> Tensors:
    """A direction for each input that has compiled derivatives, in proportion to the input."""
    generator = torch.Generator().manual_seed(seed)
    wanted = dict.fromkeys(wrt for _, wrt in case.model.derivative_pairs)
    return {
        name: size(rows[name]) * torch.randn(rows[name].shape, generator=generator, dtype=torch.float64).to(case.dtype)
        for name in wanted
    }


class TestForward:
    @ranks
    @models
    def test_agrees_with_eager(self, case: Case, rank: int, eager_tolerance: float) -> None:
        inputs = of_rank(case, rank)
        found = case.model.forward(inputs)
        expected = references.expected_outputs(case)
        assert list(found) == case.model.output_names
        for name, value in found.items():
            batch = next(iter(inputs.values())).shape[:rank]
            assert value.shape[:rank] == batch
            assert value.dtype == case.dtype
            wanted = expected[name] if rank else expected[name][-1:]
            assert difference(flattened(value, rank), wanted) < eager_tolerance, name

    @models
    def test_broadcasts_inputs_of_different_rank(self, case: Case, own_tolerance: float) -> None:
        row = of_rank(case, 0)
        names = list(row)
        small = torch.tensor([0.0, 1e-3, 2e-3], dtype=case.dtype)
        inputs = dict(row)
        # The driven input has three rows, the last one two along another axis, and all others have none.
        first, last = row[case.driven], row[names[-1]]
        inputs[case.driven] = first * (1 + small).reshape(3, *(1,) * first.ndim)
        if len(names) > 1:
            inputs[names[-1]] = last * (1 - small[:2]).reshape(2, 1, *(1,) * last.ndim)
        batch = (2, 3) if len(names) > 1 else (3,)
        found = case.model.forward(inputs)
        spread = {n: x.expand(*batch, *row[n].shape).reshape(-1, *row[n].shape) for n, x in inputs.items()}
        expected = case.model.forward(spread)
        for name, value in found.items():
            assert value.shape[: len(batch)] == batch
            assert difference(flattened(value, len(batch)), expected[name]) < own_tolerance, name
        assert not torch.equal(expected[case.model.output_names[0]][0], expected[case.model.output_names[0]][-1])

    @implicit_models
    def test_solves_the_eager_equations(self, case: Case, eager_tolerance: float) -> None:
        rows = case.rows()
        found = case.model.forward(rows)
        residual, explicit = case.residual_and_outputs(rows, found)
        # What the equations leave when nothing changes over the step.
        unchanged = {name: rows.get(f"{name}~1", torch.zeros_like(value)) for name, value in found.items()}
        at_rest, _ = case.residual_and_outputs(rows, unchanged)
        assert float(residual.norm(dim=-1).max()) < eager_tolerance * float(at_rest.norm(dim=-1).max())
        for name in set(explicit) & set(found):
            assert difference(found[name], explicit[name]) < eager_tolerance, name


def blocks_at(case: Case, operation: Operation, inputs: Tensors) -> tuple[Tensors, dict[tuple[str, str], Tensor]]:
    """Outputs, and blocks by pair, with the caller's batch."""
    if operation is INPUTS:
        outputs, blocks = case.model.jacobian(inputs, expand=True)
    else:
        outputs, blocks = case.model.param_jacobian(inputs)
    return outputs, {(out, by): block for out, row in blocks.items() for by, block in row.items()}


class TestBlocks:
    @pytest.mark.parametrize("operation", [INPUTS, PARAMETERS], ids=lambda operation: operation.name)
    @models
    def test_are_exactly_the_compiled_pairs(self, case: Case, operation: Operation) -> None:
        pairs = operation.pairs(case.model)
        if pairs:
            outputs, blocks = blocks_at(case, operation, case.rows())
            assert sorted(blocks) == sorted(pairs)
            assert list(outputs) == case.model.output_names
            return
        contraction = OPERATIONS["jvp" if operation is INPUTS else "param_vjp"]
        flag = "-d" if operation is INPUTS else "-p"
        for call in (operation.method(case.model), partial(contraction.method(case.model), **{contraction.takes: {}})):
            with pytest.raises(DerivativeNotCompiledError, match=rf"neml2-compile .* {flag} "):
                call(case.rows())

    @ranks
    @of_blocks(EAGER_BLOCKS)
    def test_agree_with_eager(self, case: Case, operation: Operation, rank: int, eager_tolerance: float) -> None:
        inputs = of_rank(case, rank)
        outputs, blocks = blocks_at(case, operation, inputs)
        rows = case.rows() if rank else {name: x[-1:] for name, x in case.rows().items()}
        if operation is INPUTS:
            expected = case.eager_jacobian(rows)
        else:
            expected = case.eager_param_jacobian(rows, list(dict.fromkeys(by for _, by in blocks)))
        for (out, by), block in blocks.items():
            if by not in expected[out]:
                assert not block.any(), f"{by} is only an initial guess"
                continue
            least = sensitivity(outputs[out], inputs[by], 1e-6) if operation is INPUTS else 0.0
            assert difference(flattened(block, rank), expected[out][by], least) < eager_tolerance, (out, by)

    @of_blocks(DIFFERENCES)
    def test_agree_with_finite_differences(self, case: Case, operation: Operation) -> None:
        rows = references.few(case)
        outputs, blocks = blocks_at(case, operation, rows)
        values = rows if operation is INPUTS else dict(case.model.named_parameters())
        for by in dict.fromkeys(by for _, by in blocks):
            if operation is INPUTS:
                base = case.model.inputs[by].natural_shape
            else:
                base = tuple(case.model.parameter_base_shapes[by])

            def moved(x: Tensor, by: str = by, base: tuple[int, ...] = base) -> Tensors:
                if operation is INPUTS:
                    return case.model.forward({**rows, by: x})
                return case.model.forward(rows, {by: x.reshape(-1, 1, *base)})

            found = finite_differences(moved, values[by], len(base))
            for out in (out for out, other in blocks if other == by):
                least = sensitivity(outputs[out], values[by], 1e-3) if operation is INPUTS else 0.0
                assert difference(blocks[out, by], found[out], least) < AGAINST_DIFFERENCES, (out, by)


class TestContractions:
    @ranks
    @derived
    def test_jvp_contracts_the_jacobian(self, case: Case, rank: int, own_tolerance: float) -> None:
        inputs = of_rank(case, rank)
        tangents = directions(case, inputs)
        outputs, along = case.model.jvp(inputs, tangents)
        values, blocks = blocks_at(case, INPUTS, inputs)
        assert list(outputs) == case.model.output_names and list(along) == list(dict.fromkeys(out for out, _ in blocks))
        for out, value in along.items():
            assert difference(outputs[out], values[out]) < own_tolerance, out
            terms = []
            for by in (by for other, by in blocks if other == out):
                block, tangent = blocks[out, by], tangents[by]
                axes = len(case.model.inputs[by].natural_shape)
                shaped = tangent.reshape(
                    (*tangent.shape[:rank], *(1,) * (block.ndim - axes - rank), *tangent.shape[rank:])
                )
                terms.append((block * shaped).flatten(block.ndim - axes).sum(-1) if axes else block * shaped)
            largest = max(float(term.abs().max()) for term in terms)
            assert difference(value, torch.stack(terms).sum(0), largest) < max(own_tolerance, 1e-10), out

    @ranks
    @with_parameters
    def test_vjp_contracts_the_jacobian(self, case: Case, rank: int, own_tolerance: float) -> None:
        inputs = of_rank(case, rank)
        outputs, blocks = blocks_at(case, PARAMETERS, inputs)
        generator = torch.Generator().manual_seed(11)
        cotangents = {
            out: torch.randn(outputs[out].shape, generator=generator, dtype=case.dtype)
            for out in dict.fromkeys(out for out, _ in blocks)
        }
        found = case.model.param_vjp(inputs, cotangents)
        assert sorted(found) == sorted({name for _, name in blocks})
        for name, gradient in found.items():
            base = len(case.model.parameter_base_shapes[name])
            terms = [
                cotangents[out].reshape((*cotangents[out].shape, *(1,) * base)) * block
                for (out, other), block in blocks.items()
                if other == name
            ]
            expected = torch.stack([term.flatten(0, term.ndim - base - 1).sum(0) for term in terms]).sum(0)
            largest = max(float(term.abs().max()) for term in terms)
            assert gradient.shape == case.model.named_parameters()[name].shape
            assert difference(gradient, expected, largest) < own_tolerance, name

    @with_parameters
    def test_vjp_of_one_value_per_row_is_one_gradient_per_row(self, case: Case, own_tolerance: float) -> None:
        rows = references.few(case)
        count = next(iter(rows.values())).shape[0]
        name = case.model.parameter_derivative_pairs[0][1]
        factors = 1 + 0.01 * torch.arange(count, dtype=case.dtype)
        base = case.model.parameter_base_shapes[name]
        values = factors.reshape(count, *(1,) * len(base)) * case.model.named_parameters()[name]
        ones = {out: torch.ones_like(x) for out, x in case.model.forward(rows).items()}
        found = case.model.param_vjp(rows, ones, {name: values})
        assert found[name].shape == (count, *base)
        for k in range(count):
            row = {n: x[k] for n, x in rows.items()}
            alone = case.model.param_vjp(row, {n: x[k] for n, x in ones.items()}, {name: values[k]})
            assert difference(found[name][k], alone[name]) < max(own_tolerance, 1e-10), k
