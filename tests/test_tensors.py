"""Tensors that are not what they seem, and calls that torch records: refused by name, or taken for what they are.

A graph that reads memory that is not there ends its process: what could lead to one runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch

import references
from attacks import children, tensors
from neml2_aoti_plugin import AOTIError, InputTypeError

SETUP = """
import sys, neml2, torch
from attacks import tensors
from neml2_aoti_plugin import AOTIError, InputTypeError, Model

kind, model = sys.argv[1], Model(sys.argv[2])
inputs = tensors.typical(model)

def told(call, kind=AOTIError):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("no error")
"""


def run(body: str, kind: str, name: str, *more: object, limit: float = 60) -> None:
    """Run a program on a model of the catalogue; `kind` says what with."""
    children.run(SETUP + dedent(body), kind, references.case(name).artifact, *more, limit=limit)


@pytest.mark.parametrize("kind", [*tensors.REFUSED, *tensors.ADMITTED])
def test_tensor_without_plain_memory_is_refused_by_name_and_others_count_as_what_they_are(kind: str) -> None:
    """By a model of one explicit segment, one with parameters, and an implicit one with initial guesses as well."""
    program = "import sys; from attacks import tensors; tensors.main(*sys.argv[1:])"
    artifacts = (references.case(name).artifact for name in ("elasticity", "promoted", "calibration"))
    assert children.run(program, kind, *artifacts) == "done\n"


@pytest.mark.parametrize("name", ["elasticity", "calibration"])
@pytest.mark.parametrize("mode", ["FakeTensorMode", "FunctionalTensorMode", "Passing"])
def test_mode_that_takes_the_place_of_operations_is_refused_by_name(mode: str, name: str) -> None:
    model = references.case(name).model
    inputs = tensors.typical(model)
    leaf = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    calls: list[Callable[[], object]] = [
        lambda: model.forward(inputs),
        lambda: model.forward(leaf),
        lambda: torch.vmap(model.forward)(inputs),
        lambda: model.solve(inputs),
        lambda: model.jacobian(inputs),
        lambda: model.jvp(inputs, {}),
        lambda: model.linearise(inputs, model.derivative_pairs[:1]),
    ]
    expected = model.forward(inputs)
    for call in calls:
        with references.reported(AOTIError, mode, "outside"), tensors.modes()[mode]():
            call()
    torch.testing.assert_close(model.forward(inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["elasticity", "calibration"])
@pytest.mark.parametrize("recorder", ["jit", "make_fx real", "make_fx fake", "make_fx symbolic", "fx", "export"])
def test_call_is_not_recorded(recorder: str, name: str) -> None:
    run(
        """
        from torch.fx.experimental.proxy_tensor import make_fx

        names = list(inputs)

        class Part(torch.nn.Module):
            def forward(self, *values):
                return 2.0 * next(iter(model.forward(dict(zip(names, values))).values()))

        recorder, _, how = kind.partition(" ")
        values = tuple(inputs.values())
        record = {
            "jit": lambda: torch.jit.trace(Part(), values),
            "make_fx": lambda: make_fx(Part(), tracing_mode=how)(*values),
            "export": lambda: torch.export.export(Part(), values, strict=False),
            "fx": lambda: torch.fx.symbolic_trace(lambda x: model.forward({**inputs, names[0]: x})),
        }
        text = told(record[recorder])
        assert ("Proxy" if recorder == "fx" else "recorded") in text or "FakeTensor" in text, text
        assert recorder == "fx" or "torch.compile" in text, text
        """,
        recorder,
        name,
    )


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("eager", "calibration"),
        pytest.param("eager", "elasticity", marks=pytest.mark.wide),
        pytest.param("inductor", "calibration", marks=pytest.mark.wide),
        pytest.param("inductor", "elasticity", marks=pytest.mark.wide),
    ],
)
def test_compile_breaks_its_graph_at_the_call(backend: str, name: str) -> None:
    """Through torch.compile a model stays a model, in any call and for any number of rows."""
    case = references.case(name)
    run(
        """
        typed = neml2.load_model(sys.argv[3], sys.argv[4])
        assert "torch._dynamo" not in sys.modules, "the compiler was imported for nothing"

        def raw(x):
            return 2.0 * model(x)["stress"] + 1.0

        def with_others(x):
            one, other = model.solve(x, jacobian=True), model.jvp(x, {"strain": x["strain"]})[1]
            return one.outputs["stress"] + one.blocks["stress"]["strain"][..., 0] + 2.0 * other["stress"]

        def wrapped(x):
            stress = typed(*(kind(x[name]) for name, kind in typed.input_spec.items()))[0]
            return 2.0 * stress.data + 1.0

        for call in (raw, with_others, wrapped):
            compiled = torch.compile(call, backend=kind)
            for rows in (1, 2, 3, 5, 8):
                x = {n: torch.cat([v] * rows) * torch.linspace(1.0, 0.5, rows * len(v), dtype=v.dtype).reshape(
                    -1, *(1,) * (v.ndim - 1)) for n, v in inputs.items()}
                assert torch.allclose(compiled(x), call(x), rtol=1e-12, atol=0.0), (call, rows)
        strain = inputs["strain"].requires_grad_()
        found, wanted = (
            torch.autograd.grad((run(inputs) ** 2).sum(), strain)[0]
            for run in (torch.compile(raw, backend=kind), raw)
        )
        assert wanted.any() and torch.allclose(found, wanted, rtol=1e-12, atol=0.0)
        whole = torch.compile(model, backend=kind)
        assert torch.equal(whole(inputs)["stress"], model(inputs)["stress"])
        # It looked into no call: there is no other reason for a break.
        from torch._dynamo.utils import counters
        assert all("disable" in why for why in counters["graph_break"]), counters["graph_break"]
        """,
        backend,
        name,
        case.file,
        case.stub.model,
        limit=300,
    )


@pytest.mark.parametrize("call", ["solve", "jacobian", "jvp"])
@pytest.mark.parametrize("name", ["elasticity", "calibration"])
def test_transform_that_only_forward_follows(call: str, name: str) -> None:
    case = references.case(name)
    more: tuple[Any, ...] = ({},) if call == "jvp" else ()
    with pytest.raises(InputTypeError, match=r"torch\.vmap"):
        torch.vmap(lambda x: getattr(case.model, call)(x, *more))(case.rows())
