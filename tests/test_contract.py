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
models_with_derivatives = pytest.mark.parametrize("case", DERIVED, indirect=True)
# Differences need double precision.
models_with_differences = pytest.mark.parametrize("case", [n for n in DERIVED if n in DOUBLE], indirect=True)
# The last span of a cut step starts from a state that the caller does not have.
implicit_models = pytest.mark.parametrize(
    "case", [n for n in CATALOGUE if n not in EXPLICIT + SUBSTEPPED], indirect=True
)
# neml2 cuts steps in compiled models only.
models_with_eager_derivatives = pytest.mark.parametrize(
    "case", [n for n in DERIVED if n not in SUBSTEPPED], indirect=True
)
models_with_parameters = pytest.mark.parametrize("case", PROMOTED, indirect=True)


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


class TestJacobian:
    @models
    def test_has_exactly_the_compiled_pairs(self, case: Case) -> None:
        pairs = case.model.derivative_pairs
        if not pairs:
            with pytest.raises(DerivativeNotCompiledError, match=r"neml2-compile .* -d "):
                case.model.jacobian(case.rows())
            return
        outputs, blocks = case.model.jacobian(case.rows())
        assert sorted((out, wrt) for out, row in blocks.items() for wrt in row) == sorted(pairs)
        assert list(outputs) == case.model.output_names

    @ranks
    @models_with_eager_derivatives
    def test_agrees_with_eager(self, case: Case, rank: int, eager_tolerance: float) -> None:
        inputs = of_rank(case, rank)
        outputs, blocks = case.model.jacobian(inputs)
        rows = case.rows() if rank else {name: x[-1:] for name, x in case.rows().items()}
        expected = case.eager_jacobian(rows)
        batch = tuple(next(iter(inputs.values())).shape[:rank])
        for out, wrt in case.model.derivative_pairs:
            if wrt not in expected[out]:
                assert not blocks[out][wrt].any(), f"{wrt} is only an initial guess"
                continue
            block = spread(blocks[out][wrt], batch, case, out, wrt)
            least = sensitivity(outputs[out], inputs[wrt], 1e-6)
            assert difference(flattened(block, rank), expected[out][wrt], least) < eager_tolerance, (out, wrt)

    @models_with_differences
    def test_agrees_with_finite_differences(self, case: Case) -> None:
        rows = references.few(case)
        outputs, blocks = case.model.jacobian(rows)
        count = next(iter(rows.values())).shape[0]

        def forward(name: str, x: Tensor) -> Tensors:
            return case.model.forward({**rows, name: x})

        for wrt in dict.fromkeys(i for _, i in case.model.derivative_pairs):
            rank = len(case.model.inputs[wrt].natural_shape)
            found = finite_differences(partial(forward, wrt), rows[wrt], rank)
            for out in (o for o, i in case.model.derivative_pairs if i == wrt):
                block = spread(blocks[out][wrt], (count,), case, out, wrt)
                least = sensitivity(outputs[out], rows[wrt], 1e-3)
                assert difference(block, found[out], least) < AGAINST_DIFFERENCES, (out, wrt)


class TestJvp:
    @ranks
    @models
    def test_contracts_the_jacobian(self, case: Case, rank: int, own_tolerance: float) -> None:
        inputs = of_rank(case, rank)
        if not case.model.derivative_pairs:
            with pytest.raises(DerivativeNotCompiledError, match=r"neml2-compile .* -d "):
                case.model.jvp(inputs, {})
            return
        tangents = directions(case, inputs)
        outputs, along = case.model.jvp(inputs, tangents)
        values, blocks = case.model.jacobian(inputs)
        batch = tuple(next(iter(inputs.values())).shape[:rank])
        assert list(outputs) == case.model.output_names
        for out, row in blocks.items():
            assert difference(outputs[out], values[out]) < own_tolerance, out
            expected = torch.zeros_like(outputs[out])
            largest = 0.0
            for wrt, block in row.items():
                axes = len(case.model.inputs[wrt].natural_shape)
                whole = spread(block, batch, case, out, wrt)
                shaped = tangents[wrt].reshape(
                    (*batch, *(1,) * (whole.ndim - axes - rank), *tangents[wrt].shape[rank:])
                )
                term = (whole * shaped).flatten(whole.ndim - axes).sum(-1) if axes else whole * shaped
                expected = expected + term
                largest = max(largest, float(term.abs().max()))
            assert difference(along[out], expected, largest) < max(own_tolerance, 1e-10), out

    @models_with_differences
    def test_of_one_input_agrees_with_differences_along_it(self, case: Case) -> None:
        rows = references.few(case)
        wrt = case.model.derivative_pairs[0][1]
        tangent = directions(case, rows)[wrt]
        _, along = case.model.jvp(rows, {wrt: tangent})
        lengths = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64).reshape(4, *(1,) * tangent.ndim) * 1e-5
        found = case.model.forward({**rows, wrt: rows[wrt] + lengths * tangent})
        assert set(along) == {out for out, i in case.model.derivative_pairs if i == wrt}
        for out, value in along.items():
            near, back, far, far_back = found[out]
            slope = (8 * (near - back) - (far - far_back)) / 12e-5
            assert difference(value, slope, 1e-3 * size(near)) < AGAINST_DIFFERENCES, out


