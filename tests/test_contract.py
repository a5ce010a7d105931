"""Every model of the catalogue times every operation, against eager neml2 and finite differences.

Where an operation has nothing compiled to work on, it must say so and name the flag of neml2-compile.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor

import references
from neml2_aoti_plugin import DerivativeNotCompiledError
from neml2_aoti_plugin.model._operations import OPERATIONS, Operation
from references import Case, Tensors, difference, finite_differences, size
from stubs.catalogue import CATALOGUE, EXPLICIT

# Relative to the largest entry of a tensor, for solves with tightened tolerances.
AGAINST_EAGER = 1e-8
AGAINST_DIFFERENCES = 1e-7
SAME_GRAPHS = 1e-12
SINGLE = 1e-6

# The last span of a cut step starts from a state that the caller does not have.
SUBSTEPPED = ["substepping"]
DERIVED = [name for name, stub in CATALOGUE.items() if "-d" in stub.flags]
PROMOTED = [name for name, stub in CATALOGUE.items() if "-p" in stub.flags]
IMPLICIT = [name for name, stub in CATALOGUE.items() if stub.model not in EXPLICIT and name not in SUBSTEPPED]

INPUTS, PARAMETERS = OPERATIONS["jacobian"], OPERATIONS["param_jacobian"]
# The operations that give blocks, with the models that have some; neml2 cuts steps in compiled models only, and
# differences need double precision.
BLOCKS = [(INPUTS, name) for name in DERIVED] + [(PARAMETERS, name) for name in PROMOTED]
EAGER_BLOCKS = [(o, name) for o, name in BLOCKS if name not in SUBSTEPPED or o is PARAMETERS]
DIFFERENCES = [(o, name) for o, name in BLOCKS if "float32" not in CATALOGUE[name].flags or o is PARAMETERS]

ranks = pytest.mark.parametrize("rank", [0, 1, 2], ids=["one row", "one axis", "two axes"])


def models(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names, indirect=True)


def of_blocks(pairs: list[tuple[Operation, str]]) -> pytest.MarkDecorator:
    marks = [pytest.param(o, name, id=f"{o.name}-{name}") for o, name in pairs]
    return pytest.mark.parametrize(("operation", "case"), marks, indirect=["case"])


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return references.case(request.param)


def within(case: Case, double: float) -> float:
    """A tolerance in double precision, or that of single precision."""
    return double if case.dtype == torch.float64 else SINGLE


def of_rank(case: Case, rank: int) -> Tensors:
    """The case's states with that many batch axes."""
    rows = case.states if rank == 2 else case.rows()
    return rows if rank else {name: x[-1] for name, x in rows.items()}


def flattened(value: Tensor, batch_rank: int) -> Tensor:
    return value.reshape(prod(value.shape[:batch_rank]), *value.shape[batch_rank:])


def sensitivity(out: Tensor, argument: Tensor, share: float) -> float:
    """A derivative that changes the output by this share of its size when the argument changes by its own."""
    return share * size(out) / size(argument)


# -- values -----------------------------------------------------------------------------------------------------------


@ranks
@models(CATALOGUE)
def test_values_agree_with_eager(case: Case, rank: int) -> None:
    inputs = of_rank(case, rank)
    found = case.model.forward(inputs)
    expected = references.expected_outputs(case)
    assert list(found) == case.model.output_names
    for name, value in found.items():
        assert value.shape[:rank] == next(iter(inputs.values())).shape[:rank]
        assert value.dtype == case.dtype
        wanted = expected[name] if rank else expected[name][-1:]
        assert difference(flattened(value, rank), wanted) < within(case, AGAINST_EAGER), name


@models(CATALOGUE)
def test_inputs_of_different_rank_broadcast(case: Case) -> None:
    row = of_rank(case, 0)
    small = torch.tensor([0.0, 1e-3, 2e-3], dtype=case.dtype)
    # The driven input has three rows, the last one two along another axis, and all others have none.
    driven, last = case.driven, list(row)[-1]
    inputs = {**row, last: row[last] * (1 - small[:2]).reshape(2, 1, *(1,) * row[last].ndim)}
    inputs[driven] = row[driven] * (1 + small).reshape(3, *(1,) * row[driven].ndim)
    batch = (2, 3) if driven != last else (3,)
    spread = {n: x.expand(*batch, *row[n].shape).reshape(-1, *row[n].shape) for n, x in inputs.items()}
    found, expected = case.model.forward(inputs), case.model.forward(spread)
    for name, value in found.items():
        assert value.shape[: len(batch)] == batch
        assert difference(flattened(value, len(batch)), expected[name]) < within(case, SAME_GRAPHS), name
    first = expected[case.model.output_names[0]]
    assert not torch.equal(first[0], first[-1])


