"""`Points` in every notation and dimension: results and tangents against algebra, closed forms and neml2's driver."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import neml2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import radial_return
import references
from neml2_aoti_plugin import DerivativeNotCompiledError, InputError, Points, UnknownNameError
from neml2_aoti_plugin.model import Outcome
from neml2_aoti_plugin.notation import convert
from stubs.catalogue import CATALOGUE

Array = NDArray[np.float64]

NOTATIONS = ("mandel", "voigt", "tensor")
PLANES = ("plane strain", "plane stress")
DIMENSIONS: tuple[Any, ...] = (3, *PLANES, "axisymmetric")
YOUNG, POISSON = 205_000.0, 0.29


def gradients(n: int, size: float, dimension: Any = 3) -> Array:
    """Symmetric 3 x 3 strains; in the plane only where the dimension is a plane one, and without shears out of it."""
    found = size * np.random.default_rng(3).normal(size=(n, 3, 3))
    if dimension != 3:
        found[:, 2, :2], found[:, :2, 2] = 0.0, 0.0
    if dimension not in (3, "axisymmetric"):
        found[:, 2, 2] = 0.0
    half: Array = 0.5 * (found + found.swapaxes(1, 2))
    return half


def written(tensors: Array, notation: str, kind: str, dimension: Any = 3) -> Array:
    """Tensors `(n, 3, 3)` as a caller writes them, by hand."""
    if dimension != 3 and notation != "tensor":
        shear = {"mandel": np.sqrt(2.0), "voigt": 2.0 if kind == "strain" else 1.0}[notation]
        hoop = [tensors[:, 2, 2]] if dimension == "axisymmetric" else []
        return np.stack([tensors[:, 0, 0], tensors[:, 1, 1], *hoop, shear * tensors[:, 0, 1]], 1)
    if dimension not in (3, "axisymmetric"):
        return tensors[:, :2, :2]
    form: Any = notation if notation != "voigt" else f"voigt {kind}"
    return convert(tensors, "tensor", form)


def points_of(name: str, n: int, **options: Any) -> Points:
    points = Points(references.case(name).model, n, **options)
    points.initial()
    return points


@pytest.mark.parametrize("dimension", [3, "plane strain", "axisymmetric"])
@pytest.mark.parametrize("notation", NOTATIONS)
def test_results_are_those_of_the_law_by_hand(notation: Any, dimension: Any) -> None:
    points = points_of("viscoplasticity", 5, notation=notation, dimension=dimension)
    hand = radial_return.RadialReturn(5)
    for step in (1, 2):
        strain = step * gradients(5, 3e-3, dimension)
        found = points.update(strain=written(strain, notation, "strain", dimension), t=float(step))
        expected = hand.update(strain=convert(strain, "tensor", "mandel"), t=float(step))
        stress = convert(expected.outputs["stress"], "mandel", "tensor")
        assert np.allclose(found.outputs["stress"], written(stress, notation, "stress", dimension), atol=1e-6)
        assert np.allclose(points.trial("stress"), written(stress, notation, "stress"), atol=1e-6)
        assert np.allclose(points.trial("strain"), written(strain, notation, "strain"), atol=1e-15)
        points.commit()
        hand.commit()
        assert np.allclose(points.committed("stress"), written(stress, notation, "stress"), atol=1e-6)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("notation", NOTATIONS)
def test_every_tangent_is_that_of_the_results(notation: Any, dimension: Any) -> None:
    """Central differences of the results, along symmetric directions as the caller writes them."""
    points = points_of("calibration", 4, notation=notation, dimension=dimension)
    strain = gradients(4, 4e-3, dimension)
    points.update(strain=written(0.7 * strain, notation, "strain", dimension), t=1.0)
    points.commit()
    at = written(strain, notation, "strain", dimension)
    found = points.update(strain=at, t=1.5)
    assert [(o, b) for o, row in found.tangent.items() for b in row] == [
        (o, b) for o in ("stress", "equivalent_plastic_strain") for b in ("strain", "t")
    ]
    move, step = written(gradients(4, 1.0, dimension)[::-1], notation, "strain", dimension), 1e-7
    for by, moved, later in (("strain", step * move, 0.0), ("t", 0.0 * move, 1e-4)):
        up, down = (points.update(strain=at + sign * moved, t=1.5 + sign * later).outputs for sign in (1.0, -1.0))
        for out in up:
            difference = (up[out] - down[out]) / 2.0
            tangent = found.tangent[out][by]
            if by == "t":
                along = 1e-4 * tangent
            else:
                axes = 2 if notation == "tensor" else 1
                rank = up[out].ndim - 1
                along = step * np.stack([np.tensordot(c, m, axes) for c, m in zip(tangent, move, strict=True)])
                assert tangent.ndim == 1 + rank + axes
            assert np.allclose(along, difference, rtol=2e-6, atol=2e-6 * np.abs(difference).max())


@pytest.mark.parametrize("notation", NOTATIONS)
def test_axisymmetric_is_the_thick_cylinder_of_lame(notation: Any) -> None:
    """Stresses under internal pressure without axial strain, from the strains of the displacement a r + b / r."""
    inner, outer, pressure = 10.0, 25.0, 80.0
    radius = np.linspace(inner, outer, 6)
    shear = YOUNG / (2.0 * (1.0 + POISSON))
    c = pressure * inner**2 / (outer**2 - inner**2)
    a, b = c * (1.0 - 2.0 * POISSON) / (2.0 * shear), c * outer**2 / (2.0 * shear)
    strain, stress = np.zeros((6, 3, 3)), np.zeros((6, 3, 3))
    # The axes are r, z, t.
    strain[:, 0, 0], strain[:, 2, 2] = a - b / radius**2, a + b / radius**2
    stress[:, 0, 0], stress[:, 2, 2] = c * (1.0 - outer**2 / radius**2), c * (1.0 + outer**2 / radius**2)
    stress[:, 1, 1] = 2.0 * POISSON * c
    points = points_of("elasticity", 6, notation=notation, dimension="axisymmetric")
    found = points.update(strain=written(strain, notation, "strain", "axisymmetric"))
    expected = written(stress, notation, "stress", "axisymmetric")
    assert np.allclose(found.outputs["stress"], expected, rtol=1e-10, atol=1e-9)
    if notation == "voigt":
        stiffness = 2.0 * shear * np.diag([1.0, 1.0, 1.0, 0.5])
        stiffness[:3, :3] += 2.0 * shear * POISSON / (1.0 - 2.0 * POISSON)
        assert np.allclose(found.tangent["stress"]["strain"], stiffness, rtol=1e-10, atol=1e-6)


YIELD, HARDENING = "residual.overstress.sy", "residual.hardening.K"


class TestParameters:
    @pytest.mark.parametrize("dimension", DIMENSIONS)
    @pytest.mark.parametrize("notation", NOTATIONS)
    def test_tangents_are_those_of_the_results(self, notation: Any, dimension: Any) -> None:
        """Central differences by a value for each point and by one for all, which overrides give."""
        pairs = [("stress", YIELD), ("stress", "strain"), ("equivalent_plastic_strain", HARDENING)]
        points = points_of("calibration", 4, notation=notation, dimension=dimension, pairs=pairs)
        at = {"strain": written(gradients(4, 4e-3, dimension), notation, "strain", dimension), "t": 1.0}
        values: dict[str, Any] = {YIELD: np.array([150.0, 160.0, 170.0, 180.0]), HARDENING: 1500.0}
        found = points.update(at, param_overrides=values)
        assert [(out, by) for out, row in found.tangent.items() for by in row] == sorted(
            pairs, key=lambda p: p[0][0] == "e"
        )
        for out, by, step in (("stress", YIELD, 1e-3), ("equivalent_plastic_strain", HARDENING, 1e-2)):
            up, down = (
                points.update(at, param_overrides={**values, by: values[by] + sign * step}).outputs[out]
                for sign in (1.0, -1.0)
            )
            expected = (up - down) / (2 * step)
            assert found.tangent[out][by].shape == expected.shape and np.abs(expected).max() > 0.0
            assert np.allclose(found.tangent[out][by], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

    @pytest.mark.parametrize("dimension", [3, "plane stress"])
    def test_overrides_are_those_of_each_point_and_of_this_update(self, dimension: Any) -> None:
        strain, yields = written(gradients(3, 6e-3, dimension), "mandel", "strain", dimension), [100.0, 200.0, 300.0]
        points = points_of("calibration", 3, dimension=dimension)
        before = points.update(strain=strain, t=1.0).outputs["stress"]
        found = points.update(strain=strain, t=1.0, param_overrides={YIELD: torch.tensor(yields).double()})
        assert isinstance(found.outputs["stress"], torch.Tensor) and bool(found.converged.all())
        for k in range(3):
            model = references.case("calibration").load()
            model.set_parameter(YIELD, yields[k])
            alone = Points(model, 1, dimension=dimension)
            alone.initial()
            expected = alone.update(strain=strain[k], t=1.0)
            assert np.allclose(found.outputs["stress"][k], expected.outputs["stress"][0], rtol=1e-9, atol=1e-7)
            assert np.allclose(found.tangent["stress"]["strain"][k], expected.tangent["stress"]["strain"][0], rtol=1e-6)
        again = points.update(strain=strain, t=1.0).outputs["stress"]
        assert np.allclose(again, before, rtol=1e-9, atol=1e-7) and not np.allclose(again, found.outputs["stress"])

    def test_points_that_are_attempted_again_keep_their_own(self) -> None:
        points, yields = points_of("calibration", 2), np.array([100.0, 300.0])
        near, far = np.zeros((2, 6)), np.zeros((2, 6))
        near[:, 0], far[1, 0] = 5e-3, np.nan
        expected = points.update(strain=near, t=1.0, param_overrides={YIELD: yields}).outputs["stress"]
        # The second point fails, and with it the guess of the next update.
        assert points.update(strain=far, t=1.0, param_overrides={YIELD: yields}).failed == [1]
        found = points.update(strain=near, t=1.0, param_overrides={YIELD: yields})
        assert not found.failed and np.allclose(found.outputs["stress"], expected, rtol=1e-9)


@pytest.mark.parametrize("notation", NOTATIONS)
class TestPlaneStress:
    def test_closed_form(self, notation: Any) -> None:
        points = points_of("elasticity", 6, notation=notation, dimension="plane stress")
        strain = gradients(6, 1e-3, "plane")
        found = points.update(strain=written(strain, notation, "strain", "plane"))
        factor = YOUNG / (1.0 - POISSON**2)
        stress = np.zeros((6, 3, 3))
        stress[:, 0, 0] = factor * (strain[:, 0, 0] + POISSON * strain[:, 1, 1])
        stress[:, 1, 1] = factor * (strain[:, 1, 1] + POISSON * strain[:, 0, 0])
        stress[:, 0, 1] = stress[:, 1, 0] = factor * (1.0 - POISSON) * strain[:, 0, 1]
        assert np.allclose(found.outputs["stress"], written(stress, notation, "stress", "plane"), rtol=1e-10, atol=1e-9)
        thickness = -POISSON / (1.0 - POISSON) * (strain[:, 0, 0] + strain[:, 1, 1])
        whole = strain.copy()
        whole[:, 2, 2] = thickness
        assert np.allclose(points.trial("strain"), written(whole, notation, "strain"), rtol=1e-12, atol=1e-18)
        if notation == "voigt":
            expected = factor * np.array([[1, POISSON, 0], [POISSON, 1, 0], [0, 0, 0.5 * (1.0 - POISSON)]])
            assert np.allclose(found.tangent["stress"]["strain"], expected, rtol=1e-11, atol=1e-6)
        assert not found.iterations.any()

    def test_stress_out_of_the_plane_vanishes(self, notation: Any) -> None:
        points = points_of("viscoplasticity", 8, notation=notation, dimension="plane stress")
        for step in range(1, 5):
            strain = written(step * gradients(8, 4e-3, "plane"), notation, "strain", "plane")
            found = points.update(strain=strain, t=step)
            assert bool(found.converged.all())
            form: Any = "voigt stress" if notation == "voigt" else notation
            whole = convert(points.trial("stress"), form, "tensor")
            assert np.abs(whole[:, 2]).max() < 1e-8 * np.abs(whole).max()
            points.commit()


def mixed_control(folder: Path, steps: int) -> Path:
    """The viscoplastic law with strain given in the plane and stress out of it, for neml2's own driver."""
    text = CATALOGUE["viscoplasticity"].path.read_text(encoding="utf-8")
    tensors = f"""
  [fixed]
    type = Python
    expr = 'SR2(torch.linspace(0.0, 1.0, {steps + 1}, dtype=torch.float64).reshape(-1, 1, 1) * torch.tensor([[2.0e-2, 1.0e-2, 0.0, 0.0, 0.0, 5e-3], [2.0e-2, -5.0e-3, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64))'
  []
  [controls]
    type = Python
    expr = 'SR2(torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64).expand({steps + 1}, 2, 6).clone())'
  []
"""  # noqa: E501
    models = "".join(
        f"""
  [{name}]
    type = MixedControlSetup
    control = 'control'
    x_above = 'fixed{lag}'
    x_below = 'mixed{lag}'
    y = 'stress{lag}'
    z = 'strain{lag}'
  []
"""
        for name, lag in (("setup", ""), ("setup_before", "~1"))
    )
    for old, new in (
        ("prescribed_SR2_names = 'strain'", "prescribed_SR2_names = 'fixed control'"),
        ("prescribed_SR2_values = 'strains'", "prescribed_SR2_values = 'fixed controls'"),
        ("[Tensors]\n", f"[Tensors]\n{tensors}"),
        ("torch.linspace(0.0, 30.0, 61", f"torch.linspace(0.0, 30.0, {steps + 1}"),
        ("[Models]\n", f"[Models]\n{models}"),
        ("models = 'total_rate", "models = 'setup setup_before total_rate"),
        (
            "unknowns = 'stress equivalent_plastic_strain'",
            "unknowns = 'mixed equivalent_plastic_strain'\n"
            "    residuals = 'stress_residual equivalent_plastic_strain_residual'",
        ),
        ("unknowns_SR2 = 'stress'", "unknowns_SR2 = 'mixed'"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    file = folder / "mixed_control.i"
    file.write_text(text, encoding="utf-8")
    return file


def test_plane_stress_is_that_of_mixed_control_by_neml2s_driver(tmp_path: Path) -> None:
    steps = 6
    driver = neml2.load_input(mixed_control(tmp_path, steps)).get_driver("driver")
    driver.run()
    points = points_of("viscoplasticity", 2, dimension="plane stress")
    inside, outside = [0, 1, 5], [2, 3, 4]
    for step in range(1, steps + 1):
        given = driver.result_in[step]
        found = points.update(strain=given["fixed"].data.numpy()[:, inside], t=float(given["t"].data))
        mixed = driver.result_out[step]["mixed"].data.detach().numpy()
        plastic = driver.result_out[step]["equivalent_plastic_strain"].data.detach().numpy()
        assert np.allclose(found.outputs["stress"], mixed[:, inside], rtol=1e-7)
        assert np.allclose(points.trial("strain")[:, outside], mixed[:, outside], rtol=1e-7, atol=1e-12)
        assert np.allclose(found.outputs["equivalent_plastic_strain"], plastic, rtol=1e-7, atol=1e-12)
        points.commit()


class TestPlaneStressOfPoints:
    @pytest.mark.wide
    def test_tangent_by_a_temperature(self) -> None:
        points = points_of("composed", 2, notation="voigt", dimension="plane stress")
        strain = np.array([[4e-3, 0, 1e-3], [0, 1e-3, 0]])
        found = points.update(strain=strain, temperature=350.0, t=1.0)
        up, down = (points.update(strain=strain, temperature=350.0 + d, t=1.0).outputs for d in (1e-2, -1e-2))
        for name, row in found.tangent.items():
            expected = (up[name] - down[name]) / 2e-2
            assert np.allclose(row["temperature"], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())

    def test_points_that_fail_do_so_alone(self) -> None:
        points, alone = (points_of("viscoplasticity", n, dimension="plane stress") for n in (4, 3))
        strain = written(gradients(4, 4e-3, "plane"), "mandel", "strain", "plane")
        broken = strain.copy()
        broken[1] = np.nan
        found = points.update(strain=broken, t=1.0)
        assert found.failed == [1] and np.isnan(found.outputs["stress"][1]).all()
        assert np.isnan(found.tangent["stress"]["strain"][1]).all()
        expected = alone.update(strain=strain[[0, 2, 3]], t=1.0)
        assert np.allclose(found.outputs["stress"][[0, 2, 3]], expected.outputs["stress"], rtol=1e-9, atol=1e-7)
        # The failed one starts from the state in the next update.
        assert not points.update(strain=strain, t=1.0).failed

    def test_search_that_does_not_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("neml2_aoti_plugin.points._plane_stress.LIMIT", 1)
        points = points_of("viscoplasticity", 2, dimension="plane stress")
        found = points.update(strain=np.array([[1e-2, 0, 0], [0, 0, 0]]), t=1.0)
        assert found.failed == [0] and found.outcome[0] == Outcome.OUT_OF_ITERATIONS
        assert np.isnan(found.outputs["stress"][0]).all() and found.step_factor == 0.5

    def test_step_that_the_model_cannot_take_is_halved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        points = points_of("viscoplasticity", 3, dimension="plane stress")
        strain = written(gradients(3, 4e-3, "plane"), "mandel", "strain", "plane")
        expected = points.update(strain=strain, t=1.0)
        points.revert()
        solve, calls = points.model.solve, 0

        def failing(inputs: Any, *rest: Any, **options: Any) -> Any:
            """The model, that fails at the second point in the second call."""
            nonlocal calls
            calls += 1
            if calls in (2, 3):
                inputs = {**inputs, "strain": inputs["strain"].clone()}
                inputs["strain"][1 if calls == 2 else 0] = torch.nan
            return solve(inputs, *rest, **options)

        monkeypatch.setattr(points.model, "solve", failing)
        found = points.update(strain=strain, t=1.0)
        assert not found.failed and calls > 3
        assert np.allclose(found.outputs["stress"], expected.outputs["stress"], rtol=1e-9, atol=1e-7)

    def test_a_step_keeps_the_strain_out_of_the_plane(self, tmp_path: Path) -> None:
        points = points_of("viscoplasticity", 2, dimension="plane stress")
        points.update(strain=np.array([[1e-2, 0, 0], [0, 5e-3, 0]]), t=1.0)
        before = points.trial("strain")
        points.commit()
        assert np.array_equal(points.committed("strain"), before) and np.abs(before[:, 2]).min() > 1e-3
        points.save(tmp_path / "state.npz")
        other = Points(points.model, 2, dimension="plane stress")
        other.load(tmp_path / "state.npz")
        strain = np.array([[1.2e-2, 0, 1e-3], [1e-3, 5e-3, 0]])
        one, two = (p.update(strain=strain, t=2.0) for p in (points, other))
        assert np.array_equal(one.outputs["stress"], two.outputs["stress"])


class TestWhole:
    """Tensors with all components in a plane dimension."""

    @pytest.mark.parametrize("notation", NOTATIONS)
    def test_outputs_and_inputs(self, notation: Any) -> None:
        reduced = points_of("viscoplasticity", 3, notation=notation, dimension="plane strain")
        whole = points_of("viscoplasticity", 3, notation=notation, dimension="plane strain", whole=["stress"])
        free = points_of("viscoplasticity", 3, notation=notation, dimension="plane strain", whole=["stress", "strain"])
        space = points_of("viscoplasticity", 3, notation=notation)
        strain = gradients(3, 4e-3, "plane")
        one = reduced.update(strain=written(strain, notation, "strain", "plane"), t=1.0)
        two = whole.update(strain=written(strain, notation, "strain", "plane"), t=1.0)
        three = free.update(strain=written(strain, notation, "strain"), t=1.0)
        expected = space.update(strain=written(strain, notation, "strain"), t=1.0)
        assert np.array_equal(two.outputs["stress"], expected.outputs["stress"])
        assert np.array_equal(three.outputs["stress"], expected.outputs["stress"])
        assert np.array_equal(three.tangent["stress"]["strain"], expected.tangent["stress"]["strain"])
        c, d = one.tangent["stress"]["strain"], two.tangent["stress"]["strain"]
        if notation == "tensor":
            assert d.shape == (3, 3, 3, 2, 2) and np.array_equal(d[:, :2, :2], c)
        else:
            assert d.shape == (3, 6, 3) and np.array_equal(d[:, [0, 1, 5]], c)

    def test_refused(self) -> None:
        model = references.case("viscoplasticity").model
        with pytest.raises(InputError, match=r"whole= names 'stress', .*trial\('stress'"):
            Points(model, 1, dimension="plane stress", whole=["stress"])
        with pytest.raises(UnknownNameError, match=r"whole= .*: unknown 't'"):
            Points(model, 1, dimension="plane strain", whole=["t"])


class TestTold:
    def test_voigt_of_variables_whose_names_do_not_tell(self, tmp_path: Path) -> None:
        model = references.altered(
            "elasticity", tmp_path, boundary_aliases={"outputs": {"stress": "sigma"}, "inputs": {"strain": "eps"}}
        )
        with pytest.raises(InputError, match=r"whether Voigt's notation writes '(sigma|eps)' as a strain.*strains=\['"):
            Points(model, 1, notation="voigt")
        points = Points(model, 1, notation="voigt", strains=["eps"], stresses=["sigma"])
        shear = YOUNG / (2.0 * (1.0 + POISSON))
        found = points.update(eps=np.array([0, 0, 0, 0, 0, 1e-3]))
        assert np.allclose(found.outputs["sigma"], [[0, 0, 0, 0, 0, shear * 1e-3]])
        # What it does with other names, it is told.
        with pytest.raises(UnknownNameError, match=r"strains= .*unknown 'epsilon'.* symmetric tensors are: sigma, eps"):
            Points(model, 1, notation="voigt", strains=["epsilon"])
        plane = Points(model, 1, dimension="plane stress")
        assert plane.update(eps=np.array([1e-3, 0.0, 0.0])).outputs["sigma"].shape == (1, 3)

    def test_plane_stress_needs_the_tangent(self, tmp_path: Path) -> None:
        bare = references.altered("viscoplasticity", tmp_path, derivatives=[])
        with pytest.raises(InputError, match=r"needs the derivative of the stress by the strain.*-d stress:strain"):
            Points(bare, 1, dimension="plane stress")

    def test_a_point_whose_plane_derivative_is_not_finite_has_failed(self) -> None:
        model = references.case("promoted").load()
        # Without stiffness any strain through the thickness will do.
        model.set_parameter("promoted.E", torch.tensor([1e5, 0.0], dtype=torch.float64))
        points = Points(model, 2, dimension="plane stress")
        found = points.update(strain=np.array([1e-3, 0.0, 0.0]))
        assert found.failed == [1] and list(found.outcome) == [Outcome.CONVERGED, Outcome.NOT_FINITE]
        assert np.isnan(found.outputs["stress"][1]).all() and np.isfinite(found.tangent["stress"]["strain"][0]).all()

    def test_plane_stress_of_which_pair(self) -> None:
        model = references.case("substepping").model
        with pytest.raises(InputError, match=r"stress_strain= names \('stress', 'strain'\).*there are: \[\('plastic_"):
            Points(model, 1, dimension="plane stress", stress_strain=("stress", "strain"))

    def test_tangents_in_plane_stress_take_others(self, tmp_path: Path) -> None:
        model = references.altered(
            "calibration", tmp_path, derivatives=[["stress", "strain"], ["equivalent_plastic_strain", "t"]]
        )
        assert Points(model, 1, dimension="plane stress").pairs == (("stress", "strain"),)
        with pytest.raises(DerivativeNotCompiledError, match=r"d\(equivalent_plastic_strain\)/d\(t\) takes d\(equiv"):
            Points(model, 1, dimension="plane stress", pairs=[("equivalent_plastic_strain", "t")])


@pytest.mark.parametrize(("notation", "dimension"), list(itertools.product(NOTATIONS, DIMENSIONS)))
def test_out_takes_every_form(notation: Any, dimension: Any) -> None:
    points = points_of("calibration", 4, notation=notation, dimension=dimension)
    at = written(gradients(4, 4e-3, dimension), notation, "strain", dimension)
    expected = points.update(strain=at, t=1.0)
    points.revert()
    out: dict[Any, Array] = {name: np.full(value.shape, -1.0) for name, value in expected.outputs.items()}
    out |= {(o, b): np.full(x.shape, -1.0) for o, row in expected.tangent.items() for b, x in row.items()}
    found = points.update(strain=at, t=1.0, out=out)
    for name, value in expected.outputs.items():
        assert np.shares_memory(found.outputs[name], out[name]) and np.array_equal(out[name], value)
    for o, row in expected.tangent.items():
        for b, value in row.items():
            assert np.shares_memory(found.tangent[o][b], out[o, b]) and np.array_equal(out[o, b], value)
