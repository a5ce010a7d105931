"""Every model of the catalogue times every operation times every way of calling gives what `Model` itself gives.

What `Model` gives is compared with eager neml2 and finite differences in test_contract.py.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import neml2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import references
from neml2_aoti_plugin import DerivativeNotCompiledError, Model, map_rows
from neml2_aoti_plugin.model import CustomOp
from neml2_aoti_plugin.model._operations import OPERATIONS, Operation
from neml2_aoti_plugin.serve import app
from references import Tensors, difference
from serving import encode, running
from stubs.catalogue import CATALOGUE

THREADS = 4
# Compiled for batches of one size along an axis.
PINNED = ("elasticity_static", "elasticity_rank2")


@functools.cache
def loaded(name: str) -> Model:
    return references.case(name).load(tight=False)


@dataclass(frozen=True)
class Question:
    """An operation of a model with what it is given: rows, and tangents or cotangents where it takes them."""

    name: str
    operation: Operation
    rows: Tensors
    beside: Tensors

    @property
    def model(self) -> Model:
        return loaded(self.name)

    @property
    def arguments(self) -> list[Tensors]:
        return [self.rows, self.beside] if self.operation.takes else [self.rows]

    def by_model(self) -> Tensors:
        return named(self, self.operation.method(self.model)(*self.arguments))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Question:
        """The same question of rows, tangents and cotangents that are changed."""
        rows, beside = ({n: change(x) for n, x in of.items()} for of in (self.rows, self.beside))
        return replace(self, rows=rows, beside=beside)


def tolerance_of(asked: Question, double: float) -> float:
    return double if asked.model.dtype == torch.float64 else 1e-6


def largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.is_floating_point() else 0.0


def question(name: str, operation: Operation) -> Question:
    model, rows = loaded(name), references.case(name).rows()
    variables = model.inputs if operation.takes == "tangents" else model.outputs
    count, generator = len(next(iter(rows.values()))), torch.Generator().manual_seed(7)
    beside = {
        n: torch.randn((count, *variables[n].natural_shape), generator=generator, dtype=torch.float64).to(model.dtype)
        for n in operation.beside(model)
    }
    return Question(name, operation, rows, beside)


def named(of: Question, found: Any) -> Tensors:
    """What an operation gives, each tensor under a name of its own, as the service has them."""
    model = of.model
    if of.operation.name == "jacobian" and model.solver is None:
        # Those that do not depend on the row come without rows.
        outputs, blocks = found
        ndim = {name: len(v.natural_shape) for name, v in (model.inputs | model.outputs).items()}
        name, output = next(iter(outputs.items()))
        batch = output.shape[: output.ndim - ndim[name]]
        blocks = {
            out: {by: x.expand((*batch, *x.shape)) if x.ndim == ndim[out] + ndim[by] else x for by, x in row.items()}
            for out, row in blocks.items()
        }
        found = outputs, blocks
    return references.named(of.operation.name, found)


def plain(found: Any) -> Any:
    """Raw tensors of typed ones."""
    if isinstance(found, Mapping):
        return {name: plain(value) for name, value in found.items()}
    return tuple(map(plain, found)) if isinstance(found, tuple) else found.data


# -- the ways ---------------------------------------------------------------------------------------------------------


@functools.cache
def typed_model(name: str) -> Any:
    case = references.case(name)
    return neml2.load_model(case.file, case.stub.model)


def by_hit_type(asked: Question, *, typed: bool) -> Tensors:
    """`AOTIModel` as `neml2.load_model` gives it."""
    model = typed_model(asked.name)
    arguments: list[Mapping[str, Any]] = [*asked.arguments]
    if typed:
        sub = {name: len(shape) for name, shape in model.input_sub_batch.items()}
        arguments[0] = {n: model.input_spec[n](x, sub_batch_ndim=sub[n]) for n, x in asked.rows.items()}
    if asked.operation.name == "forward":
        outputs = model(*arguments[0].values())
        assert [type(value) for value in outputs] == list(model.output_spec.values())
        return {name: value.data for name, value in zip(model.output_spec, outputs, strict=True)}
    found = getattr(model, asked.operation.name)(*arguments)
    if typed and asked.operation.by == "inputs":
        assert {name: type(value) for name, value in found[0].items()} == model.output_spec
    return named(asked, plain(found))


@functools.cache
def operator(name: str) -> CustomOp:
    return CustomOp(loaded(name), f"ways_{name}")


def by_operator(asked: Question) -> Tensors:
    """The model as an operator of torch."""
    found: Tensors = operator(asked.name)(asked.rows)
    return found


def by_solve(asked: Question) -> Tensors:
    """Values and blocks of one call of `Model.solve`, in which no row fails."""
    if asked.operation.lacking(asked.model):
        raise DerivativeNotCompiledError
    found = asked.model.solve(asked.rows, pairs=asked.operation.pairs(asked.model))
    assert bool(found.converged.all()) and not found.outcome.any()
    assert bool((found.iterations > 0).any()) == (asked.model.solver is not None)
    assert list(found.outputs) == asked.model.output_names
    return {**found.outputs, **{f"{out}:{by}": x for out, row in found.blocks.items() for by, x in row.items()}}


def by_rows(asked: Question) -> Tensors:
    """A call for each row."""
    count = len(next(iter(asked.rows.values())))
    parts = [asked.changed(lambda x, k=k: x[k : k + 1]).by_model() for k in range(count)]  # type: ignore[misc]
    join = (lambda x: torch.stack(x).sum(0)) if asked.operation.name == "param_vjp" else torch.cat
    return {name: join([part[name] for part in parts]) for name in parts[0]}


def by_batches(asked: Question) -> Tensors:
    """Calls with any number of batch axes, and none, of any size, and zero."""
    one = asked.changed(lambda x: x[-1:]).by_model()
    batches = [(), (1,), (5,), (1, 1), (2, 3), (2, 1, 3)]
    for batch in batches if asked.name in PINNED else [*batches, (0,), (2, 0)]:
        found = asked.changed(lambda x, batch=batch: x[-1].expand((*batch, *x.shape[1:]))).by_model()  # type: ignore[misc]
        for name, x in found.items():
            row = one[name][0] if not name.startswith("gradient:") else prod(batch) * one[name]
            expected = row.expand((*batch, *row.shape)) if not name.startswith("gradient:") else row
            assert x.is_contiguous() or name not in asked.model.outputs
            assert difference(x, expected, largest(row)) < tolerance_of(asked, 1e-12), (batch, name)
    return asked.by_model()


def by_layouts(asked: Question) -> Tensors:
    """Tensors that are transposed in memory, strided, flipped twice, and parts of larger ones."""
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
        lambda x: torch.stack([x, x + 7.0], 1)[:, 0],
        lambda x: x.flip(0).flip(0)[::1],
        lambda x: torch.cat([x, x])[: len(x)],
    ]
    first, *others = (asked.changed(view).by_model() for view in views)
    assert all(torch.equal(value, other[n]) for other in others for n, value in first.items())
    return first


def by_threads(asked: Question) -> Tensors:
    """Several threads that call one model at once, each with the rows in another order."""

    def turned(k: int) -> Tensors:
        return asked.changed(lambda x: x.roll(k, 0)).by_model()

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(turned, [*range(THREADS)] * 2))
    for k in range(THREADS):
        alone = turned(k)
        assert all(torch.equal(value, again[n]) for again in found[k::THREADS] for n, value in alone.items())
    return found[0]


def by_map_rows(asked: Question) -> Tensors:
    """A long run, in chunks of a few rows, to a function."""
    parts: list[dict[str, np.ndarray]] = []
    arrays = {name: x.numpy() for name, x in asked.rows.items()}
    done = map_rows(asked.model, arrays, parts.append, chunk=4, operation=asked.operation.name, progress=False)
    assert done.failed.tolist() == []
    whole = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    assert not whole.pop("@failed").any()
    return {name.replace("@", ":"): value for name, value in whole.items()}


def by_service(asked: Question) -> Tensors:
    """A request to the service, in this process."""
    prefix = {"tangents": "tangent:", "cotangents": "cotangent:"}.get(asked.operation.takes, "")
    given = {**asked.rows, **{prefix + name: value for name, value in asked.beside.items()}}
    body, _ = encode({n: x.numpy() for n, x in given.items()}, False, {"operation": asked.operation.name})

    async def answered() -> Any:
        async with running(app({"model": references.case(asked.name).artifact})) as ask:
            return await ask("POST", "/v2/models/model/infer", body)

    answer = asyncio.run(answered())
    if asked.operation.lacking(asked.model):
        assert answer.status == 400 and "neml2-compile" in answer.error, answer.body
        raise DerivativeNotCompiledError
    return {name: torch.from_numpy(np.array(value)) for name, value in answer.arrays.items()}


def by_torch(asked: Question) -> Tensors:
    """torch's own transforms of `forward`: vmap, forward mode, and reverse mode for a row and for parameters."""
    model, rows, beside = asked.model, asked.rows, asked.beside
    operation = asked.operation.name
    if operation == "forward":
        return dict(torch.func.vmap(model.forward)(rows))
    if operation == "jvp":
        with forward_ad.dual_level():
            given = {n: forward_ad.make_dual(x, beside[n]) if n in beside else x for n, x in rows.items()}
            found = {n: forward_ad.unpack_dual(x) for n, x in model.forward(given).items()}
        outs = {out for out, _ in model.derivative_pairs}
        along = {f"tangent:{name}": x.tangent for name, x in found.items() if name in outs}
        return {**{name: x.primal for name, x in found.items()}, **along}
    if operation == "param_vjp":
        model = references.case(asked.name).load(tight=False).requires_grad_()
        outputs = model.forward(rows)
        torch.autograd.backward([outputs[name] for name in beside], list(beside.values()))
        wanted = {name for _, name in model.parameter_derivative_pairs}
        gradients = {n: p.grad for n, p in model.named_parameters().items() if n in wanted}
        return {f"gradient:{n}": gradient for n, gradient in gradients.items() if gradient is not None}
    results: Tensors = dict(model.forward(rows))
    for out, by in model.derivative_pairs:
        slope = torch.func.jacrev(lambda x, row, out=out, by=by: model.forward({**row, by: x})[out])
        results[f"{out}:{by}"] = torch.func.vmap(slope)(rows[by], rows)
    return results


