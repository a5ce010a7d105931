"""Every model of the catalogue times every operation times every way of calling gives what `Model` itself gives.

What `Model` gives is compared with eager neml2 and finite differences in test_contract.py.
"""

from __future__ import annotations

import functools
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import neml2
import numpy as np
import pytest
import torch
import uvicorn
from torch.autograd import forward_ad

import references
from neml2_aoti_plugin import DerivativeNotCompiledError, Model, map_rows
from neml2_aoti_plugin.model import CustomOp
from neml2_aoti_plugin.model._operations import OPERATIONS, Operation
from neml2_aoti_plugin.serve import app
from references import Tensors, difference
from serving import NAMES, Answer
from stubs.catalogue import CATALOGUE

THREADS = 4


class Question:
    """An operation of a model with what it is given: rows, and tangents or cotangents where it takes them."""

    def __init__(self, name: str, operation: Operation) -> None:
        self.case = references.case(name)
        self.operation, self.model = operation, loaded(name)
        self.rows = self.case.rows()
        variables = self.model.inputs if operation.takes == "tangents" else self.model.outputs
        count = next(iter(self.rows.values())).shape[0]
        generator = torch.Generator().manual_seed(7)
        self.beside = {
            n: torch.randn((count, *variables[n].natural_shape), generator=generator, dtype=torch.float64).to(
                self.model.dtype
            )
            for n in operation.beside(self.model)
        }

    @property
    def arguments(self) -> list[Tensors]:
        return [self.rows, self.beside] if self.operation.takes else [self.rows]

    def by_model(self) -> Tensors:
        found = self.operation.method(self.model)(*self.arguments)
        return named(self.operation, found, self.model)


@functools.cache
def loaded(name: str) -> Model:
    return references.case(name).load(tight=False)


@functools.cache
def typed_model(name: str) -> Any:
    case = references.case(name)
    return neml2.load_model(case.file, case.stub.model)


class Services:
    """A service for each model that is asked for, in a thread of this process."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[uvicorn.Server, threading.Thread, http.client.HTTPConnection]] = {}

    def ask(self, name: str, document: dict[str, Any]) -> Answer:
        if name not in self._running:
            self._running[name] = self._start(name)
        connection = self._running[name][2]
        connection.request("POST", "/v2/models/model/infer", json.dumps(document))
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def _start(self, name: str) -> tuple[uvicorn.Server, threading.Thread, http.client.HTTPConnection]:
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app({"model": references.case(name).artifact}), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        return server, thread, http.client.HTTPConnection(*listening.getsockname())

    def stop(self) -> None:
        for server, thread, connection in self._running.values():
            connection.close()
            server.should_exit = True
            thread.join()


SERVICES = Services()


@pytest.fixture(scope="module", autouse=True)
def _services() -> Iterator[None]:
    yield
    SERVICES.stop()


def named(operation: Operation, found: Any, model: Model) -> Tensors:
    """What an operation gives, each tensor under a name of its own, as the service has them."""
    if operation.name == "forward":
        return dict(found)
    if operation.name == "solve":
        fared = {"@converged": found.converged, "@iterations": found.iterations, "@outcome": found.outcome}
        return {**found.outputs, **fared}
    if operation.name == "param_vjp":
        return {f"gradient:{name}": value for name, value in found.items()}
    outputs, more = found
    if operation.name == "jvp":
        return {**outputs, **{f"tangent:{name}": value for name, value in more.items()}}
    if operation.by == "inputs" and model.solver is None:
        rows = next(iter(outputs.values())).shape[0]
        # Those that do not depend on the row come without rows.
        ndim = {name: len(v.base_shape) for name, v in (model.inputs | model.outputs).items()}
        more = {
            out: {by: x.expand(rows, *x.shape) if x.ndim == ndim[out] + ndim[by] else x for by, x in row.items()}
            for out, row in more.items()
        }
    return {**outputs, **{f"{out}:{by}": block for out, row in more.items() for by, block in row.items()}}


def plain(found: Any) -> Any:
    """Raw tensors of typed ones."""
    if isinstance(found, Mapping):
        return {name: plain(value) for name, value in found.items()}
    return tuple(map(plain, found)) if isinstance(found, tuple) else found.data


# -- the ways ---------------------------------------------------------------------------------------------------------


def by_hit_type(question: Question, *, typed: bool) -> Tensors:
    """`AOTIModel` as `neml2.load_model` gives it."""
    model = typed_model(question.case.stub.name)
    arguments: list[Mapping[str, Any]] = [*question.arguments]
    if typed:
        arguments[0] = {
            n: model.input_spec[n](x, sub_batch_ndim=len(model.input_sub_batch[n])) for n, x in question.rows.items()
        }
    if question.operation.name == "forward":
        outputs = model(*arguments[0].values())
        assert [type(value) for value in outputs] == list(model.output_spec.values())
        return {name: value.data for name, value in zip(model.output_spec, outputs, strict=True)}
    found = getattr(model, question.operation.name)(*arguments)
    if typed and question.operation.by == "inputs":
        assert {name: type(value) for name, value in found[0].items()} == model.output_spec
    return named(question.operation, plain(found), question.model)


@functools.cache
def operator(name: str) -> CustomOp:
    return CustomOp(loaded(name), f"ways_{name}")


def by_operator(question: Question) -> Tensors:
    """The model as an operator of torch."""
    found: Tensors = operator(question.case.stub.name)(question.rows)
    return found


def by_threads(question: Question) -> Tensors:
    """Several threads that call one model at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        first, *others = pool.map(lambda _: question.by_model(), range(2 * THREADS))
    for other in others:
        assert all(torch.equal(value, first[name]) for name, value in other.items())
    return first