class TestParameterDerivatives:
    @models
    def test_has_exactly_the_compiled_pairs(self, case: Case) -> None:
        pairs = case.model.parameter_derivative_pairs
        if not pairs:
            with pytest.raises(DerivativeNotCompiledError, match=r"neml2-compile .* -p "):
                case.model.param_jacobian(case.rows())
            with pytest.raises(DerivativeNotCompiledError, match=r"neml2-compile .* -p "):
                case.model.param_vjp(case.rows(), {})
            return
        outputs, blocks = case.model.param_jacobian(case.rows())
        assert sorted((out, name) for out, row in blocks.items() for name in row) == sorted(pairs)
        assert list(outputs) == case.model.output_names

    @ranks
    @models_with_parameters
    def test_agrees_with_eager(self, case: Case, rank: int, eager_tolerance: float) -> None:
        pairs = case.model.parameter_derivative_pairs
        inputs = of_rank(case, rank)
        _, blocks = case.model.param_jacobian(inputs)
        rows = case.rows() if rank else {name: x[-1:] for name, x in case.rows().items()}
        expected = case.eager_param_jacobian(rows, list(dict.fromkeys(name for _, name in pairs)))
        for out, name in pairs:
            assert difference(flattened(blocks[out][name], rank), expected[out][name]) < eager_tolerance, (out, name)

    @models_with_parameters
    def test_agrees_with_finite_differences(self, case: Case) -> None:
        pairs = case.model.parameter_derivative_pairs
        rows = references.few(case)
        _, blocks = case.model.param_jacobian(rows)
        for name in dict.fromkeys(n for _, n in pairs):
            value = case.model.named_parameters()[name]
            base = tuple(case.model.parameter_base_shapes[name])

            def with_value(x: Tensor, name: str = name, base: tuple[int, ...] = base) -> Tensors:
                return case.model.forward(rows, {name: x.reshape(-1, 1, *base)})

            found = finite_differences(with_value, value, len(base))
            for out in (o for o, n in pairs if n == name):
                assert difference(blocks[out][name], found[out]) < AGAINST_DIFFERENCES, (out, name)

    @ranks
    @models_with_parameters
    def test_vjp_contracts_the_jacobian(self, case: Case, rank: int, own_tolerance: float) -> None:
        pairs = case.model.parameter_derivative_pairs
        inputs = of_rank(case, rank)
        outputs, blocks = case.model.param_jacobian(inputs)
        generator = torch.Generator().manual_seed(11)
        cotangents = {
            out: torch.randn(outputs[out].shape, generator=generator, dtype=case.dtype)
            for out in dict.fromkeys(o for o, _ in pairs)
        }
        found = case.model.param_vjp(inputs, cotangents)
        assert sorted(found) == sorted({name for _, name in pairs})
        for name, gradient in found.items():
            base = len(case.model.parameter_base_shapes[name])
            expected = torch.zeros_like(gradient)
            largest = 0.0
            for out in (o for o, n in pairs if n == name):
                weighted = cotangents[out].reshape((*cotangents[out].shape, *(1,) * base)) * blocks[out][name]
                expected = expected + weighted.flatten(0, weighted.ndim - base - 1).sum(0)
                largest = max(largest, float(weighted.abs().max()))
            assert gradient.shape == case.model.named_parameters()[name].shape
            assert difference(gradient, expected, largest) < own_tolerance, name

    @models_with_parameters
    def test_vjp_of_one_value_per_row_is_one_gradient_per_row(self, case: Case, own_tolerance: float) -> None:
        pairs = case.model.parameter_derivative_pairs
        rows = references.few(case)
        count = next(iter(rows.values())).shape[0]
        name = pairs[0][1]
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


def spread(block: Tensor, batch: tuple[int, ...], case: Case, out: str, wrt: str) -> Tensor:
    """A derivative block with the caller's batch, which constant ones of a single forward segment come without."""
    wanted = (*batch, *case.model.outputs[out].base_shape, *case.model.inputs[wrt].base_shape)
    if block.ndim < len(wanted):
        assert len(case.model.output_names) >= 1 and case.implicit is None, "only explicit models have constant blocks"
        return block.expand(wanted)
    return block