@models(IMPLICIT)
def test_values_solve_the_eager_equations(case: Case) -> None:
    rows, tolerance = case.rows(), within(case, AGAINST_EAGER)
    found = case.model.forward(rows)
    residual, explicit = case.residual_and_outputs(rows, found)
    # What the equations leave when nothing changes over the step.
    unchanged = {name: rows.get(f"{name}~1", torch.zeros_like(value)) for name, value in found.items()}
    at_rest, _ = case.residual_and_outputs(rows, unchanged)
    assert float(residual.norm(dim=-1).max()) < tolerance * float(at_rest.norm(dim=-1).max())
    for name in set(explicit) & set(found):
        assert difference(found[name], explicit[name]) < tolerance, name


# -- blocks -----------------------------------------------------------------------------------------------------------


def blocks_at(case: Case, operation: Operation, inputs: Tensors) -> tuple[Tensors, dict[tuple[str, str], Tensor]]:
    """Outputs, and blocks by pair, with the caller's batch."""
    if operation is INPUTS:
        outputs, blocks = case.model.jacobian(inputs, expand=True)
    else:
        outputs, blocks = case.model.param_jacobian(inputs)
    return outputs, {(out, by): block for out, row in blocks.items() for by, block in row.items()}


@pytest.mark.parametrize("operation", [INPUTS, PARAMETERS], ids=lambda operation: operation.name)
@models(CATALOGUE)
def test_blocks_are_exactly_the_compiled_pairs(case: Case, operation: Operation) -> None:
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
def test_blocks_agree_with_eager(case: Case, operation: Operation, rank: int) -> None:
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
        assert difference(flattened(block, rank), expected[out][by], least) < within(case, AGAINST_EAGER), (out, by)


@of_blocks(DIFFERENCES)
def test_blocks_agree_with_finite_differences(case: Case, operation: Operation) -> None:
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


# -- contractions -----------------------------------------------------------------------------------------------------


@ranks
@models(DERIVED)
def test_jvp_contracts_the_jacobian(case: Case, rank: int) -> None:
    inputs, generator = of_rank(case, rank), torch.Generator().manual_seed(5)
    # In proportion to the inputs.
    tangents = {
        name: size(inputs[name]) * torch.randn(inputs[name].shape, generator=generator, dtype=torch.float64)
        for name in dict.fromkeys(by for _, by in case.model.derivative_pairs)
    }
    tangents = {name: x.to(case.dtype) for name, x in tangents.items()}
    outputs, along = case.model.jvp(inputs, tangents)
    values, blocks = blocks_at(case, INPUTS, inputs)
    assert list(outputs) == case.model.output_names and list(along) == list(dict.fromkeys(out for out, _ in blocks))
    count = prod(next(iter(inputs.values())).shape[:rank])
    for out, value in along.items():
        assert difference(outputs[out], values[out]) < within(case, SAME_GRAPHS), out
        terms = []
        for by in (by for other, by in blocks if other == out):
            tangent = tangents[by].reshape(count, -1)
            block = blocks[out, by].reshape(count, -1, tangent.shape[1])
            terms.append(torch.einsum("boi,bi->bo", block, tangent).reshape(value.shape))
        largest = max(float(term.abs().max()) for term in terms)
        assert difference(value, torch.stack(terms).sum(0), largest) < within(case, 1e-10), out


@ranks
@models(PROMOTED)
def test_vjp_contracts_the_jacobian(case: Case, rank: int) -> None:
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
        terms = [
            torch.einsum("o,op->p", cotangents[out].flatten(), block.reshape(cotangents[out].numel(), -1))
            for (out, other), block in blocks.items()
            if other == name
        ]
        largest = max(float(term.abs().max()) for term in terms)
        assert gradient.shape == case.model.named_parameters()[name].shape
        expected = torch.stack(terms).sum(0).reshape(gradient.shape)
        assert difference(gradient, expected, largest) < within(case, SAME_GRAPHS), name


@models(PROMOTED)
def test_a_parameter_per_row_is_each_rows_own(case: Case) -> None:
    """In values, in blocks of both kinds, and in gradients, of which there is one for each row."""
    rows, model = references.few(case), case.model
    name = model.parameter_derivative_pairs[0][1]
    factors = 1 + 0.01 * torch.arange(len(next(iter(rows.values()))), dtype=case.dtype)
    values = factors.reshape(-1, *(1,) * len(model.parameter_base_shapes[name])) * model.named_parameters()[name]

    def everything(rows: Tensors, value: Tensor) -> Tensors:
        given = {name: value}
        outputs, by_parameters = model.param_jacobian(rows, given)
        blocks = model.jacobian(rows, given, expand=True)[1] if model.derivative_pairs else {}
        found = {"gradient": model.param_vjp(rows, {n: torch.ones_like(x) for n, x in outputs.items()}, given)[name]}
        for kind in (by_parameters, blocks):
            found |= {f"{out}:{by}": x for out, row in kind.items() for by, x in row.items()}
        return found | model.forward(rows, given)

    together = everything(rows, values)
    assert together["gradient"].shape == values.shape
    for k, value in enumerate(values):
        for key, alone in everything({n: x[k] for n, x in rows.items()}, value).items():
            assert difference(together[key][k], alone, 1e-6 * size(together[key])) < within(case, 1e-10), (key, k)
