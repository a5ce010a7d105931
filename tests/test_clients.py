"""Programs of others around compiled models, with the real packages: `make test-clients`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import radial_return
import references
from neml2_aoti_plugin import Model
from neml2_aoti_plugin.notation import convert, convert_tangent

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]


def loaded(name: str = "calibration") -> Model:
    return Model(references.case(name).artifact)


class TestFelupe:
    """examples/felupe_plate.py, against the same program around a law that was written by hand."""

    @staticmethod
    def by_hand(
        increment: Any, strain: Any, stress: Any, state: Any, *, tangent: bool, dt: float
    ) -> tuple[Any, Any, Any]:
        shape = increment.shape[2:]

        def rows(values: Any) -> Any:
            return convert(np.moveaxis(values.reshape(3, 3, -1), -1, 0), "tensor", "mandel")

        times = np.full(shape[0] * shape[1], dt)
        found, plastic, by_strain = radial_return.stress_and_tangent(
            rows(increment), times, rows(stress), state[0].reshape(-1)
        )
        after = np.moveaxis(convert(found, "mandel", "tensor"), 0, -1).reshape(3, 3, *shape)
        blocks = np.moveaxis(convert_tangent(by_strain, "mandel", "tensor"), 0, -1).reshape(3, 3, 3, 3, *shape)
        return blocks, after, [plastic.reshape(1, *shape)]

    def test_plate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from examples import felupe_plate

        model, mesh = loaded("viscoplasticity"), felupe_plate.plate(4, 6)
        found = felupe_plate.pull(model, mesh, 6)
        monkeypatch.setattr(felupe_plate, "CompiledMaterial", lambda model: TestFelupe.by_hand)
        force, displacement, plastic = felupe_plate.pull(model, mesh, 6)
        assert force.shape == (7,) and plastic.max() > 1e-2
        assert np.allclose(found[0], force, rtol=1e-8)
        assert np.allclose(found[1], displacement, rtol=1e-7, atol=1e-10)
        assert np.allclose(found[2], plastic, rtol=1e-6, atol=1e-10)

    def test_threads_give_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from examples import felupe_plate

        monkeypatch.setattr(felupe_plate, "PULL", 0.02)
        # More points than felupe evaluates at a time.
        model, mesh = loaded("viscoplasticity"), felupe_plate.plate(48, 48)
        one, many = (felupe_plate.pull(model, mesh, 4, parallel=parallel)[0] for parallel in (False, True))
        assert np.allclose(one, many, rtol=1e-12)

    def test_picture(self, tmp_path: Path) -> None:
        from examples import felupe_plate

        mesh = felupe_plate.plate(3, 4)
        felupe_plate.draw(mesh, np.linspace(0.0, 0.02, 4 * 12).reshape(4, 12), tmp_path / "plate.png")
        assert (tmp_path / "plate.png").stat().st_size > 5000


@pytest.mark.usefixtures("doubles")
class TestTorchFem:
    """examples/torch_fem_bar.py: the force against the law written by hand, its gradient against differences."""

    def test_force(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from examples import torch_fem_bar

        def by_hand(inputs: Any, pairs: Any = None) -> tuple[Any, Any]:
            arguments = [
                (inputs["strain"] - inputs["strain~1"]).numpy(),
                np.full(len(inputs["strain"]), float(inputs["t"] - inputs["t~1"])),
                *(inputs[name].numpy() for name in ("stress~1", "equivalent_plastic_strain~1")),
            ]
            stress, plastic, tangent = map(torch.from_numpy, radial_return.stress_and_tangent(*arguments))
            return {"stress": stress, "equivalent_plastic_strain": plastic}, {"stress": {"strain": tangent}}

        model = loaded()
        with torch.no_grad():
            force, displacement = torch_fem_bar.pull(model)
            monkeypatch.setattr(model, "jacobian", by_hand)
            expected = torch_fem_bar.pull(model)
        assert force[-1] > 600.0
        assert torch.allclose(force, expected[0], rtol=1e-8)
        assert torch.allclose(displacement, expected[1], rtol=1e-7, atol=1e-10)

    def test_gradient_by_parameters(self) -> None:
        from examples import torch_fem_bar

        model = loaded()
        model.requires_grad_()
        torch_fem_bar.pull(model)[0][-1].backward()
        for name in torch_fem_bar.PARAMETERS:
            parameter, ends = model.get_parameter(name), []
            value = parameter.item()
            with torch.no_grad():
                for moved in (1.001 * value, 0.999 * value):
                    model.set_parameter(name, moved)
                    ends.append(torch_fem_bar.pull(model)[0][-1].item())
            model.set_parameter(name, value)
            assert parameter.grad is not None
            assert parameter.grad.item() == pytest.approx((ends[0] - ends[1]) / (2e-3 * value), rel=1e-6)


def test_lmfit_takes_an_exact_jacobian() -> None:
    import lmfit

    model, names = loaded(), ("residual.overstress.sy", "residual.hardening.K")
    strain = 2e-3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs = {name: torch.zeros(variable.base_shape).double() for name, variable in model.inputs.items()}
    inputs |= {"strain": strain, "t": torch.ones(()).double()}
    data = model.forward(inputs)["stress"]

    def at(parameters: Any) -> dict[str, torch.Tensor]:
        values = parameters.valuesdict().values()
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in zip(names, values, strict=True)}

    def residual(parameters: Any) -> Any:
        return (model.forward(inputs, at(parameters))["stress"] - data).flatten().numpy()

    def jacobian(parameters: Any) -> Any:
        blocks = model.param_jacobian(inputs, at(parameters))[1]["stress"]
        return np.stack([blocks[name].flatten().numpy() for name in names], 1)

    parameters = lmfit.create_params(sy={"value": 150.0, "min": 50.0, "max": 400.0}, K={"value": 1000.0})
    found = lmfit.minimize(residual, parameters, method="least_squares", jac=jacobian)
    assert found.params["sy"].value == pytest.approx(180.0, rel=1e-6)
    assert found.params["K"].value == pytest.approx(1800.0, rel=1e-4)


@pytest.fixture(scope="module")
def material() -> Any:
    import jax

    from examples import jax_path

    jax.config.update("jax_enable_x64", True)
    return jax_path.in_jax(loaded())


class TestJax:
    """examples/jax_path.py: scan and vmap against the law written by hand, gradients against differences."""

    def test_paths(self, material: Any) -> None:
        import jax

        from examples import jax_path

        ends = 0.02 * np.random.default_rng(3).standard_normal((5, 6))
        found = np.asarray(jax.jit(jax.vmap(lambda end: jax_path.path(material, end)))(jax.numpy.asarray(ends)))
        stress, plastic, dt = np.zeros((5, 6)), np.zeros(5), np.full(5, jax_path.DURATION / jax_path.STEPS)
        for k in range(jax_path.STEPS):
            stress, plastic, _ = radial_return.stress_and_tangent(ends / jax_path.STEPS, dt, stress, plastic)
            assert np.allclose(found[:, k], stress, rtol=1e-8, atol=1e-6)
        assert (plastic > 1e-3).all()

    def test_gradient(self, material: Any) -> None:
        import jax
        import jax.numpy as jnp

        from examples import jax_path

        def last(end: Any) -> Any:
            return jnp.sum(jax_path.path(material, end)[-1] * jnp.arange(1.0, 7.0))

        end = 0.02 * jnp.array([1.0, -0.4, -0.5, 0.1, 0.0, 0.3])
        gradient, step = jax.jit(jax.grad(last))(end), 1e-6
        along = jnp.array([0.3, -0.2, 0.5, 0.1, 0.7, -0.4])
        difference = (last(end + step * along) - last(end - step * along)) / (2.0 * step)
        assert float(gradient @ along) == pytest.approx(float(difference), rel=1e-6)
        # Forward mode gives the same.
        assert float(jax.jvp(last, (end,), (along,))[1]) == pytest.approx(float(gradient @ along), rel=1e-12)