def by_map_rows(question: Question) -> Tensors:
    """A long run, in chunks of a few rows, to a function."""
    parts: list[dict[str, np.ndarray]] = []
    arrays = {name: x.numpy() for name, x in question.rows.items()}
    done = map_rows(question.model, arrays, parts.append, chunk=4, operation=question.operation.name, progress=False)
    assert done.failed.tolist() == []
    whole = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    assert not whole.pop("@failed").any()
    return {name.replace("@", ":"): value for name, value in whole.items()}


def by_service(question: Question) -> Tensors:
    """A request to the service, in this process."""
    prefix = {"tangents": "tangent:", "cotangents": "cotangent:"}.get(question.operation.takes, "")
    given = {**question.rows, **{prefix + name: value for name, value in question.beside.items()}}
    document = {
        "inputs": [
            {"name": n, "shape": list(x.shape), "datatype": NAMES[x.numpy().dtype], "data": x.flatten().tolist()}
            for n, x in given.items()
        ],
        "parameters": {"operation": question.operation.name},
    }
    answer = SERVICES.ask(question.case.stub.name, document)
    if question.operation.lacking(question.model):
        assert answer.status == 400 and "neml2-compile" in answer.error, answer.body
        raise DerivativeNotCompiledError
    return {name: torch.from_numpy(np.array(value)) for name, value in answer.arrays.items()}


def by_torch(question: Question) -> Tensors:
    """torch's own transforms of `forward`: vmap, forward mode, and reverse mode for a row and for parameters."""
    model, rows, beside = question.model, question.rows, question.beside
    operation = question.operation.name
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
        model = question.case.load(tight=False).requires_grad_()
        outputs = model.forward(rows)
        torch.autograd.backward([outputs[name] for name in beside], list(beside.values()))
        wanted = {name for _, name in model.parameter_derivative_pairs}
        return {
            f"gradient:{n}": p.grad for n, p in model.named_parameters().items() if n in wanted and p.grad is not None
        }
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
    "threads": (by_threads, tuple(OPERATIONS)),
    "map_rows": (by_map_rows, ("forward", "jacobian")),
    "service": (by_service, tuple(OPERATIONS)),
}


@pytest.mark.parametrize(("way", "operation"), [(way, name) for way, (_, names) in WAYS.items() for name in names])
@pytest.mark.parametrize("name", CATALOGUE)
def test_gives_what_the_model_gives(name: str, way: str, operation: str) -> None:
    question = Question(name, OPERATIONS[operation])
    run = WAYS[way][0]
    lacking = bool(question.operation.lacking(question.model))
    if way == "torch" and operation == "jvp" and question.beside:
        # Forward mode asks for the tangents of all outputs.
        lacking = {out for out, _ in question.model.derivative_pairs} != set(question.model.outputs)
    elif way == "torch" and lacking:
        # Reverse mode finds out in backward; see test_autograd.py.
        return
    if lacking:
        with pytest.raises(DerivativeNotCompiledError):
            run(question)
        return
    expected, found = question.by_model(), run(question)
    assert sorted(found) == sorted(expected)
    tolerance = 1e-12 if question.model.dtype == torch.float64 else 1e-6
    for key, value in expected.items():
        largest = float(value.abs().max()) if value.is_floating_point() else 0.0
        assert difference(found[key], value, largest) < tolerance, key
