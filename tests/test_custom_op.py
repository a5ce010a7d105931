"""`CustomOp`: a compiled model that torch.compile and torch.export keep in their graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import references
from neml2_aoti_plugin import DerivativeNotCompiledError, InputError
from neml2_aoti_plugin.model import CustomOp, Model

SY = "residual.overstress.sy"


def states(rows: int) -> dict[str, Tensor]:
    """Inputs of the viscoplastic model: some rows stay elastic, others flow."""
    random = torch.Generator().manual_seed(rows)
    found = {n: torch.zeros(v.base_shape, dtype=torch.float64) for n, v in loaded().inputs.items()}
    found["strain"] = 2e-3 * torch.randn(rows, 6, generator=random, dtype=torch.float64)
    return {**found, "t": found["t"] + 1.0}


def loaded() -> Model:
    return references.case("calibration").load(tight=False)


class Work(torch.nn.Module):
    """A program around a call: a parameter of its own before, and torch's operations behind."""

    def __init__(self, call: torch.nn.Module) -> None:
        super().__init__()
        self.call = call
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        found = self.call({**inputs, "strain": self.scale * inputs["strain"]})
        stress: Tensor = found["stress"].square().sum(-1) + found["equivalent_plastic_strain"]
        return stress


def gradients(program: Callable[..., Tensor], work: Work, rows: int) -> list[Tensor]:
    """What a program gives, and its gradients by the strain and by all parameters."""
    inputs = states(rows)
    asked = [inputs["strain"].requires_grad_(), *work.parameters()]
    found = program(inputs)
    return [found.detach(), *torch.autograd.grad(found.sum(), asked)]


@pytest.fixture(scope="module")
def model() -> Model:
    return loaded().requires_grad_()


@pytest.fixture(scope="module")
def operator(model: Model) -> CustomOp:
    return CustomOp(model, "viscoplasticity")


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-12, atol=0.0) for a, b in zip(found, expected, strict=True))


def test_gradients_are_those_of_forward(model: Model, operator: CustomOp) -> None:
    ours, plain = Work(operator), Work(model)
    found = gradients(ours, ours, 5)
    assert len(found) == 5 and all(bool(g.any()) for g in found)
    assert same(found, gradients(plain, plain, 5))


def test_what_torch_asks_of_an_operator(model: Model, operator: CustomOp) -> None:
    values = [states(3)[name] for name in model.inputs]
    values += [p.detach() for p in model.named_parameters().values()]
    checked = torch.library.opcheck(torch.ops.neml2_aoti_plugin.viscoplasticity.default, tuple(values))
    assert set(checked.values()) == {"SUCCESS"}


def test_parameters_of_a_call(model: Model, operator: CustomOp) -> None:
    override = {SY: torch.tensor([100.0, 200.0, 300.0], dtype=torch.float64)}
    found, expected = operator(states(3), override), model.forward(states(3), override)
    assert all(torch.equal(found[name], expected[name]) for name in model.outputs)


@pytest.mark.parametrize("how", ["set", "in place", "in the module", "parametrised"])
def test_parameters_that_the_model_has_been_given_since(how: str) -> None:
    """Values of another shape too, which take the place of the parameter that was there when the operator was made."""
    model = loaded()
    operator = CustomOp(model, f"given_since_{how.replace(' ', '_')}")
    before, values = operator(states(3))["stress"], torch.tensor([50.0, 60.0, 70.0], dtype=torch.float64)
    node = model.get_submodule("residual.overstress")
    if how == "set":
        model.set_parameter(SY, values)
    elif how == "in place":
        model.named_parameters()[SY].data = values
    elif how == "in the module":
        node.sy = torch.nn.Parameter(values)
    elif how == "parametrised":
        torch.nn.utils.parametrize.register_parametrization(node, "sy", torch.nn.Identity())
        node.get_parameter("parametrizations.sy.original").data = values
    found = operator(states(3))["stress"]
    assert torch.equal(found, model.forward(states(3))["stress"]) and not torch.allclose(found, before)
    model.requires_grad_()
    operator(states(3))["stress"].sum().backward()
    gradient = next(p.grad for p in model.parameters() if p.shape == values.shape)
    assert gradient is not None and gradient.shape == values.shape and bool(gradient.any())


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
def test_compile_without_a_break(model: Model, operator: CustomOp) -> None:
    work, plain = Work(operator), Work(model)
    program = torch.compile(work, fullgraph=True)
    for rows in (3, 5, 8):
        assert same(gradients(program, work, rows), gradients(plain, plain, rows))


# torch's own, before 2.13, where an exported program is loaded.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_export_with_any_batch(operator: CustomOp, tmp_path: Path) -> None:
    work = Work(operator)
    rows = {name: ({0: torch.export.Dim("rows")} if name == "strain" else None) for name in states(4)}
    program = torch.export.export(work, (states(4),), dynamic_shapes=(rows,))
    torch.export.save(program, tmp_path / "work.pt2")
    again = torch.export.load(tmp_path / "work.pt2").module()
    for count in (2, 9):
        assert torch.equal(again(states(count)), work(states(count)))


def test_what_is_wrong_is_named(model: Model, operator: CustomOp) -> None:
    with pytest.raises(InputError, match="viscoplasticity is there already"):
        CustomOp(model, "viscoplasticity")
    with pytest.raises(InputError, match="Python identifier"):
        CustomOp(model, "visco plasticity")
    inputs = states(2)
    inputs["time"] = inputs.pop("t")
    with pytest.raises(InputError, match="missing 't'; unknown 'time'"):
        operator(inputs)
    inputs = states(2)
    inputs["stress~1"].requires_grad_()
    found = CustomOp(references.case("viscoplasticity").model, "without_all_derivatives")(inputs)
    with pytest.raises(DerivativeNotCompiledError, match="stress:stress~1"):
        found["stress"].sum().backward()