HIT = ("forward", "jacobian", "jvp", "param_jacobian", "param_vjp")
WAYS: dict[str, tuple[Callable[[Question], Tensors], tuple[str, ...]]] = {
    "AOTIModel": (functools.partial(by_hit_type, typed=False), HIT),
    "typed": (functools.partial(by_hit_type, typed=True), HIT),
    "CustomOp": (by_operator, ("forward",)),
    "torch": (by_torch, ("forward", "jacobian", "jvp", "param_vjp")),
    "solve": (by_solve, ("forward", "jacobian", "param_jacobian")),
    "rows": (by_rows, tuple(OPERATIONS)),
    "batches": (by_batches, tuple(OPERATIONS)),
    "layouts": (by_layouts, tuple(OPERATIONS)),
    "threads": (by_threads, tuple(OPERATIONS)),
    "map_rows": (by_map_rows, ("forward", "jacobian")),
    "service": (by_service, tuple(OPERATIONS)),
}


@pytest.mark.parametrize(("way", "operation"), [(way, name) for way, (_, names) in WAYS.items() for name in names])
@pytest.mark.parametrize("name", CATALOGUE)
def test_gives_what_the_model_gives(name: str, way: str, operation: str) -> None:
    asked = question(name, OPERATIONS[operation])
    run = WAYS[way][0]
    lacking = bool(asked.operation.lacking(asked.model))
    if way == "torch" and operation == "jvp" and asked.beside:
        # Forward mode asks for the tangents of all outputs.
        lacking = {out for out, _ in asked.model.derivative_pairs} != set(asked.model.outputs)
    elif way == "torch" and lacking:
        # Reverse mode finds out in backward; see test_autograd.py.
        return
    if lacking:
        with pytest.raises(DerivativeNotCompiledError):
            run(asked)
        return
    given = asked.changed(torch.clone)
    expected, found = given.by_model(), run(asked)
    assert sorted(found) == sorted(expected)
    # Solves by matrix products of other sizes differ in the last bits; the iterations damp that.
    tolerance = tolerance_of(asked, 1e-10 if way == "rows" else 1e-12)
    for key, value in expected.items():
        assert difference(found[key], value, largest(value)) < tolerance, key
    # What was given is as it was, and what is given belongs to the caller.
    assert all(torch.equal(x, given.rows[n]) for n, x in asked.rows.items())
    again = given.by_model()
    for value in again.values():
        value.zero_()
    assert all(torch.equal(value, expected[key]) for key, value in given.by_model().items())
