"""`Points` in every notation and dimension: results, tangents and gradients against algebra and differences."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import radial_return
import references
from neml2_aoti_plugin import DerivativeNotCompiledError, InputError, Points, UnknownNameError
from neml2_aoti_plugin.model import Outcome
from neml2_aoti_plugin.notation import convert
from point_cases import DIMENSIONS, HARDENING, YIELD, Array, N, begun, close, strains, tensors, written

NOTATIONS = ("mandel", "voigt", "tensor")
FORMS = pytest.mark.parametrize(("notation", "dimension"), list(itertools.product(NOTATIONS, DIMENSIONS)))
YOUNG, POISSON = 205_000.0, 0.29


@FORMS
def test_results_are_those_of_the_law_by_hand(notation: Any, dimension: Any) -> None:
    """In plane stress at the strains that were found out of the plane, where no stress may be left."""
    points, hand = begun(notation=notation, dimension=dimension), radial_return.RadialReturn(N)
    for step in (1.0, 2.0):
        strain = tensors(step * 4e-3, dimension=dimension)
        given = written(strain, notation, "strain", dimension)
        out: dict[Any, Array] = {
            "stress": np.full(given.shape, -1.0),
            ("stress", "strain"): np.full((*given.shape, *given.shape[1:]), -1.0),
        }
        found = points.update(strain=given, t=step, out=out)
        if dimension == "plane stress":
            form: Any = "voigt strain" if notation == "voigt" else notation
            whole = convert(points.trial("strain"), form, "tensor")
            strain[:, 2], strain[:, :, 2] = whole[:, 2], whole[:, :, 2]
        stress = hand.update(strain=convert(strain, "tensor", "mandel"), t=step).outputs["stress"]
        stress = convert(stress, "mandel", "tensor")
        assert dimension != "plane stress" or np.abs(stress[:, 2]).max() < 1e-5
        assert np.allclose(found.outputs["stress"], written(stress, notation, "stress", dimension), atol=1e-5)
        assert np.allclose(points.trial("stress"), written(stress, notation, "stress"), atol=1e-5)
        assert np.allclose(points.trial("strain"), written(strain, notation, "strain"), rtol=1e-12, atol=1e-15)
        # Arrays of the caller are where the results are.
        assert np.shares_memory(found.outputs["stress"], out["stress"])
        assert np.shares_memory(found.tangent["stress"]["strain"], out["stress", "strain"])
        close(found, points.update(strain=given, t=step))
        points.commit()
        hand.commit()
        assert np.allclose(points.committed("stress"), written(stress, notation, "stress"), atol=1e-5)


@FORMS
def test_tangents_and_gradients_are_those_of_the_results(notation: Any, dimension: Any) -> None:
    """Central differences by inputs and parameters, a value for each point or one for all, in the second step."""
    outputs, inputs = ("stress", "equivalent_plastic_strain"), {"strain": 1e-7, "t": 1e-4, YIELD: 1e-2, HARDENING: 1.0}
    pairs = [(out, by) for out in outputs for by in inputs]
    points = begun("calibration", notation=notation, dimension=dimension, pairs=pairs)
    points.update(strain=strains(4e-3, notation=notation, dimension=dimension), t=1.0)
    points.commit()
    at = {
        "strain": strains(7e-3, notation=notation, dimension=dimension),
        "t": np.array(1.5),
        YIELD: np.array([150.0, 160.0, 170.0, 180.0]),
        HARDENING: np.array(1500.0),
    }

    def update(values: Any) -> Any:
        driven, overrides = (dict(list(values.items())[part]) for part in (slice(2), slice(2, 4)))
        found = points.update(driven, param_overrides=overrides)
        assert not found.failed
        return found

    found = update(at)
    assert [(out, by) for out, row in found.tangent.items() for by in row] == pairs
    leaves = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in at.items()}
    followed, random = update(leaves).outputs, np.random.default_rng(7)
    weights = {out: random.normal(size=value.shape) for out, value in followed.items()}
    # Both outputs take part in the loss.
    weights["equivalent_plastic_strain"] *= 1e5
    sum((torch.from_numpy(weights[out]) * value).sum() for out, value in followed.items()).backward()
    for by, step in inputs.items():
        one = tensors(1.0, dimension=dimension, seed=9)
        along = written(one, notation, "strain", dimension) if by == "strain" else np.ones_like(at[by])
        up, down = (update({**at, by: at[by] + sign * step * along}).outputs for sign in (1.0, -1.0))
        axes, loss = (1 if notation != "tensor" else 2) if by == "strain" else 0, 0.0
        for out, row in found.tangent.items():
            slope = (up[out] - down[out]) / (2 * step)
            block = (
                np.stack([np.tensordot(c, m, axes) for c, m in zip(row[by], along, strict=True)]) if axes else row[by]
            )
            assert row[by].ndim == slope.ndim + axes and np.abs(slope).max() > 0.0
            assert np.allclose(block, slope, rtol=1e-5, atol=1e-5 * np.abs(slope).max())
            loss += float((weights[out] * slope).sum())
        gradient = leaves[by].grad
        assert gradient is not None and gradient.shape == at[by].shape
        assert float((gradient * torch.from_numpy(along)).sum()) == pytest.approx(loss, rel=2e-5)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_stiffness_of_elasticity_in_closed_form(dimension: Any) -> None:
    """With engineering shears, as textbooks have it; nothing is solved."""
    points = begun("elasticity", notation="voigt", dimension=dimension)
    shear = YOUNG / (2.0 * (1.0 + POISSON))
    expected: Any = shear * np.diag([2.0, 2.0, 2.0, 1.0, 1.0, 1.0])
    expected[:3, :3] += 2.0 * shear * POISSON / (1.0 - 2.0 * POISSON)
    if dimension == "plane stress":
        expected = np.linalg.inv(expected)
    if dimension != 3:
        kept = [0, 1, 2, 5] if dimension == "axisymmetric" else [0, 1, 5]
        expected = expected[np.ix_(kept, kept)]
    if dimension == "plane stress":
        expected = np.linalg.inv(expected)
    strain = strains(1e-3, notation="voigt", dimension=dimension)
    found = points.update(strain=strain)
    assert np.allclose(found.tangent["stress"]["strain"], expected, rtol=1e-10, atol=1e-6)
    assert np.allclose(found.outputs["stress"], strain @ expected, rtol=1e-10, atol=1e-9)
    assert not found.iterations.any()


@pytest.mark.parametrize("dimension", [3, "plane stress"])
def test_overrides_are_those_of_each_point_and_of_this_update(dimension: Any) -> None:
    strain, yields = strains(6e-3, 3, dimension=dimension), [100.0, 200.0, 300.0]
    points = begun("calibration", 3, dimension=dimension)
    before = points.update(strain=strain, t=1.0)
    found = points.update(strain=strain, t=1.0, param_overrides={YIELD: torch.tensor(yields).double()})
    assert isinstance(found.outputs["stress"], torch.Tensor) and bool(found.converged.all())
    for k in range(3):
        model = references.case("calibration").load()
        model.set_parameter(YIELD, yields[k])
        close(begun(model, 1, dimension=dimension).update(strain=strain[k], t=1.0), found, [k])
    again = points.update(strain=strain, t=1.0)
    close(again, before)
    assert not np.allclose(again.outputs["stress"], found.outputs["stress"])


# -- plane stress ----------------------------------------------------------------------------------------------------


def in_plane_stress(model: Any = "viscoplasticity", n: int = N, **options: Any) -> Points:
    return begun(model, n, dimension="plane stress", **options)


IN_PLANE = strains(4e-3, dimension="plane stress")


class TestPlaneStress:
    def test_points_that_fail_do_so_alone(self) -> None:
        points, broken, others = in_plane_stress(), IN_PLANE.copy(), [0, 2, 3]
        broken[1] = np.nan
        found = points.update(strain=broken, t=1.0)
        assert found.failed == [1] and np.isnan(found.outputs["stress"][1]).all()
        assert np.isnan(found.tangent["stress"]["strain"][1]).all()
        expected = in_plane_stress(n=3).update(strain=IN_PLANE[others], t=1.0)
        close(expected, found, others)
        # The failed one starts from the state in the next update.
        assert not points.update(strain=IN_PLANE, t=1.0).failed

    def test_search_that_does_not_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("neml2_aoti_plugin.points._plane_stress.LIMIT", 1)
        found = in_plane_stress(n=2).update(strain=np.array([[1e-2, 0, 0], [0, 0, 0]]), t=1.0)
        assert found.failed == [0] and found.outcome[0] == Outcome.OUT_OF_ITERATIONS
        assert np.isnan(found.outputs["stress"][0]).all() and found.step_factor == 0.5

    def test_step_that_the_model_cannot_take_is_halved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        points = in_plane_stress()
        expected = points.update(strain=IN_PLANE, t=1.0)
        points.revert()
        solve, calls = points.model.solve, itertools.count(1)

        def failing(inputs: Any, *rest: Any, **options: Any) -> Any:
            """The model, that fails at the second point in the second call, and at what is tried again in the third."""
            point = {2: 1, 3: 0}.get(next(calls))
            if point is not None:
                inputs = {**inputs, "strain": inputs["strain"].clone()}
                inputs["strain"][point] = torch.nan
            return solve(inputs, *rest, **options)

        monkeypatch.setattr(points.model, "solve", failing)
        found = points.update(strain=IN_PLANE, t=1.0)
        assert not found.failed and next(calls) > 4
        close(found, expected)

    def test_a_step_keeps_the_strain_out_of_the_plane(self, tmp_path: Path) -> None:
        points = in_plane_stress()
        points.update(strain=IN_PLANE, t=1.0)
        before = points.trial("strain")
        points.commit()
        assert np.array_equal(points.committed("strain"), before) and np.abs(before[:, 2]).min() > 1e-4
        points.save(tmp_path / "state.npz")
        other = in_plane_stress()
        other.load(tmp_path / "state.npz")
        one, two = (p.update(strain=1.2 * IN_PLANE, t=2.0) for p in (points, other))
        assert np.array_equal(one.outputs["stress"], two.outputs["stress"])

    def test_a_point_whose_plane_derivative_is_not_finite_has_failed(self) -> None:
        model = references.case("promoted").load()
        # Without stiffness any strain through the thickness will do.
        model.set_parameter("promoted.E", torch.tensor([1e5, 0.0], dtype=torch.float64))
        found = in_plane_stress(model, 2).update(strain=np.array([1e-3, 0.0, 0.0]))
        assert found.failed == [1] and list(found.outcome) == [Outcome.CONVERGED, Outcome.NOT_FINITE]
        assert np.isnan(found.outputs["stress"][1]).all() and np.isfinite(found.tangent["stress"]["strain"][0]).all()

    def test_derivatives_take_others(self, tmp_path: Path) -> None:
        derivatives = [["stress", "strain"], ["equivalent_plastic_strain", "t"]]
        model = references.altered("calibration", tmp_path, derivatives=derivatives)
        points, time = in_plane_stress(model), torch.tensor(1.0).double().requires_grad_()
        assert points.pairs == (("stress", "strain"),)
        said = r"in plane stress d\(equiv.*\)/d\(t\) takes d\(equiv.*\)/d\(strain\) too"
        with pytest.raises(DerivativeNotCompiledError, match=said):
            in_plane_stress(model, pairs=[("equivalent_plastic_strain", "t")])
        found = points.update(strain=torch.from_numpy(IN_PLANE), t=time).outputs
        with pytest.raises(DerivativeNotCompiledError, match=said):
            found["equivalent_plastic_strain"].sum().backward()

    def test_what_it_cannot_be_about_is_refused(self, tmp_path: Path) -> None:
        bare = references.altered("viscoplasticity", tmp_path, derivatives=[])
        said = r"stress_strain= names \('stress', 'strain'\).*there are: \[\('plastic_"
        for model, options, words in (
            (bare, {}, r"needs the derivative of the stress by the strain.*-d stress:strain"),
            ("substepping", {"stress_strain": ("stress", "strain")}, said),
            ("viscoplasticity", {"whole": ["stress"]}, r"whole= names 'stress', .*trial\('stress'"),
        ):
            with pytest.raises(InputError, match=words):
                in_plane_stress(model, **options)


# -- what is told ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notation", NOTATIONS)
def test_tensors_with_all_components_in_a_plane_dimension(notation: Any) -> None:
    flat: dict[str, Any] = {"notation": notation, "dimension": "plane strain"}
    strain = tensors(4e-3, dimension="plane strain")
    plane, space = (written(strain, notation, "strain", d) for d in ("plane strain", 3))
    reduced = begun(**flat).update(strain=plane, t=1.0).tangent["stress"]["strain"]
    found = begun(**flat, whole=["stress"]).update(strain=plane, t=1.0)
    expected = begun(notation=notation).update(strain=space, t=1.0)
    close(begun(**flat, whole=["stress", "strain"]).update(strain=space, t=1.0), expected)
    assert np.array_equal(found.outputs["stress"], expected.outputs["stress"])
    tangent = found.tangent["stress"]["strain"]
    rows = tangent[:, :2, :2] if notation == "tensor" else tangent[:, [0, 1, 5]]
    assert tangent.shape[1:] == (*space.shape[1:], *plane.shape[1:]) and np.array_equal(rows, reduced)
    with pytest.raises(UnknownNameError, match=r"whole= .*: unknown 't'"):
        begun(**flat, whole=["t"])


def test_voigt_of_variables_whose_names_do_not_tell(tmp_path: Path) -> None:
    names = {"outputs": {"stress": "sigma"}, "inputs": {"strain": "eps"}}
    model = references.altered("elasticity", tmp_path, boundary_aliases=names)
    with pytest.raises(InputError, match=r"whether Voigt's notation writes '(sigma|eps)' as a strain.*strains=\['"):
        Points(model, 1, notation="voigt")
    with pytest.raises(UnknownNameError, match=r"strains= .*unknown 'epsilon'.* symmetric tensors are: sigma, eps"):
        Points(model, 1, notation="voigt", strains=["epsilon"])
    points = Points(model, 1, notation="voigt", strains=["eps"], stresses=["sigma"])
    shear = YOUNG / (2.0 * (1.0 + POISSON))
    found = points.update(eps=np.array([0, 0, 0, 0, 0, 1e-3]))
    assert np.allclose(found.outputs["sigma"], [[0, 0, 0, 0, 0, shear * 1e-3]])
    # Plane stress finds its pair whatever it is called.
    plane = Points(model, 1, dimension="plane stress")
    assert plane.update(eps=np.array([1e-3, 0.0, 0.0])).outputs["sigma"].shape == (1, 3)
