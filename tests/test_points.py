"""`Points`: steps and their state, against neml2's driver, a law by hand, and calls of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import radial_return
import references
from neml2_aoti_plugin import AOTIError, InputError, Model, Points, UnknownNameError
from neml2_aoti_plugin.model import Outcome
from neml2_aoti_plugin.points import PointsResult
from neml2_aoti_plugin.points._evaluation import step_factor

Array = NDArray[np.float64]

RANDOM = np.random.default_rng(5)
DIRECTIONS = RANDOM.normal(size=(7, 6))


def visco() -> Model:
    return references.case("viscoplasticity").model


def strains(size: float, n: int = 7) -> Array:
    """Strains of several directions, up to a size."""
    found: Array = size * np.linspace(0.2, 1.0, n)[:, None] * DIRECTIONS[:n]
    return found


def begun(model: Model | None = None, n: int = 7, **options: Any) -> Points:
    """Points at their start, where all is zero."""
    points = Points(model or visco(), n, **options)
    points.initial()
    return points


def by_hand(size: float, *times: float) -> Array:
    """Stresses by hand after steps to these times, at strains of a size times the time."""
    hand = radial_return.RadialReturn(7)
    for time in times:
        found = hand.update(strain=strains(size * time), t=time)
        hand.commit()
    stress: Array = found.outputs["stress"]
    return stress


def renamed(folder: Path, inputs: dict[str, str]) -> Model:
    """The viscoplastic model with other names at its boundary."""

    return references.altered("viscoplasticity", folder, boundary_aliases={"inputs": inputs})


class TestRoles:
    def test_from_names(self) -> None:
        points = Points(visco(), 3)
        assert points.driven == ("strain", "t")
        assert points.kept == ("strain~1", "t~1", "equivalent_plastic_strain~1", "stress~1")
        assert points.pairs == (("stress", "strain"),)
        assert "3, notation='mandel', dimension=3" in repr(points)
        assert Points(visco(), np.int64(3)).n == 3

    def test_model_without_state_needs_no_initial(self) -> None:
        points = Points(references.case("elasticity").artifact, 2)
        assert points.driven == ("strain",) and points.kept == ()
        found = points.update(strain=np.eye(6)[:2])
        points.commit()
        assert found.outputs["stress"].shape == (2, 6)

    def test_inputs_that_are_initial_guesses_are_kept_and_given(self) -> None:
        points = Points(references.case("cross_group").model, 2)
        assert points.driven == ("stress", "t")
        assert points.kept == ("branch_strain~1", "t~1", "strain~1")
        points.initial()
        assert points.committed("branch_strain").shape == (2, 3, 6)

    def test_history_under_another_name_is_told(self, tmp_path: Path) -> None:
        model = renamed(tmp_path, {"stress~1": "old_stress"})
        assert Points(model, 1).driven == ("strain", "t", "old_stress")
        points = Points(model, 1, history={"old_stress": "stress~1"})
        assert points.driven == ("strain", "t") and "stress~1" in points.kept
        plain = Points(visco(), 1)
        for one in (points, plain):
            one.initial(stress=[[10.0, 0, 0, 0, 0, 0]] @ np.eye(6))
        found, expected = (one.update(strain=strains(1e-2, 1), t=1.0) for one in (points, plain))
        assert np.allclose(found.outputs["stress"], expected.outputs["stress"], rtol=1e-9)

    def test_what_cannot_be_derived_is_said(self, tmp_path: Path) -> None:
        model = renamed(tmp_path, {"stress~1": "sigma~1"})
        with pytest.raises(
            InputError, match=r"where 'sigma~1' come from.*history=\{'sigma~1': 'VARIABLE~1'\}.*driven="
        ):
            Points(model, 1)
        assert Points(model, 1, driven=["sigma~1"]).driven == ("strain", "t", "sigma~1")
        assert "stress~1" in Points(model, 1, history={"sigma~1": "stress~1"}).kept
        with pytest.raises(InputError, match="says that 'sigma~1' is 'stress', expected a name such as"):
            Points(model, 1, history={"sigma~1": "stress"})
        with pytest.raises(InputError, match=r"'sigma~1' has the base shape \(6,\) and 't' \(\)"):
            Points(model, 1, history={"sigma~1": "t~1"})
        with pytest.raises(UnknownNameError, match=r"history= and driven= .* unknown 'sigma'"):
            Points(model, 1, driven=["sigma"])


class TestSteps:
    @pytest.mark.parametrize(
        ("name", "n", "steps"),
        [
            ("viscoplasticity", 3, 40),
            ("calibration", 3, 40),
            ("cross_group", 2, None),
            # Without a predictor.
            pytest.param("krylov", 2, None, marks=pytest.mark.wide),
            # With histories of two steps.
            pytest.param("chaboche", 2, None, marks=pytest.mark.wide),
        ],
    )
    def test_agree_with_neml2s_driver(self, name: str, n: int, steps: int | None) -> None:
        case = references.case(name)
        points = begun(case.model, n)
        for step in range(1, steps or case.driver.nsteps):
            given = case.driver.result_in[step]
            found = points.update({name: given[name].data.numpy() for name in points.driven})
            assert bool(found.converged.all())
            for output, value in found.outputs.items():
                expected = case.driver.result_out[step][output].data
                assert references.difference(torch.from_numpy(value), expected, 1e-6) < 1e-7
            points.commit()

    def test_histories_of_two_steps(self, tmp_path: Path) -> None:
        # What the model takes for the strain before the step comes from two steps back.
        model = renamed(tmp_path, {"strain~1": "strain~2"})
        points = Points(model, 2)
        assert set(points.kept) == {"strain~1", "strain~2", "t~1", "equivalent_plastic_strain~1", "stress~1"}
        first = strains(1e-3, 2)
        points.initial({"strain~2": first}, strain=2 * first)
        history = [first, 2 * first]
        zero = torch.zeros(2, dtype=torch.float64)
        state = {"stress~1": torch.zeros(2, 6, dtype=torch.float64), "equivalent_plastic_strain~1": zero, "t~1": zero}
        for step in range(1, 5):
            strain, time = (2.0 + step) * first, float(step)
            found = points.update(strain=strain, t=time)
            expected = model.forward(
                {
                    **state,
                    "strain": torch.from_numpy(strain),
                    "strain~2": torch.from_numpy(history[-2]),
                    "t": zero + time,
                }
            )
            assert np.allclose(found.outputs["stress"], expected["stress"], rtol=1e-12)
            points.commit()
            assert np.array_equal(points.committed("strain", 2), history[-1])
            history.append(strain)
            state = {**{f"{name}~1": value for name, value in expected.items()}, "t~1": zero + time}

    def test_many_updates_of_a_step_leave_the_state(self) -> None:
        points, once = begun(), begun()
        for one in (points, once):
            one.update(strain=strains(3e-3), t=1.0)
            one.commit()
        before = points.state()
        for factor in (4.0, 2.0, -1.0, 2.00001):
            points.update(strain=factor * strains(3e-3), t=2.0)
        after = points.state()
        assert all(torch.equal(after.values[name], value) for name, value in before.values.items())
        found, expected = (one.update(strain=2 * strains(3e-3), t=2.0) for one in (points, once))
        assert np.allclose(found.outputs["stress"], expected.outputs["stress"], rtol=1e-9)

    def test_revert_forgets(self) -> None:
        points = begun()
        cold = points.update(strain=strains(3e-3), t=1.0)
        points.revert()
        again = points.update(strain=strains(3e-3), t=1.0)
        assert np.array_equal(cold.iterations, again.iterations)
        assert np.array_equal(cold.outputs["stress"], again.outputs["stress"])
        points.revert()
        with pytest.raises(AOTIError, match="no update since the last commit or revert"):
            points.commit()
        with pytest.raises(AOTIError, match="no update since the last commit or revert"):
            points.trial("stress")

    def test_tangent_on_request(self) -> None:
        case = references.case("calibration")
        points = begun(case.model, pairs=[("equivalent_plastic_strain", "strain"), ("stress", "t")])
        found = points.update(strain=strains(3e-3), t=1.0)
        assert found.tangent["equivalent_plastic_strain"]["strain"].shape == (7, 6)
        assert found.tangent["stress"]["t"].shape == (7, 6)
        assert points.update(strain=strains(3e-3), t=1.0, tangent=False).tangent == {}

    def test_no_points(self) -> None:
        points = begun(n=0)
        found = points.update(strain=np.zeros((0, 6)), t=1.0)
        assert found.outputs["stress"].shape == (0, 6) and found.tangent["stress"]["strain"].shape == (0, 6, 6)
        points.commit()


class TestWarmStart:
    def test_saves_updates(self) -> None:
        points = begun()
        cold = points.update(strain=strains(1e-2), t=1.0)
        warm = points.update(strain=(1 + 1e-6) * strains(1e-2), t=1.0)
        assert int(cold.iterations.max()) >= 5 and int(warm.iterations.max()) <= 2

    def test_makes_no_point_fail(self) -> None:
        case = references.case("viscoplasticity")
        model = case.load()
        model.set_solver_config(**{**case.newton, "ls_max_iters": 1})
        points = begun(model)
        near, far = strains(4e-3), -strains(4e-2)
        enough = int(points.update(strain=near, t=1.0).iterations.max())
        points.update(strain=far, t=1.0)
        # As many updates as the model needs from its own start, and no more.
        model.set_solver_config(**{**case.newton, "miters": enough + 1, "ls_max_iters": 1})
        warm = model.solve(
            {
                "strain": torch.from_numpy(near),
                **{
                    n: torch.zeros(6 if n in ("strain~1", "stress~1") else (), dtype=torch.float64) for n in points.kept
                },
                "t": torch.tensor(1.0, dtype=torch.float64),
                **{name: torch.from_numpy(points.trial(name)) for name in model.output_names},
            }
        )
        assert not bool(warm.converged.all()), "the start is meant to be a bad one"
        found = points.update(strain=near, t=1.0)
        assert bool(found.converged.all())
        assert np.allclose(found.outputs["stress"], by_hand(4e-3, 1.0), atol=1e-6)

    def test_failed_points_start_from_the_state(self) -> None:
        points = begun()
        bad = strains(1e-2)
        bad[3] = np.nan
        points.update(strain=bad, t=1.0)
        found = points.update(strain=strains(1e-2), t=1.0)
        expected = begun().update(strain=strains(1e-2), t=1.0)
        assert bool(found.converged.all())
        assert np.allclose(found.outputs["stress"], expected.outputs["stress"], rtol=1e-9)


class TestFailedPoints:
    @pytest.fixture
    def points(self) -> Points:
        points = begun()
        points.update(strain=strains(3e-3), t=1.0)
        points.commit()
        return points

    @pytest.fixture
    def found(self, points: Points) -> PointsResult:
        strain = strains(6e-3)
        strain[[2, 5]] = np.nan
        return points.update(strain=strain, t=2.0)

    def test_are_told_and_raise_nothing(self, points: Points, found: PointsResult) -> None:
        assert found.failed == [2, 5] and not found.converged[[2, 5]].any()
        assert found.outcome[2] == Outcome.DIVERGED and found.outcome[0] == Outcome.CONVERGED
        assert np.isnan(found.outputs["stress"][[2, 5]]).all()
        assert np.isnan(found.tangent["stress"]["strain"][[2, 5]]).all()
        fine = [0, 1, 3, 4, 6]
        assert np.allclose(found.outputs["stress"][fine], by_hand(3e-3, 1.0, 2.0)[fine], atol=1e-6)
        assert found.step_factor == 0.5

    def test_are_not_committed(self, points: Points, found: PointsResult) -> None:
        before = points.state()
        said = r"2 of 7 points failed.*: 2, 5. Call revert\(\) and give finite values of 'strain', or commit"
        with pytest.raises(AOTIError, match=said):
            points.commit()
        with pytest.raises(AOTIError, match="1 of 7 points failed"):
            points.commit([0, 2])
        assert all(torch.equal(points.state().values[name], value) for name, value in before.values.items())
        # It can still be committed.
        points.commit(found.converged)

    def test_those_of_a_model_that_solves_nothing_too(self) -> None:
        points, strain = Points(references.case("elasticity").model, 3), strains(1e-3, 3)
        strain[1, 4] = np.nan
        found = points.update(strain=strain)
        assert found.failed == [1] and found.step_factor == 0.5
        assert list(found.outcome) == [Outcome.CONVERGED, Outcome.NOT_FINITE, Outcome.CONVERGED]
        with pytest.raises(AOTIError, match="1 of 3 points failed in the last update and can't be committed: 1"):
            points.commit()
        points.commit(found.converged)

    @pytest.mark.parametrize("kind", ["mask", "indices", "torch"])
    def test_others_may_be_committed(self, points: Points, found: PointsResult, kind: str) -> None:
        before = {name: points.committed(name) for name in ("stress", "strain", "t")}
        fine = np.array([0, 1, 3, 4, 6])
        points.commit({"mask": found.converged, "indices": fine, "torch": torch.from_numpy(found.converged)}[kind])
        stress = points.committed("stress")
        assert np.array_equal(stress[fine], found.outputs["stress"][fine])
        assert np.array_equal(points.committed("t"), np.where(found.converged, 2.0, 1.0))
        for name, value in before.items():
            assert np.array_equal(points.committed(name)[[2, 5]], value[[2, 5]])

    def test_those_behind_can_be_taken_along_in_smaller_steps(self, points: Points, found: PointsResult) -> None:
        points.commit(found.converged)
        for time in (1.5, 2.0):
            behind = points.update(strain=strains(3e-3 * time), t=time)
            # The others have no time left, and are not asked.
            assert bool(behind.converged[[2, 5]].all())
            points.commit([2, 5])
        assert np.allclose(points.committed("stress")[[2, 5]], by_hand(3e-3, 1.0, 1.5, 2.0)[[2, 5]], atol=1e-6)

    def test_step_is_cut_until_it_succeeds(self) -> None:
        """The loop that programs write: revert, and go on with the suggested step."""
        case = references.case("viscoplasticity")
        model = case.load()
        model.set_solver_config(**{**case.newton, "miters": 6, "ls_max_iters": 1})
        points = begun(model)
        time, step, cuts = 0.0, 4.0, 0
        times: list[float] = []
        while time < 4.0 - 1e-12:
            step = min(step, 4.0 - time)
            found = points.update(strain=strains(5e-3 * (time + step)), t=time + step)
            if found.failed:
                points.revert()
                cuts += 1
                step *= found.step_factor
                continue
            points.commit()
            time += step
            times.append(time)
            step *= found.step_factor
        assert cuts > 0 and len(times) > 1
        assert np.allclose(points.committed("stress"), by_hand(5e-3, *times), atol=1e-6)


class TestParts:
    """Updates of a part of the points."""

    @pytest.mark.parametrize("dimension", [3, "plane stress"])
    def test_are_the_update_of_the_whole(self, dimension: Any) -> None:
        whole, parts = (begun(dimension=dimension) for _ in range(2))
        mask = np.array([False, True, False, True, True, False, False])
        for step in (1, 2):
            # Two updates of the step, of which the second starts from the first.
            for factor in (1.0, 1.1):
                strain, time = factor * step * strains(4e-3), np.linspace(0.5, 1.0, 7) * step
                strain = strain if dimension == 3 else strain[:, :3]
                expected = whole.update(strain=strain, t=time)
                for chosen, rows in (
                    ([6, 0], [6, 0]),
                    (slice(2, None, 3), [2, 5]),
                    (torch.from_numpy(mask), [1, 3, 4]),
                ):
                    found = parts.update(strain=strain[rows], t=time[rows], points=chosen)
                    assert found.converged.all() and np.array_equal(found.iterations, expected.iterations[rows])
                    assert np.allclose(found.outputs["stress"], expected.outputs["stress"][rows], rtol=1e-11, atol=1e-9)
                    tangent = expected.tangent["stress"]["strain"][rows]
                    assert np.allclose(found.tangent["stress"]["strain"], tangent, rtol=1e-9, atol=1e-4)
                # That of the last part is that of the step.
                assert found.step_factor == expected.step_factor
            for one in (whole, parts):
                one.commit()
            for name, value in whole.state().values.items():
                assert torch.allclose(parts.state().values[name], value, rtol=1e-11, atol=1e-12)

    def test_points_that_were_not_updated_stay_where_they_are(self) -> None:
        points = begun()
        points.update(strain=strains(4e-3)[:3], t=1.0, points=[0, 1, 2])
        assert np.isnan(points.trial("stress")[3:]).all() and np.isfinite(points.trial("stress")[:3]).all()
        with pytest.raises(AOTIError, match="4 of 7 points were not updated"):
            points.commit()
        points.commit(slice(3))
        assert np.array_equal(points.committed("t"), [1, 1, 1, 0, 0, 0, 0])
        assert not points.committed("stress")[3:].any()
        assert np.allclose(points.committed("stress")[:3], by_hand(4e-3, 1.0)[:3], atol=1e-6)

    def test_whole_and_parts_in_one_step(self) -> None:
        points = begun()
        points.update(strain=strains(9e-3)[:2], t=1.0, points=[0, 1])
        with torch.inference_mode():
            points.update(strain=strains(4e-3), t=1.0)
        changed = 2 * strains(4e-3)[4:]
        bad = points.update(strain=np.full((3, 6), np.nan), t=1.0, points=[4, 5, 6])
        assert bad.failed == [0, 1, 2] and bad.step_factor == 0.5
        # A part that is fine does not hide that another one failed.
        assert points.update(strain=strains(4e-3)[:1], t=1.0, points=[0]).step_factor == 0.5
        with pytest.raises(AOTIError, match=r"3 of 7 points failed in the last update .*: 4, 5, 6"):
            points.commit()
        points.update(strain=changed, t=1.0, points=[4, 5, 6])
        points.commit()
        hand = radial_return.RadialReturn(7)
        expected = hand.update(strain=np.concatenate([strains(4e-3)[:4], changed]), t=1.0).outputs["stress"]
        assert np.allclose(points.committed("stress"), expected, atol=1e-6)

    @pytest.mark.parametrize("dimension", [3, "plane stress"])
    def test_parameters_of_each_point(self, dimension: Any) -> None:
        model, young = references.case("promoted").load(), torch.tensor([70e3, 80e3, 210e3]).double()
        model.set_parameter("promoted.E", young)
        strain = strains(1e-3, 3)[:, : 6 if dimension == 3 else 3]
        points = Points(model, 3, dimension=dimension)
        expected = points.update(strain=strain).outputs["stress"]
        found = points.update(strain=strain[[2, 0]], points=[2, 0]).outputs["stress"]
        assert np.allclose(found, expected[[2, 0]], rtol=1e-12)
        model.set_parameter("promoted.E", 1.0)
        given = {"promoted.E": young[[2, 0]]}
        again = points.update(strain=strain[[2, 0]], points=[2, 0], param_overrides=given).outputs["stress"]
        assert np.allclose(again, expected[[2, 0]], rtol=1e-12)

    def test_out_is_of_the_part(self) -> None:
        points, stress = begun(), np.zeros((7, 6))
        for part in (slice(0, 4), slice(4, 7)):
            points.update(strain=strains(4e-3)[part], t=1.0, points=part, out={"stress": stress[part]})
        assert np.array_equal(stress, begun().update(strain=strains(4e-3), t=1.0).outputs["stress"])


class TestStepFactor:
    def test_rule(self) -> None:
        assert step_factor(3, failed=True) == step_factor(0, failed=True) == 0.5
        assert step_factor(0, failed=False) == step_factor(1, failed=False) == 2.0
        assert step_factor(8, failed=False) == 1.0
        assert step_factor(1000, failed=False) == 0.5
        assert step_factor(6, failed=False) > step_factor(7, failed=False) > step_factor(9, failed=False)

    def test_the_hardest_update_of_a_step_counts(self) -> None:
        points = begun()
        first = points.update(strain=strains(1e-2), t=1.0)
        again = points.update(strain=strains(1e-2), t=1.0)
        assert int(again.iterations.max()) == 0 and again.step_factor == first.step_factor < 2.0
        points.commit()
        assert points.update(strain=strains(1e-2), t=1.001).step_factor > first.step_factor
