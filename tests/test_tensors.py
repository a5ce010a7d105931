"""Tensors that are not what they seem, and calls that torch records: refused by name, or taken for what they are.

Each in a process of its own, for a graph that reads memory that is not there ends it.
"""

from __future__ import annotations

import pytest

import references
from attacks import children, tensors

RUN = "import sys; from attacks import tensors; tensors.main(*sys.argv[1:])"


def artifacts() -> list[str]:
    """A model of one forward segment, one with parameters, and an implicit one with parameters and first iterates."""
    return [str(references.case(name).artifact) for name in ("elasticity", "promoted", "calibration")]


@pytest.mark.parametrize("kind", tensors.REFUSED)
def test_tensor_without_plain_memory_is_refused_by_name(kind: str) -> None:
    assert children.run(RUN, kind, *artifacts()) == "done\n"


@pytest.mark.parametrize("kind", tensors.ADMITTED)
def test_tensor_with_memory_counts_as_what_it_is(kind: str) -> None:
    assert children.run(RUN, kind, *artifacts()) == "done\n"


@pytest.mark.parametrize("kind", ["negative", "negative view", "class", "class with functions"])
def test_gradient_leads_through_tensors_that_count_as_what_they_are(kind: str) -> None:
    children.run(
        """
        import sys, torch
        from attacks import tensors
        from neml2_aoti_plugin import Model

        model = Model(sys.argv[2])
        inputs = tensors.typical(model)
        found = []
        for make in (tensors.ADMITTED[sys.argv[1]], torch.clone):
            strain = inputs["strain"].clone().requires_grad_()
            model.forward({**inputs, "strain": make(strain)})["stress"].sum().backward()
            found.append(strain.grad)
        assert found[0].any() and torch.equal(*found)
        """,
        kind,
        references.case("calibration").artifact,
    )


@pytest.mark.parametrize("kind", ["fake", "wrapper", "functional", "freed", "masked"])
def test_parameter_without_plain_memory_is_refused_by_name(kind: str) -> None:
    children.run(
        """
        import sys, torch
        from attacks import tensors
        from neml2_aoti_plugin import InputTypeError, Model

        model = Model(sys.argv[2])
        make, words = tensors.REFUSED[sys.argv[1]]
        inputs = tensors.typical(model)
        name, value = next(iter(model.named_parameters().items()))
        for put in ("set", "in the module"):
            try:
                if put == "set":
                    model.set_parameter(name, make(value.detach().expand(3).clone()))
                else:
                    node = model.get_submodule(name.rpartition(".")[0])
                    leaf = name.rpartition(".")[2]
                    node._parameters[leaf] = torch.nn.Parameter(make(value.detach().clone()), requires_grad=False)
                    model.forward(inputs)
            except InputTypeError as error:
                assert words in str(error) and repr(name) in str(error), error
            except (NotImplementedError, RuntimeError) as error:
                # torch itself makes no parameter of such a tensor.
                assert put == "in the module" and "neml2" not in type(error).__module__, error
            else:
                raise AssertionError(put)
        """,
        kind,
        references.case("promoted").artifact,
    )


@pytest.mark.parametrize("name", ["elasticity", "calibration"])
@pytest.mark.parametrize("mode", ["FakeTensorMode", "FunctionalTensorMode", "Passing"])
def test_mode_that_takes_the_place_of_operations_is_refused_by_name(mode: str, name: str) -> None:
    children.run(
        """
        import sys, torch
        from attacks import tensors
        from neml2_aoti_plugin import AOTIError, Model

        model = Model(sys.argv[2])
        inputs = tensors.typical(model)
        leaf = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        out, wrt = model.derivative_pairs[0]
        calls = (
            lambda: model.forward(inputs),
            lambda: model.forward(leaf),
            lambda: torch.vmap(model.forward)(inputs),
            lambda: model.solve(inputs),
            lambda: model.jacobian(inputs),
            lambda: model.jvp(inputs, {}),
            lambda: model.linearise(inputs, [(out, wrt)]),
        )
        expected = model.forward(inputs)
        for call in calls:
            try:
                with tensors.modes()[sys.argv[1]]():
                    call()
            except AOTIError as error:
                assert sys.argv[1] in str(error) and "outside" in str(error), error
            else:
                raise AssertionError("no error")
        assert all(torch.equal(x, expected[n]) for n, x in model.forward(inputs).items())
        """,
        mode,
        references.case(name).artifact,
    )


@pytest.mark.parametrize("name", ["elasticity", "calibration"])
@pytest.mark.parametrize("recorder", ["jit", "make_fx real", "make_fx fake", "make_fx symbolic", "fx", "export"])
def test_call_is_not_recorded(recorder: str, name: str) -> None:
    children.run(
        """
        import sys, torch
        from torch.fx.experimental.proxy_tensor import make_fx
        from attacks import tensors
        from neml2_aoti_plugin import AOTIError, Model

        model = Model(sys.argv[2])
        inputs = tensors.typical(model)
        names = list(inputs)

        class Part(torch.nn.Module):
            def forward(self, *values):
                return 2.0 * next(iter(model.forward(dict(zip(names, values))).values()))

        recorder, _, how = sys.argv[1].partition(" ")
        values = tuple(inputs.values())
        try:
            if recorder == "jit":
                torch.jit.trace(Part(), values)
            elif recorder == "make_fx":
                make_fx(Part(), tracing_mode=how)(*values)
            elif recorder == "export":
                torch.export.export(Part(), values, strict=False)
            else:
                torch.fx.symbolic_trace(lambda x: model.forward({**inputs, names[0]: x}))
        except AOTIError as error:
            text = str(error)
            assert ("Proxy" if recorder == "fx" else "recorded") in text or "FakeTensor" in text, text
            assert recorder == "fx" or "torch.compile" in text, text
        else:
            raise AssertionError("it was recorded")
        """,
        recorder,
        references.case(name).artifact,
    )


def test_compile_breaks_its_graph_at_the_call() -> None:
    """Through torch.compile the model stays a model: other inputs give other numbers."""
    children.run(
        """
        import sys, torch
        from attacks import tensors
        from neml2_aoti_plugin import Model

        model = Model(sys.argv[1])

        def double(strain):
            return 2.0 * model.forward({"strain": strain})["stress"]

        compiled = torch.compile(double, backend="eager")
        for k in range(1, 4):
            strain = torch.full((k, 6), 1e-3 * k, dtype=torch.float64)
            assert torch.equal(compiled(strain), double(strain))
        """,
        references.case("elasticity").artifact,
        limit=120,
    )


@pytest.mark.parametrize("call", ["solve", "jacobian", "jvp"])
@pytest.mark.parametrize("name", ["elasticity", "calibration"])
def test_transform_that_only_forward_follows(call: str, name: str) -> None:
    children.run(
        """
        import sys, torch
        from attacks import tensors
        from neml2_aoti_plugin import InputTypeError, Model

        model = Model(sys.argv[2])
        inputs = tensors.typical(model)
        run = {
            "solve": lambda x: model.solve(x).outputs,
            "jacobian": lambda x: model.jacobian(x)[0],
            "jvp": lambda x: model.jvp(x, {})[0],
        }[sys.argv[1]]
        try:
            torch.vmap(run)(inputs)
        except InputTypeError as error:
            assert "torch.vmap" in str(error), error
        else:
            raise AssertionError("no error")
        """,
        call,
        references.case(name).artifact,
    )
